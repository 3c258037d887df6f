//! LoRA on the fused parameters of experts, as PEFT saves what `target_parameters` names (its `ParamWrapper`).
//!
//! A is `[experts · rank, in]`, expert after expert; B is `[out, rank · experts]`, where the experts of one rank lie side by side.
//! Several parameters of one module are wrapped one in the other, so that the inner ones have `base_layer` in their names.

use half::f16;
use kernels::low_rank::LowRank;
use kernels::shape::Experts;

use super::lora::{HalfPair, incomplete};
use crate::adapter::canonical::SiteDelta;
use crate::adapter::error::AdapterError;
use crate::adapter::peft_config::LoraConfig;
use crate::adapter::sites::{Site, experts_path};
use crate::adapter::tensors::{NamedTensor, Tensors};
use crate::model::spec::{FusedExperts, ModelSpec, Module};

/// The tensors of one wrapper.
pub(super) struct FusedPair<'a> {
    layer: usize,
    a: NamedTensor<'a>,
    b: NamedTensor<'a>,
}

impl<'a> FusedPair<'a> {
    /// Those of a file for this base.
    ///
    /// # Errors
    /// When one of a pair is missing.
    pub fn take_all(tensors: &mut Tensors<'a>, spec: &ModelSpec) -> Result<Vec<Self>, AdapterError> {
        let mut pairs = Vec::new();
        if spec.features.experts.is_none() {
            return Ok(pairs);
        }
        for layer in 0..spec.num_layers {
            let outer = experts_path(layer);
            for path in [format!("{outer}.base_layer"), outer] {
                match ["lora_A.weight", "lora_B.weight"].map(|name| tensors.take_of(&path, name)) {
                    [None, None] => {}
                    [Some(a), Some(b)] => pairs.push(Self { layer, a, b }),
                    [a, _] => {
                        return Err(incomplete(&path, if a.is_none() { "lora_A.weight" } else { "lora_B.weight" }));
                    }
                }
            }
        }
        Ok(pairs)
    }

    pub fn key(&self) -> &'a str {
        self.a.key
    }

    /// What it does to each expert. Which parameter it is for, its shape says: no two have the same.
    ///
    /// # Errors
    /// When the shape is that of neither, or the rank not that of the configuration, or a value is not finite.
    pub fn deltas(&self, config: &LoraConfig, spec: &ModelSpec) -> Result<Vec<(Site, SiteDelta)>, AdapterError> {
        let shapes = (self.a.shape().last(), self.b.shape().first());
        let fused = FusedExperts::ALL.into_iter().find(|fused| {
            let (inputs, outputs) = spec.fused_shape(*fused);
            shapes == (Some(&inputs), Some(&outputs))
        });
        let (Some(fused), Some(Experts { count, .. })) = (fused, spec.features.experts) else {
            let reason = format!("with lora_B of {:?} it fits neither parameter of the experts", self.b.shape());
            return Err(AdapterError::tensor(self.a.key, reason));
        };
        let (inputs, outputs) = spec.fused_shape(fused);
        let path = format!("{}.{}", experts_path(self.layer), fused.name());
        let (rank, scale) = (config.rank(&path)?, config.scale(&path)?);
        self.a.check_rank(0, inputs, rank * count)?;
        self.b.check_rank(1, outputs, rank * count)?;
        let HalfPair { a, b, scale } = HalfPair::of(&self.a, &self.b, scale)?;
        let mut deltas = Vec::new();
        for expert in 0..count {
            let a = &a[expert * rank * inputs..][..rank * inputs];
            let mut rows = b.chunks_exact(rank * count);
            for projection in fused.projections() {
                let module = Module::Expert(expert, *projection);
                let (_, outputs) = spec.module_shape(module);
                let of_expert = |row: &'_ [f16]| row[expert..].iter().step_by(count).copied().collect::<Vec<_>>();
                let b: Vec<f16> = rows.by_ref().take(outputs).flat_map(of_expert).collect();
                let low_rank = Some(LowRank::pack(rank, inputs, outputs, scale, a, &b));
                deltas.push(((self.layer, module), SiteDelta { low_rank, ..SiteDelta::default() }));
            }
        }
        Ok(deltas)
    }
}
