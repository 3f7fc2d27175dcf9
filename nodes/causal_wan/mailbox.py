"""Messages to runs of the sampler while they sample: a new prompt, or the request to end.

The server's thread writes, the sampler's thread reads. A run is named by its job and node.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from ..common.values import check_text

LONGEST_PROMPT = 10_000  # characters
REMEMBERED = 100         # ended runs


class Refused(Exception):
    """A message that is not accepted. `status`: the HTTP status that fits."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


class Mailbox:
    """Messages to one run. The blocks that it makes are counted from 1.

    first: the first block that a prompt can begin with. blocks: number of blocks, None until stopped. prompts: the run
    has a text encoder.
    """

    def __init__(self, first: int, blocks: int | None, prompts: bool):
        self.next, self.blocks, self.prompts = first, blocks, prompts
        self.waiting: str | None = None
        self.stopped = False
        self.lock = Lock()

    def send(self, text: str) -> dict:
        """Leave a prompt for the next block; it replaces one that still waits. Returns {"block", "message"}."""
        text = checked_prompt(text)
        with self.lock:
            if not self.prompts:
                raise Refused(409, "This run has no text encoder: connect one to the sampler's clip, and queue again.")
            if self.stopped or self.blocks is not None and self.next > self.blocks:
                raise Refused(409, "Too late: the last block is being made. Queue again for another video.")
            replaced = "" if self.waiting is None else f", instead of {self.waiting!r}, which no block has used"
            self.waiting = text
            return {"block": self.next, "message": f"The prompt begins with block {self.next}{replaced}."}

    def stop(self) -> dict:
        """Ask the run to end after the current block. Returns {"message"}."""
        with self.lock:
            self.stopped = True
        return {"message": "The video ends with the block that is being made."}

    def take(self, block: int) -> str | None:
        """The prompt for this block, which is made now."""
        with self.lock:
            self.next = block + 1
            text, self.waiting = self.waiting, None
            return text


def checked_prompt(text) -> str:
    """`text` as one line, as Prompt Timeline takes it. Raises Refused unless it is a prompt."""
    if not isinstance(text, str) or not text.strip():
        raise Refused(400, "text is empty: give the new prompt, for example a red circle moves up.")
    if len(text) > LONGEST_PROMPT:
        raise Refused(400, f"text has {len(text)} characters: give at most {LONGEST_PROMPT}.")
    try:
        check_text("text", text)
    except ValueError as error:
        raise Refused(400, str(error)) from None
    return " ".join(text.split())


class Mailboxes:
    """The mailboxes of all runs in progress, by (job, node)."""

    def __init__(self):
        self.open: dict[tuple[str, str], Mailbox] = {}
        self.ended: deque[tuple[str, str]] = deque(maxlen=REMEMBERED)

    @contextmanager
    def opened(self, run: tuple[str, str], mailbox: Mailbox) -> Iterator[None]:
        """Messages to `run` reach `mailbox` until the with block ends."""
        self.open[run] = mailbox
        try:
            yield
        finally:
            del self.open[run]
            self.ended.append(run)

    def find(self, run: tuple[str, str]) -> Mailbox:
        """Raises Refused if the run is not in progress."""
        found = self.open.get(run)
        if found is None and run in self.ended:
            raise Refused(409, "Too late: this run has ended. Queue again for another video.")
        if found is None:
            raise Refused(404, f"Node {run[1]} of the job {run[0]} takes no messages: it has not begun, or it is no "
                               "Block-Autoregressive Sampler.")
        return found
