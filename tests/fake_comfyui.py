"""A loopback server that responds like ComfyUI, or not, for tests of the client."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Fake(BaseHTTPRequestHandler):
    """Responds like ComfyUI, unless the test overrides a path: with (status, headers, body), or a callable."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        size = int(self.headers.get("Content-Length") or 0)
        path = self.path.partition("?")[0]
        self.server.seen.append((self.command, self.path, dict(self.headers), self.rfile.read(size)))
        answer = next((answer for start, answer in self.server.answers.items() if path.startswith(start)), None)
        if callable(answer):
            answer = answer(self)
        if answer is None:  # the connection breaks
            self.close_connection = True
            return
        status, headers, body = answer if isinstance(answer, tuple) else (200, {}, answer)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = "Content-Length" in headers  # a wrong one

    do_POST = do_GET


@contextlib.contextmanager
def running():
    """A server that is up: `answers` by the start of the path, `seen` requests, `url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    server.daemon_threads, server.seen = True, []
    server.answers = {"/ws": (404, {}, b""), "/system_stats": {}, "/interrupt": b"",
                      "/queue": {"queue_running": [], "queue_pending": []}}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def asked(server, path, method="POST"):
    return [body for kind, where, _, body in server.seen if kind == method and where == path]


def queued(server):
    return [json.loads(body)["prompt_id"] for body in asked(server, "/prompt")]
