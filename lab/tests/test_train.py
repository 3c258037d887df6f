"""Trainings: the cut of a rank, resuming, and from a recipe to a served answer."""

import json
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from adapter_folder import cut_rank
from base import MissingModel, gguf_file
from data_files import REPOSITORY
from encoding import encode
from nearest import Nearest
from recipe import Recipe, RecipeError, load_recipe
from tasks import INSTRUCTION_PROMPT
from train import Measured, Run, Trainee, TrainingError, main, passes

sys.path.insert(0, str(REPOSITORY / "tests" / "clients"))

from lorry_server import BINARY, serving  # noqa: E402

SMOKE_RECIPE = REPOSITORY / "lab" / "recipes" / "smoke.toml"
OWN_EXAMPLES = REPOSITORY / "config" / "icl" / "python.jsonl"
SMOKE_BASE = "smollm2:135m"


@pytest.fixture
def smoke_base():
    try:
        return gguf_file(SMOKE_BASE)
    except MissingModel as missing:
        pytest.skip(f"skipped: {missing}")


def _written(folder: Path, recipe: str) -> Path:
    path = folder / "smoke.toml"
    path.write_text(recipe.replace("../../config", str(REPOSITORY / "config")), encoding="utf-8")
    return path


def test_a_product_of_low_rank_survives_the_cut_to_it():
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(12, 20)), LoraConfig(r=6, target_modules=["0"]))
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(torch.randn(6, 2) @ torch.randn(2, 12))
        b.normal_()
    product = (b @ a).detach().clone()
    cut_rank(model, 2)
    torch.testing.assert_close(b[:, :2] @ a[:2], product)
    assert not a[2:].any()
    assert not b[:, 2:].any()


def test_rows_pass_by_length_in_pieces_that_fit():
    rows = [([1] * prompt, [2] * target) for prompt, target in [(30, 10), (3, 1), (90, 30), (0, 5), (3, 2)]]
    for num_tokens, expected in [(1, [1] * 5), (12, [2, 1, 1, 1]), (15, [3, 1, 1]), (160, [4, 1]), (600, [5])]:
        pieces = list(passes(rows, num_tokens))
        assert [len(piece) for piece in pieces] == expected
        assert [row for piece in pieces for row in piece] == sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    assert list(passes([], 10)) == []


def test_a_batch_has_the_same_gradients_in_any_number_of_passes(
    tmp_path: Path, smoke_base: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("train.has_fast_bf16", lambda _: False)
    run = Run(load_recipe(_written(tmp_path, SMOKE_RECIPE.read_text(encoding="utf-8"))), tmp_path, torch.device("cpu"))
    batch = [*sorted(run.rows, key=lambda row: len(row[1]))[::10], ([], run.rows[0][0])]
    gradients = []
    for num_tokens in (100_000, 60, 1):
        monkeypatch.setattr("train.PASS_TOKENS", {"cpu": num_tokens})
        loss = run.trainee.loss(batch, backward=True)
        gradients.append([torch.tensor(loss), *(p.grad.clone() for p in run.trainee.trained.values())])
        run.optimizer.zero_grad()
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0][1:])
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0], rtol=1e-3, atol=1e-5)


def test_a_resumed_training_ends_as_one_that_was_not_interrupted(tmp_path: Path, smoke_base: Path):
    text = SMOKE_RECIPE.read_text(encoding="utf-8")
    for old, new in [
        ("lora_alpha = 8", "lora_alpha = 8\nlora_dropout = 0.1"),
        ("epochs = 3", "epochs = 1"),
        ("max_examples = 64", "max_examples = 8\nmax_tokens = 48"),
        ("batch_size = 8", "batch_size = 2"),
        ("validation_examples = 8", "validation_examples = 2"),
    ]:
        assert old in text
        text = text.replace(old, new)
    recipe = load_recipe(_written(tmp_path, text))

    whole = Run(recipe, tmp_path / "whole", torch.device("cpu"))
    whole.train()

    first = Run(recipe, tmp_path / "parts", torch.device("cpu"))
    first.state["base_loss"] = 0.0
    first.trainee.model.train()
    batches = first.batches()
    for _ in range(2):
        first.step(next(batches))
    first.save()
    second = Run(recipe, tmp_path / "parts", torch.device("cpu"))
    second.train()

    assert second.state["step"] == whole.state["step"] == 4
    assert second.state["losses"] == pytest.approx(whole.state["losses"], rel=1e-4)
    for name, weights in whole.trainee.weights().items():
        torch.testing.assert_close(second.trainee.weights()[name], weights, rtol=1e-3, atol=1e-5)

    second.write()
    with pytest.raises(TrainingError, match="holds a trained adapter"):
        second.has_ended()


