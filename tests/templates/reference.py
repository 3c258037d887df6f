"""Writes reference.json: what transformers renders of conversations by chat templates.

The templates beside this file are ours: between them they have every construct of those that public models come with, one for
each way of wording chats. Of other templates, such as those that llama.cpp and TRL carry, the same is written with

    python tests/templates/reference.py --templates FOLDER --out reference.json
    LORRY_TEMPLATES=$PWD/reference.json cargo test --release --test templates

    python -m venv /tmp/venv && /tmp/venv/bin/pip install -r tests/families/requirements.txt
    /tmp/venv/bin/python tests/templates/reference.py
"""

import argparse
import copy
import json
from pathlib import Path

import jinja2
from transformers.utils import chat_template_utils

HERE = Path(__file__).parent
BOS, EOS = "<s>", "</s>"


class Now:
    """A time that stays as it is asked for, for the test to write its own there."""

    @staticmethod
    def now():
        return Now

    @staticmethod
    def strftime(format):
        return f"strftime({format})"


chat_template_utils.datetime = Now


def tool(name, description, properties, required):
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    tool(
        "read_file",
        "Read \"a\" file's text & <lines>",
        {
            "path": {"type": "string", "description": "Where it is"},
            "lines": {"type": "array", "items": {"type": "integer"}, "description": "From and to"},
            "mode": {"type": "string", "enum": ["text", "binary"], "default": "text"},
        },
        ["path"],
    ),
    tool("now", "What time it is — «ici»", {}, []),
]
ODD_TOOL = tool(
    "odd",
    "Line\nand line",
    {
        "any": {},
        "either": {"anyOf": [{"type": "string"}, {"type": "integer"}], "description": "This or that"},
        "optional": {"type": ["string", "null"], "default": None},
        "nested": {"type": "object", "properties": {"z": {"type": "number"}, "a": {"type": "boolean"}}, "required": ["z"]},
    },
    ["nested", "any"],
)

SYSTEM = {"role": "system", "content": "You write Rust.\nBe brief."}
USER = {"role": "user", "content": "Sort a list."}
ANSWER = {"role": "assistant", "content": "list.sort();"}


def call(id, name, arguments):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


READ = {"path": "src/<main>.rs", "lines": [1, 20], "strict": True, "ratio": 0.5, "rest": [1e20, -1.5e-07, 12345678901234567890], "mode": None, "of": {"à": "é\n\"'&"}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [call("abcdefgh1", "read_file", READ)]}
TWO_CALLS = {
    "role": "assistant",
    "content": "I look.",
    "tool_calls": [call("abcdefgh2", "read_file", {"path": "a"}), call("abcdefgh3", "now", {})],
}


def result(id, content):
    return {"role": "tool", "tool_call_id": id, "content": content}


