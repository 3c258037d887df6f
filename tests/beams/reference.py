"""Writes reference.json: what transformers' beam search makes of a made-up model, for the tests of `BeamSearch`.

usage: reference.py > reference.json
The model is a table: the logits of the next token by the last one. So both searches see the same log-probabilities, and
must find the same tokens with the same scores. Needs torch and transformers 5.
"""

import itertools
import json
import sys

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY, FIRST_TOKEN, STOP_TOKENS = 40, 39, [0, 1]


class Table(PreTrainedModel, GenerationMixin):
    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__(PretrainedConfig(vocab_size=VOCABULARY, is_encoder_decoder=False))
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, **_: object) -> CausalLMOutput:
        return CausalLMOutput(logits=self.logits[input_ids])


class LastTokens(StoppingCriteria):
    """Ends an output as a stop string does: with a token that stays in it."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], self.tokens)


def beams(
    model: Table, num_beams: int, max_tokens: int, length_penalty: float, early_stopping: bool, last_tokens: list[int]
) -> dict:
    prompt = torch.tensor([[FIRST_TOKEN]])
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), num_beams=num_beams, num_return_sequences=num_beams,
        do_sample=False, max_new_tokens=max_tokens, length_penalty=length_penalty, early_stopping=early_stopping,
        eos_token_id=STOP_TOKENS, pad_token_id=STOP_TOKENS[0], use_cache=False, return_dict_in_generate=True,
        output_scores=True, stopping_criteria=StoppingCriteriaList([LastTokens(last_tokens)]),
    )  # fmt: skip
    tokens = [
        list(itertools.takewhile(lambda token: token not in STOP_TOKENS, beam[1:])) for beam in found.sequences.tolist()
    ]
    return {
        "num_beams": num_beams, "max_tokens": max_tokens, "length_penalty": length_penalty,
        "early_stopping": early_stopping, "last_tokens": last_tokens,
        "tokens": tokens, "scores": found.sequences_scores.tolist(),
    }  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    tables = []
    # Of the second one, outputs end early and often; of the first, some only with the last token.
    for stop_bonus in (1.0, 3.0):
        logits = (torch.randn(VOCABULARY, VOCABULARY) * 2 * 10_000).round() / 10_000
        logits[:, STOP_TOKENS] += stop_bonus
        model = Table(logits).eval()
        options = itertools.product((2, 5, 16), (1, 9), (0.0, 1.0, -1.5), (False, True), ([], [2, 3]))
        tables.append(
            {
                "logits": [[round(value, 4) for value in row] for row in logits.tolist()],
                "cases": [beams(model, *chosen) for chosen in options],
            }
        )
    json.dump({"first_token": FIRST_TOKEN, "stop_tokens": STOP_TOKENS, "tables": tables}, sys.stdout)


if __name__ == "__main__":
    main()
