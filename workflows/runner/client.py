"""A small synchronous client for ComfyUI's HTTP and websocket API.

The websocket delivers progress; /history is authoritative and is polled.
"""

import contextlib
import json
import re
import tempfile
import time
import urllib.parse
import uuid
from pathlib import Path

from errors import BadStatus, JobError, JobLost, ServerGone, StrangeServer, plain
from inprocess import common

OUT_OF_MEMORY = ("out of memory", "outofmemory", "not enough memory", "can't allocate memory", "memoryerror")
ADVICE = ("Out of memory: use a smaller preset (512 or 256), fewer frames, or a tiled decode "
          "(VAE Decode (Tiled) instead of VAE Decode), and close other programs that use this device.")
GONE_AFTER_SECONDS = 10
LOOK_SECONDS = 5  # between checks that the server still knows the job
SLOW_SECONDS = 600  # for a large picture over a slow connection, and for graph validation
IN_MEMORY = 64 << 20  # bytes of a file kept in memory for inspection; a longer one is spooled to disk


class Client:
    """Talks to one server; `local` is its launch.Server, or None for a server that we did not start. `token`: sent as
    a bearer token, for a server behind a proxy that wants one.

    Every call raises ServerGone if there is no response, or its subclass StrangeServer for a response not from ComfyUI.
    """

    def __init__(self, url, local=None, token=None):
        from transport import Connection, Events  # these need aiohttp, which the host's Python has

        self.connection, self.events = Connection(url, token), Events
        self.lists_jobs = None  # whether the server has /api/jobs; not asked yet
        self.url = self.connection.url  # without a password
        self.local = local
        self.id = uuid.uuid4().hex

    # ---- plain requests ----

    def request(self, path, body=None, headers=None, tries=None, **options):
        """The response to a GET, or to a POST if there is a body (bytes or a JSON-serializable value), as an open file.

        Retries when the connection breaks. options: passed to Connection.ask.
        """
        from transport import Broken

        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        for attempt in range(tries or GONE_AFTER_SECONDS, 0, -1):
            try:
                return self.connection.ask(path, body, headers, **options)
            except Broken:
                self._check_alive()
                if attempt == 1:
                    raise
            time.sleep(1)

    def _check_alive(self):
        if self.local and not self.local.alive():
            code = self.local.process.returncode
            advice = f"\n{ADVICE}" if code == -9 else ""
            raise ServerGone(f"the ComfyUI server ended (exit code {code}). Its last words:\n"
                             f"{plain(self.local.tail())}{advice}")

    def json(self, path, body=None, kind=object, **options):
        """The response's JSON, None if it is empty; it must be of type `kind`."""
        text = self.request(path, body, **options).read()
        with self.understood(path):
            found = json.loads(text) if text else None
            if not isinstance(found, kind):
                raise TypeError(f"{type(found).__name__} for {kind.__name__}")
        return found

    @contextlib.contextmanager
    def understood(self, path):
        """Raise StrangeServer for a response that is not JSON or not in ComfyUI's format."""
        try:
            yield
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise StrangeServer(f"{self.url} does not answer as a ComfyUI does: {path.partition('?')[0]} gave "
                                f"something else ({type(error).__name__}).") from error

    def upload(self, data, name):
        """Upload these bytes to the server's input folder; returns the name to use in LoadImage (a different one
        if the folder has another file of this name). Raises JobError if the server rejects the file."""
        edge, path = uuid.uuid4().hex, Path(name)
        name = re.sub(r"[^\w .()-]", "_", path.stem)[:60] + re.sub(r"[^\w.]", "", path.suffix)
        head = (f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
                "Content-Type: application/octet-stream\r\n\r\n")
        body = head.encode() + data + f"\r\n--{edge}--\r\n".encode()
        try:
            stored = self.json("/upload/image", body, dict, seconds=SLOW_SECONDS,
                               headers={"Content-Type": f"multipart/form-data; boundary={edge}"})
        except BadStatus as error:
            why = f"it is too large ({len(data) / 2 ** 20:.0f} MB)" if error.code == 413 else error
            raise JobError(f"the server does not take {name}: {why}") from None
        with self.understood("/upload/image"):
            return "/".join(filter(None, (stored["subfolder"] + "", stored["name"] + "")))

    def view(self, entry):
        """The bytes of an output entry (filename, subfolder, type) from the history, as an open file."""
        return self.fetch(entry, tempfile.SpooledTemporaryFile(IN_MEMORY))

    def fetch(self, entry, file):
        """Write an output entry from the history to an open file; returns the file, rewound to the start."""
        from transport import Broken

        with self.understood("/history"):
            query = urllib.parse.urlencode({name: entry[name] for name in ("filename", "subfolder", "type")})
        for attempt in (1, 2, 3):
            try:
                file.seek(0)
                file.truncate()
                self.connection.ask(f"/view?{query}", file=file)
                break
            except Broken:
                self._check_alive()
                if attempt == 3:
                    raise
                time.sleep(1)
            except BadStatus as error:  # an OSError, which would look like a disk error
                raise StrangeServer(str(error)) from None
        file.seek(0, 2)
        if not file.tell():
            raise StrangeServer(f"{self.url} sent an empty file.")
        file.seek(0)
        return file

    def download(self, entry, path, overwrite=True):
        """Save an output entry from the history to this path atomically; returns the path.

        overwrite False: an existing file is kept, and the new one gets the next free number: video.mp4,
        video-2.mp4, ... Raises OSError if it cannot be written.
        """
        saving, name = common("saving"), FreeName(path)
        with saving.replacing(name.path) if overwrite else saving.new_file(name) as content:
            with open(content, "xb") as file:
                self.fetch(entry, file)
        return name.path

    # ---- jobs ----

    def queue(self, graph, workflow=None, prompt_id=None):
        """Queue an API graph; saved files embed the UI workflow. Returns the prompt id. Raises JobError.

        We choose the job's id, so that it can be looked up if the response is lost: it is never queued twice.
        """
        from transport import Broken

        prompt_id = prompt_id or str(uuid.uuid4())
        body = {"prompt": graph, "client_id": self.id, "prompt_id": prompt_id}
        if workflow:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        for attempt in (1, 2, 3):
            try:
                answer = self.json("/prompt", body, dict, tries=1, seconds=SLOW_SECONDS)
                break
            except Broken:
                time.sleep(1)
                if self._knows(prompt_id):
                    return prompt_id
                if attempt == 3:
                    raise
            except BadStatus as error:
                if not error.text.startswith("{"):
                    raise JobError(str(error)) from None
                with self.understood("/prompt"):
                    raise JobError(refusal(json.loads(error.text), graph)) from None
        with self.understood("/prompt"):
            prompt_id, problems = answer["prompt_id"] + "", answer.get("node_errors")
            if problems:  # the server would still run the rest of the graph
                self.cancel(prompt_id)
                raise JobError(refusal(answer, graph))
        return prompt_id

    def _knows(self, prompt_id):
        """Whether the job is queued, running or finished."""
        if self.lists_jobs:
            return self._look(prompt_id)[0]
        queue = self.json("/queue", kind=dict)  # before the history, where a job goes from here
        with self.understood("/queue"):
            listed = [job[1] for job in queue["queue_running"] + queue["queue_pending"]]
        return prompt_id in listed or self._look(prompt_id)[1] is not None

    def _look(self, prompt_id):
        """(whether the server knows the job, its entry if it has ended: status and outputs). The first is None where
        that cannot be told: the server has no /api/jobs (ComfyUI before 0.6), and the job is not in the history."""
        name = urllib.parse.quote(prompt_id, safe="")
        if self.lists_jobs is None:
            try:
                self.lists_jobs = isinstance(self.json("/api/jobs?limit=1", tries=1), dict)
            except ServerGone:  # also a proxy that lets only known paths through
                self.lists_jobs = False
        if not self.lists_jobs:
            entry = self.json(f"/history/{name}", kind=dict).get(prompt_id)
            return None if entry is None else True, entry
        try:
            job = self.json(f"/api/jobs/{name}", kind=dict)
        except BadStatus as error:
            if error.code != 404:
                raise
            return False, None
        with self.understood("/api/jobs"):
            ended = job["status"] not in ("pending", "in_progress")
            return True, {"status": job["execution_status"], "outputs": job["outputs"]} if ended else None

    def cancel(self, prompt_id):
        """Remove a job from the queue, or interrupt it if it is running."""
        for path, body in (("/queue", {"delete": [prompt_id]}), ("/interrupt", {"prompt_id": prompt_id})):
            self.request(path, body, tries=1, seconds=5)

    def run(self, graph, workflow=None, progress=None, prompt_id=None, again=False, watch=None, heard=None):
        """Queue a graph and wait for it to finish; returns the history's outputs by node id.

        `progress(node id, value, maximum)` is called at every step, `watch()` about every second, `heard(kind, data)`
        for every message about the job, and for what a node says (transport.NODE_TEXT). again: the job was queued
        earlier under `prompt_id` and is only waited for. Raises JobError, its subclass JobLost if the server does not
        know the job, and ServerGone; anything that ends the wait early, including Ctrl-C, cancels the job.
        """
        events, prompt_id, errors = self._events(), prompt_id or str(uuid.uuid4()), []
        try:
            if not again:
                prompt_id = self.queue(graph, workflow, prompt_id)
            look = 0 if again else time.monotonic() + LOOK_SECONDS
            while True:
                known, entry = self._look(prompt_id)
                if entry is not None:
                    with self.understood("/history"):
                        return finished(entry, graph, errors)
                if known is False or time.monotonic() > look:
                    if not self._knows(prompt_id):
                        raise JobLost(f"{self.url} does not know the job any more: it was started again, or somebody "
                                      "removed the job. Run the command again.")
                    look = time.monotonic() + LOOK_SECONDS
                ended, events = self._follow(events, prompt_id, graph, progress, errors, heard)
                if watch:
                    watch()
                if ended:  # the history is updated shortly after the message
                    time.sleep(0.05)
        except BaseException as stop:
            if not isinstance(stop, JobError):
                with contextlib.suppress(ServerGone):
                    self.cancel(prompt_id)
            raise
        finally:
            if events:
                events.close()

    def _events(self):
        from transport import Broken

        self.request("/system_stats")  # raises ServerGone if the server is down
        try:
            return self.events(self.connection, self.id)
        except Broken:  # some proxies do not forward websockets; the history is enough
            return None

    def _follow(self, events, prompt_id, graph, progress, errors, heard):
        """Handle messages for up to a second: (whether the job ended, events or None if the connection broke).
        Errors are kept: the reason a node was blocked is reported nowhere else."""
        from transport import NODE_TEXT, Broken

        deadline = time.monotonic() + 1
        try:
            while events and (left := deadline - time.monotonic()) > 0:
                message = events.next(left) or {}
                kind, data = message.get("type"), message.get("data")
                if not isinstance(data, dict) or kind != NODE_TEXT and data.get("prompt_id") != prompt_id:
                    continue
                if heard:
                    heard(kind, data)
                numbers = [data.get("value"), data.get("max")]
                node = str(data.get("node")).partition(".")[0]  # nodes that NODE expands into are NODE.0.0.1, ...
                if kind == "progress" and progress and node in graph and all(
                        isinstance(number, (int, float)) for number in numbers):
                    progress(node, *numbers)
                if kind == "execution_error":
                    errors.append(data)
                if kind in ("execution_success", "execution_error", "execution_interrupted"):
                    return True, events
        except Broken:
            events.close()
            events = None
        if events is None:
            time.sleep(0.5)
        return False, events


