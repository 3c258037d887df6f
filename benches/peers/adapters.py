"""Random LoRA adapters for a base, each written twice: as a PEFT folder and as llama.cpp's GGUF."""

import json
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

# Name in PEFT's module paths, name in GGUF.
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ALL_LINEAR = tuple(MODULES)
QV = ("self_attn.q_proj", "self_attn.v_proj")
# Of the entries of B: large enough to change the output, small enough to leave it a text.
B_STD = 0.002


@dataclass
class Base:
    architecture: str
    num_layers: int
    # [out, in] by GGUF tensor name
    shapes: dict[str, tuple[int, int]]

    @staticmethod
    def read(path: Path) -> "Base":
        reader = gguf.GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        num_layers = reader.fields[f"{architecture}.block_count"].contents()
        # GGUF lists the fastest dimension first.
        shapes = {t.name: (int(t.shape[1]), int(t.shape[0])) for t in reader.tensors if len(t.shape) == 2}
        return Base(architecture, num_layers, shapes)


def write(base: Base, root: Path, name: str, modules: tuple[str, ...], rank: int, seed: int) -> Path:
    """Writes `root/peft/name/` and `root/name.gguf`; returns the latter. The same arguments give the same bytes."""
    rng = np.random.default_rng(seed)
    alpha = 2 * rank
    writer = gguf.GGUFWriter(root / f"{name}.gguf", base.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    peft = {}
    for layer in range(base.num_layers):
        for module in modules:
            tensor = f"blk.{layer}.{MODULES[module]}.weight"
            num_out, num_in = base.shapes[tensor]
            a = rng.normal(0, num_in**-0.5, (rank, num_in)).astype(np.float16)
            b = rng.normal(0, B_STD, (num_out, rank)).astype(np.float16)
            writer.add_tensor(f"{tensor}.lora_a", a)
            writer.add_tensor(f"{tensor}.lora_b", b)
            path = f"base_model.model.model.layers.{layer}.{module}"
            peft[f"{path}.lora_A.weight"], peft[f"{path}.lora_B.weight"] = a, b
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    folder = root / "peft" / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(peft, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(module.split(".")[1] for module in modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return root / f"{name}.gguf"


def folders(root: Path) -> list[Path]:
    """The PEFT folders in `root`. A lorry that serves them keeps a `.lorry` beside them."""
    return sorted(config.parent for config in root.glob("*/adapter_config.json"))
