"""Servers that work on a batch, one job at a time: one that runs somewhere, and one that this command starts."""

import os
import string
import sys
import time
import urllib.parse
from collections import namedtuple
from pathlib import Path

import client
import host
import launch
from errors import JobError, ServerGone, plain
from jobgraphs import build, read_input

SAMPLE_SECONDS = 1  # between looks at the memory in use
Made = namedtuple("Made", "entries fetch seconds memory")  # fetch(entry, file) writes a result into an open file
Address = namedtuple("Address", "url token", defaults=[None])


class JobRunner:
    """Runs the jobs of one template list on a client: checks the server, uploads each input once, samples the memory.

    templates(id): content of a template. models: the models folder of a server that we started. Raises HostError for a
    server that lacks nodes or the checkpoint.
    """

    def __init__(self, server, templates, models=None):
        self.client, self.templates, self.models = server, templates, models
        self.schemas = server.json("/object_info", kind=dict)
        self.uploads, self.checkpoints = {}, {}

    def check(self, template):
        """The checkpoint to use. Raises HostError if this server cannot run the template."""
        classes = {node["class_type"] for node in template["graph"].values()}
        missing = sorted(plain(name) for name in classes - self.schemas.keys())
        if missing:
            raise host.HostError(f"the ComfyUI at {self.client.url} lacks the nodes {', '.join(missing)}: install what "
                                 "they belong to and start it again.")
        if "preset" not in template:
            return None
        from pipeline import find_checkpoint

        return find_checkpoint(self.client, template["preset"], template["checkpoint"], self.models)

    def run(self, job, progress, watch, read=read_input):
        """Made, with the entries of the server's history. read(value): (bytes, name) of an input file."""
        template = self.templates(job.template)
        if job.template not in self.checkpoints:
            self.checkpoints[job.template] = self.check(template)
        graph, workflow = build(template, job, self.schemas, lambda value: self._upload(value, read),
                                self.checkpoints[job.template])
        start, used, looked = time.monotonic(), self._memory(), 0

        def look():
            nonlocal used, looked
            if time.monotonic() > looked + SAMPLE_SECONDS:
                used, looked = max(used, self._memory()), time.monotonic()
            watch()

        try:
            outputs = self.client.run(graph, workflow, self._told(graph, progress), job.prompt, job.again, look)
        except JobError:
            self.uploads.clear()  # somebody may have emptied the input folder
            raise
        with self.client.understood("/history"):
            entries = [entry for node in sorted(outputs) for found in outputs[node].values() if isinstance(found, list)
                       for entry in found if isinstance(entry, dict) and entry.get("type") == "output"]
        if not entries:
            raise JobError("the job ended without a result; does its graph save anything? The server's log says more.")
        return Made(entries, self.client.fetch, time.monotonic() - start, max(used, self._memory()))

    def _upload(self, value, read):
        key = value["sha256"], Path(value["file"]).suffix.lower()
        if key not in self.uploads:
            self.uploads[key] = self.client.upload(*read(value))
        return self.uploads[key]

    def _memory(self):
        """Bytes in use on the server's device, by all programs."""
        stats = self.client.json("/system_stats", kind=dict)
        with self.client.understood("/system_stats"):
            device = stats["devices"][0]
            return device["vram_total"] - device["vram_free"]

    def _told(self, graph, progress):
        def tell(node_id, value, maximum):
            schema = self.schemas.get(graph[node_id]["class_type"])
            name = schema.get("display_name") if isinstance(schema, dict) else None
            progress(plain(name or graph[node_id]["class_type"]), value, maximum)

        return tell


class RemoteWorker:
    """A ComfyUI that runs at an address."""

    def __init__(self, address, templates):
        self.address, self.templates, self.runner = address, templates, None
        self.label = client.Client(*self._login()).url  # without a password

    def _login(self):
        return self.address.url, None, self.address.token

    def open(self):
        """Connect; raises ServerGone if nobody answers."""
        server = client.Client(*self._login())
        server.request("/system_stats", tries=1, seconds=10)
        self.runner = JobRunner(server, self.templates)

    def run(self, job, progress, watch):
        return self.runner.run(job, progress, watch)

    def cancel(self, prompt_id):
        self.runner.client.cancel(prompt_id)

    def lost(self):
        """Forget the connection, and with it what was uploaded: a restarted server may have a new input folder."""
        self.runner = None

    def close(self):
        self.runner = None


