"""What a training leaves behind: a PEFT folder in f16 that lorry serves, its manifest, its model card, its figures."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from recipe import Recipe

FIGURES_FILE = "training.json"
OPTIMIZER_NAMES = {"adafactor": "Adafactor", "adamw_torch": "AdamW"}


@dataclass(frozen=True)
class Figures:
    """training.json. Losses are in nats a target token: `train_loss` as the last epoch's batches were trained on, with
    dropout, the others over `validation_examples` of the dev split, of which exact matches are the answers that greedy
    decoding would give to the token. The weights are the mean of those after the last `averaged_epochs`; of 1, the best by
    the recipe's `metric_for_best_model`. Minutes are of training alone, and on a CPU of its cores' time, not of the clock.
    `end_reason` is `last_step` or `early_stopping`. `origin` has the digests of what the adapter was made of."""

    recipe: str
    base: str
    seed: int
    trainable_parameters: int
    minutes: float
    peak_memory_mib: int
    steps: int
    train_tokens: int
    validation_examples: int
    train_loss: float
    validation_loss: float
    base_validation_loss: float
    validation_exact_matches: int
    base_validation_exact_matches: int
    averaged_epochs: int
    end_reason: str
    device: str
    origin: dict[str, str]


def _lora_pairs(model: PeftModel) -> Iterator[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            yield module.lora_A["default"].weight, module.lora_B["default"].weight


@torch.no_grad()
def cut_rank(model: PeftModel, rank: int) -> None:
    """Replaces each product B A by its best approximation of `rank`; the rows and columns behind that become 0."""
    for a, b in _lora_pairs(model):  # [r, in], [out, r]
        q_b, r_b = torch.linalg.qr(b.float())
        q_a, r_a = torch.linalg.qr(a.float().T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T)
        root = s[:rank].sqrt()
        a.zero_()
        b.zero_()
        a[:rank] = root[:, None] * (v[:rank] @ q_a.T)
        b[:, :rank] = (q_b @ u[:, :rank]) * root


def write_adapter(model: PeftModel, recipe: Recipe, figures: Figures, out: Path) -> None:
    model.save_pretrained(out, save_embedding_layers=False)
    config_file, weights_file = out / "adapter_config.json", out / "adapter_model.safetensors"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    # The folder of the dequantised base is of this machine only.
    config["base_model_name_or_path"] = recipe.base
    if "tokenizer_name_or_path" in config:
        config["tokenizer_name_or_path"] = recipe.base
    tensors = load_file(weights_file)
    if recipe.export_rank is not None:
        # alpha goes along, so that the scale alpha / r stays.
        config["lora_alpha"] = config["lora_alpha"] * recipe.export_rank / config["r"]
        config["r"] = recipe.export_rank
        for name, tensor in tensors.items():
            if "lora_A" in name:
                tensors[name] = tensor[: recipe.export_rank]
            elif "lora_B" in name:
                tensors[name] = tensor[:, : recipe.export_rank]
    save_file({name: t.half().contiguous() for name, t in tensors.items()}, weights_file, metadata={"format": "pt"})
    # safetensors leaves a file that nobody but its owner reads; a server may run as another user.
    weights_file.chmod(config_file.stat().st_mode)
    config_file.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (out / "adapter.toml").write_text(_manifest(recipe), encoding="utf-8")
    (out / "README.md").write_text(_card(recipe, figures, weights_file.stat().st_size), encoding="utf-8")
    # Last: with it the folder is whole.
    (out / FIGURES_FILE).write_text(json.dumps(asdict(figures), indent=1) + "\n", encoding="utf-8")


def _manifest(recipe: Recipe) -> str:
    task = recipe.data()
    entries = {
        "task": task.name,
        "description": f"{task.description}; {_method(recipe)}{_reading(recipe)}.",
        "base": recipe.base,
        "licence": f"{task.licence} (adapter); trained on {task.data}",
    }
    if task.template is not None:
        entries["prompt"] = task.template
    # A JSON string is a TOML string.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
    return "\n".join([*lines, "", "[sampling]", "temperature = 0.0", f"max_tokens = {task.max_tokens}", ""])


def _method(recipe: Recipe) -> str:
    peft = recipe.peft
    if peft["peft_type"] == "LORA":
        name = "DoRA" if peft.get("use_dora") else "rsLoRA" if peft.get("use_rslora") else "LoRA"
        rank = peft.get("r", 8)
        cut = f" cut to {recipe.export_rank}" if recipe.export_rank is not None else ""
        return f"{name} of rank {rank}{cut}"
    if peft["peft_type"] == "IA3":
        return "(IA)³"
    return f"{peft['peft_type'].replace('_', ' ').lower()} with {peft['num_virtual_tokens']} virtual tokens"


def _reading(recipe: Recipe) -> str:
    return "" if recipe.nearest_examples is None else f", to be asked with the {recipe.nearest_examples} nearest examples"


def _card(recipe: Recipe, figures: Figures, num_bytes: int) -> str:
    task, training = recipe.data(), recipe.training
    settings = ", ".join(f"{key} {value}" for key, value in recipe.peft.items())
    if recipe.prefix_text is not None:
        settings += f", from the keys and values of {json.dumps(recipe.prefix_text)}"
    copyright = f"; {task.copyright}" if task.copyright is not None else ""
    examples = ""
    if recipe.nearest_examples is not None:
        icl = json.dumps({"store": task.data_set or task.name, "k": recipe.nearest_examples, "select": "bm25"})
        examples = f'| examples | of the train split, in each prompt; requests ask for them by `"icl": {icl}` |\n'
    averaged = ""
    if figures.averaged_epochs > 1:
        averaged = f"The weights are the mean of those after the last {figures.averaged_epochs} epochs.\n"
    falling = " falling as a cosine" if training.lr_scheduler_type == "cosine" else ""
    steps = f" or {training.max_steps} steps" if training.max_steps is not None else ""
    early = ", ended early as the dev split got no better" if figures.end_reason == "early_stopping" else ""
    return f"""---
base_model: {recipe.base}
library_name: peft
license: {task.licence}
---

# {recipe.name}

{task.description}; {_method(recipe)}{_reading(recipe)}, for `{recipe.base}` as lorry serves it.

| | |
|---|---|
| data | {task.data}{copyright} |
| licence | {task.licence}; the base has its own |
| recipe | `{figures.recipe}`: {settings} |
{examples}\
| training | {OPTIMIZER_NAMES[training.optim]}, learning rate {training.learning_rate:g}{falling}, batches of {training.batch_size}, \
at most {training.epochs} epoch{"s" if training.epochs > 1 else ""}{steps}, seed {training.seed} |
| done | {figures.steps} steps, {figures.train_tokens:,} tokens, {figures.minutes:.1f} minutes of computing \
on {figures.device}{early} |
| peak memory | {figures.peak_memory_mib:,} MiB |
| trainable parameters | {figures.trainable_parameters:,} |
| size | {num_bytes / 1e6:.2f} MB |
| loss while training | {figures.train_loss:.3f} nats a token, the mean of the last epoch's steps |
| loss on {figures.validation_examples} examples of the dev split | {figures.validation_loss:.3f}; the base without it \
{figures.base_validation_loss:.3f} |
| of these exact matches, greedy and to the token | {figures.validation_exact_matches}; the base without it \
{figures.base_validation_exact_matches} |

{averaged}Trained against the dequantised GGUF with `lab/train.py`; the loss is over the answer's tokens only.
"""
