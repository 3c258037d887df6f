"""The GGUF that lorry serves as a Hugging Face folder: its weights dequantised, as QLoRA sees its base."""

import os
import shutil
import tomllib
from pathlib import Path

from data_files import REPOSITORY

CATALOGUE = REPOSITORY / "config" / "models.toml"


class MissingModel(Exception):
    """A base is not on this machine."""


def lorry_home() -> Path:
    """Where lorry keeps its models."""
    return Path(os.environ.get("LORRY_HOME", Path.home() / ".cache" / "lorry"))


def gguf_file(base: str) -> Path:
    """The file of `base`, an id of the catalogue or a path."""
    models = tomllib.loads(CATALOGUE.read_text(encoding="utf-8"))["models"]
    named = [model["file"] for model in models if model["id"] == base]
    file = lorry_home() / "models" / named[0] if named else Path(base)
    if not file.is_file():
        raise MissingModel(f"{file} is missing: fetch it with `lorry pull {base}`, or set LORRY_HOME")
    return file


def dequantised(base: str) -> Path:
    """The folder with model and tokenizer of `base` in f32, made at the first call (2.5 GB for 0.5 billion weights)."""
    gguf = gguf_file(base)
    folder = lorry_home() / "dequantised" / gguf.stem
    if folder.is_dir() and folder.stat().st_mtime >= gguf.stat().st_mtime:
        return folder

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"dequantising {gguf} to {folder}", flush=True)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
