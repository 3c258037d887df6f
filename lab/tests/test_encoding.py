"""What a tokenizer makes of examples: where a text begins, where an answer ends, and what is too long."""

from types import SimpleNamespace

import pytest
from encoding import TrainingError, encode
from tasks import Example, encoded_splits, task_named

CHAT = [{"role": "user", "content": "q"}]
BOS, EOS, END_OF_TEXT, UNKNOWN = 1, 2, 50, 0


class Tokenizer:
    """One token a character."""

    def __init__(self, *, eos=EOS, bos=None, vocabulary=()):
        self.eos_token_id, self.bos_token_id, self.vocabulary = eos, bos, dict(vocabulary)

    def get_vocab(self):
        return self.vocabulary

    def convert_tokens_to_ids(self, token):
        return self.vocabulary.get(token, UNKNOWN)

    def apply_chat_template(self, messages, **_):
        return "".join(message["content"] for message in messages) + ">"

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[[ord(char) for char in text] for text in texts])


def test_an_answer_ends_with_a_token_that_the_base_has():
    examples = [Example("p", "t"), Example(CHAT, "t")]
    for vocabulary, end in [({"<|endoftext|>": END_OF_TEXT}, END_OF_TEXT), ({}, EOS)]:
        rows = encode(examples, Tokenizer(vocabulary=vocabulary), 9, bos=False)
        assert [target for _, target in rows] == [[ord("t"), end], [ord("t"), EOS]]
    with pytest.raises(TrainingError, match="no token with which an answer ends"):
        encode(examples, Tokenizer(eos=None), 9, bos=False)


def test_a_text_and_no_chat_begins_with_bos_where_the_server_puts_one():
    examples = [Example("p", "t"), Example(CHAT, "t")]
    for bos, prompts in [(True, [[BOS, ord("p")], [ord("q"), ord(">")]]), (False, [[ord("p")], [ord("q"), ord(">")]])]:
        assert [prompt for prompt, _ in encode(examples, Tokenizer(bos=BOS), 9, bos)] == prompts
    # It counts.
    assert encode(examples[:1], Tokenizer(bos=BOS), 3, bos=True) == []
    assert len(encode(examples[:1], Tokenizer(bos=BOS), 3, bos=False)) == 1
    with pytest.raises(TrainingError, match="no BOS token"):
        encode(examples, Tokenizer(), 9, bos=True)


@pytest.mark.parametrize(
    "line",
    [
        '{{"prompt": "{0}", "completion": "c"}}',
        '{{"instruction": "{0}", "code": "c"}}',
        '{{"messages": [{{"role": "user", "content": "{0}"}}, {{"role": "assistant", "content": "c"}}]}}',
    ],
    ids=["pairs", "instructions", "chats"],
)
def test_a_long_first_line_is_not_all_of_the_dev_split(tmp_path, line: str):
    file, long = tmp_path / "mine.jsonl", line.format("p" * 500)
    file.write_text("\n".join([long, *(line.format(index) for index in range(11))]))

    def fitting(examples):
        return encode(examples, Tokenizer(), 100, bos=False)

    splits, num_left_out = encoded_splits(task_named(str(file)), fitting)
    assert (len(splits["train"]), len(splits["dev"]), num_left_out) == (9, 2, 1)
    # A dev split of its own is as it is.
    dev = tmp_path / "dev.jsonl"
    dev.write_text("\n".join([long, line.format("x")]))
    splits, num_left_out = encoded_splits(task_named(str(file), str(dev)), fitting)
    assert (len(splits["train"]), len(splits["dev"]), num_left_out) == (11, 1, 2)
