"""Writes adapter_reference.json: the log-probabilities that transformers and PEFT give for every adapter that ships.

usage: adapter_reference.py HF_DIR > adapter_reference.json
HF_DIR is the served GGUF of the default base, dequantised to a Hugging Face folder. Needs torch, transformers and peft.
The texts are of our own writing: the stores of config/icl, in each adapter's own prompt.
"""

import json
import sys
import tomllib
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
STORES = {"conala": "python", "bash": "bash", "docstring": "docstring", "fim-python": "docstring"}
NUM_TEXTS = 6


def texts(manifest):
    """Prompts with their answers."""
    lines = (REPOSITORY / "config" / "icl" / f"{STORES[manifest['task']]}.jsonl").read_text(encoding="utf-8").splitlines()
    for example in map(json.loads, lines[:NUM_TEXTS]):
        instruction, answer = example["instruction"], example["code"]
        if "prompt" in manifest:
            yield manifest["prompt"].replace("{{ instruction }}", instruction) + answer
        else:
            head, body = instruction.split("\n", 1)
            gap, _, rest = body.partition("\n")
            yield f"<|fim_prefix|>{head}\n<|fim_suffix|>\n{rest}<|fim_middle|>{gap}"


def log_probabilities(model, ids):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    # Prompt tuning gives its virtual tokens' rows too, before the others.
    logprobs = torch.log_softmax(logits[-len(ids) :], -1)
    return [round(logprobs[position, token].item(), 5) for position, token in enumerate(ids[1:])]


tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
adapters = {}
for folder in sorted(REPOSITORY.glob("adapters/*/adapter.toml")):
    manifest = tomllib.loads(folder.read_text(encoding="utf-8"))
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder.parent).eval()
    cases = [tokenizer(text, add_special_tokens=False).input_ids for text in texts(manifest)]
    adapters[folder.parent.name] = [{"ids": ids, "logprobs": log_probabilities(model, ids)} for ids in cases]
lines = [f"{json.dumps(name)}: {json.dumps(cases)}" for name, cases in adapters.items()]
print("{\n" + ",\n".join(lines) + "\n}")
