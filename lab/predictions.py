"""Asks a server for what is missing, and keeps every prediction as a line of JSON."""

import asyncio
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai
from arms import Arm, Decoding, digest, request_body
from suites import Row, Suite
from tqdm import tqdm

# A full server answers 503; the client library waits longer with each try.
MAX_RETRIES = 8
TIMEOUT_SECONDS = 1800


class EvaluationError(Exception):
    """The server cannot be measured as asked."""


@dataclass(frozen=True)
class Prediction:
    suite: str
    arm: str
    seed: int | None
    row: str
    decoding: str
    request: str
    """Digest of the request's body."""
    texts: list[str]
    """One a choice, the best beam first, as the server returned them."""
    finish_reason: str | None
    model: str
    """As the reply names it."""
    adapter: str | None
    generation: str | None
    """Of the adapter, where the server says it."""
    icl: dict[str, Any] | None
    """The examples in the prompt, where the server says them."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_ms: float | None
    """None where the reply came whole."""
    total_ms: float
    concurrency: int

    @property
    def key(self) -> tuple[str, str, int | None, str, str]:
        return self.suite, self.arm, self.seed, self.row, self.decoding


@dataclass(frozen=True)
class Question:
    suite: Suite
    row: Row
    arm: Arm
    seed: int | None
    decoding: Decoding

    @property
    def key(self) -> tuple[str, str, int | None, str, str]:
        return self.suite.name, self.arm.name, self.seed, self.row.id, self.decoding.name

    def body(self) -> dict[str, Any]:
        return request_body(self.suite, self.row, self.arm, self.seed, self.decoding)

    def __str__(self) -> str:
        return f"arm {self.arm.name}, row {self.row.id} of {self.suite.name}"


@contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Raises `EvaluationError` if another process writes to the folder `run`: each would cut off what the other has begun."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EvaluationError(
                f"another evaluation is writing to {run}: wait for its end, or take another --out"
            ) from error
        yield


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of `file`, if there is one. A last one that was not written to its end is cut off."""
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        # Not written anew: what is whole must outlive a crash here too.
        os.truncate(file, len(whole))
    return [_line(file, number, line) for number, line in enumerate(whole.splitlines(), start=1)]


