"""A run whose prompts change while it samples."""
from __future__ import annotations

from collections.abc import Callable

from .mailbox import Mailbox
from .timeline import Prompts, PromptTimeline


def encode_prompt(clip, text: str):
    """CONDITIONING of a text, as core's CLIP Text Encode makes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


class Steering:
    """Hands prompts from a mailbox to a run, and records in `prompts` what was used.

    encode(text) returns the prompt's CONDITIONING, with ValueError for one that does not fit the model. tell(**values)
    tells the page: what began (block, frame, text), or what did not (text, error). What is told counts blocks from 1
    after the `given` ones, and latent frames from 0 after the first `cut` ones.
    """

    def __init__(self, mailbox: Mailbox, prompts: Prompts, given: int, cut: int, encode: Callable | None,
                 tell: Callable):
        self.mailbox, self.prompts, self.given, self.cut = mailbox, prompts, given, cut
        self.encode, self.tell = encode, tell
        self.before = 0  # first latent frame of the block before
        self.frames = 0  # latent frames of video so far
        self.sent: list[tuple[int, str]] = []  # (frame, text)

    def change(self, index: int, start: int, made: bool):
        """The CONDITIONING that begins with the block at latent frame `start`, or None. made: the block is stored
        already, so prompts have to wait."""
        before, self.before = self.before, start
        block = index - self.given + 1
        text = None if made else self.mailbox.take(block)
        if text is None:
            return None
        try:
            conditioning = self.encode(text)
        except ValueError as error:  # the video goes on with its last prompt
            self.tell(text=text, error=str(error))
            return None
        self.prompts.begin(conditioning, start, before)
        frame = max(0, start - self.cut)
        self.sent.append((frame, text))
        self.tell(text=text, block=block, frame=frame)
        return conditioning

    def ends(self, frames: int) -> bool:
        """Whether the run has to end after these `frames` latent frames of video."""
        self.frames += frames
        return self.mailbox.stopped

    def timeline(self, positive) -> PromptTimeline:
        """The prompts that the video so far was made with."""
        return self.prompts.timeline(positive, self.frames, self.cut)
