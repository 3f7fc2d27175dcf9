"""Start and stop a ComfyUI server for one run: on loopback, with a free port and its own folders."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import host

STARTUP_SECONDS = 180
COUNT_GPUS = "import torch; print(torch.cuda.device_count() or int(torch.backends.mps.is_available()))"
PACK_FOLDER = "stillmotion"
GUARD = host.RUNNER / "guard.py"
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # never use a proxy for loopback


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def models_folder(comfyui):
    """Where this ComfyUI searches for checkpoints: its own models folder, or the one shared by the private hosts."""
    if comfyui.is_relative_to(host.cache_folder()):
        return host.cache_folder() / "models"
    return comfyui / "models"


def device_arguments(found, device):
    """ComfyUI's arguments for `auto`, `cpu`, `cuda` or `cuda:N`; auto falls back to the CPU. Raises HostError for a GPU
    that is not there."""
    named = re.fullmatch(r"(?:cuda:?)?(\d*)", device)
    if device == "cpu":
        return ["--cpu"]
    if device != "auto" and not named:
        raise host.HostError(f"device {device!r} is unknown: use auto, cpu, cuda or cuda:N (N counts GPUs from 0).")
    gpus = count_gpus(found)
    if device == "auto":
        return [] if gpus else ["--cpu"]
    if int(named[1] or 0) >= gpus:
        raise host.HostError(f"device {device!r} is not there: PyTorch in {found.python} finds " + (
            f"{gpus} GPU(s), counted from 0." if gpus else "no GPU. Use auto or cpu."))
    return ["--cuda-device", named[1]] if named[1] else []


def count_gpus(found):
    """GPUs that the host's PyTorch can use; Apple's counts as one."""
    if found.variant == "cpu":  # importing torch takes two seconds
        return 0
    done = subprocess.run([str(found.python), "-c", COUNT_GPUS], stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else 0


def link_pack(custom_nodes):
    """Put the pack into a custom_nodes folder: as a symlink, or as a copy if symlinks are not permitted."""
    custom_nodes.mkdir(parents=True)
    try:
        (custom_nodes / PACK_FOLDER).symlink_to(host.PACK, target_is_directory=True)
    except OSError:
        unneeded = shutil.ignore_patterns(".git", "results", "tests")
        shutil.copytree(host.PACK, custom_nodes / PACK_FOLDER, ignore=unneeded)


class Server:
    """A running ComfyUI with the pack in it. Use as a context manager.

    `models` are folders with checkpoints/, loras/, ... to search besides the host's own; `checkpoints` are
    folders with checkpoint files; `threads` is torch's number of CPU threads, None for its default; `arguments` are
    extra ComfyUI command-line arguments. Raises HostError if the server or the pack fails to start.
    """

    def __init__(self, found, device="auto", models=(), checkpoints=(), threads=None, arguments=()):
        self.base = Path(tempfile.mkdtemp(prefix="stillmotion-server-"))
        self.process = None
        self.keep = False  # keep the folders if something in them is still needed
        self.environment = dict(host.clean_environment(), PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1")
        if threads:
            self.environment.setdefault("OMP_NUM_THREADS", str(threads))
        try:
            link_pack(self.base / "custom_nodes")
            for name in ("input", "output", "user"):
                (self.base / name).mkdir()
            own = models_folder(found.comfyui)
            (own / "checkpoints").mkdir(parents=True, exist_ok=True)
            paths = self._model_paths([own, *models], checkpoints)
            self.command = [
                str(found.python), str(found.comfyui / "main.py"), "--listen", "127.0.0.1", "--disable-auto-launch",
                "--disable-api-nodes", "--base-directory", str(self.base), "--database-url", "sqlite:///:memory:",
                "--log-stdout", "--extra-model-paths-config", str(paths), *device_arguments(found, device), *arguments]
            self._start()
            self._check_pack()
        except BaseException:
            self.stop()
            raise

    def _model_paths(self, models, checkpoints):
        """ComfyUI's file of extra model folders (YAML, of which JSON is a subset)."""
        entries = {}
        for i, folder in enumerate(map(Path, models)):
            names = {d.name for d in folder.iterdir() if d.is_dir()} | {"checkpoints"}
            entries[f"models{i}"] = {"base_path": str(folder.absolute()), **{n: n for n in sorted(names)}}
        for i, folder in enumerate(map(Path, checkpoints)):
            entries[f"checkpoints{i}"] = {"checkpoints": str(folder.absolute()), "is_default": True}  # searched first
        path = self.base / "model_paths.yaml"
        path.write_text(json.dumps(entries))
        return path

    def _start(self):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = open(self.base / "server.log", "wb")
        python, *arguments = self.command
        # a separate session: Ctrl-C reaches only the runner, which then stops the job and the server cleanly. If the
        # runner dies without doing so, the guard sees EOF on its input and terminates the server.
        self.process = subprocess.Popen([python, str(GUARD), str(self.base), *arguments, "--port", str(port)],
                                        stdin=subprocess.PIPE, stdout=self.log, cwd=self.base,
                                        stderr=subprocess.STDOUT, env=self.environment, start_new_session=True)
        deadline = time.monotonic() + STARTUP_SECONDS
        while True:
            if not self.alive():
                code = self.process.returncode
                raise host.HostError(f"ComfyUI stopped while starting (exit code {code}):\n{self.tail()}")
            try:
                with _open(self.url + "/system_stats", timeout=5):
                    return
            except OSError:
                if time.monotonic() > deadline:
                    raise host.HostError(f"ComfyUI did not answer within {STARTUP_SECONDS} s:\n{self.tail()}")
                time.sleep(0.1)

    def _check_pack(self):
        with _open(self.url + "/object_info", timeout=60) as answer:
            nodes = json.load(answer)
        failed = [line for line in self.tail(10000).splitlines() if "IMPORT FAILED" in line and PACK_FOLDER in line]
        if failed or not any(name.startswith("Stillmotion_") for name in nodes):
            raise host.HostError(f"ComfyUI started, but the pack did not load in it:\n{self.tail(40)}")

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def tail(self, lines=20):
        """The last lines of the server's log."""
        return "\n".join((self.base / "server.log").read_text(errors="replace").splitlines()[-lines:])

    def stop(self):
        """Stop the server (takes about a second) and remove its folders unless `keep` is set."""
        if self.alive():
            self.process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process is not None:
            self.process.stdin.close()
            self.log.close()
        if not self.keep:
            shutil.rmtree(self.base, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stop()