@pytest.mark.parametrize(("of_mean", "averaged_epochs"), [(0.5, 2), (1.5, 1)], ids=["better", "worse"])
def test_the_mean_of_the_last_epochs_is_kept_where_it_is_better(
    tmp_path: Path, smoke_base: Path, monkeypatch: pytest.MonkeyPatch, of_mean: float, averaged_epochs: int
):
    text = SMOKE_RECIPE.read_text(encoding="utf-8")
    for old, new in [
        ("epochs = 3", "epochs = 4"),
        # The last epoch is half of one.
        ("max_steps = 8", "max_steps = 5\naverage_last = 2"),
        ("batch_size = 8", "batch_size = 2"),
        ("max_examples = 64", "max_examples = 4"),
    ]:
        assert old in text
        text = text.replace(old, new)
    recipe = load_recipe(_written(tmp_path, text))
    run = Run(recipe, tmp_path / "out", torch.device("cpu"))
    measured, after_epochs = iter([3.0, 2.0, 1.8, 1.0, of_mean]), []

    def measure(*_: Any) -> Measured:
        after_epochs.append(run.trainee.weights())
        return Measured(next(measured), 0)

    monkeypatch.setattr(run.trainee, "measure", measure)
    run.train()
    base, first, second, third, mean = after_epochs
    for name, weights in mean.items():
        torch.testing.assert_close(weights, (second[name] + third[name]) / 2)
    kept = mean if averaged_epochs == 2 else third
    assert all(torch.equal(weights, kept[name]) for name, weights in run.trainee.weights().items())
    assert any((weights != third[name]).any() for name, weights in second.items())
    run.write()
    figures = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert (figures["averaged_epochs"], figures["validation_loss"]) == (averaged_epochs, min(of_mean, 1.0))
    assert ("mean of those after the last 2 epochs" in (tmp_path / "out" / "README.md").read_text()) == (of_mean < 1)

    too_many = replace(recipe, training=replace(recipe.training, average_last=4))
    with pytest.raises(RecipeError, match="average_last: there are 3 epochs"):
        Run(too_many, tmp_path, torch.device("cpu"))


def _epochs_of_one_step(folder: Path, *training: str) -> Recipe:
    """Six of them, with further keys of `[training]`."""
    text = SMOKE_RECIPE.read_text(encoding="utf-8")
    for old, new in [
        ("epochs = 3", "\n".join(["epochs = 6", *training])),
        ("batch_size = 8", "batch_size = 2"),
        ("max_examples = 64", "max_examples = 2"),
    ]:
        assert old in text
        text = text.replace(old, new)
    return load_recipe(_written(folder, text))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("linear", [2, 2, 4, 6, 4, 2]), ("cosine", [2, 2, 4, 6, 4.5, 1.5])],
    ids=["linear", "cosine"],
)
def test_the_learning_rate_rises_and_falls_as_the_recipe_says(
    tmp_path: Path, smoke_base: Path, schedule: str, rates: list[float]
):
    recipe = _epochs_of_one_step(tmp_path, "warmup = 0.5", 'optim = "adamw_torch"', f'lr_scheduler_type = "{schedule}"')
    recipe = replace(recipe, training=replace(recipe.training, learning_rate=6e-3))
    applied = []
    run = Run(recipe, tmp_path / "out", torch.device("cpu"))
    run.trainee.measure = lambda _: Measured(1.0, 0)
    run.report = lambda **line: applied.append(run.optimizer.param_groups[0]["lr"]) if line["type"] == "step" else None
    run.train()
    assert applied == pytest.approx([rate * 1e-3 for rate in rates])
    run.write()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("AdamW, learning rate 0.006 falling as a cosine" in card) == (schedule == "cosine")


