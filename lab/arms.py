"""What is compared: an arm is a model under a name, with the fields its requests have beside the prompt."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from suites import Row, Suite

# Of the paper: what is drawn at random is drawn with each of these, and means are over them.
PAPER_SEEDS = (42, 777, 5432, 55555, 97)
# What a command says of all its arms, and answers are filed by.
DECODING_FIELDS = ("n", "best_of", "use_beam_search")


class ArmError(Exception):
    """An arm is not written as it should be."""


@dataclass(frozen=True)
class Arm:
    name: str
    fields: dict[str, Any]
    """Fields of every request, the model among them, as the server takes them."""
    seeds: tuple[int | None, ...] = (None,)
    """The arm is asked once with each; None leaves the seed out."""
    chat: bool = False
    """Asks in a chat, so that the server adds the prompt of the model or adapter."""
    infill: bool = False
    """Asks llama.cpp's `/infill`, as editors do, instead of a completion with a `suffix`."""
    instruction: str = "{}"
    """What is asked where the server makes the prompt; `{}` is the row's own instruction."""


@dataclass(frozen=True)
class Decoding:
    """Greedy; with `num_beams` above 1 beam search; with `num_samples` above 1, or a temperature, samples."""

    num_beams: int = 1
    num_samples: int = 1
    temperature: float = 0.0

    @property
    def name(self) -> str:
        if self.num_beams > 1:
            return f"beam{self.num_beams}"
        return f"sample{self.num_samples}@{self.temperature:g}" if self.is_sampled else "greedy"

    @property
    def is_sampled(self) -> bool:
        return self.num_samples > 1 or self.temperature > 0

    @property
    def num_choices(self) -> int:
        return max(self.num_beams, self.num_samples)

    def fields(self) -> dict[str, Any]:
        if self.num_beams > 1:
            return {"use_beam_search": True, "n": self.num_beams, "temperature": 0}
        sampling = {"temperature": self.temperature, "seed": PAPER_SEEDS[0]} if self.is_sampled else {"temperature": 0}
        if self.num_samples > 1:
            return sampling | {"n": self.num_samples}
        # With one choice it can be streamed, and the time to the first token be seen.
        return sampling | {"stream": True, "stream_options": {"include_usage": True}}

    def of(self, arm: Arm) -> Decoding:
        """This one at the arm's own temperature, if it has one."""
        temperature = arm.fields.get("temperature", self.temperature)
        if self.num_beams > 1 and temperature > 0:
            raise ArmError(f"arm {arm.name}: beams are not drawn: leave its `temperature` out, or `--beams`")
        return replace(self, temperature=temperature)


def request_body(suite: Suite, row: Row, arm: Arm, seed: int | None, decoding: Decoding) -> dict[str, Any]:
    """The body of the request that puts `row` to `arm`."""
    if arm.chat and row.suffix is not None:
        raise ArmError(f"arm {arm.name}: a chat cannot fill a gap, as {suite.name} asks")
    if arm.infill and row.suffix is None:
        raise ArmError(f"arm {arm.name}: `infill` fills gaps, and {suite.name} has none")
    body: dict[str, Any] = {"n_predict" if arm.infill else "max_tokens": suite.max_tokens}
    # Where a program ends is known of one that goes on from its prompt; in a chat it stands in a fence.
    if suite.stop and not (arm.chat and "pass" in suite.metrics):
        body["stop"] = list(suite.stop)
    body |= decoding.fields() | arm.fields
    if seed is not None:
        body["seed"] = seed
        if "icl" in body:
            body["icl"] = body["icl"] | {"seed": seed}
    if arm.infill:
        # Its streams are not OpenAI's: the reply comes whole.
        whole = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
        return whole | {"input_prefix": row.prompt, "input_suffix": row.suffix}
    instruction = arm.instruction.replace("{}", row.instruction)
    if arm.chat:
        return body | {"messages": [{"role": "user", "content": instruction}]}
    server_makes_prompt = "prompt_format" in body or "icl" in body or "+icl:" in body["model"]
    if arm.instruction != "{}" and not server_makes_prompt:
        raise ArmError(f"arm {arm.name}: `instruction` is for chats and prompt formats; a plain completion has none")
    body["prompt"] = instruction if server_makes_prompt else row.prompt
    if row.suffix is not None:
        body["suffix"] = row.suffix
    return body


