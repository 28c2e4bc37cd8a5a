"""A server of rewards on this machine: `vapi_jax.rewards.http` asks it."""

import base64
import contextlib
import http.server
import io
import json
import threading
import time

import numpy as np
from PIL import Image


class Server(http.server.ThreadingHTTPServer):
    """Answers with each image's mean pixel and its prompt's length, or as it is told."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.answers = [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/score"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append("GET")
        self.reply(200, b'{"scores": [0]}')

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        images = [Image.open(io.BytesIO(base64.b64decode(x))) for x in body["images"]]
        assert all(image.format == "PNG" for image in images)
        self.server.asked.append((len(images), body["prompts"]))
        scores = [
            np.asarray(x).mean() / 8 + len(p) for x, p in zip(images, body["prompts"], strict=True)
        ]
        status, data = self.server.answers.pop(0) if self.server.answers else (200, None)
        if status == "slow":
            time.sleep(data)
            status, data = 200, None
        if status == "stalls":  # before it says what is wrong
            self.reply(503, b"", missing=9)
            self.wfile.flush()
            time.sleep(data)
        elif status == "cut":
            self.reply(200, b'{"sco', missing=data)
        else:
            self.reply(status, json.dumps({"scores": scores}).encode() if data is None else data)

    def reply(self, status, data, missing=0):
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.server.url)
        self.send_header("Content-Length", str(len(data) + missing))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def serving():
    """A server that answers until the context ends."""
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield found
        finally:
            found.shutdown()
            thread.join()
