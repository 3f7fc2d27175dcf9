"""Shared by the commands that send work to a server: flags, their validation, startup and exit."""

import contextlib
import os
import signal
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import errors
import host

PRESETS = {
    "demo": {},  # the workflow's own values
    "256": {"width": 256, "height": 256, "frame_stride": 3, "guidance_scale": 7.5},
    "512": {"width": 512, "height": 320, "frame_stride": 24, "guidance_scale": 7.5},
    "1024": {"width": 1024, "height": 576, "frame_stride": 10, "guidance_scale": 7.5},
}


def add_server_flags(parser):
    parser.add_argument("--overwrite", action="store_true",
                        help="replace files of the same name (default: the new ones get a number)")
    parser.add_argument("--models", type=Path, help="another models folder to search (with checkpoints/ in it)")
    parser.add_argument("--device", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--comfyui", metavar="PATH", help="use the ComfyUI in this folder")
    parser.add_argument("--server", metavar="URL",
                        help="use the ComfyUI that runs at this address; with a password: http://NAME:PASSWORD@HOST")


def check(options, positive=()):
    """What is wrong with the shared options and the numbers in `positive`, or None."""
    for name in positive:
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            return f"--{name} is {value}: it must be above 0"
    if options.steps and options.steps > 1000:
        return f"--steps is {options.steps}: the model has 1000 timesteps, so at most 1000"
    if options.seed is not None and not 0 <= options.seed < 2 ** 64:
        return f"--seed is {options.seed}: it must lie between 0 and {2 ** 64 - 1}"
    ignored = [name for name in ("comfyui", "models", "device") if getattr(options, name)]
    if options.server and ignored:
        return f"--server brings its own ComfyUI, models and device: leave out --{' --'.join(ignored)}"
    if options.models and not options.models.is_dir():
        return f"--models: there is no folder {options.models}"
    return None


def start(options, client=False):
    """Re-execute in the host's Python; a client alone needs no host if its packages are installed. From now on SIGTERM
    and a closed terminal are handled like Ctrl-C."""
    if not (client or options.server) or not all(map(find_spec, ("aiohttp", "numpy", "PIL"))):
        host.reexec(options.comfyui)
    for stream in filter(None, (sys.stdout, sys.stderr, sys.stdin)):
        # a Windows console or file may have a limited character set
        stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)


def open_pipeline(options, preset="demo"):
    """The pipeline.Pipeline for these options."""
    import pipeline

    return pipeline.Pipeline(preset, options.checkpoint, options.device or "auto", options.comfyui, options.server,
                             options.models)


@contextlib.contextmanager
def ending():
    """Exit with a one-sentence message if something goes wrong."""
    try:
        yield
    except (host.HostError, errors.JobError, errors.ServerGone) as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # the reader of our output has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped; the job was cancelled", file=sys.stderr)
        sys.exit(130)


def make_folder(folder):
    """Create the output folder before any work starts; raises HostError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise host.HostError(f"cannot write into {folder}: {error}. Choose another folder with --output.") from None


def save(pipe, entry, path, overwrite):
    """Save an output entry of the server; returns the path. Raises HostError if it cannot be written."""
    with saving(path, pipe):
        return pipe.client.download(entry, path, overwrite)


@contextlib.contextmanager
def saving(path, pipe):
    """Turn write errors into HostError; the results then stay in the server's folder."""
    try:
        yield
    except OSError as error:
        if pipe.server:
            pipe.server.keep = True
            print(f"the finished files are kept in {pipe.server.base / 'output'}", flush=True)
        raise host.HostError(f"cannot save {path}: {error}. Free some space or choose another --output.") from None


def note(kind, data):
    """Print what a node says, among the messages of a job (Client.run)."""
    import transport

    if kind == transport.NODE_TEXT:
        print(errors.plain(data["text"]), file=sys.stderr, flush=True)


def tell(number, of, what):
    """Exit with an error if any failed."""
    if number:
        sys.exit(f"error: {number} of {of} {what} failed")
