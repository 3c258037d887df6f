"""`lorry generate` and `lorry chat`: against a real model, and against a server that shows what they send and when."""

import json
import os
import pty
import queue
import re
import select
import signal
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lorry_server import BINARY, serving

BASE = "smollm2:135m"
PROMPT = "def fibonacci(n):\n"
MAX_SECONDS = 120


@pytest.fixture(scope="module")
def small():
    with serving("--model", BASE, "--adapters", "") as server:
        yield server


def post(server, path, body):
    with urllib.request.urlopen(server.url + path, json.dumps(body).encode(), timeout=MAX_SECONDS) as reply:
        return json.load(reply)["choices"][0]


def lorry(command, url, *arguments, stdin=""):
    command = [BINARY, command, "--url", url, *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=MAX_SECONDS)


class Stub(ThreadingHTTPServer):
    """Answers with what the test puts into `pieces`: texts, events, and `None` at the end. `bodies` has what was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.bodies, self.pieces, self.left = queue.Queue(), queue.Queue(), threading.Event()

    def reply(self, *pieces):
        for piece in (*pieces, None):
            self.pieces.put(piece)


class StubHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.put((self.path, body))
        self.send_response(200)
        self.end_headers()
        while (piece := self.server.pieces.get()) is not None:
            choice = {"text": piece} if "prompt" in body else {"delta": {"content": piece}}
            event = piece if isinstance(piece, dict) else {"choices": [choice]}
            try:
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            except OSError:
                self.server.left.set()
                return
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    with Stub() as stub:
        serving = threading.Thread(target=stub.serve_forever)
        serving.start()
        yield stub
        stub.shutdown()
        serving.join()


def test_generate_writes_what_a_completion_says(small):
    expected = post(small, "/v1/completions", {"prompt": PROMPT, "max_tokens": 24, "temperature": 0})["text"]
    options = ["--max-tokens", "24", "--temperature", "0"]
    for said in (lorry("generate", small.url, *options, PROMPT), lorry("generate", small.url, *options, stdin=PROMPT)):
        assert (said.returncode, said.stdout, said.stderr) == (0, expected, "")


def test_generate_takes_an_adapter_by_name_and_fills_a_gap(server):
    body = {"model": "conala", "prompt": "reverse the list `xs`", "max_tokens": 12, "temperature": 0}
    gap = {"prompt": "def area(radius):\n    return ", "suffix": "\n\nprint(area(2))\n", "max_tokens": 12, "seed": 3}
    for fields in (body, gap):
        options = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items() if name != "prompt"]
        said = lorry("generate", server.url, *options, fields["prompt"])
        assert (said.returncode, said.stdout) == (0, post(server, "/v1/completions", fields)["text"]), said.stderr


def test_options_are_sent_as_fields_and_what_is_not_said_is_not_sent(stub):
    stub.reply("a", "b")
    said = lorry("generate", stub.url, "x")
    assert (said.stdout, stub.bodies.get()) == ("ab", ("/v1/completions", {"prompt": "x", "stream": True}))
    options = ["--model", "m", "--max-tokens", "5", "--temperature", "0.2", "--top-p", "0.9", "--seed", "-1"]
    fields = {"model": "m", "max_tokens": 5, "temperature": 0.2, "top_p": 0.9, "seed": -1, "stop": ["\n", "-"], "stream": True}
    stub.reply("a")
    lorry("generate", stub.url, *options, "--stop", "\n", "--stop=-", "--suffix", "", "x")
    assert stub.bodies.get() == ("/v1/completions", {**fields, "prompt": "x", "suffix": ""})
    stub.reply("a")
    lorry("chat", stub.url, *options, "--stop", "\n", "--stop=-", "--system", "s", stdin="x\n")
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]
    assert stub.bodies.get() == ("/v1/chat/completions", {**fields, "messages": messages})


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_text_is_written_before_more_of_it_comes(stub, command):
    with subprocess.Popen([BINARY, command, "--url", stub.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(b"x\n")
        process.stdin.close()
        for piece in ("one", " two"):
            stub.pieces.put(piece)
            assert process.stdout.read(len(piece)) == piece.encode()
        stub.reply()


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("generate", ["x"]),
        ("chat", []),
        ("compare", ["-p", "x", "--max-tokens", "1", "--arm", "a=", "--arm", "b="]),
    ],
)
def test_an_output_that_nobody_reads_ends_the_command_quietly(small, command, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [BINARY, command, "--url", small.url, *arguments]
    process = subprocess.run(command, input=b"x\n", stdout=writer, stderr=subprocess.PIPE, timeout=MAX_SECONDS)
    os.close(writer)
    assert (process.returncode, process.stderr) == (0, b"")


def test_generate_stops_when_its_reader_has_enough(stub):
    command = [BINARY, "generate", "--url", stub.url, "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        stub.pieces.put("a")
        assert process.stdout.read(1) == b"a"
        process.stdout.close()
        while process.poll() is None:
            stub.pieces.put("b")
            time.sleep(0.01)
        assert (process.returncode, process.stderr.read()) == (0, b"")
    while not stub.left.wait(0.01):
        stub.pieces.put("b")


def test_what_is_refused_is_named_and_nothing_is_written(small):
    for arguments, cause in [
        (["--model", "nobody", "x"], "nobody"),
        (["--suffix", "y", "x"], "suffix"),
        (["--temperature", "9", "x"], "`temperature` must be from 0 to 2"),
    ]:
        refused = lorry("generate", small.url, *arguments)
        assert (refused.returncode, refused.stdout) == (1, "") and cause in refused.stderr, refused.stderr
    refused = lorry("chat", small.url, "--top-p", "2", stdin="x\ny\n")
    assert (refused.returncode, refused.stdout) == (1, "") and refused.stderr.count("`top_p`") == 1
    unreachable = lorry("generate", "http://127.0.0.1:1", "x")
    assert unreachable.returncode == 1 and "lorry serve" in unreachable.stderr
    broken = subprocess.run([BINARY, "generate", "--url", small.url], input=b"\xff", capture_output=True, timeout=MAX_SECONDS)
    assert broken.returncode == 1 and b"the prompt cannot be read" in broken.stderr


def test_chat_without_a_terminal_answers_each_line_with_all_before_it(small):
    messages = [{"role": "system", "content": "Answer briefly."}]
    expected = ""
    for line in ("Name a colour.", "And another?"):
        messages.append({"role": "user", "content": line})
        reply = post(small, "/v1/chat/completions", {"messages": messages, "max_tokens": 12, "temperature": 0})
        messages.append(reply["message"])
        expected += reply["message"]["content"] + "\n"
    options = ["--system", "Answer briefly.", "--max-tokens", "12", "--temperature", "0"]
    said = lorry("chat", small.url, *options, stdin="Name a colour.\n\nAnd another?")
    assert (said.returncode, said.stdout, said.stderr) == (0, expected, "")


class Terminal:
    """The other side of a terminal."""

    def __init__(self, descriptor):
        self.descriptor, self.shown = descriptor, ""

    def type(self, keys):
        os.write(self.descriptor, keys.encode())

    def expect(self, text):
        """Waits until `text` is shown, and forgets what was before."""
        deadline = time.monotonic() + MAX_SECONDS
        while text not in self.shown:
            assert select.select([self.descriptor], [], [], deadline - time.monotonic())[0], self.shown[-1000:]
            # Without the movements of the cursor.
            read = os.read(self.descriptor, 4096).decode(errors="replace")
            self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", read)
        self.shown = self.shown.partition(text)[2]


@contextmanager
def chat_in_a_terminal(url, *arguments):
    """Yields the terminal and the process's id; the program must have ended well at the end."""
    process, descriptor = pty.fork()
    if process == 0:
        os.execve(BINARY, [BINARY, "chat", "--url", url, *arguments], {**os.environ, "TERM": "xterm"})
    try:
        yield Terminal(descriptor)
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise
    finally:
        os.close(descriptor)