class FreeName:
    """A file name and the next free ones after it, in the form nodes/common/saving.py expects."""

    def __init__(self, path):
        self.wanted, self.number = Path(path), 1

    @property
    def path(self):
        more = "" if self.number == 1 else f"-{self.number}"
        return self.wanted.with_name(f"{self.wanted.stem}{more}{self.wanted.suffix}")


# ---- error messages and results --------------------------------------------------------------------------

def refusal(answer, graph):
    """The server's validation errors as readable lines."""
    lines = []
    for node_id, report in (answer.get("node_errors") or {}).items():
        for error in report["errors"]:
            lines.append(f"{graph[node_id]['class_type']} (node {node_id}): {error['message']}: {error['details']}")
    error = answer.get("error")
    if not lines and error:
        lines.append(f"{error['message']} {error.get('details', '')}".strip() if isinstance(error, dict) else error)
    return plain("the server refused the graph:\n  " + "\n  ".join(lines))


def finished(entry, graph, errors=()):
    """The outputs of a finished job; raises JobError if a node failed or the job was interrupted."""
    for kind, data in [*entry["status"]["messages"], *(("execution_error", error) for error in errors)]:
        if kind == "execution_interrupted":
            raise JobError("the job was interrupted")
        if kind == "execution_error":
            reason = f"{data['exception_type']} {data['exception_message']}".strip()
            text = f"{data['node_type']} (node {data['node_id']}) failed: {data['exception_message'].strip() or reason}"
            if any(word in reason.lower() for word in OUT_OF_MEMORY):
                text += f"\n{ADVICE}"
            raise JobError(plain(text))
    return entry["outputs"]


def results(outputs, node, kind="images"):
    """The output of one node of a finished job; raises JobError if there is none."""
    found = outputs.get(node) if isinstance(outputs, dict) else None
    entries = found.get(kind) if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        raise JobError("the job ended without a result; the server's log says why.")
    return entries
