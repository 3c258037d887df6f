"""The dequantised base: one folder for each file, made once, with nothing left of what was killed."""

import os
from pathlib import Path

import base
import pytest


@pytest.fixture
def home(tmp_path: Path, monkeypatch):
    """With a dequantiser that copies."""
    monkeypatch.setenv("LORRY_HOME", str(tmp_path / "home"))

    def dequantise(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(base, "_dequantise", dequantise)
    return tmp_path / "home" / "dequantised"


def _gguf(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "model.gguf"
    file.write_bytes(content)
    os.utime(file, (1000, 1000))
    return file


def _weights(file: Path) -> bytes:
    return (base.dequantised(str(file)) / "weights").read_bytes()


def test_files_of_one_name_are_different_bases(tmp_path: Path, home: Path):
    first, second = _gguf(tmp_path / "a", b"first"), _gguf(tmp_path / "b", b"other")
    assert (_weights(first), _weights(second)) == (b"first", b"other")
    link = tmp_path / "link.gguf"
    link.symlink_to(first)
    assert base.dequantised(str(link)) == base.dequantised(str(first))
    assert len(list(home.glob("model-*"))) == 2


def test_a_file_that_was_replaced_is_dequantised_again_and_the_old_one_is_gone(tmp_path: Path, home: Path):
    file = _gguf(tmp_path / "a", b"first")
    assert _weights(file) == b"first"
    # As long, and of the same time: as one that was restored from an archive.
    file.write_bytes(b"other")
    os.utime(file, (1000, 1000))
    assert _weights(file) == b"other"
    assert len(list(home.glob("model-*"))) == 1


def test_what_was_killed_while_dequantising_is_removed(tmp_path: Path, home: Path):
    for name in ("model.123.part", "other-456.part"):
        (home / name).mkdir(parents=True)
        (home / name / "weights").write_bytes(b"half")
    base.dequantised(str(_gguf(tmp_path / "a", b"first")))
    assert list(home.glob("*.part")) == []
