"""Trains an adapter as a recipe says, against the GGUF that lorry serves.

The loss is over the answers' tokens, and only their positions go through the output head. A run that was interrupted is
resumed by the same command.
"""

import argparse
import hashlib
import json
import math
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# oneDNN keeps code and scratch memory for every shape of a batch that it has met, a gigabyte in two minutes: a job would end at its
# limit of memory. A step has fewer than 64 of its own.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PeftType, TaskType, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import Adafactor, AutoModelForCausalLM, AutoTokenizer

from adapter_folder import FIGURES_FILE, Figures, cut_rank, write_adapter
from base import MissingModel, dequantised, file_digest, gguf_file
from data_files import REPOSITORY, BadData, MissingData
from encoding import Ids, TrainingError, encode
from nearest import Nearest
from recipe import Recipe, RecipeError, Training, load_recipe
from stores import store
from tasks import Example, encoded_splits

CHECKPOINT_SECONDS = 120
IGNORED = -100
# Of one pass through the model, padding included: a batch of long examples would take more memory than a job has.
PASS_TOKENS = {"cpu": 1024, "cuda": 8192}


def trainer_digest() -> str:
    """Of what makes something else of the same recipe, data and base: this file, the recipes' defaults, what computes."""
    lab = Path(__file__).parent
    files = [file_digest(lab / name) for name in ("train.py", "recipe.py")]
    versions = [version(package) for package in ("torch", "peft", "transformers")]
    return hashlib.sha256(" ".join(files + versions).encode()).hexdigest()


def drawn(rows: list[Ids], count: int | None, seed: int) -> list[Ids]:
    return rows if count is None or count >= len(rows) else random.Random(seed).sample(rows, count)


def epoch_batches(rows: list[Ids], batch_size: int, seed: str) -> list[list[Ids]]:
    """The batches of one epoch in random order, each of rows of similar length."""
    order = random.Random(seed)
    shuffled = order.sample(rows, len(rows))
    batches = []
    # Sorted within pieces only, so that a batch is another one in every epoch.
    for start in range(0, len(rows), batch_size * 16):
        piece = sorted(shuffled[start : start + batch_size * 16], key=lambda row: len(row[0]) + len(row[1]))
        batches += [piece[index : index + batch_size] for index in range(0, len(piece), batch_size)]
    order.shuffle(batches)
    return batches


def passes(rows: list[Ids], num_tokens: int) -> Iterator[list[Ids]]:
    """The rows by length, in pieces of at most so many tokens with their padding; one that is longer is alone."""
    piece: list[Ids] = []
    for row in sorted(rows, key=lambda row: len(row[0]) + len(row[1])):
        if piece and (len(piece) + 1) * (len(row[0]) + len(row[1])) > num_tokens:
            yield piece
            piece = []
        piece.append(row)
    if piece:
        yield piece


def has_fast_bf16(device: torch.device) -> bool:
    """Without such instructions a CPU emulates bf16, many times slower than f32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def optimizer(training: Training, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """As Hugging Face's trainer sets it: with a learning rate from outside, and without weight decay."""
    if training.optim == "adamw_torch":
        return torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    return Adafactor(parameters, lr=training.learning_rate, scale_parameter=False, relative_step=False)


class ComputeClock:
    """Seconds of computing since it was last read. On a CPU those of this process over its threads: what the training
    would have taken with its cores to itself."""

    def __init__(self, device: torch.device) -> None:
        self.on_cpu = device.type == "cpu"
        self.last = self._now()

    def _now(self) -> float:
        return time.process_time() / torch.get_num_threads() if self.on_cpu else time.monotonic()

    def elapsed(self) -> float:
        before, self.last = self.last, self._now()
        return self.last - before


@dataclass(frozen=True)
class Measured:
    """What an adapter is worth on the dev split."""

    loss: float
    """The mean over the answers' tokens, in nats."""
    exact_matches: int
    """Answers that greedy decoding would give to the token: each of their tokens is the likeliest after those before it."""