def test_control_c_ends_the_reply_and_control_d_the_conversation(stub):
    with chat_in_a_terminal(stub.url) as terminal:
        terminal.expect("> ")
        terminal.type("one\r")
        stub.pieces.put("half a")
        terminal.expect("half a")
        terminal.type("\x03")
        terminal.expect("> ")
        while not stub.left.wait(0.01):
            stub.pieces.put("never shown")
        stub.pieces = queue.Queue()
        stub.reply("whole")
        terminal.type("thrown away\x03")
        terminal.expect("> ")
        # Pasted, with its lines.
        terminal.type("\x1b[200~two\nlines\x1b[201~\r")
        terminal.expect("whole")
        terminal.expect("> ")
        terminal.type("\x04")
    stub.bodies.get()
    roles_and_texts = [(message["role"], message["content"]) for message in stub.bodies.get()[1]["messages"]]
    assert roles_and_texts == [("user", "one"), ("assistant", "half a"), ("user", "two\nlines")]
    assert stub.bodies.empty()


def test_in_a_terminal_a_failure_is_said_and_the_conversation_goes_on_without_it(stub):
    with chat_in_a_terminal(stub.url) as terminal:
        terminal.expect("> ")
        stub.reply({"error": {"message": "the engine has stopped"}})
        terminal.type("one\r")
        terminal.expect("lorry: the server could not finish the reply: the engine has stopped")
        terminal.expect("> ")
        stub.reply("whole")
        terminal.type("two\r")
        terminal.expect("whole")
        terminal.expect("> ")
        terminal.type("\x04")
    stub.bodies.get()
    assert stub.bodies.get()[1]["messages"] == [{"role": "user", "content": "two"}]
