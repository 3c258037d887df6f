"""Log-probabilities of the server against float32 references, base and adapters."""

import json
import shutil
import subprocess
import sys

import pytest

from lorry_server import FIXTURES, serving

FIDELITY = FIXTURES.parent / "tools" / "fidelity.py"
BASES = {"smollm2:135m": "smollm2-135m", "qwen2.5-coder:0.5b": "qwen2.5-coder-0.5b"}
ADAPTERS = [
    "lora_qv",
    "lora_all",
    "lora_patterns",
    "lora_layers",
    "lora_bias",
    "lora_embed",
    "rslora",
    "dora",
    "ia3",
    "ia3_wide",
    "prompt",
    "prefix",
]

pytestmark = pytest.mark.skipif(not FIDELITY.exists(), reason="skipped: the references are not beside the repository")


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory):
    # lorry keeps generations in the folder that it serves, and the fixtures are to stay as they are.
    adapters = shutil.copytree(FIXTURES / BASES[request.param] / "adapters", tmp_path_factory.mktemp("adapters") / "served")
    with serving("--model", request.param, "--adapters", adapters) as server:
        yield request.param, server


@pytest.mark.parametrize("reference", ["base", *ADAPTERS])
def test_log_probabilities_are_within_the_bound_of(base, reference):
    model, server = base
    folder = FIXTURES / BASES[model]
    bound = json.loads((folder / "bounds.json").read_text())[reference]["bound"]
    path, name = folder / "base.json", model
    if reference != "base":
        path, name = folder / "adapters" / f"{reference}.json", f"{model}-{reference}"
    run = subprocess.run([sys.executable, FIDELITY, server.url, name, path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["mean_abs_dlogp"] <= bound, run.stdout
