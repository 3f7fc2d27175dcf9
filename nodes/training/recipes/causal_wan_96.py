"""Recipe of the 96x96 causal Wan: the method of `causal_wan` on patterned objects, with the encoders of the 96x96
DynamiCrafter demo."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from ...causal_wan.model import CausalWan
from ...common.demo import DYNAMICRAFTER_96
from ...common.files import read_checkpoint
from ...dynamicrafter import checkpoint as dynamicrafter
from ..data import scenes
from ..parallel import OneProcess
from . import causal_wan as small
from .causal_wan import FRAMES, TURNING, TURNS, WINDOW, Drawn
from .fast import check_gradients

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


def encode_part(folder: Path, demo, kind: str, number: int) -> dict:
    """One file of encodings, made if it is missing, with its captions in the order of their numbers."""
    path = folder / f"causal_wan_96_{kind}_{number:02}.pt"
    if not path.exists():
        index: dict[str, int] = {}
        clips = drawn_scenes(Random(f"{kind} {number}"), kind)
        torch.save({**small.encode(demo, clips, index), "captions": list(index)}, path)
    return torch.load(path, weights_only=True)


def encode_clips(folder: Path, parts: dict[str, int]) -> dict[str, Tensor]:
    """As returned by `causal_wan.encode_clips`."""
    demo = dynamicrafter.load(read_checkpoint(DYNAMICRAFTER_96), weight_dtype="fp32")
    index, made = {"": 0}, {}
    for kind, count in parts.items():
        found = [encode_part(folder, demo, kind, number) for number in range(count)]
        for part in found:
            numbers = torch.tensor([index.setdefault(caption, len(index)) for caption in part.pop("captions")])
            part["caption"] = numbers[part["caption"]]
        made |= {("short_" if kind == "short" else "") + name: torch.cat([part[name] for part in found])
                 for name in found[0]}
    return {name: value.clone() for name, value in (made | small.encode_fixed(demo, index, scenes.SIZE)).items()}


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
        compile_layers(net, encodings, size)
        net = small.train(net, encodings, folder / f"causal_wan_96_{number}.pt", steps, size, lr, seed=40 + number,
                          own_context=number > 1)
    small.export(target, net)
