"""Clips of the causal Wan demo: patterned objects that go on for two windows and may turn, encoded once by the encoders
of the 96x96 DynamiCrafter demo."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from ...common.clip import VisionTower
from ...common.demo import DYNAMICRAFTER_96
from ...common.files import read_checkpoint
from ...dynamicrafter import checkpoint as dynamicrafter
from ..data import scenes
from .encodings import encode_captions, encode_drawn, encoders

WINDOW = 16                 # latent frames that a block attends to, including sink and itself, in training and sampling
FRAMES = 2 * WINDOW         # per clip
FS = 30                     # the slowest: an object stays inside for FRAMES frames. The network has no input for it
TURNS = (8, 12, 16, 20)     # latent frames where a clip may change direction, and the prompt with it
TURNING = 0.4               # fraction of clips that change direction
PART = 400                  # clips per file
PARTS = {"long": 10, "short": 16}  # files of clips of FRAMES, and of WINDOW frames without a turn


class Drawn(NamedTuple):
    frames_THWC: Tensor              # uint8
    turn: int                        # frame from which it moves in another direction, or 0
    captions: Sequence[Sequence[str]]  # before and after that, in every wording for training


def draw_turning(scene: scenes.ObjectScene, turn: int, direction: str) -> Tensor:
    """[T, H, W, 3]: like `scene` up to frame `turn`, then in the new direction from its current position."""
    step_x, step_y = scenes.DIRECTIONS[scene.direction]
    way = (turn - 1) * scene.speed
    onward = replace(scene, direction=direction, x=scene.x + step_x * way, y=scene.y + step_y * way)
    return torch.cat((scenes.draw(scene, turn), scenes.draw(onward, FRAMES - turn + 1)[1:]))


def drawn_scenes(rng: Random, kind: str) -> Iterator[Drawn]:
    """PART clips, without held-out combinations before or after a turn."""
    frames = FRAMES if kind == "long" else WINDOW
    for number in range(PART):
        scene = scenes.random_object(rng, frames=frames, fs=FS)
        turn = TURNS[number % len(TURNS)] if kind == "long" and number < PART * TURNING else 0
        onward = replace(scene, direction=rng.choice(
            [d for d in scenes.DIRECTIONS if d != scene.direction
             and not scenes.is_held_out(scene.shape, scene.colour, d)])) if turn else scene
        drawn = draw_turning(scene, turn, onward.direction) if turn else scenes.draw(scene, frames)
        yield Drawn(drawn, turn, [[s.caption(form) for form in range(scenes.HELD_OUT_FORM)] for s in (scene, onward)])


class Encoders(NamedTuple):
    vae: nn.Module
    clip: nn.Module
    vision: VisionTower          # as the nodes have it, whose tokens for Wan differ from DynamiCrafter's


def load_encoders(folder: Path) -> Encoders:
    nodes = dynamicrafter.load(read_checkpoint(DYNAMICRAFTER_96), weight_dtype="fp32")
    return Encoders(*encoders(folder), nodes.clip_vision)


def encode_part(folder: Path, using: Encoders, kind: str, number: int) -> dict:
    """One file of encodings, made if it is missing, with its captions in the order of their numbers."""
    path = folder / f"causal_wan_{kind}_{number:02}.pt"
    if not path.exists():
        index: dict[str, int] = {}
        images, found = [], []
        for drawn in drawn_scenes(Random(f"{kind} {number}"), kind):
            captions = [[index.setdefault(caption, len(index)) for caption in forms] for forms in drawn.captions]
            latents = encode_drawn(using.vae, drawn.frames_THWC.movedim(-1, 1).float() / 127.5 - 1)
            found.append({"latents": latents, "turn": torch.tensor(drawn.turn), "caption": torch.tensor(captions)})
            images.append(drawn.frames_THWC[0].float() / 255)
        part = {name: torch.stack([clip[name] for clip in found]).contiguous() for name in found[0]}
        part["tokens"] = using.vision.encode_image(torch.stack(images)).penultimate_hidden_states
        torch.save({**part, "captions": list(index)}, path)
    return torch.load(path, weights_only=True)


@torch.no_grad()
def encode_clips(folder: Path, parts: dict[str, int]) -> dict[str, Tensor]:
    """Encodings that stay fixed during training, of files that are made once.

    Of the long clips latents [K, 4, FRAMES, h, w] (scaled), tokens [K, N, W] of the first frame, turn [K], caption
    [K, 2, forms] (before and after the turn, indices of text); of the short ones the same under `short_` names; text
    [captions, 77, C] (the empty caption first); grey [1, 4, 1, h, w] and grey_tokens [1, N, W] of a grey image.
    """
    using, index, made = load_encoders(folder), {"": 0}, {}
    for kind, count in parts.items():
        found = [encode_part(folder, using, kind, number) for number in range(count)]
        for part in found:
            numbers = torch.tensor([index.setdefault(caption, len(index)) for caption in part.pop("captions")])
            part["caption"] = numbers[part["caption"]]
        made |= {("short_" if kind == "short" else "") + name: torch.cat([part[name] for part in found])
                 for name in found[0]}
    grey_BHWC = torch.full((1, scenes.SIZE, scenes.SIZE, 3), 0.5)
    return made | {"text": encode_captions(using.clip, SimpleTokenizer(context_length=77)(list(index))),
                   "grey": encode_drawn(using.vae, 2 * grey_BHWC.movedim(-1, 1) - 1)[None].float(),
                   "grey_tokens": using.vision.encode_image(grey_BHWC).penultimate_hidden_states}
