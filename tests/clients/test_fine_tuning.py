"""Fine-tuning with OpenAI's own client, unmodified: once with a trainer that trains nothing, for every call that the client
has, and once with the lab's, for a few steps."""

import json
import subprocess
import sys
import time

import openai
import pytest

from lorry_server import REPOSITORY, serving

BASE = "smollm2:135m"
MAX_SECONDS = 600
LAB_PYTHON = REPOSITORY / ".venv-lab" / "bin" / "python"
NEEDS_THE_LAB = pytest.mark.skipif(
    not (REPOSITORY / ".venv-lab" / "ready-to-train").exists(),
    reason="skipped: it needs .venv-lab: make .venv-lab/ready-to-train",
)
# Leaves a LoRA of rank 1 that changes a little.
TRAINER = """
import json, struct, sys, time
from pathlib import Path
recipe, _, out, _ = sys.argv[1:]
def say(**line):
    print(json.dumps(line), flush=True)
say(type="begin", step=0, steps=2, examples=9, validation_examples=1, left_out=0)
say(type="validation", step=0, loss=3.0)
say(type="step", step=1, loss=2.5, tokens=40)
while (Path(__file__).parent / "hold").exists():
    time.sleep(0.05)
say(type="step", step=2, loss=2.0, tokens=80)
say(type="validation", step=2, loss=1.5)
width, header, data = 576, {}, b""
for layer in range(30):
    for part, shape in (("lora_A", [1, width]), ("lora_B", [width, 1])):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.{part}.weight"
        tensor = struct.pack(f"<{width}f", *([0.01] * width))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(tensor)]}
        data += tensor
head = json.dumps(header).encode()
folder = Path(out)
folder.mkdir()
(folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
(folder / "adapter_config.json").write_text(json.dumps(config))
"""


def chats(count):
    lines = (
        {"messages": [{"role": "user", "content": f"Count to {n}."}, {"role": "assistant", "content": f"one to {n}"}]}
        for n in range(count)
    )
    return "\n".join(json.dumps(line) for line in lines).encode()


def config_with(folder, *command):
    config = folder / "lorry.toml"
    config.write_text(
        f"""
        [server]
        admin_key = "admin"
        [adapters]
        dir = {json.dumps(str(folder / "adapters"))}
        [fine_tuning]
        enabled = true
        dir = {json.dumps(str(folder / "fine_tuning"))}
        command = {json.dumps([str(part) for part in command])}
        """
    )
    return config


def served_with(folder, *command):
    return serving("--model", BASE, "--config", config_with(folder, *command))


def client_of(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="admin", max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fine_tuning")


@pytest.fixture(scope="module")
def client(folder):
    (folder / "trainer.py").write_text(TRAINER)
    with served_with(folder, sys.executable, folder / "trainer.py") as server:
        yield client_of(server)


def until(client, job, status):
    """The job, when it has this status."""
    deadline = time.monotonic() + MAX_SECONDS
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job.id)
        if job.status == status:
            return job
        assert job.finished_at is None, job
        time.sleep(0.1)
    raise AssertionError(f"not {status} after {MAX_SECONDS} s: {job}")


def test_files_are_uploaded_listed_read_and_deleted(client):
    first = client.files.create(file=("first.jsonl", chats(10)), purpose="fine-tune")
    second = client.files.create(file=("second.jsonl", chats(11)), purpose="fine-tune")
    assert (first.object, first.filename, first.bytes) == ("file", "first.jsonl", len(chats(10)))
    assert client.files.retrieve(first.id) == first
    assert client.files.content(first.id).read() == chats(10)
    # The client asks for further pages by itself.
    assert [file.id for file in client.files.list(limit=1)][:2] == [second.id, first.id]
    assert [file.id for file in client.files.list(order="asc", purpose="fine-tune")][-2:] == [first.id, second.id]
    assert client.files.delete(first.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("a.jsonl", chats(10)), purpose="batch")


def test_a_job_ends_as_a_model_of_the_server(client):
    file = client.files.create(file=("mine.jsonl", chats(10)), purpose="fine-tune")
    hyperparameters = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix="mine",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    )
    assert (job.object, job.model, job.seed, job.hyperparameters.n_epochs) == ("fine_tuning.job", BASE, 7, 2)
    job = until(client, job, "succeeded")
    assert job.fine_tuned_model.startswith(f"{BASE}-ft-mine-") and job.trained_tokens == 80
    assert job.fine_tuned_model in [model.id for model in client.models.list()]
    messages = [{"role": "user", "content": "Count to 3."}]
    reply = client.chat.completions.create(model=job.fine_tuned_model, messages=messages, max_tokens=4)
    assert reply.model == job.fine_tuned_model

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert events[0].message == "The job has succeeded" and events[0].type == "message"
    assert [event.data["train_loss"] for event in events if event.type == "metrics" and "train_loss" in event.data] == [2.0, 2.5]
    [checkpoint] = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == job.fine_tuned_model
    assert (checkpoint.step_number, checkpoint.metrics.valid_loss) == (2, 1.5)
    assert job.id in [known.id for known in client.fine_tuning.jobs.list(limit=1)]