def digest(body: dict[str, Any]) -> str:
    """Tells requests apart: what was asked otherwise must not be taken for an answer."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def read_arms(files: Iterable[Path], written: Iterable[str]) -> list[Arm]:
    """The arms of TOML `files` (`[[arms]]` tables) and those `written` as `NAME=MODEL[,KEY=VALUE]...`."""
    arms = []
    for file in files:
        try:
            tables = tomllib.loads(file.read_text(encoding="utf-8"))["arms"]
            arms += [_arm(table, f"{file}: arms[{index}]") for index, table in enumerate(tables)]
        except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
            raise ArmError(f"{file}: {error!r}: arms are `[[arms]]` tables with at least `name` and `model`") from error
    arms += [_arm(_table(text), text) for text in written]
    names = [arm.name for arm in arms]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ArmError(f"several arms are named {', '.join(sorted(repeated))}: predictions are filed by that name")
    if not arms:
        raise ArmError("name at least one arm, with --arm or --arms")
    return arms


def _table(text: str) -> dict[str, Any]:
    """`NAME=MODEL[,KEY=VALUE]...` in the words of `lorry compare`: `icl=STORE@K`, `select=bm25`, `seeds=paper`."""
    first, *rest = text.split(",")
    pairs = [part.partition("=") for part in (first, *rest)]
    if not all(key and separator and value for key, separator, value in pairs):
        raise ArmError(f"`{text}` is not NAME=MODEL[,KEY=VALUE]...")
    (name, _, model), *rest_pairs = pairs
    keys = ["name", "model", *(key for key, _, _ in rest_pairs)]
    if repeated := next((key for key in keys if keys.count(key) > 1), None):
        raise ArmError(f"`{text}` says `{repeated}` twice")
    table: dict[str, Any] = {"name": name, "model": model}
    for key, _, value in rest_pairs:
        if key == "icl":
            store, _, count = value.rpartition("@")
            if not (store and count.isdecimal()):
                raise ArmError(f"`icl={value}` of arm {name} is not icl=STORE@K")
            table.setdefault("icl", {}).update(store=store, k=int(count))
        elif key == "select":
            table.setdefault("icl", {})["select"] = value
        else:
            table[key] = _value(value)
    return table


def _value(text: str) -> Any:
    """A number, `true` or `false` as in JSON; anything else is a text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _arm(table: Any, where: str) -> Arm:
    if not isinstance(table, dict):
        raise ArmError(f"{where}: arms are `[[arms]]` tables")
    fields = dict(table)
    name, seeds = fields.pop("name", None), fields.pop("seeds", (None,))
    chat, infill = fields.pop("chat", False), fields.pop("infill", False)
    instruction = fields.pop("instruction", "{}")
    if not isinstance(name, str) or not isinstance(fields.get("model"), str):
        raise ArmError(f"{where}: `name` and `model` must be texts")
    if not isinstance(chat, bool) or not isinstance(infill, bool):
        raise ArmError(f"{where}: `chat` and `infill` are true or false")
    if infill and (chat or instruction != "{}"):
        raise ArmError(f"{where}: `infill` has no `chat` and no `instruction`: its prompt is the text around a gap")
    if not isinstance(instruction, str) or "{}" not in instruction:
        raise ArmError(f"{where}: `instruction` must hold {{}}, where the row's own comes in")
    if of_all := next((field for field in DECODING_FIELDS if field in fields), None):
        raise ArmError(f"{where}: `{of_all}` is said of all arms, by `--beams` or `--samples`")
    temperature = fields.get("temperature", 0)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < float("inf"):
        raise ArmError(f"{where}: `temperature` must be a number from 0 on")
    if not isinstance(fields.get("icl", {}), dict):
        raise ArmError(f"{where}: `icl` is a table with `store` and `k`")
    if seeds == "paper":
        seeds = PAPER_SEEDS
    elif not isinstance(seeds, list | tuple) or not seeds:
        raise ArmError(f"{where}: `seeds` is `paper`, or in a file a list of numbers")
    return Arm(name, fields, tuple(seeds), chat, infill, instruction)
