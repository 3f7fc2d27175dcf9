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
    pipe = None
    try:
        for request in map(json.loads, sys.stdin):
            try:
                if pipe is None:
                    pipe = pipeline.Pipeline(**request)
                else:
                    make(pipe, **request)
                answer = {"url": pipe.client.url}
            except (host.HostError, errors.JobError, errors.ServerGone) as error:
                answer = {"error": str(error)}
            channel.write(json.dumps(answer) + "\n")
            channel.flush()
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(1)
    finally:
        if pipe:
            pipe.close()


if __name__ == "__main__":
    main()
