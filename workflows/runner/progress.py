"""Progress of a job on the terminal."""

import sys
import time


class Progress:
    """One line that grows on a terminal, one line a step elsewhere."""

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