@NEEDS_THE_LAB
def test_the_bench_of_pairs_says_what_a_job_gives(tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)
    config = config_with(tmp_path, sys.executable, tmp_path / "trainer.py")
    for name, count in [("pairs", 10), ("held_out", 2)]:
        (tmp_path / name).write_bytes(chats(count))
    command = [LAB_PYTHON, REPOSITORY / "benches" / "pairs.py", tmp_path / "pairs", tmp_path / "held_out"]
    result = subprocess.run(
        [*command, "--model", BASE, "--epochs", "1", "--config", config], stdout=subprocess.PIPE, check=True
    )
    base, adapter, alone = [json.loads(line) for line in result.stdout.splitlines()]
    assert (base["answers"], adapter["answers"]) == ("base", "adapter")
    assert (adapter["validation_loss_of_base"], adapter["validation_loss"]) == (3.0, 1.5)
    assert (adapter["em@1"] - base["em@1"]) / 50 == alone["adapter_alone"] - alone["base_alone"]


def test_a_job_is_cancelled(client, folder):
    file = client.files.create(file=("mine.jsonl", chats(10)), purpose="fine-tune")
    (folder / "hold").touch()
    job = until(client, client.fine_tuning.jobs.create(model=BASE, training_file=file.id), "running")
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    (folder / "hold").unlink()
    assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model is None


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "a"}}]}, "integrations"),
        ({"suffix": "a b"}, "suffix"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(client, wrong, param):
    file = client.files.create(file=("mine.jsonl", chats(10)), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as refusal:
        client.fine_tuning.jobs.create(**{"model": BASE, "training_file": file.id, **wrong})
    assert refusal.value.param == param


def test_a_bad_line_is_refused_with_its_number_and_field(client):
    text = chats(10) + b'\n{"messages": [{"role": "user"}]}'
    file = client.files.create(file=("mine.jsonl", text), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match=r"line 11: `messages\[0\].content` must be a string") as refusal:
        client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    assert refusal.value.param == "training_file"


@pytest.fixture(scope="module")
def lab_client(tmp_path_factory):
    with served_with(tmp_path_factory.mktemp("lab"), LAB_PYTHON, REPOSITORY / "lab" / "train.py") as server:
        yield client_of(server)


@NEEDS_THE_LAB
@pytest.mark.parametrize(
    ("kind", "own", "served"),
    [
        ("supervised", {}, {"method": "lora", "max_rank": 16, "num_virtual_tokens": 0}),
        ("lora", {"rank": 4}, {"method": "lora", "max_rank": 4, "num_virtual_tokens": 0}),
        ("ia3", {}, {"method": "ia3", "num_virtual_tokens": 0}),
        ("prompt", {"num_virtual_tokens": 7}, {"method": "prompt-tuning", "num_virtual_tokens": 7}),
        ("prefix", {"num_virtual_tokens": 5}, {"method": "prefix-tuning", "num_virtual_tokens": 5}),
    ],
)
def test_the_lab_trains_what_is_served_by_every_method(lab_client, kind, own, served):
    client = lab_client
    file = client.files.create(file=("mine.jsonl", chats(20)), purpose="fine-tune")
    hyperparameters = {"n_epochs": 2, "batch_size": 9, "learning_rate_multiplier": 0.9}
    method = {"type": kind, kind: {**own, "hyperparameters": hyperparameters}}
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, suffix=kind, seed=1, method=method)
    assert job.to_dict()["method"] == method
    job = until(client, job, "succeeded")
    events = list(client.fine_tuning.jobs.list_events(job.id))
    losses = [event.data["train_loss"] for event in events if event.data and "train_loss" in event.data]
    # The latest first.
    assert len(losses) == 4 and losses[0] < losses[-1]
    assert "Training ended at step 4/4: all steps are done" in [event.message for event in events]
    [checkpoint] = client.fine_tuning.jobs.checkpoints.list(job.id)
    of_base = [event.data["valid_loss"] for event in events if event.data and "valid_loss" in event.data][-1]
    assert checkpoint.metrics.valid_loss < of_base
    name = job.fine_tuned_model.removeprefix(f"{BASE}-")
    adapter = client.get(f"/adapters/{name}", cast_to=object)
    known = {"method": adapter["method"], **adapter["coverage"]}
    assert served.items() <= known.items() and adapter["phase"] == "ready", adapter
    assert not adapter["self_test"]["is_inert"]
    messages = [{"role": "user", "content": "Count to 3."}]
    reply = client.chat.completions.create(model=job.fine_tuned_model, messages=messages, max_tokens=8)
    assert reply.choices[0].message.content


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("supervised", {"rank": 4}),
        ("lora", {"num_virtual_tokens": 4}),
        ("lora", {"lora_alpha": 8}),
        ("ia3", {"rank": 4}),
        ("prompt", {"prompt_tuning_init": "TEXT"}),
        ("prefix", {"prefix_projection": True}),
    ],
)
def test_what_a_method_has_not_is_refused_by_its_path(client, kind, own):
    file = client.files.create(file=("mine.jsonl", chats(10)), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as refusal:
        client.fine_tuning.jobs.create(model=BASE, training_file=file.id, method={"type": kind, kind: own})
    [name] = own
    assert refusal.value.param == f"method.{kind}.{name}"