class Killed(Exception):
    pass


def _run(
    recipe: Recipe, out: Path, measured: list[Measured], killed_at: tuple[str, int] | None = None
) -> tuple[Run, list[dict[str, Any]]]:
    """A run that has ended, or was killed when it told of that, and what it told; `measured` has the base's and then that of
    each step."""
    told = []

    def report(**line: Any) -> None:
        told.append(line)
        if (line["type"], line["step"]) == killed_at:
            raise Killed

    run = Run(recipe, out, torch.device("cpu"), report)
    run.trainee.measure = lambda _: measured[run.state["step"]]
    try:
        run.train()
    except Killed:
        assert killed_at is not None
    else:
        assert killed_at is None
    return run, told


def _losses(*losses: float) -> list[Measured]:
    return [Measured(loss, 0) for loss in losses]


@pytest.mark.parametrize(
    ("patience", "metric", "measured", "last_step", "best_step"),
    [
        (None, "loss", _losses(3.0, 2.0, 1.5, 1.6, 1.7, 1.8, 1.9), 6, 2),
        (1, "loss", _losses(3.0, 2.0, 1.5, 1.5, 1.0, 1.0, 1.0), 3, 2),
        (2, "loss", _losses(3.0, 2.0, 1.5, 1.6, 1.4, 1.5, 1.6), 6, 4),
        (2, "loss", _losses(3.0, 4.0, 5.0, 6.0, 1.0, 1.0, 1.0), 3, 1),
        (2, "loss", _losses(3.0, float("nan"), 2.0, float("nan"), 2.1, 1.0, 1.0), 4, 2),
        # What answers are worth, told by two: more of them exact, or as many and a lower loss.
        (2, "exact_match", [Measured(3 + n, n // 2) for n in range(7)], 6, 6),
        (1, "exact_match", [*_losses(3.0), *(Measured(loss, 1) for loss in (2.0, 1.5, 1.6)), *_losses(0, 0, 0)], 3, 2),
        (2, "exact_match", [*_losses(3.0), Measured(2.0, 1), *_losses(1.0, 0.5, 0.2, 0.1, 0.1)], 3, 1),
    ],
    ids=["unasked", "at-once", "patient", "never-below-the-base", "not-finite", "exact", "as-exact", "less-exact"],
)
def test_a_training_ends_when_validations_bring_nothing_better(
    tmp_path: Path, smoke_base: Path, patience: int | None, metric: str, measured: list[Measured], last_step: int,
    best_step: int,
):  # fmt: skip
    asked = [] if patience is None else [f"early_stopping_patience = {patience}"]
    recipe = _epochs_of_one_step(tmp_path, f'metric_for_best_model = "{metric}"', *asked)
    run, told = _run(recipe, tmp_path / "out", measured)
    reason = "early_stopping" if last_step < 6 else "last_step"
    assert told[-1] == {"type": "end", "step": last_step, "reason": reason}
    assert [line["step"] for line in told if line["type"] == "validation"] == list(range(last_step + 1))
    run.write()
    figures = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert (figures["steps"], figures["end_reason"]) == (last_step, reason)
    kept = measured[best_step]
    assert (figures["validation_loss"], figures["validation_exact_matches"]) == (kept.loss, kept.exact_matches)
    assert figures["base_validation_loss"] == measured[0].loss
    assert ("ended early" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")) == (last_step < 6)


@pytest.mark.parametrize(
    ("optim", "killed_at"),
    [
        ("adafactor", ("step", 4)),
        ("adafactor", ("validation", 4)),
        ("adafactor", ("step", 5)),
        ("adafactor", ("end", 5)),
        ("adamw_torch", ("step", 4)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"at-{value[0]}-{value[1]}",
)
def test_a_training_that_was_killed_ends_early_at_the_same_step(
    tmp_path: Path, smoke_base: Path, monkeypatch: pytest.MonkeyPatch, optim: str, killed_at: tuple[str, int]
):
    monkeypatch.setattr("train.CHECKPOINT_SECONDS", -1)
    recipe = _epochs_of_one_step(tmp_path, "early_stopping_patience = 3", "average_last = 3", f'optim = "{optim}"')
    # The last is that of the mean, after step 5.
    measured = _losses(3.0, 2.0, 1.5, 1.6, 1.7, 1.8)
    whole, _ = _run(recipe, tmp_path / "whole", measured)
    killed, _ = _run(recipe, tmp_path / "parts", measured, killed_at)
    resumed, told = _run(recipe, tmp_path / "parts", measured)
    assert told[0]["step"] == killed.state["step"] - (killed_at[0] != "end")
    assert told[-1] == {"type": "end", "step": 5, "reason": "early_stopping"}
    assert resumed.state["step"] == whole.state["step"] == 5
    assert resumed.state["losses"] == pytest.approx(whole.state["losses"], rel=1e-4)
    for name, weights in whole.trainee.weights().items():
        torch.testing.assert_close(resumed.trainee.weights()[name], weights, rtol=1e-3, atol=1e-5)


def test_exact_matches_are_what_greedy_decoding_gives(smoke_base: Path, monkeypatch: pytest.MonkeyPatch):
    # The one row alone and the padded batch are rounded alike.
    monkeypatch.setattr("train.has_fast_bf16", lambda _: False)
    trainee = Trainee(load_recipe(SMOKE_RECIPE), torch.device("cpu"))
    rows = []
    for prompt, num_tokens in [("def add(a, b):\n", 6), ("The capital of France is", 3), ("1, 2, 3,", 9)]:
        ids = trainee.tokenizer(prompt).input_ids
        answer: list[int] = []
        for _ in range(num_tokens):
            with torch.no_grad():
                hidden = trainee.model(input_ids=torch.tensor([ids + answer])).logits[0, -1]
            answer.append(int(trainee.head(hidden).argmax()))
        rows.append((ids, answer))
    assert trainee.measure(rows).exact_matches == 3
    (ids, answer), *others = rows
    for wrong in ([*answer[:-1], answer[-1] + 1], [answer[0] + 1, *answer[1:]], [token + 1 for token in answer]):
        for num_tokens in (1000, 1):
            monkeypatch.setattr("train.PASS_TOKENS", {"cpu": num_tokens})
            measured = trainee.measure([others[0], (ids, wrong), others[1]])
            assert measured.exact_matches == 2
            assert measured.loss == pytest.approx(trainee.loss([*others, (ids, wrong)]), rel=1e-4)


def test_a_checkpoint_of_other_data_another_recipe_or_another_base_is_not_gone_on_from(
    tmp_path: Path, smoke_base: Path, monkeypatch: pytest.MonkeyPatch
):
    text = SMOKE_RECIPE.read_text(encoding="utf-8").replace("../../config/icl/python.jsonl", "mine.jsonl")
    pairs = OWN_EXAMPLES.read_text(encoding="utf-8").splitlines(keepends=True)
    other_base = tmp_path / "other.gguf"
    other_base.write_bytes(b"GGUF")

    def run(recipe: str = text, lines: list[str] = pairs, **settings: bool) -> Run:
        (tmp_path / "mine.jsonl").write_text("".join(lines), encoding="utf-8")
        return Run(load_recipe(_written(tmp_path, recipe)), tmp_path / "out", torch.device("cpu"), **settings)

    first = run()
    first.state["step"] = 2
    first.save()
    # Of what is validated on, too: its losses are not to be compared.
    shorter, other_dev = pairs[:-1], [pairs[0].replace("[", "("), *pairs[1:]]
    assert other_dev != pairs
    longer_run = text.replace("epochs = 3", "epochs = 4")
    for changed, what in [
        (run(lines=shorter), "another data"),
        (run(lines=other_dev), "another data"),
        (run(recipe=longer_run), "another recipe"),
        (run(recipe=longer_run, lines=shorter), "another recipe and another data"),
    ]:
        with pytest.raises(TrainingError, match=f"checkpoint.pt is of {what}: remove it"):
            changed.resume()
        assert changed.state["step"] == 0
    anew = run(lines=shorter, begins_anew=True)
    anew.resume()
    assert anew.state["step"] == 0

    same = run()
    same.resume()
    assert same.state["step"] == 2
    with monkeypatch.context() as patched:
        patched.setattr("train.gguf_file", lambda _: other_base)
        with pytest.raises(TrainingError, match="checkpoint.pt is of another base: remove it"):
            run().resume()
    monkeypatch.setattr("train.version", lambda package: f"another {package}")
    with pytest.raises(TrainingError, match="checkpoint.pt is of another trainer: remove it"):
        run().resume()


def test_a_supervised_training_takes_no_adapter_for_its_own_that_is_of_something_else(
    tmp_path: Path, smoke_base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    text = SMOKE_RECIPE.read_text(encoding="utf-8")
    for old, new in [
        ("../../config/icl/python.jsonl", "mine.jsonl"),
        ("max_steps = 8", "max_steps = 1"),
        ("batch_size = 8", "batch_size = 1"),
        ("validation_examples = 8", "validation_examples = 1"),
    ]:
        assert old in text
        text = text.replace(old, new)
    pairs = OWN_EXAMPLES.read_text(encoding="utf-8").splitlines(keepends=True)
    other_base = tmp_path / "other.gguf"
    other_base.write_bytes(b"GGUF")
    figures = tmp_path / "out" / "training.json"

    def trains(recipe: str = text, lines: list[str] = pairs) -> str:
        """What it says, of a training that has gone well."""
        (tmp_path / "mine.jsonl").write_text("".join(lines), encoding="utf-8")
        path = _written(tmp_path, recipe)
        monkeypatch.setattr("sys.argv", ["train.py", str(path), "--out", str(tmp_path / "out"), "--progress"])
        capfd.readouterr()
        assert main() == 0
        out = capfd.readouterr().out
        assert figures.is_file() and ('"type": "end"' in out) == ("training begins anew" in out or is_first)
        return out

    is_first = True
    trains()
    is_first = False
    assert trains() == ""
    assert "training.json is of another data: training begins anew" in trains(lines=pairs[1:])
    assert "is of another recipe and another data:" in trains(recipe=text.replace("epochs = 3", "epochs = 4"))
    # As a power cut leaves it, and as it was written before it said of what it is.
    for cut_off in ("", '{"steps": 1}'):
        figures.write_text(cut_off, encoding="utf-8")
        assert "is of another recipe and another data and another base and another trainer:" in trains()
    assert trains() == ""
    monkeypatch.setattr("train.version", lambda package: f"another {package}")
    assert "is of another trainer:" in trains()
    monkeypatch.setattr("train.gguf_file", lambda _: other_base)
    assert "is of another base:" in trains()
    assert trains() == ""


@pytest.mark.parametrize(
    ("peft", "tensor"),
    [
        ('peft_type = "LORA"\nuse_rslora = true\nr = 4\ntarget_modules = ["v_proj"]', "lora_A"),
        ('peft_type = "LORA"\nuse_dora = true\nr = 4\ntarget_modules = ["v_proj"]', "lora_magnitude_vector"),
        ('peft_type = "IA3"\ntarget_modules = ["v_proj", "down_proj"]\nfeedforward_modules = ["down_proj"]', "ia3_l"),
        ('peft_type = "PROMPT_TUNING"\nnum_virtual_tokens = 4', "prompt_embeddings"),
        ('peft_type = "PREFIX_TUNING"\nnum_virtual_tokens = 4', "prompt_embeddings"),
    ],
    ids=["rslora", "dora", "ia3", "prompt", "prefix"],
)
def test_every_other_method_that_lorry_serves_can_be_trained(tmp_path: Path, smoke_base: Path, peft: str, tensor: str):
    settings = SMOKE_RECIPE.read_text(encoding="utf-8")
    for old, new in [
        ("max_steps = 8", "max_steps = 1"),
        ("batch_size = 8", "batch_size = 1"),
        ("validation_examples = 8", "validation_examples = 1"),
    ]:
        assert old in settings
        settings = settings.replace(old, new)
    before, _, after = settings.partition("[peft]\n")
    path = _written(tmp_path, f"{before}[peft]\n{peft}\n\n[training]{after.partition('[training]')[2]}")
    run = Run(load_recipe(path), tmp_path / "out", torch.device("cpu"))
    untrained = run.trainee.weights()
    run.train()
    run.write()
    assert any((weights != untrained[name]).any() for name, weights in run.trainee.weights().items())
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(tensor in name for name in saved)
    assert all(weights.dtype == torch.float16 and weights.isfinite().all() for weights in saved.values())


@pytest.mark.parametrize("num_virtual_tokens", [2, 5, 12])
def test_a_prefix_begins_with_a_text_as_often_as_it_takes(
    smoke_base: Path, monkeypatch: pytest.MonkeyPatch, num_virtual_tokens: int
):
    # bf16 rounds more than what is compared.
    monkeypatch.setattr("train.has_fast_bf16", lambda _: False)
    recipe = load_recipe(SMOKE_RECIPE)
    of = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": num_virtual_tokens}
    trainee = Trainee(replace(recipe, peft=of, prefix_text="Generate Python code."), torch.device("cpu"))
    ids = trainee.tokenizer("Generate Python code.").input_ids
    assert 2 < len(ids) < 12
    # What follows is read as behind the text itself.
    row = ([9, 8, 7], [6, 5])
    behind = trainee.loss([row])
    with trainee.model.disable_adapter():
        text = (ids * num_virtual_tokens)[:num_virtual_tokens]
        expected = trainee.loss([(text + row[0], row[1])])
    torch.testing.assert_close(behind, expected, rtol=1e-3, atol=1e-3)


def test_prompts_with_examples_are_those_that_the_server_makes(tmp_path: Path, smoke_base: Path):
    """Byte for byte and token for token: of what is held out, and of what is trained on but for what tells its answer."""
    if not BINARY.is_file():
        pytest.skip(f"skipped: {BINARY} is not built: make build")
    pairs = [(row["instruction"], row["code"]) for row in map(json.loads, OWN_EXAMPLES.read_text().splitlines())]
    # Words as no other has them, equals, and answers to one question.
    pairs += [(f"print {name} of the list", f"print({name})\n") for name in ("xs", "ys", "zs")]
    pairs += [("reverse the list `xs`", code) for code in ("xs[::-1]", "list(reversed(xs))")]
    pairs += [
        ("用pandas读取csv文件", "pd.read_csv(path)"),
        ("对列表xs排序", "sorted(xs)"),
        ("sort the listOfHTTPServers2 by {name}", "sorted(servers, key=lambda s: s['{name}'])"),
        ("सूची उलटें", "xs[::-1]"),
        ("½ of the Ⓐ list, don't", "xs[: len(xs) // 2]"),
    ]
    held_out = [
        ("sort the list of httpServers", "a"), ("反转列表xs", "b"), ("सूची दिखाएं, print the list", "c"), ("--", "d"),
        ("print { and } of the list twice, of the list", "e"), ("read İstanbul.CSV with pandas", "f"),
    ]  # fmt: skip
    stores, adapter, k = tmp_path / "stores", tmp_path / "adapters" / "reads", 3
    stores.mkdir()
    for file, rows in [(stores / "mine.jsonl", pairs), (tmp_path / "held_out.jsonl", held_out)]:
        file.write_text("".join(json.dumps({"instruction": i, "code": c}) + "\n" for i, c in rows), encoding="utf-8")
    text = SMOKE_RECIPE.read_text(encoding="utf-8")
    for old, new in [
        ('task = "../../config/icl/python.jsonl"', 'task = "stores/mine.jsonl"\nvalidation = "held_out.jsonl"\n'
         f"nearest_examples = {k}"),
        ("max_steps = 8", "max_steps = 2\nmax_tokens = 512"),
    ]:  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    run = Run(load_recipe(_written(tmp_path, text)), adapter, torch.device("cpu"))
    run.train()
    run.write()
    assert "3 nearest examples" in (adapter / "adapter.toml").read_text(encoding="utf-8")
    assert '"icl": {"store": "mine", "k": 3, "select": "bm25"}' in (adapter / "README.md").read_text(encoding="utf-8")

    def asked(path: str, instruction: str, k: int) -> dict[str, Any]:
        icl = {"store": "mine", "k": k, "select": "bm25"}
        body = {"model": "reads", "messages": [{"role": "user", "content": instruction}], "icl": icl}
        body |= {"max_tokens": 4} if path.startswith("/v1") else {}
        request = urllib.request.Request(server.url + path, json.dumps(body).encode())
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    nearest, task = Nearest(pairs, k), run.recipe.data()
    environment = {"LORRY__ICL__DIR": str(stores)}
    with serving("--model", SMOKE_BASE, "--adapters", adapter.parent, environment=environment) as server:
        for example in task.dev():
            with_examples = nearest.before(example)
            assert asked("/apply-template", example.instruction, k)["prompt"] == with_examples.prompt
            (row,) = encode([with_examples], run.trainee.tokenizer, 512, bos=False)
            assert asked("/tokenize", example.instruction, k)["tokens"] == row[0]
            assert row in run.dev
        for example in task.train():
            # The server has the example too, and all others.
            prompt = asked("/apply-template", example.instruction, len(pairs))["prompt"]
            blocks = {pair: INSTRUCTION_PROMPT.format(pair[0]) + pair[1] + "\n\n" for pair in pairs}
            ranked = sorted(blocks, key=lambda pair: prompt.index(blocks[pair]))
            assert prompt == "".join(blocks[pair] for pair in ranked) + example.prompt
            others = [pair for pair in ranked if pair[0] != example.instruction and pair[1] != example.target]
            with_examples = nearest.before(example)
            assert with_examples.prompt == "".join(blocks[pair] for pair in others[-k:]) + example.prompt
            assert encode([with_examples], run.trainee.tokenizer, 512, bos=False)[0] in run.rows
        reply = asked("/v1/chat/completions", held_out[0][0], k)
        assert reply["icl"]["k"] == k and reply["adapter"]["name"] == "reads"


def test_a_trained_adapter_is_served_and_evaluated(tmp_path: Path, smoke_base: Path):
    """`make lab-smoke`."""
    if not BINARY.is_file():
        pytest.skip(f"skipped: {BINARY} is not built: make build")
    lab, adapter = REPOSITORY / "lab", tmp_path / "adapters" / "smoke"
    subprocess.run([sys.executable, lab / "train.py", SMOKE_RECIPE, "--out", adapter], check=True)
    figures = json.loads((adapter / "training.json").read_text(encoding="utf-8"))
    assert figures["validation_loss"] < figures["base_validation_loss"]

    with serving("--model", SMOKE_BASE, "--adapters", adapter.parent) as server:
        command = [sys.executable, lab / "evaluate.py", OWN_EXAMPLES, "--url", f"{server.url}/v1", "--limit", "4"]
        arms = ["--arm", f"base={SMOKE_BASE}", "--arm", f"tuned={SMOKE_BASE}-smoke", "--out", tmp_path / "run"]
        subprocess.run([*command, *arms], check=True)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text(encoding="utf-8"))
    assert {(score["arm"], score["adapter"]) for score in scores} == {("base", None), ("tuned", "smoke")}
