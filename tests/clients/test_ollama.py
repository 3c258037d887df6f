"""Ollama's own client library against real models."""

import ollama
import pytest

from lorry_server import REPOSITORY, serving

BASE = "smollm2:135m"
CODER = "qwen2.5-coder:0.5b"
ADAPTER = f"{CODER}-conala"
OPTIONS = {"temperature": 0, "num_predict": 12, "num_ctx": 4096}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client():
    with serving("--model", BASE, "--adapters", "") as server:
        yield ollama.Client(server.url)


@pytest.fixture(scope="module")
def coder():
    with serving("--model", CODER, "--adapters", REPOSITORY / "adapters") as server:
        yield ollama.Client(server.url)


def test_a_streamed_generation_says_the_same_as_a_whole_one(client):
    whole = client.generate(BASE, "def fibonacci(n):\n", raw=True, options=OPTIONS)
    parts = list(client.generate(BASE, "def fibonacci(n):\n", raw=True, options=OPTIONS, stream=True))
    assert whole.response and "".join(part.response for part in parts) == whole.response
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (whole.done_reason, whole.eval_count) == ("length", 12) == (parts[-1].done_reason, parts[-1].eval_count)
    assert whole.total_duration >= whole.eval_duration > 0


def test_a_prompt_that_is_not_raw_is_a_chat(client):
    said = client.generate(BASE, QUESTION[0]["content"], system="Answer briefly.", options=OPTIONS)
    messages = [{"role": "system", "content": "Answer briefly."}, *QUESTION]
    chat = client.chat(BASE, messages, options=OPTIONS)
    assert said.response and chat.message.content == said.response
    assert chat.prompt_eval_count == said.prompt_eval_count
    raw = client.generate(BASE, QUESTION[0]["content"], raw=True, options=OPTIONS)
    assert raw.prompt_eval_count < said.prompt_eval_count


def test_a_streamed_chat_says_the_same_as_a_whole_one(client):
    whole = client.chat(BASE, QUESTION, options=OPTIONS)
    parts = list(client.chat("smollm2:latest", QUESTION, options=OPTIONS, stream=True))
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert all(part.message.role == "assistant" and part.model == BASE for part in parts)


def test_models_are_loaded_listed_and_shown(client):
    assert client.generate(BASE).done_reason == "load"
    [model] = client.list().models
    assert (model.model, model.details.family, model.details.format) == (BASE, "llama", "gguf")
    assert model.size > 50_000_000 and model.details.parameter_size.endswith("M")
    [resident] = client.ps().models
    assert resident.model == BASE and resident.context_length > 0
    shown = client.show(BASE)
    assert shown.modelinfo["llama.context_length"] == resident.context_length
    assert "completion" in shown.capabilities and "insert" not in shown.capabilities


def test_what_is_not_served_is_said_in_a_sentence(client):
    for ask in (
        lambda: client.pull("llama3"),
        lambda: client.embed(BASE, "a"),
        lambda: client.generate(BASE, "a", template="{{ .Prompt }}"),
        lambda: client.generate("llama3", "a"),
    ):
        with pytest.raises(ollama.ResponseError) as refused:
            ask()
        assert " " in refused.value.error and "{" not in refused.value.error.replace("{{ .Prompt }}", "")


def test_a_gap_is_filled(coder):
    options = {"temperature": 0, "num_predict": 24}
    filled = coder.generate(CODER, "def add(a, b):\n    return ", suffix="\n\nprint(add(1, 2))\n", options=options)
    assert filled.response.strip().startswith("a + b")
    shown = coder.show(CODER)
    assert ".Suffix" in shown.template and "insert" in shown.capabilities


def test_adapters_are_models(coder):
    adapters = {f"{CODER}-{path.parent.name}" for path in REPOSITORY.glob("adapters/*/adapter_config.json")}
    assert {model.model for model in coder.list().models} == {CODER, *adapters}
    intent = [{"role": "user", "content": "check if all elements in list `mylist` are the same"}]
    said = coder.chat(ADAPTER, intent, options={"temperature": 0, "num_predict": 48})
    assert said.model == ADAPTER and "mylist" in said.message.content
    assert ADAPTER in {model.model for model in coder.ps().models}


def test_tools_are_called_whole_and_streamed(coder):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    weather = {"name": "get_weather", "description": "Current weather of a city", "parameters": schema}
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    options = {"temperature": 0, "num_predict": 80}
    ask = {"messages": question, "tools": [{"type": "function", "function": weather}], "options": options}
    assert "tools" in coder.show(CODER).capabilities
    whole = coder.chat(CODER, **ask).message
    [call] = whole.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Paris"})
    calls = [call for part in coder.chat(CODER, stream=True, **ask) for call in part.message.tool_calls or []]
    assert [call.function.arguments for call in calls] == [{"city": "Paris"}]
    result = {"role": "tool", "content": "18 degrees and sunny", "tool_name": "get_weather"}
    asked = coder.chat(CODER, **{**ask, "options": {"num_predict": 1}})
    answered = coder.chat(CODER, [*question, whole, result], tools=ask["tools"], options={"num_predict": 1})
    assert answered.prompt_eval_count > asked.prompt_eval_count + 20
