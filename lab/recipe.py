"""A recipe: what to train, on what, and how; one TOML file of lab/recipes."""

import hashlib
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tasks import TASKS


class RecipeError(Exception):
    """A recipe is not written as it should be."""


@dataclass(frozen=True)
class Training:
    learning_rate: float
    epochs: int = 5
    batch_size: int = 16
    max_minutes: float = 60.0
    """Of computing. The learning rate reaches 0 at the end of the epochs or of these, whichever comes first."""
    max_tokens: int = 192
    """Longer examples, prompt and answer together, are left out."""
    max_examples: int | None = None
    """As many are drawn from the train split; all if there is none."""
    validation_examples: int = 64
    """As many are drawn from the dev split."""
    warmup: float = 0.05
    """Part of the training in which the learning rate rises."""
    seed: int = 42


@dataclass(frozen=True)
class Recipe:
    name: str
    """The adapter's name."""
    task: str
    peft: dict[str, Any]
    """The fields of PEFT's configuration, `peft_type` among them."""
    training: Training
    base: str = "qwen2.5-coder:0.5b"
    export_rank: int | None = None
    """LoRA of a higher rank is cut to this one at the end: the best approximation of each site's product."""
    prefix_text: str | None = None
    """Prefix tuning begins with the keys and values of this text."""
    sha256: str = ""
    """Of the file: a run is only resumed with the recipe it began with."""


def _built(kind: type, table: dict[str, Any], where: str) -> Any:
    known = {field.name for field in fields(kind)} - {"sha256"}
    if unknown := sorted(table.keys() - known):
        raise RecipeError(f"{where}: unknown key `{unknown[0]}`; known are {', '.join(sorted(known))}")
    try:
        return kind(**table)
    except TypeError as error:
        raise RecipeError(f"{where}: {error}") from error


def load_recipe(path: Path) -> Recipe:
    text = path.read_bytes()
    try:
        table = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    table["training"] = _built(Training, table.get("training", {}), f"{path}: [training]")
    recipe = _built(Recipe, table, str(path))
    if recipe.task not in TASKS:
        raise RecipeError(f"{path}: task: there is no `{recipe.task}`; known are {', '.join(TASKS)}")
    if "peft_type" not in recipe.peft:
        raise RecipeError(f'{path}: [peft]: peft_type is missing, such as "LORA"')
    if recipe.export_rank is not None and recipe.peft.get("use_dora"):
        raise RecipeError(f"{path}: export_rank: DoRA's magnitudes belong to the rank it was trained with")
    return Recipe(**{**vars(recipe), "sha256": hashlib.sha256(text).hexdigest()})
