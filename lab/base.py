"""The GGUF that lorry serves as a Hugging Face folder: its weights dequantised, as QLoRA sees its base."""

import fcntl
import glob
import hashlib
import os
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
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


def file_digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits for whoever else dequantises there; what was killed in it holds nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def dequantised(base: str) -> Path:
    """The folder with model and tokenizer of `base` in f32, made at the first call (2.5 GB for 0.5 billion weights)."""
    gguf = gguf_file(base).resolve()
    # Two files of one name are two models, and so is one that was replaced by another, whatever its size and time.
    place = f"{gguf.stem}-{hashlib.sha256(os.fsencode(gguf)).hexdigest()[:12]}"
    folder = lorry_home() / "dequantised" / f"{place}-{file_digest(gguf)[:12]}"
    if not folder.is_dir():
        with _alone_in(folder.parent):
            if not folder.is_dir():
                for outdated in [*folder.parent.glob("*.part"), *folder.parent.glob(f"{glob.escape(place)}-*")]:
                    shutil.rmtree(outdated, ignore_errors=True)
                _dequantise(gguf, folder)
    return folder


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"dequantising {gguf} to {folder}", flush=True)
    unfinished = folder.with_name(f"{folder.name}.part")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
