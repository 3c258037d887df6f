"""Libraries that applications are made of, unmodified, against the default base and its adapters."""

import json
import os
import subprocess
import sys

import pytest

BASE = "qwen2.5-coder:0.5b"
ADAPTER = f"{BASE}-conala"
INTENT = "check if all elements in list `mylist` are the same"


@pytest.fixture(scope="module")
def endpoint(server):
    return f"{server.url}/v1"


def test_langchain_completes_several_prompts_at_once(endpoint):
    from langchain_openai import OpenAI

    model = OpenAI(model=BASE, base_url=endpoint, api_key="none", temperature=0, max_tokens=8, max_retries=0)
    prompts = ["def fibonacci(n):\n", "def factorial(n):\n"]
    together = model.generate(prompts).generations
    assert [generation[0].text for generation in together] == [model.invoke(prompt) for prompt in prompts]


def test_langchain_chats_streams_and_counts(endpoint):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model=ADAPTER, base_url=endpoint, api_key="none", temperature=0, max_tokens=32, max_retries=0, stream_usage=True
    )
    plain = model.invoke(INTENT)
    chunks = list(model.stream(INTENT))
    assert "".join(chunk.content for chunk in chunks) == plain.content
    streamed = sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata)
    assert streamed == plain.usage_metadata["output_tokens"]


def test_litellm_chats_and_completes_text(endpoint):
    import litellm

    options = {"api_base": endpoint, "api_key": "none", "temperature": 0, "max_tokens": 16}
    messages = [{"role": "user", "content": INTENT}]
    chat = litellm.completion(model=f"openai/{ADAPTER}", messages=messages, **options)
    assert chat.choices[0].message.content
    stream = litellm.completion(model=f"openai/{ADAPTER}", messages=messages, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == chat.choices[0].message.content
    text = litellm.text_completion(
        model=f"text-completion-openai/{BASE}", prompt="def add(a, b):\n    return ", suffix="\n", **options
    )
    assert "a + b" in text.choices[0].text


def test_llm_answers_in_the_terminal(endpoint, tmp_path):
    models = [{"model_id": "lorry", "model_name": ADAPTER, "api_base": endpoint, "api_key_name": None}]
    # Of JSON, YAML takes all.
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))
    run = subprocess.run(
        [sys.executable, "-m", "llm", "--model", "lorry", "-o", "temperature", "0", "-o", "max_tokens", "32", INTENT],
        env={**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert "mylist" in run.stdout


def test_mistral_fills_gaps_and_chats(server):
    from mistralai.client import Mistral

    client = Mistral(api_key="none", server_url=server.url)
    gap = {"model": BASE, "prompt": "def add(a, b):\n    return ", "suffix": "\n\nprint(add(1, 2))\n", "max_tokens": 16}
    filled = client.fim.complete(**gap, temperature=0).choices[0].message.content
    assert "a + b" in filled
    streamed = client.fim.stream(**gap, temperature=0)
    assert "".join(event.data.choices[0].delta.content for event in streamed) == filled
    chat = client.chat.complete(
        model=ADAPTER, messages=[{"role": "user", "content": INTENT}], temperature=0, max_tokens=32
    )
    assert "mylist" in chat.choices[0].message.content
