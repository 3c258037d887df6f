"""Writes beam_reference.json: what transformers' beam search says, for test_beam_search.py.

usage: beam_reference.py HF_DIR > beam_reference.json
HF_DIR is the served GGUF of smollm2:135m, dequantised to a Hugging Face folder. Needs torch and transformers.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_BEAMS, MAX_TOKENS = 10, 24
# `<|endoftext|>` and `<|im_end|>`, which end an output in lorry.
STOP_TOKENS = [0, 2]
PROMPTS = [
    "def fibonacci(n):\n    ",
    "### Instruction:\ncheck if all elements in list `mylist` are the same\n### Response:\n",
    "import os\n\nfor name in sorted(os.listdir('.')):\n    if name",
    "The capital of France is",
    "SELECT name FROM users WHERE",
]

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
cases = []
for prompt in PROMPTS:
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=NUM_BEAMS, num_return_sequences=NUM_BEAMS, do_sample=False,
        max_new_tokens=MAX_TOKENS, eos_token_id=STOP_TOKENS, pad_token_id=0, return_dict_in_generate=True,
        output_scores=True,
    )
    texts = [tokenizer.decode(beam[ids.shape[1]:], skip_special_tokens=True) for beam in found.sequences]
    scores = [round(score, 4) for score in found.sequences_scores.tolist()]
    cases.append({"prompt": ids[0].tolist(), "texts": texts, "scores": scores})
json.dump({"num_beams": NUM_BEAMS, "max_tokens": MAX_TOKENS, "cases": cases}, sys.stdout, indent=1)
