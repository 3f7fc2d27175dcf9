"""A small client for ComfyUI's HTTP and websocket interface. Standard library only.

The websocket brings progress; what counts is /history, which is asked again and again.
"""

import base64
import json
import os
import shutil
import socket
import ssl
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

OUT_OF_MEMORY = ("out of memory", "outofmemory", "not enough memory", "can't allocate memory", "memoryerror")
ADVICE = ("Out of memory: use a smaller preset (512 or 256), fewer frames, or a tiled decode "
          "(VAE Decode (Tiled) instead of VAE Decode), and close other programs that use this device.")
GONE_AFTER_SECONDS = 10


class JobError(RuntimeError):
    """The server refused the graph or a node failed; the message is for people."""


class ServerGone(RuntimeError):
    """The server does not answer any more."""


class Events:
    """The receiving half of a websocket: JSON messages of one client id."""

    def __init__(self, url, client_id):
        parts = urllib.parse.urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        self.socket = socket.create_connection((parts.hostname, port), timeout=30)
        if parts.scheme == "https":
            self.socket = ssl.create_default_context().wrap_socket(self.socket, server_hostname=parts.hostname)
        self.socket.sendall((
            f"GET {parts.path.rstrip('/')}/ws?clientId={client_id} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n\r\n").encode())
        self.buffer = b""
        while b"\r\n\r\n" not in self.buffer:
            self._receive()
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise ConnectionError(f"no websocket at {url}: {head.splitlines()[0].decode()}")
        self.message = b""  # of a message sent in several frames

    def _receive(self):
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the websocket was closed")
        self.buffer += data

    def _frame(self):
        """(first byte, payload) of the next whole frame in the buffer, or None. RFC 6455 section 5.2."""
        if len(self.buffer) < 2:
            return None
        size, start = self.buffer[1] & 0x7F, 2
        if size > 125:
            width = 2 if size == 126 else 8
            if len(self.buffer) < 2 + width:
                return None
            size, start = int.from_bytes(self.buffer[2:2 + width], "big"), 2 + width
        if len(self.buffer) < start + size:
            return None
        frame = self.buffer[0], self.buffer[start:start + size]
        self.buffer = self.buffer[start + size:]
        return frame

    def next(self, seconds):
        """The next JSON message, or None after about that many seconds. Raises ConnectionError when closed."""
        deadline = time.monotonic() + seconds
        while True:
            frame = self._frame()
            if frame is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self.socket.settimeout(left)
                try:
                    self._receive()
                except TimeoutError:
                    return None
                continue
            kind, payload = frame[0] & 0x0F, frame[1]
            if kind == 8:
                raise ConnectionError("the websocket was closed by the server")
            if kind == 9:  # ping: answer with the same bytes, masked with zeros as a client must
                self.socket.sendall(struct.pack(">BBI", 0x8A, 0x80 | len(payload), 0) + payload)
            elif kind in (0, 1, 2):
                self.message += payload
                if frame[0] & 0x80:
                    message, self.message = self.message, b""
                    if message[:1] == b"{":  # the rest are preview images
                        return json.loads(message)

    def close(self):
        self.socket.close()


