"""Recipe of the 96x96 causal Wan: the method of `causal_wan` on patterned objects, with the encoders of the 96x96
DynamiCrafter demo."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from ...causal_wan.model import CausalWan
from ...common.clip import VisionTower
from ...common.demo import DYNAMICRAFTER_96
from ...common.files import read_checkpoint
from ...dynamicrafter import checkpoint as dynamicrafter
from ..data import scenes
from ..parallel import OneProcess
from . import causal_wan as small
from .causal_wan import FRAMES, TURNING, TURNS, WINDOW, Drawn
from .encodings import encode_captions, encode_drawn, encoders
from .fast import check_gradients, device

PARAMS = replace(small.PARAMS, dim=144, ffn_dim=576)
FS = 30                # the slowest: an object stays inside for FRAMES frames
PART = 400             # clips per file
PARTS = {"long": 5, "short": 8}  # of clips of FRAMES, two in five of which turn, and of WINDOW frames
STAGES = ((8000, 1.5e-3), (3000, 5e-4))  # steps and learning rate


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
    path = folder / f"causal_wan_96_{kind}_{number:02}.pt"
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
    """As returned by `causal_wan.encode_clips`."""
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


def compile_layers(net: CausalWan, encodings: dict[str, Tensor], size: int) -> None:
    """Compile the layers for each kind of excerpt when it first comes, for a minute each, which makes a step a quarter
    faster. Raises RuntimeError if that changes the gradients of the most frequent kind."""
    for block in net.blocks:
        block.compile(dynamic=False)

    def loss() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        batch = small.draw_batch(encodings, size, Random(0), generator)
        return small.excerpt_loss(net, batch, small.START, batch.z_BCTHW, generator)

    def eager() -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return loss()
    check_gradients(net, eager, loss, precision=OneProcess())


def make_demo(folder: Path, target: Path, size: int = 8) -> None:
    """Run both stages in `folder`, resuming what is there, then write the file."""
    folder.mkdir(parents=True, exist_ok=True)
    encodings, net = encode_clips(folder, PARTS), small.demo_network(PARAMS)
    for number, (steps, lr) in enumerate(STAGES, start=1):
        if device().type == "cpu":
            compile_layers(net, encodings, size)
        net = small.train(net, encodings, folder / f"causal_wan_96_{number}.pt", steps, size, lr, seed=40 + number,
                          own_context=number > 1)
    small.export(target, net)
