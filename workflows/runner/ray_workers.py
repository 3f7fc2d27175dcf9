"""Servers on a Ray cluster: each is an actor that owns a ComfyUI, started there by the code that starts a private one.

The list stays with this command. Ray starts a lost actor again and repeats its job; when it gives up, the job goes
back to the list and a new actor is made. Ray is an optional package; it may live in an environment of its own.
"""

import contextlib
import os
import subprocess
import sys
from importlib.util import find_spec

import host
from errors import JobError, JobLost, ServerGone
from jobgraphs import BadInput, is_file, read_input
from workers import Made

PACKAGES = ["ray", "aiohttp", "numpy", "pillow", "av"]
MODULES = ("ray", "aiohttp", "numpy", "PIL")
RESTARTS = 3  # of an actor, and of a job on it, before the job goes back to the list
START_SECONDS = 900  # for a place in the cluster and the start of ComfyUI, which may be set up there
LOOK_SECONDS = 0.5
UNSENT = [".git", "results", "output", "tests", "web"]  # folders of the pack that a node does not need


# ---- the environment ----

def environment():
    """The folder of the environment with Ray that --install_ray makes."""
    pinned = {"packages": PACKAGES, "python": host.pins("cpu")["python"]}
    return host.cache_folder() / f"ray-{host.key(pinned)}"


def enter(install=False):
    """Run this command again in the environment with Ray, unless this Python has Ray. Raises HostError."""
    if all(map(find_spec, MODULES)):
        return
    folder = environment()
    if install:
        host.ensure(folder, build, works)
    elif not (folder / host.MANIFEST).is_file():
        raise host.HostError(f"--ray needs the packages {', '.join(PACKAGES)}, which {sys.executable} lacks. Add "
                             "--install_ray to put them into an environment of their own (300 MB, once), or start the "
                             "command with a Python that has them.")
    python = host.venv_python(folder / "venv")
    clean = {name: value for name, value in host.clean_environment().items()
             if name not in ("STILLMOTION_COMFYUI", "STILLMOTION_VARIANT")}
    command = [str(python), *sys.argv]
    if os.name == "nt":
        sys.exit(subprocess.call(command, env=clean))
    os.execve(command[0], command, clean)


def build(folder):
    host.say(f"installing Ray into {folder} (once, about a minute)")
    host.call(sys.executable, "-m", "venv", folder / "venv")
    host.call(host.venv_python(folder / "venv"), "-m", "pip", "install", "-qq", "--no-cache-dir", *PACKAGES)


def works(folder):
    python = host.venv_python(folder / "venv")
    return python.exists() and subprocess.run([str(python), "-c", "import ray, aiohttp, numpy, PIL"],
                                              capture_output=True, env=host.clean_environment()).returncode == 0


# ---- actors ----

class Actor:
    """Runs in the cluster. Sent there by value, so it imports the pack's modules only once it knows where they lie."""

    def __init__(self, pack, options, folder):
        import os
        import sys

        pack = pack or os.getcwd()  # the copy of the pack that Ray brought here
        sys.path.insert(0, os.path.join(pack, "workflows", "runner"))
        import ray_work

        self.work = ray_work.Work(options, folder)

    def open(self):
        return self.work.open()

    def run(self, template, job, inputs):
        return self.work.run(template, job, inputs)

    def state(self):
        return self.work.state


def start(options, templates, folder=None):
    """Connect to the cluster, or start one on this machine; returns its workers. Raises HostError."""
    import ray

    at_home = options.ray == "local"
    runtime = None if at_home else {"working_dir": str(host.PACK), "excludes": UNSENT}
    try:
        ray.init(address=options.ray, log_to_driver=False, logging_level="ERROR", runtime_env=runtime,
                 **({"include_dashboard": False} if at_home else {}))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise host.HostError(f"--ray {options.ray}: no cluster answers there ({error}). If it wants a token, "
                             "set RAY_AUTH_MODE=token, as for every program that uses it.") from None
    gpus = ray.cluster_resources().get("GPU", 0)
    share = options.ray_gpus if options.ray_gpus is not None else min(1, gpus)
    number = options.ray_workers or (int(gpus / share) if gpus and share else 1)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    kind = ray.remote(num_cpus=1, num_gpus=share, max_restarts=RESTARTS, max_task_retries=RESTARTS,
                      max_concurrency=2)(Actor)
    named = {name: str(value) if (value := getattr(options, name)) else None
             for name in ("comfyui", "models", "device", "checkpoint", "preset")}
    arguments = (str(host.PACK) if at_home else None, named, str(folder) if folder and at_home else None)
    return [Hired(f"ray worker {i + 1}", lambda: kind.remote(*arguments), templates) for i in range(number)]


class Hired:
    """One actor as a worker of the pool (see workers.py)."""

    def __init__(self, label, make, templates):
        self.label, self.make, self.templates, self.actor = label, make, templates, None

    def open(self):
        import ray

        self.actor = self.actor or self.make()
        with lost_actor():
            problem = ray.get(self.actor.open.remote(), timeout=START_SECONDS)
        if problem:
            raise host.HostError(f"{self.label}: {problem}")

    def run(self, job, progress, watch):
        import ray

        inputs = {value["sha256"]: read_input(value) for _, _, value in job.changes if is_file(value)}
        with lost_actor():
            waiting = self.actor.run.remote(self.templates(job.template), tuple(job), inputs)
            while not ray.wait([waiting], timeout=LOOK_SECONDS)[0]:
                watch()
                state, _ = ray.wait([self.actor.state.remote()], timeout=LOOK_SECONDS)
                if state and (step := ray.get(state[0])):
                    progress(*step)
            made = ray.get(waiting)
        kind = made.get("kind")
        if kind:
            raise {"lost": ServerGone, "unknown": JobLost, "input": BadInput, "host": host.HostError}.get(
                kind, JobError)(made["text"])
        return Made([{"filename": name, "data": data} for name, data in made["files"]],
                    lambda entry, file: file.write(entry["data"]), made["seconds"], made["memory"])

    def cancel(self, prompt_id):
        pass  # it ended with the actor

    def lost(self):
        self.close()

    def close(self):
        import ray

        if self.actor:
            ray.kill(self.actor)
            self.actor = None


@contextlib.contextmanager
def lost_actor():
    """Turns Ray's errors of a lost actor into ServerGone."""
    import ray

    try:
        yield
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise ServerGone(f"the actor was lost: {str(error).strip().splitlines()[0]}") from None