def num_foretold(rows: list[Ids]) -> int:
    """Tokens of answers; the first token of a text is not foretold."""
    return max(1, sum(len(target) - (not prompt) for prompt, target in rows))


class Trainee:
    """The base with its adapter, and the loss of a batch."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        folder = dequantised(recipe.weights)
        self.device = device
        self.bf16 = has_fast_bf16(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if self.bf16 else torch.float32)
        self.head = base.get_output_embeddings().to(device)
        # The model gives hidden states; the head is applied where there is something to learn.
        base.set_output_embeddings(torch.nn.Identity())
        settings = {key: value for key, value in recipe.peft.items() if key != "peft_type"}
        if "prompt_tuning_init_text" in settings:
            settings["tokenizer_name_or_path"] = str(folder)
        try:
            config_type = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[recipe.peft["peft_type"]]]
            config = config_type(task_type=TaskType.CAUSAL_LM, **settings)
        except (KeyError, TypeError, ValueError) as error:
            raise RecipeError(f"{recipe.name}: [peft]: {error}") from error
        self.model: PeftModel = get_peft_model(base, config).to(device)
        if recipe.prefix_text is not None:
            self._begin_prefix_with(recipe.prefix_text, config.num_virtual_tokens)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for parameter in self.trained.values():
            parameter.data = parameter.data.float()

    @torch.no_grad()
    def _begin_prefix_with(self, text: str, num_virtual_tokens: int) -> None:
        """As PEFT begins prompt tuning: with the text over and over, cut to so many tokens."""
        ids = self.tokenizer(text).input_ids
        ids = (ids * -(-num_virtual_tokens // len(ids)))[:num_virtual_tokens]
        with self.model.disable_adapter():
            cache = self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=True).past_key_values
        initialize_kv_prefix_from_past_key_values(self.model, past_key_values=cache)

    def loss(self, batch: list[Ids], backward: bool = False) -> float:
        """The mean loss over the answers' tokens, in nats; with its gradients, if that is asked for."""
        mean, num_tokens = 0.0, num_foretold(batch)
        for piece in passes(batch, PASS_TOKENS[self.device.type]):
            # The logits have no name here, by which they would be there still while the next piece has its own.
            loss = cross_entropy(*self._foretell(piece)[:2], reduction="sum") / num_tokens
            if backward:
                loss.backward()
            mean += loss.item()
        return mean

    def _foretell(self, batch: list[Ids]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the answers' tokens, in one pass: their logits, they themselves, and which row each is of."""
        length = max(len(prompt) + len(target) for prompt, target in batch)
        ids = torch.zeros((len(batch), length), dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORED)
        for row, (prompt, target) in enumerate(batch):
            end = len(prompt) + len(target)
            ids[row, :end] = torch.tensor(prompt + target)
            mask[row, :end] = 1
            labels[row, len(prompt) : end] = torch.tensor(target)
        ids, mask, labels = ids.to(self.device), mask.to(self.device), labels.to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            # Prompt tuning gives its virtual tokens' states too, before the others.
            hidden = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -length:]
            predicts = labels[:, 1:] != IGNORED
            logits = self.head(hidden[:, :-1][predicts]).float()
        return logits, labels[:, 1:][predicts], predicts.nonzero()[:, 0]

    @torch.no_grad()
    def measure(self, rows: list[Ids]) -> Measured:
        """Without dropout."""
        self.model.eval()
        total, exact_matches = 0.0, 0
        for piece in passes(rows, PASS_TOKENS[self.device.type]):
            logits, tokens, of_rows = self._foretell(piece)
            total += cross_entropy(logits, tokens, reduction="sum").item()
            exact_matches += len(piece) - of_rows[logits.argmax(-1) != tokens].unique().numel()
        self.model.train()
        return Measured(total / num_foretold(rows), exact_matches)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().cpu().clone() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])


