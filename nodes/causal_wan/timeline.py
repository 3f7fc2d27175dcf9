"""Prompts with the latent frames where they start."""
from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

EXAMPLE = 'one "start frame: prompt" per line, for example\n0: a red circle moves left\n12: a red circle moves up'


class PromptTimeline(NamedTuple):
    """`conditionings[i]` (of ComfyUI's CONDITIONING type) applies from latent frame `starts[i]` on.

    Without entries, the sampler's positive prompt applies to the whole video.
    """

    starts: tuple[int, ...]
    conditionings: tuple


@dataclass
class Prompts:
    """The prompts of a run in order, with those that are sent while it runs.

    `switches[i]` is the latent frame from which `prompts[i + 1]` applies.
    """

    prompts: list
    switches: list[int]

    def begin(self, prompt, start: int, before: int) -> None:
        """`prompt` applies from the block at latent frame `start` on, instead of planned prompts that would begin with
        this block; `before` is the first frame of the block before it."""
        if start == 0:
            self.prompts[0] = prompt
            return
        taken, due = (sum(frame <= reached for frame in self.switches) for reached in (before, start))
        self.switches[taken:due] = [start]
        self.prompts[taken + 1:due + 1] = [prompt]

    def timeline(self, positive, frames: int, cut: int) -> PromptTimeline:
        """The prompts of a video of `frames` latent frames that follow the first `cut` ones, which are dropped. It does
        not name `positive` at the start."""
        starts = [0, *(frame - cut for frame in self.switches)]
        used = [(start, prompt) for start, prompt in zip(starts, self.prompts) if start < frames]
        if used and used[0][1] is positive:
            del used[0]
        return PromptTimeline(tuple(start for start, _ in used), tuple(prompt for _, prompt in used))


def parse_timeline(text: str) -> list[tuple[int, str]]:
    """(start frame, prompt) for each non-empty line. Raises ValueError unless the frames are ascending."""
    entries = []
    for line in filter(None, map(str.strip, text.splitlines())):
        found = re.fullmatch(r"(\d+)\s*:\s*(.*)", line)
        if found is None:
            raise ValueError(f"The timeline's line {line!r} has no start frame. Write {EXAMPLE}")
        entries.append((int(found[1]), found[2]))
    if not entries:
        raise ValueError(f"The timeline is empty. Write {EXAMPLE}")
    starts = [start for start, _ in entries]
    if any(a >= b for a, b in zip(starts, starts[1:])):
        raise ValueError(f"The timeline's start frames are {', '.join(map(str, starts))}. Each prompt must start "
                         "later than the one before it. Put the lines in order and use each frame once.")
    return entries


def apply_timeline(timeline: PromptTimeline | None, positive, frames: int | float) -> tuple[list, tuple[int, ...]]:
    """(prompts in order, start frames of the second, third, ...) for a video of `frames` latent frames.

    `positive` is the prompt until the timeline's first one starts.
    """
    if timeline is None or not timeline.starts:
        return [positive], ()
    if timeline.starts[-1] >= frames:
        raise ValueError(f"The timeline's last prompt starts at latent frame {timeline.starts[-1]}, but this video has "
                         f"the latent frames 0 to {frames - 1}. Use an earlier frame, or make the video longer.")
    if timeline.starts[0] == 0:
        return list(timeline.conditionings), timeline.starts[1:]
    return [positive, *timeline.conditionings], timeline.starts


def with_image(positive, conditioning) -> list:
    """CONDITIONING with the image entries of `positive`."""
    image = positive[0][1] if positive else {}
    return [[text, {**image, **values}] for text, values in conditioning]
