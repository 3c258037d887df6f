"""A server in OpenAI's style that answers as it is told."""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Refused(Exception):
    """To be answered with 400."""


@contextmanager
def answering(choices_of: Callable[[dict[str, Any]], list[str]], generation: str = "g1"):
    """Serves on a free port while the block runs; yields the URL and the list of bodies that were asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            try:
                texts = choices_of(body)
            except Refused as refusal:
                return self.send(400, {"error": {"message": str(refusal), "type": "invalid_request_error"}})
            if self.path.endswith("/infill"):
                counts = {"tokens_evaluated": 7, "tokens_predicted": 3, "timings": {"cache_n": 2}}
                reply = {"model": body["model"], "content": texts[0], "stop_type": "word"} | counts
                return self.send(200, reply)
            head = {"model": body["model"], "adapter": {"name": body["model"], "generation": generation}, "icl": None}
            usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
            choices = [{"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate(texts)]
            if not body.get("stream"):
                return self.send(200, head | {"choices": choices, "usage": usage})
            # In two pieces, as a stream comes.
            first = [{"index": 0, "text": texts[0][:1], "finish_reason": None}]
            rest = [{"index": 0, "text": texts[0][1:], "finish_reason": "stop"}]
            chunks = [{"choices": first}, {"choices": rest}, {"choices": [], "usage": usage}]
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for chunk in chunks:
                self.wfile.write(f"data: {json.dumps(head | chunk)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def send(self, status, body):
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
