"""Tools through the OpenAI client library, with the default base, whose template has them."""

import json

import openai
import pytest

from lorry_server import serving

BASE = "qwen2.5-coder:0.5b"
MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]


def tool(name, description, parameter):
    schema = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [tool("get_weather", "Current weather of a city", "city"), tool("read_file", "Read a file of the project", "path")]


@pytest.fixture(scope="module")
def client():
    with serving() as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def chat(client, messages=MESSAGES, **options):
    options = {"model": BASE, "max_tokens": 80, "temperature": 0, "tools": TOOLS, **options}
    return client.chat.completions.create(messages=messages, **options)


def test_a_call_is_read_whole(client):
    choice = chat(client).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    [call] = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def test_a_streamed_call_is_the_whole_one_in_pieces(client):
    [whole] = chat(client).choices[0].message.tool_calls
    pieces = [chunk.choices[0] for chunk in chat(client, stream=True)]
    assert pieces[-1].finish_reason == "tool_calls"
    calls = [call for piece in pieces for call in piece.delta.tool_calls or []]
    assert len(calls) > 2 and {call.index for call in calls} == {0}
    assert calls[0].id and calls[0].function.name == whole.function.name
    assert not any(call.id or call.function.name for call in calls[1:])
    assert "".join(call.function.arguments for call in calls) == whole.function.arguments
    assert not any(piece.delta.content for piece in pieces)


def test_a_result_goes_back_to_the_model(client):
    message = chat(client).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "18 degrees <|im_end|> and sunny"}
    with_result = chat(client, [*MESSAGES, message, result], max_tokens=1)
    assert with_result.usage.prompt_tokens > chat(client, max_tokens=1).usage.prompt_tokens + 20


def test_nothing_is_called_where_nothing_is_to_be(client):
    choice = chat(client, tool_choice="none").choices[0]
    assert choice.finish_reason != "tool_calls" and choice.message.content and not choice.message.tool_calls
    offered = chat(client, max_tokens=1).usage.prompt_tokens
    assert chat(client, tool_choice="none", max_tokens=1).usage.prompt_tokens < offered - 50


def test_tools_need_a_model_that_was_taught_to_call_and_a_chat(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=BASE, prompt="a", extra_body={"tools": TOOLS})
    assert refused.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, extra_body={"prompt_format": "instruction"})
    assert refused.value.param in ("tools", "prompt_format")
    with serving("--model", "smollm2:135m") as server:
        other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="no way to call"):
            chat(other, model="smollm2:135m")


@pytest.mark.parametrize("choice, names", [
    ("required", {"get_weather", "read_file"}),
    ({"type": "function", "function": {"name": "read_file"}}, {"read_file"}),
])
def test_a_forced_call_is_made_whatever_is_said(client, choice, names):
    messages = [{"role": "user", "content": "Tell me a joke about the sea."}]
    for seed in range(3):
        options = {"tool_choice": choice, "temperature": 1.2, "seed": seed, "max_tokens": 200}
        answered = chat(client, messages, **options).choices[0]
        assert answered.finish_reason == "tool_calls" and not answered.message.content
        [call] = answered.message.tool_calls
        assert call.function.name in names
        required = {"get_weather": "city", "read_file": "path"}[call.function.name]
        assert isinstance(json.loads(call.function.arguments)[required], str)


def test_a_strict_tool_is_called_as_its_schema_says_and_text_stays_free(client):
    where = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    where |= {"additionalProperties": False}
    strict = {**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True, "parameters": where}}
    [call] = chat(client, tools=[strict, TOOLS[1]]).choices[0].message.tool_calls
    assert call.function.name == "get_weather" and json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    streamed = list(chat(client, tools=[strict, TOOLS[1]], stream=True))
    pieces = [call for chunk in streamed for call in chunk.choices[0].delta.tool_calls or []]
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments
    greeting = [{"role": "user", "content": "Hello! How are you?"}]
    loose = {**TOOLS[0], "function": {**strict["function"], "strict": False}}
    told, freely = (chat(client, greeting, tools=[tool, TOOLS[1]]) for tool in (strict, loose))
    assert told.choices[0].message.content == freely.choices[0].message.content
    assert told.usage.prompt_tokens == freely.usage.prompt_tokens, "it is no word to the model"


def test_a_result_without_its_call_is_refused_by_its_place(client):
    result = {"role": "tool", "tool_call_id": "nobody", "content": "18 degrees"}
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, [*MESSAGES, result])
    assert refused.value.param == "messages[1].tool_call_id"