# As clients send them.
CONVERSATIONS = {
    "a question": {"messages": [USER]},
    "a question and no prompt for an answer": {"messages": [USER], "add_generation_prompt": False},
    "a system message": {"messages": [SYSTEM, USER]},
    "an empty system message": {"messages": [{"role": "system", "content": ""}, USER]},
    "several turns": {"messages": [SYSTEM, USER, ANSWER, {"role": "user", "content": "  In reverse?\n"}]},
    "an answered question": {"messages": [USER, ANSWER], "add_generation_prompt": False},
    "other scripts and every kind of quote": {
        "messages": [
            {"role": "user", "content": "naïve «日本語» 🚚👩‍👩‍👧 \\n \"a\" 'b' <c> & {{ d }} {% e %}\t\u00a0\u2028|"},
            {"role": "assistant", "content": "<think>\nWhy?\n</think>\n\nBecause é.\n\n"},
            {"role": "user", "content": "And?"},
        ]
    },
    "two messages of one role": {"messages": [USER, USER, ANSWER, ANSWER, USER]},
    "a system message in the middle": {"messages": [USER, ANSWER, SYSTEM, USER]},
    "content in parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Sort "}, {"type": "text", "text": "it."}]}]
    },
    "thoughts beside the answer": {
        "messages": [USER, {"role": "assistant", "content": "Sorted.", "reasoning_content": "They ask.\nI sort."}, USER]
    },
    "thoughts under another name": {
        "messages": [USER, {"role": "assistant", "content": "Sorted.", "reasoning": "I sort."}],
        "add_generation_prompt": False,
    },
    "fields that are null": {
        "messages": [USER, ANSWER | {"tool_calls": None, "reasoning_content": None}, USER, ANSWER | {"tool_calls": []}, USER]
    },
    "tools": {"messages": [SYSTEM, USER], "tools": TOOLS},
    "tools without a system message": {"messages": [USER], "tools": TOOLS[1:]},
    "a tool with an unusual schema": {"messages": [SYSTEM, USER], "tools": [ODD_TOOL]},
    "a call and its result": {
        "messages": [SYSTEM, USER, CALLS, result("abcdefgh1", '{"text": "fn main() {}"}')],
        "tools": TOOLS,
    },
    "two calls, their results and an answer": {
        "messages": [USER, TWO_CALLS, result("abcdefgh2", "fn"), result("abcdefgh3", "12:00 é"), ANSWER, USER],
        "tools": TOOLS,
    },
    "calls in several steps": {
        "messages": [
            USER,
            CALLS | {"reasoning_content": "First the file."},
            result("abcdefgh1", "<think>no</think>"),
            {"role": "assistant", "content": "", "tool_calls": [call("abcdefgh4", "now", {})]},
            result("abcdefgh4", "12:00"),
        ],
        "tools": TOOLS,
    },
    "a call that nothing offers": {"messages": [USER, CALLS, result("abcdefgh1", "x")]},
    "an answer to go on with": {
        "messages": [SYSTEM, USER, {"role": "assistant", "content": "list."}],
        "continue_final_message": True,
    },
    "an answer to go on with that ends in space": {
        "messages": [USER, {"role": "assistant", "content": "```rust\nlet  "}],
        "continue_final_message": True,
    },
}


# What a template may take of an assistant that only calls, and of the arguments.
FORMS = [("", json.loads), (None, json.loads), ("", str), (None, str)]


def in_templates_form(message, form):
    """What a server gives a template: text as content, no field that is null."""
    silence, arguments = form
    message = {name: value for name, value in copy.deepcopy(message).items() if value is not None}
    content = message.get("content", "")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    if not message.get("tool_calls", True):
        del message["tool_calls"]
    for made in message.get("tool_calls", []):
        made["function"]["arguments"] = arguments(made["function"]["arguments"])
    message["content"] = content if content or "tool_calls" not in message else silence
    return message


def rendered(template, conversation, form):
    """The text, or why the template refuses; nothing where Python fails in it."""
    goes_on = conversation.get("continue_final_message", False)
    try:
        texts, _ = chat_template_utils.render_jinja_template(
            conversations=[[in_templates_form(message, form) for message in conversation["messages"]]],
            tools=conversation.get("tools"),
            chat_template=template,
            add_generation_prompt=conversation.get("add_generation_prompt", not goes_on),
            continue_final_message=goes_on,
            bos_token=BOS,
            eos_token=EOS,
        )
        return {"text": texts[0]}
    except jinja2.exceptions.TemplateError as error:
        return {"refusal": str(error)} if type(error) is jinja2.exceptions.TemplateError else None
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
        return None


def form_of(template):
    """The first in which a call shows."""
    for form in FORMS:
        found = rendered(template, CONVERSATIONS["a call that nothing offers"], form) or {}
        if "read_file" in found.get("text", "") and "strict" in found["text"]:
            return form
    return FORMS[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=Path, default=HERE)
    parser.add_argument("--out", type=Path, default=HERE / "reference.json")
    arguments = parser.parse_args()
    templates = {}
    for path in sorted(arguments.templates.glob("*.jinja")):
        source = path.read_text()
        form = form_of(source)
        of_template = {name: rendered(source, conversation, form) for name, conversation in CONVERSATIONS.items()}
        of_template = {name: found for name, found in of_template.items() if found}
        templates[path.stem] = {"source": source, "rendered": of_template}
    reference = {"bos_token": BOS, "eos_token": EOS, "conversations": CONVERSATIONS, "templates": templates}
    arguments.out.write_text(json.dumps(reference, ensure_ascii=False, indent=1) + "\n")
    for name, template in templates.items():
        texts = sum("text" in found for found in template["rendered"].values())
        print(f"{name}: {texts} texts, {len(template['rendered']) - texts} refusals")


if __name__ == "__main__":
    main()
