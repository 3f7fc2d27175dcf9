"""The child process of library.py: keeps a Pipeline in ComfyUI's Python. One JSON object a line on standard input and
output: the first request opens the pipeline, each further one makes a video. Ends with its input.
"""

import json
import os
import signal
import sys

import errors
import host
import numpy
import pipeline
from progress import Progress


def answer(channel, work):
    """Do the work of one request and answer; returns its result."""
    result, found = None, {}
    try:
        result = work()
    except (host.HostError, errors.JobError, errors.ServerGone) as error:
        found = {"error": str(error)}
    channel.write(json.dumps(found) + "\n")
    channel.flush()
    return result


def make(pipe, image, prompt, result, **settings):
    progress = Progress()
    try:
        frames_THWC = pipe.frames(image, prompt, progress=progress if sys.stderr.isatty() else None, **settings)
    finally:
        progress.close()
    numpy.save(result, frames_THWC)


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cancels the job and stops ComfyUI
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed goes to the terminal
    try:
        pipe = None
        for request in map(json.loads, sys.stdin):
            if pipe is None:
                pipe = answer(channel, lambda: pipeline.Pipeline(**request))
            else:
                answer(channel, lambda: make(pipe, **request))
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(1)
    finally:
        if pipe:
            pipe.close()


if __name__ == "__main__":
    main()
