"""From what a server returned to what is scored. Which of the two ways a score was got is said beside it."""

import inspect
import re

# The stop strings of the paper's code of January 2024, joined into a regular expression without escaping, as it does:
# `<|endoftext|>` is three alternatives, and every prediction ends at its first `<` or `>`. Together with the newline,
# 49 of CoNaLa's 543 references can never be matched.
PAPER_STOPS = re.compile("<|endoftext|>|</s>|\n")

# A fence opens at the start, with the name of a language, or where another one closes it; any other closes one that the
# prompt had opened.
FENCE = re.compile(r"(?:\A\s*```[^\n`]*|```[^\n`]+)\n(.*?)(?:```|\Z)|```[ \t]*\n(.*?)```", re.DOTALL)
TRIPLE_QUOTED = re.compile(r'[rR]?("""|\'\'\')(.*?)(?:\1|\Z)', re.DOTALL)
DEFINITION = re.compile(r"(?:@|(?:async\s+)?def\s|class\s)")
BLANK_LINE = re.compile(r"\n[ \t]*\n")


def paper_compat(text: str) -> str:
    """What the paper's code of January 2024 scores: everything before the first of its stops, as it is."""
    return PAPER_STOPS.split(text, maxsplit=1)[0]


def unfenced(text: str) -> str:
    """The code of the first fence; without one everything, up to a fence that only closes."""
    return _fenced(text) or text.partition("```")[0]


def _fenced(text: str) -> str | None:
    fence = FENCE.search(text)
    return fence and fence[fence.lastindex]


def answer(text: str) -> str:
    """A short answer without what models put around it: no fence, and nothing from the first blank line on.

    No reference of CoNaLa or nl2bash has a blank line; some of CoNaLa's have several lines.
    """
    return BLANK_LINE.split(unfenced(text).strip(), maxsplit=1)[0].strip()


def docstring(text: str) -> str:
    """A docstring without fence, quotes and the function around it; unlike other answers, it may have blank lines."""
    text = unfenced(text).strip()
    quoted = TRIPLE_QUOTED.search(text) if DEFINITION.match(text) else TRIPLE_QUOTED.match(text)
    return inspect.cleandoc(quoted[2]).strip() if quoted else text


def before_stops(text: str, stops: tuple[str, ...]) -> str:
    """A program: the code of the first fence, or the completion up to the first of `stops`."""
    if (fenced := _fenced(text)) is not None:
        return fenced
    return text[: min((text.find(stop) for stop in stops if stop in text), default=None)]


def first_line(text: str) -> str:
    """The one line that was to be filled in: the first that is not empty, with its indentation and its end."""
    return next((line for line in text.splitlines() if line.strip()), "") + "\n"


def before_suffix(text: str, suffix: str) -> str:
    """What fills a gap: `text` up to where it goes on with the first line of what stands behind the gap.

    A line of less than three characters, such as `):`, says nothing: it occurs within gaps.
    """
    first_line = re.match(r"\s*[^\n]*", suffix)[0]
    return text.partition(first_line)[0] if len(first_line.strip()) >= 3 else text