def _line(file: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise EvaluationError(f"{file}: line {number} is damaged: take it out, and only that is done again") from error


def read_predictions(file: Path) -> dict[tuple, Prediction]:
    """The predictions of `file` by key."""
    try:
        predictions = [Prediction(**line) for line in read_lines(file)]
    except TypeError as error:
        raise EvaluationError(f"{file} is of another version of the lab: take another --out ({error})") from error
    return {prediction.key: prediction for prediction in predictions}


def missing(questions: list[Question], known: dict[tuple, Prediction], file: Path) -> list[Question]:
    """The questions without a prediction. Raises if one was asked in other words before."""
    for question in questions:
        prediction = known.get(question.key)
        if prediction and prediction.request != digest(question.body()):
            raise EvaluationError(
                f"{file} holds answers to other requests of {question}: rename the arm, or take another --out"
            )
    return [question for question in questions if question.key not in known]


async def ask(url: str, api_key: str, questions: list[Question], concurrency: int, file: Path) -> None:
    """Puts `questions` to the server, `concurrency` at a time in their order, and appends each answer to `file`.

    Raises `EvaluationError` at the first that is refused; what was answered until then is kept.
    """
    client = openai.AsyncOpenAI(base_url=url, api_key=api_key, max_retries=MAX_RETRIES, timeout=TIMEOUT_SECONDS)
    waiting: Iterator[Question] = iter(questions)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines, tqdm(total=len(questions), unit="row", smoothing=0.05) as progress:

        async def worker() -> None:
            for question in waiting:
                prediction = await _answer(client, question, concurrency)
                lines.write(json.dumps(asdict(prediction)) + "\n")
                lines.flush()
                progress.update()

        async with client:
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(min(concurrency, len(questions))):
                        workers.create_task(worker())
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None


async def _answer(client: openai.AsyncOpenAI, question: Question, concurrency: int) -> Prediction:
    body = question.body()
    path = "/infill" if question.arm.infill else "/chat/completions" if question.arm.chat else "/completions"
    started = time.perf_counter()
    try:
        if body.get("stream"):
            reply, first_text = await _streamed(client, path, body)
        else:
            reply, first_text = await client.post(path, body=body, cast_to=object), None
    except openai.APIStatusError as error:
        raise EvaluationError(f"{question}: the server answers {error.status_code}: {error.message}") from error
    except openai.APIError as error:
        raise EvaluationError(f"{question}: no whole answer from {client.base_url}: {error}") from error
    ended = time.perf_counter()

    try:
        reply = _of_infill(reply) if question.arm.infill else reply
        return _prediction(question, body, reply, concurrency, started, first_text, ended)
    except (AttributeError, KeyError, TypeError) as error:
        raise EvaluationError(f"{question}: the reply is not OpenAI's: {error!r} in {str(reply)[:300]}") from error


def _prediction(
    question: Question,
    body: dict[str, Any],
    reply: dict[str, Any],
    concurrency: int,
    started: float,
    first_text: float | None,
    ended: float,
) -> Prediction:
    choices = sorted(reply["choices"], key=lambda choice: choice["index"])
    # `null` is what a chat says that says nothing.
    texts = [(choice["message"]["content"] if "message" in choice else choice["text"]) or "" for choice in choices]
    expected = question.decoding.num_choices
    if len(texts) != expected:
        raise EvaluationError(f"{question}: {len(texts)} choices instead of {expected}")
    # Beams that end with the same stop text may be alike; their scores are not.
    answers = {(text, choice.get("score")) for text, choice in zip(texts, choices)}
    if question.decoding.num_beams > 1 and len(answers) == 1:
        raise EvaluationError(f"{question}: {expected} equal choices: the server does not know `use_beam_search`")
    usage, adapter = reply["usage"], reply.get("adapter") or {}
    return Prediction(
        suite=question.suite.name,
        arm=question.arm.name,
        seed=question.seed,
        row=question.row.id,
        decoding=question.decoding.name,
        request=digest(body),
        texts=texts,
        finish_reason=choices[0]["finish_reason"],
        model=reply["model"],
        adapter=adapter.get("name"),
        generation=adapter.get("generation"),
        icl=reply.get("icl"),
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        completion_tokens=usage["completion_tokens"],
        ttft_ms=None if first_text is None else 1000 * (first_text - started),
        total_ms=1000 * (ended - started),
        concurrency=concurrency,
    )


def _of_infill(reply: dict[str, Any] | list[dict[str, Any]]) -> dict[str, Any]:
    """llama.cpp's reply, or one for each choice, in OpenAI's words."""
    replies = reply if isinstance(reply, list) else [reply]
    reasons = {"limit": "length", "eos": "stop", "word": "stop"}
    return {
        "model": replies[0]["model"],
        "choices": [
            {"index": index, "text": reply["content"], "finish_reason": reasons[reply["stop_type"]]}
            for index, reply in enumerate(replies)
        ],
        "usage": {
            "prompt_tokens": replies[0]["tokens_evaluated"],
            "completion_tokens": sum(reply["tokens_predicted"] for reply in replies),
            "prompt_tokens_details": {"cached_tokens": replies[0]["timings"]["cache_n"]},
        },
    }


async def _streamed(client: openai.AsyncOpenAI, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The whole reply of a stream with one choice, and when its first chunk with a choice came."""
    stream = await client.post(
        path, body=body, cast_to=dict[str, Any], stream=True, stream_cls=openai.AsyncStream[dict[str, Any]]
    )
    reply: dict[str, Any] = {}
    text, finish_reason, usage, first = "", None, None, None
    async for chunk in stream:
        reply = chunk
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            delta = choice["delta"].get("content") if "delta" in choice else choice["text"]
            if first is None and (delta or choice["finish_reason"]):
                first = time.perf_counter()
            text += delta or ""
            finish_reason = choice["finish_reason"] or finish_reason
    if first is None or usage is None:
        raise EvaluationError("the stream ended without a choice, or without `usage` (`stream_options`)")
    choice = {"index": 0, "text": text, "finish_reason": finish_reason}
    return reply | {"choices": [choice], "usage": usage}, first
