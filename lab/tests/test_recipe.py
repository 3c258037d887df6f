"""Recipes: those that come with the lab, and those that are wrong."""

from pathlib import Path

import pytest
from data_files import REPOSITORY
from recipe import RecipeError, load_recipe

RECIPES = sorted((REPOSITORY / "lab" / "recipes").glob("*.toml"))


def test_every_recipe_is_valid_and_named_as_its_file():
    assert [load_recipe(path).name for path in RECIPES] == [path.stem for path in RECIPES]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "\\[training\\]: .*learning_rate"),
        ('name = "a"\ntask = "b"\npeft = {}\ntraining = {learning_rate = 1}', "there is no `b`"),
        ('name = "a"\ntask = "bash"\npeft = {}\ntraining = {learning_rate = 1, epoch = 2}', "unknown key `epoch`"),
        ('name = "a"\ntask = "bash"\npeft = {}\ntraining = {learning_rate = 1}', "peft_type is missing"),
        ('name = "a"\ntask = 3\npeft = {}\ntraining = {learning_rate = 1}', "there is no `3`"),
        ("name = ", "Invalid value"),
        ("training = 3", "must be a table"),
        ("[training]\nlearning_rate = 1\nepochs = 0", "epochs must be a whole number from 1 on"),
        ("[training]\nlearning_rate = 1\nepochs = true", "epochs must be a whole number from 1 on, not True"),
        ("[training]\nlearning_rate = true", "learning_rate must be above 0"),
        (
            "[training]\nlearning_rate = 1\nearly_stopping_patience = 0",
            "early_stopping_patience must be a whole number from 1 on",
        ),
        (
            '[training]\nlearning_rate = 1\nmetric_for_best_model = "em"',
            "metric_for_best_model must be one of loss, exact_match, not 'em'",
        ),
        ('[training]\nlearning_rate = 1\noptim = "sgd"', "optim must be one of adafactor, adamw_torch, not 'sgd'"),
        (
            "[training]\nlearning_rate = 1\nlr_scheduler_type = true",
            "lr_scheduler_type must be one of linear, cosine, not True",
        ),
        ("[training]\nlearning_rate = 1\naverage_last = true", "average_last must be a whole number from 2 on"),
        ("[training]\nlearning_rate = 1\naverage_last = 1", "average_last must be a whole number from 2 on"),
        ("[training]\nlearning_rate = 1\nwarmup = 1", "warmup must be above 0 and below 1"),
        (
            'name = "a"\ntask = "bash"\nnearest_examples = 0\npeft = {}\ntraining = {learning_rate = 1}',
            "nearest_examples must be a whole number from 1 to 256",
        ),
        (
            'name = "a"\ntask = "fim-python"\nnearest_examples = 3\npeft = {}\ntraining = {learning_rate = 1}',
            "nearest_examples: fim-python has no pairs",
        ),
        (
            'name = "a"\ntask = "bash"\nprefix_text = "b"\npeft = {peft_type = "LORA"}\ntraining = {learning_rate = 1}',
            "prefix_text: only PREFIX_TUNING",
        ),
        (
            'name = "a"\ntask = "bash"\nprefix_text = ""\npeft = {peft_type = "PREFIX_TUNING"}\n'
            "training = {learning_rate = 1}",
            "prefix_text must be a text",
        ),
        (
            'name = "a"\ntask = "bash"\nexport_rank = 4\npeft = {peft_type = "IA3"}\ntraining = {learning_rate = 1}',
            "can be cut",
        ),
        (
            'name = "a"\ntask = "bash"\nexport_rank = true\npeft = {peft_type = "LORA"}\ntraining = {learning_rate = 1}',
            "at most its r",
        ),
        (
            'name = "a"\ntask = "bash"\nexport_rank = 9\npeft = {peft_type = "LORA"}\ntraining = {learning_rate = 1}',
            "at most its r",
        ),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_by_its_field(tmp_path: Path, text: str, message: str):
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)
