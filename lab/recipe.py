"""A recipe: what to train, on what, and how; one TOML file of lab/recipes."""

import hashlib
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tasks import OWN_DATA_SUFFIX, Task, task_named

# In a prompt, as the server has them.
MAX_EXAMPLES = 256
# `exact_match` counts the answers that greedy decoding would give to the token; of equally many, the lower loss is better.
METRICS = ("loss", "exact_match")
# As in Hugging Face's TrainingArguments.
OPTIMIZERS = ("adafactor", "adamw_torch")
SCHEDULES = ("linear", "cosine")


class RecipeError(Exception):
    """A recipe is not written as it should be."""


def _is_whole(value: Any) -> bool:
    """To Python `true` is a number."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Training:
    learning_rate: float
    epochs: int = 5
    batch_size: int = 16
    max_steps: int | None = None
    """The learning rate reaches 0 at the end of the epochs or of these, whichever comes first."""
    max_tokens: int = 192
    """Longer examples, prompt and answer together, are left out."""
    max_examples: int | None = None
    """As many are drawn from the train split; all if there is none."""
    validation_examples: int = 64
    """As many are drawn from the dev split."""
    metric_for_best_model: str = "loss"
    """Of the dev split: which weights are kept, and with which the training may end early; one of `METRICS`."""
    early_stopping_patience: int | None = None
    """The training ends when so many validations one after the other have brought nothing better; there is one an epoch."""
    average_last: int | None = None
    """The mean of the weights after so many of the last epochs is measured too, and kept if it is the best."""
    optim: str = "adafactor"
    """One of `OPTIMIZERS`; AdamW without weight decay."""
    warmup: float = 0.05
    """Part of the training in which the learning rate rises."""
    lr_scheduler_type: str = "linear"
    """How it falls to 0 after that; one of `SCHEDULES`."""
    seed: int = 42

    def __post_init__(self) -> None:
        for name in (
            "epochs", "batch_size", "max_steps", "max_tokens", "max_examples", "validation_examples",
            "early_stopping_patience",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (not _is_whole(value) or value < 1):
                raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")
        for name, known in (
            ("metric_for_best_model", METRICS), ("optim", OPTIMIZERS), ("lr_scheduler_type", SCHEDULES),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if self.average_last is not None and (not _is_whole(self.average_last) or self.average_last < 2):
            raise ValueError(f"average_last must be a whole number from 2 on, not {self.average_last!r}")
        for name, most in (("learning_rate", float("inf")), ("warmup", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
                raise ValueError(f"{name} must be above 0" + (f" and below {most:g}" if name == "warmup" else ""))


@dataclass(frozen=True)
class Recipe:
    name: str
    """The adapter's name."""
    task: str
    """A task of the lab, or a file of one's own; in a recipe its path goes from the recipe's folder."""
    peft: dict[str, Any]
    """The fields of PEFT's configuration, `peft_type` among them."""
    training: Training
    base: str = "qwen2.5-coder:0.5b"
    gguf: str | None = None
    """The base's file, where it is not that of the catalogue."""
    validation: str | None = None
    """The dev split of a file of one's own; every tenth line of it if there is none."""
    bos: bool = False
    """Whether a text begins with the base's BOS token, where the server puts one before it."""
    export_rank: int | None = None
    """LoRA of a higher rank is cut to this one at the end: the best approximation of each site's product."""
    nearest_examples: int | None = None
    """Prompts begin with so many examples, the nearest of the train split, as the server's `icl` with `bm25` gives them."""
    prefix_text: str | None = None
    """Prefix tuning begins with the keys and values of this text, repeated or cut to `num_virtual_tokens`."""
    sha256: str = ""
    """Of the file."""

    def __post_init__(self) -> None:
        try:
            self.data()
        except ValueError as error:
            raise ValueError(f"task: {error}") from error
        if self.nearest_examples is not None:
            if not _is_whole(self.nearest_examples) or not 1 <= self.nearest_examples <= MAX_EXAMPLES:
                raise ValueError(f"nearest_examples must be a whole number from 1 to {MAX_EXAMPLES}")
            if self.data().pairs is None:
                raise ValueError(f"nearest_examples: {self.task} has no pairs of instruction and answer to take them from")
        if not isinstance(self.bos, bool):
            raise ValueError("bos must be true or false")
        if not isinstance(self.peft, dict) or "peft_type" not in self.peft:
            raise ValueError('[peft]: peft_type is missing, such as "LORA"')
        if self.prefix_text is not None:
            if self.peft.get("peft_type") != "PREFIX_TUNING":
                raise ValueError("prefix_text: only PREFIX_TUNING begins with one")
            if not isinstance(self.prefix_text, str) or not self.prefix_text:
                raise ValueError("prefix_text must be a text, and not empty")
        if self.export_rank is None:
            return
        # rsLoRA's scale goes with the root of the rank, DoRA's magnitudes belong to the rank they were trained with.
        plain_lora = self.peft["peft_type"] == "LORA" and not (self.peft.get("use_dora") or self.peft.get("use_rslora"))
        if not plain_lora or not _is_whole(self.export_rank) or not 1 <= self.export_rank <= self.peft.get("r", 8):
            raise ValueError("export_rank: only LoRA that is neither rsLoRA nor DoRA can be cut, and to at most its r")

    @property
    def weights(self) -> str:
        """The base as `gguf_file` finds it."""
        return self.gguf or self.base

    def data(self) -> Task:
        return task_named(str(self.task), self.validation)


def _built(kind: type, table: Any, where: str) -> Any:
    if not isinstance(table, dict):
        raise RecipeError(f"{where}: must be a table")
    known = {field.name for field in fields(kind)}
    if unknown := sorted(table.keys() - known):
        raise RecipeError(f"{where}: unknown key `{unknown[0]}`; known are {', '.join(sorted(known))}")
    try:
        return kind(**table)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}") from error


def load_recipe(path: Path) -> Recipe:
    text = path.read_bytes()
    try:
        table = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    if str(table.get("task")).endswith(OWN_DATA_SUFFIX):
        table["task"] = str(path.parent / table["task"])
        if "validation" in table:
            table["validation"] = str(path.parent / str(table["validation"]))
    table["training"] = _built(Training, table.get("training", {}), f"{path}: [training]")
    return _built(Recipe, table | {"sha256": hashlib.sha256(text).hexdigest()}, str(path))
