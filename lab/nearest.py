"""The examples nearest to an instruction, as the server looks them up (`icl` with `select = "bm25"`, docs/icl.md) and
writes them before it.

Scores are those of src/icl/bm25.rs, sum by sum, so that equals fall to the same side. What a character is is asked of
Unicode, as Rust does: to Python's own methods no mark is a letter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import islice

import numpy as np
import regex

from encoding import TrainingError
from tasks import INSTRUCTION_PROMPT, Example

# An instruction and its answer.
Pair = tuple[str, str]

# How fast more of the same word stops counting.
K1 = 1.2
# How much a longer instruction must say to score the same.
B = 0.75

_ALPHANUMERIC = regex.compile(r"[\p{Alphabetic}\p{N}]")
_NUMERIC = regex.compile(r"\p{N}")
_LOWER = regex.compile(r"\p{Lowercase}")
_UPPER = regex.compile(r"\p{Uppercase}")
# Han and Hiragana, of which each character is a word.
_UNSPACED = regex.compile("[々ぁ-ゟ㐀-䶿一-鿿\uf900-\ufaff\U00020000-\U0003ffff]")


@cache
def _is(kind: regex.Pattern, character: str) -> bool:
    return kind.fullmatch(character) is not None


def words(text: str) -> Iterator[str]:
    """Lower-case words; identifiers fall apart at punctuation, at a change of case, and between letters and digits."""
    word, previous = "", " "
    for index, character in enumerate(text):
        is_alphanumeric = _is(_ALPHANUMERIC, character)
        if word and (not is_alphanumeric or _begins_word(previous, character, text[index + 1 : index + 2])):
            yield word
            word = ""
        if is_alphanumeric:
            word += character.lower()
        previous = character
    if word:
        yield word


def _begins_word(previous: str, character: str, following: str) -> bool:
    """Between `previous` and `character`, as in `readLine`, `HTTPServer`, `utf8`."""
    return (
        _is(_NUMERIC, character) != _is(_NUMERIC, previous)
        or (_is(_UPPER, character) and (_is(_LOWER, previous) or _is(_LOWER, following)))
        or _is(_UNSPACED, character)
        or _is(_UNSPACED, previous)
    )


class Nearest:
    """The `k` nearest of `pairs`, a store as the server has it, for what is in that store itself.

    An example is never shown itself, nor another with its answer or of its source: whoever asks has none of these, and what
    is learned with them is to copy.
    """

    def __init__(self, pairs: list[Pair], k: int, sources: dict[str, str] | None = None) -> None:
        """`sources` are of instructions; none is of its own."""
        self.pairs, self.k, self.sources = pairs, k, sources or {}
        documents = [Counter(words(instruction)) for instruction, _ in pairs]
        lens = np.array([document.total() for document in documents], dtype=float)
        len_penalties = 1.0 - B + B * lens / max(lens.sum() / max(len(pairs), 1), 1.0)
        counts: dict[str, dict[int, int]] = {}
        for index, document in enumerate(documents):
            for word, count in document.items():
                counts.setdefault(word, {})[index] = count
        # By word: the examples that have it, and what it adds to their scores.
        self._postings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, of_word in counts.items():
            indices, count = np.array(list(of_word)), np.array(list(of_word.values()), dtype=float)
            rarity = math.log(1.0 + (len(pairs) - len(of_word) + 0.5) / (len(of_word) + 0.5))
            weights = rarity * count * (K1 + 1.0) / (count + K1 * len_penalties[indices])
            self._postings[word] = indices, weights

    def to(self, instruction: str, answer: str) -> list[Pair]:
        """The nearest last."""
        scores = np.zeros(len(self.pairs))
        # In order, so that sums round as the server's.
        for word in sorted(set(words(instruction))):
            if word in self._postings:
                indices, weights = self._postings[word]
                scores[indices] += weights
        ranked = np.argsort(-scores, kind="stable")
        pairs = (self.pairs[index] for index in ranked)
        others = (pair for pair in pairs if not self._is_told_by(pair, instruction, answer))
        return list(islice(others, self.k))[::-1]

    def _is_told_by(self, pair: Pair, instruction: str, answer: str) -> bool:
        source = self.sources.get(instruction)
        is_of_source = source is not None and self.sources.get(pair[0]) == source
        return pair[0] == instruction or pair[1] == answer or is_of_source

    def before(self, example: Example) -> Example:
        """The prompt as the server makes it with examples, for an adapter that has the task's template."""
        shots = self.to(example.instruction, example.target)
        if len(shots) < self.k:
            raise TrainingError(f"nearest_examples: there are no {self.k} others for {example.instruction!r}")
        before = "".join(INSTRUCTION_PROMPT.format(instruction) + code + "\n\n" for instruction, code in shots)
        return replace(example, prompt=before + example.prompt)
