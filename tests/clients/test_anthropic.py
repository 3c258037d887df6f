"""Anthropic's own client library against the default base, whose template has tools."""

import anthropic
import pytest

from lorry_server import serving

BASE = "qwen2.5-coder:0.5b"
CLAUDE = "claude-haiku-4-5"
# The library has no argument for it any more.
LIKELIEST = {"temperature": 0}
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOLS = [
    {
        "name": "get_weather",
        "description": "Current weather of a city",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
]


@pytest.fixture(scope="module")
def client():
    with serving(environment={f"LORRY__SERVER__MODEL_ALIASES__{CLAUDE}": BASE}) as server:
        yield anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=300)


def create(client, messages=QUESTION, **options):
    options = {"model": BASE, "max_tokens": 80, "messages": messages, "extra_body": LIKELIEST, **options}
    return client.messages.create(**options)


def test_a_message_has_blocks_a_reason_and_its_costs(client):
    message = create(client, max_tokens=8, system=[{"type": "text", "text": "Be brief."}])
    assert message.content[0].text and message.model == BASE and message.id.startswith("msg_")
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 8)
    again = create(client, max_tokens=8, system="Be brief.")
    assert again.content[0].text == message.content[0].text
    assert again.usage.cache_read_input_tokens > 0
    whole = message.usage.input_tokens + message.usage.cache_read_input_tokens
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == whole
    counted = client.messages.count_tokens(model=BASE, messages=QUESTION, system="Be brief.")
    assert counted.input_tokens == whole


def test_the_stop_sequence_that_ended_a_message_is_named(client):
    question = [{"role": "user", "content": "Count from 1 to 9, with commas."}]
    message = create(client, question, stop_sequences=["\n\n\n\n", "4"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "4")


def test_a_streamed_message_says_the_same_as_a_whole_one(client):
    whole = create(client, max_tokens=16)
    with client.messages.stream(model=BASE, max_tokens=16, messages=QUESTION, extra_body=LIKELIEST) as stream:
        streamed = stream.get_final_message()
    assert [block.text for block in streamed.content] == [block.text for block in whole.content]
    assert (streamed.stop_reason, streamed.usage.output_tokens) == ("max_tokens", 16)


def test_a_call_is_a_block_whole_and_streamed_and_its_result_is_read(client):
    whole = create(client, tools=TOOLS)
    assert whole.stop_reason == "tool_use"
    [call] = [block for block in whole.content if block.type == "tool_use"]
    assert (call.name, call.input) == ("get_weather", {"city": "Paris"})
    options = {"model": BASE, "max_tokens": 80, "messages": QUESTION, "tools": TOOLS, "extra_body": LIKELIEST}
    with client.messages.stream(**options) as stream:
        streamed = stream.get_final_message()
    [streamed_call] = [block for block in streamed.content if block.type == "tool_use"]
    assert (streamed_call.name, streamed_call.input) == (call.name, call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "18 degrees and sunny"}
    answered = [*QUESTION, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    count = lambda messages: client.messages.count_tokens(model=BASE, messages=messages, tools=TOOLS).input_tokens
    assert count(answered) > count(QUESTION) + 20
    assert create(client, answered, tools=TOOLS, max_tokens=1).usage.output_tokens == 1


def test_models_are_listed_with_the_names_that_stand_for_them(client):
    assert [model.id for model in client.models.list()][0] == BASE
    assert CLAUDE in {model.id for model in client.models.list()}
    assert create(client, model=CLAUDE, max_tokens=1).model == BASE


def test_errors_are_the_librarys_own(client):
    with pytest.raises(anthropic.NotFoundError) as unknown:
        create(client, model="claude-unknown")
    assert unknown.value.body["error"]["type"] == "not_found_error" and unknown.value.body["request_id"]
    with pytest.raises(anthropic.BadRequestError) as refused:
        create(client, [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://a"}}]}])
    assert "messages[0].content[0]" in str(refused.value)


def test_an_answer_that_is_begun_is_gone_on_with(client):
    begun = [{"role": "user", "content": "Count from one to five."}, {"role": "assistant", "content": "one, two,"}]
    message = create(client, begun, max_tokens=8)
    assert "three" in message.content[0].text and "one" not in message.content[0].text
    counted = client.messages.count_tokens(model=BASE, messages=begun)
    assert counted.input_tokens > client.messages.count_tokens(model=BASE, messages=begun[:1]).input_tokens
