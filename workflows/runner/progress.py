"""Progress of a job on the terminal."""

import sys
import time


class Progress:
    """On a terminal one line that is updated in place, elsewhere one line per step."""

    def __init__(self):
        self.node = None
        self.start = time.monotonic()

    def __call__(self, node, value, maximum):
        if node != self.node:
            self.close()
            self.node = node
        end = "\r" if sys.stdout.isatty() else "\n"
        print(f"  {node}: {value}/{maximum}, {time.monotonic() - self.start:.1f} s ", end=end, flush=True)

    def close(self):
        if self.node and sys.stdout.isatty():
            print()
        self.node = None
