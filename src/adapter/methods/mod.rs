//! One file per PEFT method: each turns its tensors into the canonical form.

pub mod lora;