class Run:
    """A training under way; `state` is what a checkpoint holds beside the weights."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        device: torch.device,
        report: Callable[..., None] = lambda **line: None,
        begins_anew: bool = False,
    ) -> None:
        """`report` is told of the progress, line by line. What another training has left is refused, unless this one
        `begins_anew`: nobody may be there to take it away."""
        self.report, self.begins_anew = report, begins_anew
        self.recipe, self.out, self.checkpoint = recipe, out, out / "checkpoint.pt"
        training = recipe.training
        random.seed(training.seed)
        torch.manual_seed(training.seed)
        self.trainee = Trainee(recipe, device)
        self.optimizer = optimizer(training, self.trainee.trained.values())
        task, tokenizer = recipe.data(), self.trainee.tokenizer
        nearest = None
        if recipe.nearest_examples is not None:
            sources = task.sources() if task.sources is not None else None
            nearest = Nearest(store(task.pairs()), recipe.nearest_examples, sources)

        def encoded(examples: list[Example]) -> list[Ids]:
            if nearest is not None:
                examples = [nearest.before(example) for example in examples]
            return encode(examples, tokenizer, training.max_tokens, recipe.bos)

        splits, self.left_out = encoded_splits(task, encoded)
        for split, rows in splits.items():
            if not rows:
                most = f"has at most {training.max_tokens} tokens: max_tokens"
                raise TrainingError(f"no example of the {split} split of task {recipe.task} {most}")
        # What a checkpoint or an adapter is of. Files are known by their content: what has their name may be something
        # else tomorrow.
        self.origin = {
            "recipe": recipe.sha256,
            "data": hashlib.sha256(json.dumps(splits).encode()).hexdigest(),
            "base": file_digest(gguf_file(recipe.weights)),
            "trainer": trainer_digest(),
        }
        self.rows = drawn(splits["train"], training.max_examples, training.seed)
        self.dev = drawn(splits["dev"], training.validation_examples, training.seed)
        self.steps_per_epoch = -(-len(self.rows) // training.batch_size)
        self.num_steps = min(training.epochs * self.steps_per_epoch, training.max_steps or sys.maxsize)
        num_epochs = -(-self.num_steps // self.steps_per_epoch)
        if training.average_last is not None and training.average_last > num_epochs:
            raise RecipeError(f"{recipe.name}: average_last: there are {num_epochs} epochs")
        self.state: dict[str, Any] = {
            "step": 0, "seconds": 0.0, "tokens": 0, "losses": [], "best": None, "best_loss": float("inf"),
            "best_exact_matches": -1, "base_loss": None, "base_exact_matches": 0, "validations_since_best": 0,
            "averaged_epochs": 1, "last": [],
        }  # fmt: skip

    def has_ended(self) -> bool:
        """Whether the adapter of this very training is there. Any other that is there gives way where it `begins_anew`."""
        file = self.out / FIGURES_FILE
        if not file.is_file():
            return False
        if not self.begins_anew:
            raise TrainingError(f"{self.out} holds a trained adapter: remove it, or give another --out")
        try:
            origin = json.loads(file.read_text(encoding="utf-8"))["origin"]
        # Of before it was written, or cut off while it was.
        except (ValueError, KeyError):
            origin = {}
        if self.is_of(file, origin):
            return True
        file.unlink()
        return False

    def is_of(self, file: Path, origin: dict[str, str]) -> bool:
        """Whether a file of this origin is of this training; refuses any other, unless this one `begins_anew`."""
        changed = [what for what, digest in self.origin.items() if origin.get(what) != digest]
        if changed:
            of = f"{file} is of another {' and another '.join(changed)}"
            if not self.begins_anew:
                raise TrainingError(f"{of}: remove it, or give another --out")
            print(f"{of}: training begins anew", flush=True)
        return not changed

    def resume(self) -> None:
        if not self.checkpoint.is_file():
            return
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if not self.is_of(self.checkpoint, saved.get("origin", {})):
            return
        self.state = saved["state"]
        self.trainee.set_weights(saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        torch.cuda.set_rng_state_all(saved["cuda_rng"])

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        unfinished = self.checkpoint.with_suffix(".part")
        torch.save(
            {
                "origin": self.origin,
                "state": self.state,
                "weights": self.trainee.weights(),
                "optimizer": self.optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all(),
            },
            unfinished,
        )
        unfinished.replace(self.checkpoint)

    def batches(self) -> Iterator[list[Ids]]:
        """From where the run is, to the end."""
        training = self.recipe.training
        while self.state["step"] < self.num_steps and not self.stops_early():
            epoch, index = divmod(self.state["step"], self.steps_per_epoch)
            yield epoch_batches(self.rows, training.batch_size, f"{training.seed} {epoch}")[index]

    def end_epoch(self) -> None:
        self.validate()
        if (num_averaged := self.recipe.training.average_last) is not None:
            self.state["last"] = [*self.state["last"], self.trainee.weights()][-num_averaged:]

    def stops_early(self) -> bool:
        """By what a checkpoint holds: a training that was cut off ends where it would have ended."""
        patience = self.recipe.training.early_stopping_patience
        return patience is not None and self.state["validations_since_best"] >= patience

    def validate(self, averaged_epochs: int = 1) -> None:
        """Keeps the weights if none before them were as good on the dev split."""
        measured = self.trainee.measure(self.dev)
        self.report(type="validation", step=self.state["step"], loss=measured.loss)
        of = f", of the mean of {averaged_epochs} epochs' weights" if averaged_epochs > 1 else ""
        tqdm.write(f"step {self.state['step']}: {self.on_dev(measured)}{of}")
        if self.is_best(measured):
            self.state |= {
                "best": self.trainee.weights(), "best_loss": measured.loss, "best_exact_matches": measured.exact_matches,
                "averaged_epochs": averaged_epochs, "validations_since_best": 0,
            }  # fmt: skip
        else:
            self.state["validations_since_best"] += 1

    def is_best(self, measured: Measured) -> bool:
        if not math.isfinite(measured.loss):
            return False
        more_exact = measured.exact_matches - self.state["best_exact_matches"]
        if self.recipe.training.metric_for_best_model == "exact_match" and more_exact != 0:
            return more_exact > 0
        return measured.loss < self.state["best_loss"]

    def on_dev(self, measured: Measured) -> str:
        return f"loss on the dev split {measured.loss:.4f}, {measured.exact_matches} of {len(self.dev)} exact matches"

    def average(self) -> None:
        last = self.state["last"]
        mean = {name: torch.stack([weights[name] for weights in last]).mean(0) for name in self.trainee.trained}
        self.trainee.set_weights(mean)
        self.validate(len(last))

    def learning_rate(self) -> float:
        training, progress = self.recipe.training, self.state["step"] / self.num_steps
        if progress < training.warmup:
            # The first step's rate is that at its end, or it would be 0.
            return training.learning_rate * min(1.0, max(progress, 1 / self.num_steps) / training.warmup)
        left = (1 - progress) / (1 - training.warmup)
        if training.lr_scheduler_type == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return training.learning_rate * left

    def step(self, batch: list[Ids]) -> float:
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.trainee.loss(batch, backward=True)
        if not math.isfinite(loss):
            raise TrainingError(f"the loss of step {self.state['step']} is not finite: lower the learning rate")
        torch.nn.utils.clip_grad_norm_(self.trainee.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state["step"] += 1
        self.state["tokens"] += sum(len(prompt) + len(target) for prompt, target in batch)
        self.state["losses"].append(loss)
        return loss

    def train(self) -> None:
        """To the last step, or until it `stops_early`; leaves the weights that were the best on the dev split."""
        training, trainee = self.recipe.training, self.trainee
        self.resume()
        self.report(
            type="begin", step=self.state["step"], steps=self.num_steps, examples=len(self.rows),
            validation_examples=len(self.dev), left_out=self.left_out,
        )  # fmt: skip
        if self.state["base_loss"] is None:
            with trainee.model.disable_adapter():
                measured = trainee.measure(self.dev)
            self.state |= {"base_loss": measured.loss, "base_exact_matches": measured.exact_matches}
            self.report(type="validation", step=0, loss=measured.loss)
            tqdm.write(f"the base: {self.on_dev(measured)}")
        trainee.model.train()
        last_saved, clock = time.monotonic(), ComputeClock(trainee.device)
        with tqdm(total=self.num_steps, initial=self.state["step"], unit="step", mininterval=5) as bar:
            for batch in self.batches():
                loss = self.step(batch)
                self.state["seconds"] += clock.elapsed()
                self.report(type="step", step=self.state["step"], loss=loss, tokens=self.state["tokens"])
                bar.update()
                tokens_per_second = self.state["tokens"] / self.state["seconds"]
                bar.set_postfix(loss=f"{loss:.3f}", tokens_per_second=f"{tokens_per_second:.0f}", refresh=False)
                if self.state["step"] % self.steps_per_epoch == 0:
                    self.end_epoch()
                if time.monotonic() - last_saved > CHECKPOINT_SECONDS:
                    self.save()
                    last_saved = time.monotonic()
                # Validation and checkpoints are no training time.
                clock.elapsed()
        if self.state["step"] % self.steps_per_epoch:
            self.end_epoch()
        if training.average_last is not None:
            self.average()
        if self.state["best"] is None:
            raise TrainingError("the loss on the dev split was never finite: lower the learning rate")
        trainee.set_weights(self.state["best"])
        self.report(type="end", step=self.state["step"], reason=self.end_reason())

    def end_reason(self) -> str:
        return "last_step" if self.state["step"] == self.num_steps else "early_stopping"

    def write(self) -> None:
        training, trainee, state = self.recipe.training, self.trainee, self.state
        measured = Measured(state["best_loss"], state["best_exact_matches"])
        if self.recipe.export_rank is not None:
            cut_rank(trainee.model, self.recipe.export_rank)
            measured = trainee.measure(self.dev)
        if trainee.device.type == "cuda":
            peak_bytes, device = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
        else:
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            device = f"{torch.get_num_threads()} CPU cores, {'bf16' if trainee.bf16 else 'f32'}"
        last_losses = state["losses"][-self.steps_per_epoch :]
        figures = Figures(
            recipe=f"lab/recipes/{self.recipe.name}.toml",
            base=self.recipe.base,
            seed=training.seed,
            trainable_parameters=sum(p.numel() for p in trainee.trained.values()),
            minutes=round(state["seconds"] / 60, 2),
            peak_memory_mib=peak_bytes >> 20,
            steps=state["step"],
            train_tokens=state["tokens"],
            validation_examples=len(self.dev),
            train_loss=round(sum(last_losses) / len(last_losses), 4),
            validation_loss=round(measured.loss, 4),
            base_validation_loss=round(state["base_loss"], 4),
            validation_exact_matches=measured.exact_matches,
            base_validation_exact_matches=state["base_exact_matches"],
            averaged_epochs=state["averaged_epochs"],
            end_reason=self.end_reason(),
            device=device,
            origin=self.origin,
        )
        self.out.mkdir(parents=True, exist_ok=True)
        write_adapter(trainee.model, self.recipe, figures, self.out)
        self.checkpoint.unlink(missing_ok=True)
        ended = f", ended early at step {state['step']} of {self.num_steps}" if state["step"] < self.num_steps else ""
        print(f"{self.out}: {self.on_dev(measured)}; the base's loss {figures.base_validation_loss}{ended}")


def print_line(**line: Any) -> None:
    """As the server's fine-tuning reads it; a loss that is no number ends the training or is not kept."""
    if all(math.isfinite(value) for value in line.values() if isinstance(value, float)):
        print(json.dumps(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path, help="a file of lab/recipes")
    parser.add_argument("--out", type=Path, help="where the checkpoint and then the adapter go; default: lab/runs/NAME")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--progress",
        action="store_true",
        help="print the progress as lines of JSON; let a training that has ended be one that has gone well, and begin anew "
        "where what is there is of something else",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: every core")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        recipe = load_recipe(arguments.recipe)
        out = arguments.out or REPOSITORY / "lab" / "runs" / recipe.name
        supervised = {"report": print_line, "begins_anew": True} if arguments.progress else {}
        run = Run(recipe, out, torch.device(arguments.device), **supervised)
        if not run.has_ended():
            run.train()
            run.write()
    except (BadData, MissingData, MissingModel, RecipeError, TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
