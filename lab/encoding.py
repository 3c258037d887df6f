"""Examples as a base's tokenizer has them: where a text begins, and where an answer ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The token that ends an answer to a text, where the base has it: the server stops there, and at the base's own end.
END = "<|endoftext|>"

# The ids of a prompt, and those of its answer with the token that ends it.
Ids = tuple[list[int], list[int]]


class TrainingError(Exception):
    """A training cannot begin or go on."""


def encode(examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_tokens: int, bos: bool) -> list[Ids]:
    """With `bos` a text begins with the base's BOS token, as on the server; a chat begins as its template says."""
    if not examples:
        return []
    if bos and tokenizer.bos_token_id is None:
        raise TrainingError("the base has no BOS token: bos = true")
    # By the vocabulary: asked for a token that it has not, a tokenizer gives its unknown one.
    end = tokenizer.get_vocab().get(END, tokenizer.eos_token_id)
    # In a chat an answer ends as the base ends its own.
    ends = [end if isinstance(example.prompt, str) else tokenizer.eos_token_id for example in examples]
    if None in ends:
        raise TrainingError("the base has no token with which an answer ends")
    prompts = tokenizer([_text(example.prompt, tokenizer) for example in examples], add_special_tokens=False).input_ids
    targets = tokenizer([example.target for example in examples], add_special_tokens=False).input_ids
    beginnings = [[tokenizer.bos_token_id] if bos and isinstance(example.prompt, str) else [] for example in examples]
    rows = [(begin + prompt, [*target, end]) for begin, prompt, target, end in zip(beginnings, prompts, targets, ends)]
    return [row for row in rows if len(row[0]) + len(row[1]) <= max_tokens]


def _text(prompt: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(prompt, str):
        return prompt
    try:
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # Only what trains has it.
        from jinja2 import TemplateError

        if not isinstance(error, ValueError | TemplateError):
            raise
        raise TrainingError(f"the base's chat template cannot render an example: {error}") from error
