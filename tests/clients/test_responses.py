"""The Responses interface through the OpenAI client library."""

import json

import openai
import pytest

from lorry_server import serving
from test_tools import BASE, TOOLS

FUNCTIONS = [{"type": "function", **tool["function"]} for tool in TOOLS]


@pytest.fixture(scope="module")
def client():
    with serving() as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def respond(client, text, **options):
    options = {"model": BASE, "max_output_tokens": 48, "temperature": 0, **options}
    return client.responses.create(input=text, **options)


def test_a_response_is_what_a_chat_says(client):
    response = respond(client, "Say hi.", instructions="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hi."}]
    chat = client.chat.completions.create(model=BASE, messages=messages, max_tokens=48, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    assert response.status == "completed" and response.usage.output_tokens == chat.usage.completion_tokens


def test_a_stream_tells_the_whole_response(client):
    whole = respond(client, "Count from one to five.")
    events = list(respond(client, "Count from one to five.", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text == whole.output_text


def test_a_conversation_goes_on_from_what_is_kept(client):
    first = respond(client, "My name is Ada. Say hi.")
    second = respond(client, "What is my name?", previous_response_id=first.id)
    messages = [
        {"role": "user", "content": "My name is Ada. Say hi."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "What is my name?"},
    ]
    assert second.output_text == respond(client, messages).output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    unkept = respond(client, "Say hi.", store=False)
    with pytest.raises(openai.NotFoundError) as unknown:
        respond(client, "Again.", previous_response_id=unkept.id)
    assert unknown.value.param == "previous_response_id"


def test_a_function_is_called_and_its_result_goes_back(client):
    response = respond(client, "What is the weather in Paris?", tools=FUNCTIONS)
    [call] = response.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"city": "Paris"})
    events = list(respond(client, "What is the weather in Paris?", tools=FUNCTIONS, stream=True))
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert done.arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"}
    answered = respond(client, [result], tools=FUNCTIONS, previous_response_id=response.id)
    assert answered.usage.input_tokens > response.usage.input_tokens


def test_what_is_cut_off_is_incomplete_and_what_is_not_served_is_refused(client):
    cut = respond(client, "Count to one hundred.", max_output_tokens=4)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    for field, value in [("background", True), ("truncation", "auto"), ("reasoning", {"effort": "high"})]:
        with pytest.raises(openai.BadRequestError) as refused:
            respond(client, "a", **{field: value})
        assert refused.value.param.startswith(field)


def test_freeform_tools_and_namespaces_are_called_as_they_were_offered(client):
    shell = {"type": "custom", "name": "shell", "description": "Runs a command line."}
    notes = {"type": "namespace", "name": "notes", "description": "Of notes.", "tools": [FUNCTIONS[1]]}
    search = {"type": "web_search", "external_web_access": False}
    options = {"tools": [shell, notes, search], "tool_choice": {"type": "custom", "name": "shell"}}
    response = respond(client, "List the files here.", **options)
    [call] = response.output
    assert (call.type, call.name) == ("custom_tool_call", "shell") and call.input
    assert [tool.type for tool in response.tools] == ["custom", "namespace"]
    events = list(respond(client, "List the files here.", stream=True, **options))
    [done] = [event for event in events if event.type == "response.custom_tool_call_input.done"]
    assert done.input == call.input
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "notes.txt"}
    named = {"type": "function", "name": "read_file", "namespace": "notes"}
    answered = respond(client, [result], previous_response_id=response.id, tools=[notes], extra_body={"tool_choice": named})
    [call] = answered.output
    assert (call.type, call.namespace, call.name) == ("function_call", "notes", "read_file")


@pytest.mark.parametrize("tool", [{"type": "web_search"}, {"type": "local_shell"}, {"type": "code_interpreter", "container": {"type": "auto"}}])
def test_a_tool_that_the_server_would_have_to_run_is_refused(client, tool):
    with pytest.raises(openai.BadRequestError) as refused:
        respond(client, "a", tools=[*FUNCTIONS, tool])
    assert refused.value.param == "tools[2].type"


def test_errors_name_what_the_client_sent(client):
    orphan = {"type": "function_call_output", "call_id": "nobody", "output": "x"}
    for options, param in [
        ({"input": [{"role": "user", "content": "a"}, orphan], "instructions": "b"}, "input[1].call_id"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "name": "x", "schema": 1}}}, "text.format.schema"),
        ({"input": "a", "tools": [{"type": "function", "name": "a b", "parameters": {}}]}, "tools[0].name"),
        ({"input": "word " * 60_000}, "input"),
    ]:
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model=BASE, **options)
        assert refused.value.param == param