class Client:
    """Talks to one server; `local` is the launch.Server behind it, or None for somebody else's."""

    def __init__(self, url, local=None):
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self.local = local
        self.id = uuid.uuid4().hex
        at_home = urllib.parse.urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        proxies = [urllib.request.ProxyHandler({})] if at_home else []
        self._open = urllib.request.build_opener(*proxies).open

    # ---- plain requests ----

    def request(self, path, body=None, headers=None):
        """The open answer of a GET, or of a POST where there is a body (bytes, or anything JSON takes)."""
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        for attempt in range(GONE_AFTER_SECONDS):
            try:
                return self._open(urllib.request.Request(self.url + path, body, headers or {}), timeout=120)
            except urllib.error.HTTPError:
                raise
            except OSError as error:
                if self.local and not self.local.alive():
                    code = self.local.process.returncode
                    advice = f"\n{ADVICE}" if code == -9 else ""
                    raise ServerGone(f"the ComfyUI server ended (exit code {code}). Its last words:\n"
                                     f"{self.local.tail()}{advice}") from None
                if attempt == GONE_AFTER_SECONDS - 1:
                    raise ServerGone(f"no answer from {self.url}: {error}. Is ComfyUI still running there?") from None
            time.sleep(1)

    def json(self, path, body=None):
        with self.request(path, body) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def upload(self, data, name):
        """Put a file with these bytes into the server's input folder; returns the name to use in LoadImage (another
        one where the folder holds another file of this name)."""
        edge = uuid.uuid4().hex
        def part(field, value):
            return f'--{edge}\r\nContent-Disposition: form-data; name="{field}"{value}\r\n'.encode()
        body = (part("image", f'; filename="{name}"\r\n') + data + f"\r\n--{edge}--\r\n".encode())
        with self.request("/upload/image", body, {"Content-Type": f"multipart/form-data; boundary={edge}"}) as answer:
            stored = json.load(answer)
        return "/".join(filter(None, (stored["subfolder"], stored["name"])))

    def view(self, entry):
        """The open answer with the bytes of an output entry (filename, subfolder, type) of the history."""
        return self.request("/view?" + urllib.parse.urlencode({k: entry[k] for k in ("filename", "subfolder", "type")}))

    def download(self, entry, path):
        """Save an output entry of the history under this path, whole or not at all."""
        part = Path(f"{path}.part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            with self.view(entry) as answer, open(part, "wb") as f:
                shutil.copyfileobj(answer, f)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    # ---- jobs ----

    def queue(self, graph, workflow=None):
        """Queue an API graph; saved files carry the UI workflow. Returns the prompt id. Raises JobError."""
        body = {"prompt": graph, "client_id": self.id}
        if workflow:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        try:
            answer = self.json("/prompt", body)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise JobError(refusal(json.loads(text), graph) if text[:1] == "{" else text) from None
        if answer["node_errors"]:  # the server would run the rest of the graph
            self.cancel(answer["prompt_id"])
            raise JobError(refusal(answer, graph))
        return answer["prompt_id"]

    def cancel(self, prompt_id):
        """Take a job off the queue, or interrupt it where it runs."""
        self.json("/queue", {"delete": [prompt_id]})
        self.json("/interrupt", {"prompt_id": prompt_id})

    def run(self, graph, workflow=None, progress=None):
        """Queue a graph and wait for its end; returns the history's outputs by node id.

        `progress(node id, value, maximum)` is called at every step. Raises JobError and ServerGone; anything
        that ends the wait early, Ctrl-C too, cancels the job.
        """
        events = self._events()
        prompt_id, errors = self.queue(graph, workflow), []
        try:
            while True:
                ended, events = self._follow(events, prompt_id, progress, errors)
                entry = self.json(f"/history/{prompt_id}").get(prompt_id)
                if entry:
                    return finished(entry, graph, errors)
                if ended:  # the history follows the message within moments
                    time.sleep(0.05)
        except BaseException as stop:
            if not isinstance(stop, (JobError, ServerGone)):
                self.cancel(prompt_id)
            raise
        finally:
            if events:
                events.close()

    def _events(self):
        self.json("/system_stats")  # says that the server is gone where it is
        try:
            return Events(self.url, self.id)
        except OSError:  # some proxies pass no websocket; the history is enough
            return None

    def _follow(self, events, prompt_id, progress, errors):
        """Handle messages for up to a second: (whether the job ended, events or None when the connection broke).
        Errors are kept: why a node was blocked is said in no other place."""
        deadline = time.monotonic() + 1
        try:
            while events and time.monotonic() < deadline:
                message = events.next(deadline - time.monotonic())
                if message is None or message["data"].get("prompt_id") != prompt_id:
                    continue
                data = message["data"]
                if message["type"] == "progress" and progress:
                    progress(data["node"], data["value"], data["max"])
                if message["type"] == "execution_error":
                    errors.append(data)
                if message["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    return True, events
        except OSError:
            events = None
        if events is None:
            time.sleep(0.5)
        return False, events


# ---- what went wrong, in words ---------------------------------------------------------------------------

def refusal(answer, graph):
    """The server's validation answer as readable lines."""
    lines = []
    for node_id, report in (answer.get("node_errors") or {}).items():
        for error in report["errors"]:
            lines.append(f"{graph[node_id]['class_type']} (node {node_id}): {error['message']}: {error['details']}")
    if not lines and "error" in answer:
        lines.append(f"{answer['error']['message']} {answer['error'].get('details', '')}".strip())
    return "the server refused the graph:\n  " + "\n  ".join(lines)


def finished(entry, graph, errors=()):
    """The outputs of a finished job; JobError when a node failed or it was interrupted."""
    for kind, data in [*entry["status"]["messages"], *(("execution_error", error) for error in errors)]:
        if kind == "execution_interrupted":
            raise JobError("the job was interrupted")
        if kind == "execution_error":
            reason = f"{data['exception_type']} {data['exception_message']}".strip()
            text = f"{data['node_type']} (node {data['node_id']}) failed: {data['exception_message'].strip() or reason}"
            if any(word in reason.lower() for word in OUT_OF_MEMORY):
                text += f"\n{ADVICE}"
            raise JobError(text)
    return entry["outputs"]
