"""gpu.py as far as it comes without a card: over tests that are made up, and over the real lorry on the CPU, which gets less to do."""

import json
import sys

import pytest

import gpu

LORRY = gpu.ROOT / "target" / "release" / "lorry"
# What libtest prints with --nocapture --test-threads=1.
PROMISES = """
running 3 tests
test promised::a_row_has_the_same_bits ... 
thread 'promised::a_row_has_the_same_bits' panicked at tests/tiny/mod.rs:151:63:
there is no NVIDIA driver: libcuda was not found
FAILED
test promised::a_refused_model_is_an_error ... ok
test promised::of_another_machine ... ignored, for its size

failures:
"""
FIDELITY = """
running 1 test
test log_probabilities_are_within_their_bounds ... base: 0.0123 of 0.02
lora_qv: 0.0150 of 0.03
ok
"""
LESS = {"--prompt-tokens": "4", "--max-tokens": "2", "--batch": "1,2", "--num-adapters": "0,1", "--repeat": "1"}
WITH_LESS = f"""
import os, sys
arguments = [{LESS!r}.get(before, now) for before, now in zip(sys.argv, sys.argv[1:])]
os.execv({str(LORRY)!r}, [{str(LORRY)!r}, *arguments])
"""


@pytest.fixture
def binaries(tmp_path, monkeypatch):
    """Writes Python programs to where gpu.py looks for binaries."""
    monkeypatch.setattr(gpu, "BINARIES", tmp_path)

    def write(**programs):
        for name, program in programs.items():
            (tmp_path / name).write_text(f"#!{sys.executable}\n{program}")
            (tmp_path / name).chmod(0o755)

    return write


@pytest.fixture
def run(monkeypatch, capfd):
    """The exit status of gpu.py, and the lines it prints after that of the card."""

    def of(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        status = gpu.main()
        card, *lines = map(json.loads, capfd.readouterr().out.splitlines())
        assert set(card) == {"card"}
        return status, lines

    return of


def test_every_test_is_reported_with_its_result(binaries, run):
    binaries(promises_gpu=f"print({PROMISES!r})\nraise SystemExit(101)", fidelity_gpu=f"print({FIDELITY!r})")
    status, lines = run("test")
    assert status == 1
    assert lines == [
        {"test": "promised::a_row_has_the_same_bits", "result": "FAILED"},
        {"test": "promised::a_refused_model_is_an_error", "result": "ok"},
        {"test": "promised::of_another_machine", "result": "ignored"},
        {"binary": "promises_gpu", "exit": 101, "last_lines": [*PROMISES.splitlines(keepends=True), "\n"][-12:]},
        {"fidelity": "base: 0.0123 of 0.02"},
        {"fidelity": "lora_qv: 0.0150 of 0.03"},
        {"test": "log_probabilities_are_within_their_bounds", "result": "ok"},
        {"binary": "fidelity_gpu", "exit": 0},
    ]


def test_tests_that_pass_on_the_card_are_asked_for_by_its_variable(binaries, run):
    passes_there = "import os\nraise SystemExit(os.environ['LORRY_TEST_GPU'] != '1')"
    binaries(promises_gpu=passes_there, fidelity_gpu=passes_there)
    assert run("test") == (0, [{"binary": name, "exit": 0} for name in gpu.TESTS])


def test_what_has_no_time_left_is_said(run):
    assert run("test", "--seconds", "5") == (1, [{"binary": name, "left_out": "no time"} for name in gpu.TESTS])
    status, lines = run("bench", "--seconds", "5")
    assert status == 0
    assert [line["shape"] for line in lines if line["left_out"] == "no time"] == ["0.5b", "0.5b", "7b", "7b", "32b"]


def test_what_takes_too_long_is_ended():
    *said, status = gpu.lines([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 2)
    assert (said, status) == (["begun\n"], -9)


def test_the_bench_gets_its_lines_from_the_real_lorry(binaries, run):
    binaries(lorry=WITH_LESS)
    status, lines = run("bench", "--device", "cpu", "--shapes", "0.5b")
    assert status == 0
    # What the device can do at most, where that can be measured.
    lines = [line for line in lines if "batch" in line]
    assert [(line["num_adapters"], line["batch"]) for line in lines] == [(0, 1), (0, 2), (0, 1), (0, 2), (1, 1), (1, 2)]
    assert all(line["device"].startswith("CPU") and line["decode_tok_s"] > 0 for line in lines)


def test_a_bench_that_fails_is_said(binaries, run):
    binaries(lorry="raise SystemExit(3)")
    assert run("bench", "--shapes", "32b") == (1, [{"shape": "32b", "exit": 3}])