class PrivateWorker:
    """A ComfyUI that this command starts, and starts again if it ends."""

    label = "this machine"

    def __init__(self, options, templates, folder=None):
        """folder: where the server's output, and so the blocks of long videos, stays after its end."""
        self.templates, self.runner, self.server = templates, None, None
        self.found = host.find_host(options.comfyui)
        file = Path(options.checkpoint).expanduser().absolute() if options.checkpoint else None
        arguments = ["--output-directory", str(folder)] if folder else []
        self.settings = dict(
            device=options.device or "auto", models=[options.models] if options.models else [],
            checkpoints=[file.parent] if file and file.is_file() else [], arguments=arguments,
            threads=1 if options.preset == "demo" else None)  # tiny matrices: more threads only cost synchronization

    def open(self):
        self.server = self.server or launch.Server(self.found, **self.settings)
        self.runner = JobRunner(client.Client(self.server.url, self.server), self.templates,
                           launch.models_folder(self.found.comfyui))

    def run(self, job, progress, watch, read=read_input):
        return self.runner.run(job, progress, watch, read)

    def cancel(self, prompt_id):
        pass  # it ended with the server

    def lost(self):
        self.close()  # it may hang

    def close(self):
        if self.server:
            self.server.stop()
        self.runner = self.server = None


# ---- addresses ----

def read_addresses(text, environment):
    """[Address] from `URL,URL,...` or from a file with one `URL [token=TOKEN]` a line; # begins a comment.

    In a file $NAME or ${NAME} is a variable of the environment, quoted as a URL needs it, so that passwords need not
    lie in the file; $$ is a dollar sign. STILLMOTION_TOKEN is sent to all servers without a token or password of their
    own. Raises HostError; messages never show a line's text, which may hold a password.
    """
    path, common_token = Path(text), environment.get("STILLMOTION_TOKEN")
    if not path.is_file():
        if ":" not in text and ("/" in text or text.endswith(".txt")):
            raise host.HostError(f"there is no file {text}. Give a file of addresses, or http://HOST:PORT,...")
        lines = [(f"address {i}", part.strip()) for i, part in enumerate(text.split(","), 1)]
    else:
        lines = [(f"{path}, line {i}", line.split("#")[0].strip())
                 for i, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1)]
    found = {}
    for where, line in lines:
        if not line:
            continue
        url, *more = line.split()
        token = None
        try:
            if path.is_file():
                quoted = {name: urllib.parse.quote(value, safe="") for name, value in environment.items()}
                url = string.Template(url).substitute(quoted)
                more = [string.Template(word).substitute(environment) for word in more]
        except (KeyError, ValueError) as error:
            name = f"the variable {error.args[0]} is not set" if isinstance(error, KeyError) else "write $ as $$"
            raise host.HostError(f"{where}: {name}.") from None
        if more and (len(more) > 1 or not more[0].startswith("token=")):
            raise host.HostError(f"{where}: after the address only token=TOKEN may follow.")
        if more:
            token = more[0].removeprefix("token=")
        elif "@" not in url:
            token = common_token
        found[url] = Address(url, token)
    return list(found.values())


class WorkerList:
    """Keeps a pool's workers as an address list says; a file is read again when it changes."""

    def __init__(self, where, worker, pool):
        self.where, self.worker, self.pool, self.workers = where, worker, pool, {}
        self.file = Path(where)
        self.stamp = self._stamp()
        self._read()

    def _stamp(self):
        return self.file.stat().st_mtime_ns if self.file.is_file() else None

    def _read(self):
        wanted = {}
        for address in read_addresses(self.where, os.environ):
            worker = self.worker(address)
            wanted.setdefault(worker.label, worker)
        for label, worker in list(self.workers.items()):
            if label not in wanted or wanted[label].address != worker.address:
                self.pool.leave(label)
                del self.workers[label]
        for label, worker in wanted.items():
            if label not in self.workers:
                self.workers[label] = worker
                self.pool.join(worker)

    def look(self):
        """Read the file again if it has changed; one that is being written or is wrong changes nothing."""
        stamp = self._stamp()
        if stamp == self.stamp:
            return
        self.stamp = stamp
        try:
            if stamp:
                self._read()
        except (host.HostError, ServerGone, OSError, UnicodeDecodeError) as error:
            print(f"error: {error} The servers stay as they were.", file=sys.stderr, flush=True)
