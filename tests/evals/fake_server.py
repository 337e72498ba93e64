"""A server on the loopback that answers chat completions as it is told: well, badly, late or not at all."""

import contextlib
import http.server
import json
import threading
import time


class FakeServer:
    """`script`: what to do with each request, in order; the last entry serves all that follow.

    An entry is a text (a good reply), a status, ("retry-after", seconds), bytes (sent as the body), "stall" or
    "drip" (never completes), or "hang up".
    """

    def __init__(self, script):
        self.script, self.requests, self.times = list(script), [], []
        self.lock, self.ending = threading.Lock(), threading.Event()

    def next(self, body, headers):
        with self.lock:
            number = len(self.requests)
            self.requests.append((body, dict(headers)))
            self.times.append(time.monotonic())
            return self.script[min(number, len(self.script) - 1)]


@contextlib.contextmanager
def serve(*script):
    fake = FakeServer(script)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            todo = fake.next(body, self.headers)
            if callable(todo):
                todo = todo(body)
            if todo == "hang up":
                return
            if todo in ("stall", "drip"):
                if todo == "drip":
                    self.send_response(200)
                    self.end_headers()
                while not fake.ending.wait(0.02):
                    with contextlib.suppress(OSError):
                        self.wfile.write(b" " if todo == "drip" else b"")
                        self.wfile.flush()
                return
            status, extra = 200, {}
            if isinstance(todo, int):
                status, todo = todo, b'{"error": "no"}'
            elif isinstance(todo, tuple):
                status, extra, todo = 429, {"Retry-After": str(todo[1])}, b"{}"
            elif isinstance(todo, str):
                todo = json.dumps({"choices": [{"message": {"role": "assistant", "content": todo}}]}).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(todo)), **extra}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(todo)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield fake
    finally:
        fake.ending.set()
        server.shutdown()
        server.server_close()
