"""Prompts with the latent frames where they start."""
from __future__ import annotations

import re
from typing import NamedTuple

EXAMPLE = 'one "start frame: prompt" per line, for example\n0: a red circle moves left\n12: a red circle moves up'


class PromptTimeline(NamedTuple):
    """`conditionings[i]` (of ComfyUI's CONDITIONING type) applies from latent frame `starts[i]` on."""

    starts: tuple[int, ...]
    conditionings: tuple


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


def apply_timeline(timeline: PromptTimeline | None, positive, frames: int) -> tuple[list, tuple[int, ...]]:
    """(prompts in order, start frames of the second, third, ...) for a video of `frames` latent frames.

    `positive` is the prompt until the timeline's first one starts, and its image entries are used for all prompts.
    """
    if timeline is None:
        return [positive], ()
    if timeline.starts[-1] >= frames:
        raise ValueError(f"The timeline's last prompt starts at latent frame {timeline.starts[-1]}, but this video has "
                         f"the latent frames 0 to {frames - 1}. Use an earlier frame, or make the video longer.")
    image = positive[0][1] if positive else {}
    prompts = [[[text, {**image, **values}] for text, values in conditioning]
               for conditioning in timeline.conditionings]
    if timeline.starts[0] == 0:
        return prompts, timeline.starts[1:]
    return [positive, *prompts], timeline.starts
