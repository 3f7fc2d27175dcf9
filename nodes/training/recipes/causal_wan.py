"""The recipe of the small causal Wan: image to video in blocks of four frames, trained on Moving Shapes.

Two stages, each resumable: flow matching behind clean context (teacher forcing), then behind last blocks that the
network itself has made (after Self-Forcing, arXiv 2506.08009). Image, text and latents are encoded by the
DynamiCrafter demo, whose VAE and towers it is used with.
"""
from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...causal_wan.blocks import BlockLoop, Plan
from ...causal_wan.cache import KVCache
from ...causal_wan.model import CausalWan, WanParams
from ...causal_wan.noise import seeded_noise
from ...causal_wan.schedule import make_steps
from ...common.attention import torch_attention
from ...common.demo import DYNAMICRAFTER
from ...common.files import read_checkpoint
from ...dynamicrafter import checkpoint as dynamicrafter
from .. import objectives
from ..data import shapes as data
from ..loop import fit

SCALE_FACTOR = 0.18215
PARAMS = WanParams(in_dim=12, out_dim=4, dim=128, ffn_dim=512, num_heads=4, num_layers=4, text_dim=32, freq_dim=64,
                   i2v=True, clip_dim=48)
MASK_CHANNELS = 4

BLOCK = 4
SINK = 4                    # the first block stays in sight
WINDOW = 16                 # latent frames that a block sees, sink and itself included, in training and sampling
FRAMES = data.MAX_FRAMES    # of a clip: twice the window
FS = 18                     # one speed, since the network is not told any
SHIFT = 5.0
STEPS = (1000, 500)         # of the rollouts in training: half of the demo's, which errs in the same way and costs half
OWN_BLOCKS = 3              # that a rollout makes at most: of longer ones little is left of the clip that is learned
TURNS = (8, 12, 16, 20)     # latent frames where a clip may change its direction, and the prompt with it
TURNING = 0.4               # share of clips that do
BLANK = 0.15                # share of batches without a start image: text to video
CLIPS, SHORT_CLIPS = 4000, 6000  # with fewer the network learns places by heart
SHORT = 0.75                # share of straight batches that are short clips


class Excerpt(NamedTuple):
    """Which frames of a clip one training pass sees, and what it learns."""

    end: int                 # the sink, then the frames up to here
    blocks: tuple[int, ...]
    first: int               # blocks from here on are learned

    @property
    def frames(self) -> list[int]:
        return [*range(SINK), *range(self.end - WINDOW + SINK, self.end)]


def draw_excerpt(rng: Random, turn: int) -> Excerpt:
    """An excerpt of a clip that turns at frame `turn`, or goes straight (0), as a block of the sampler would see it.

    Half of the excerpts are the beginning, where they may be. After a turn all before it is one block under the new
    prompt, as when the cache is computed anew; later excerpts have a gap, and learn nothing from the block behind it.
    """
    if not turn:
        end = rng.choice((WINDOW, rng.randrange(WINDOW + BLOCK, FRAMES + 1, BLOCK)))
        return Excerpt(end, (BLOCK,) * (WINDOW // BLOCK), 0 if end == WINDOW else 2)
    ends = [end for end in range(WINDOW, FRAMES + 1, BLOCK)
            if end > turn and (end == WINDOW or turn - end + WINDOW >= SINK + BLOCK)]
    end = rng.choice(ends)
    old = turn - (end - WINDOW)
    return Excerpt(end, (old,) + (BLOCK,) * ((WINDOW - old) // BLOCK), 1)


def draw_turning(clip: data.ShapeClip, turn: int, new_direction: str) -> Tensor:
    """[T, H, W, 3]: as `clip` up to frame `turn`, then in the new direction from where it is."""
    step_x, step_y = data.DIRECTIONS[clip.direction]
    travelled = (turn - 1) * clip.speed
    onward = replace(clip, direction=new_direction, x=clip.x + step_x * travelled, y=clip.y + step_y * travelled)
    return torch.cat((data.draw_clip(clip, turn), data.draw_clip(onward, FRAMES - turn + 1)[1:]))


def random_clips(rng: Random, count: int, turning: float = TURNING) -> list[tuple[data.ShapeClip, int, str]]:
    """(clip, frame where it turns or 0, direction after that); no held-out combination, before or after."""
    clips = []
    while len(clips) < count:
        clip = data.random_clip(rng)
        if clip.fs != FS:  # drawn again: the margin that keeps a shape inside belongs to its speed
            continue
        turn = TURNS[len(clips) % len(TURNS)] if len(clips) < count * turning else 0
        others = [d for d in data.DIRECTIONS if d != clip.direction
                  and not data.is_held_out(clip.shape, clip.colour, d)]
        clips.append((clip, turn, rng.choice(others) if turn else clip.direction))
    return clips


@torch.no_grad()
def encode(demo, clips: Sequence[tuple[data.ShapeClip, int, str]], frames: int, index: dict[str, int]
           ) -> dict[str, Tensor]:
    """Encodings of clips by the nodes that a user has: latents [K, 4, frames, h, w] (scaled), tokens [K, N, W] of the
    first frame, turn [K], caption [K, 2, forms] (before and after the turn) as numbers of `index`, which grows."""
    found = {"latents": [], "tokens": [], "turn": [], "caption": []}
    for clip, turn, direction in clips:
        drawn = draw_turning(clip, turn, direction) if turn else data.draw_clip(clip, frames)
        pixels_THWC = drawn.float() / 255
        found["latents"].append((demo.vae.encode(pixels_THWC)[0] * SCALE_FACTOR).half())
        found["tokens"].append(demo.clip_vision.encode_image(pixels_THWC[:1]).penultimate_hidden_states[0])
        found["turn"].append(torch.tensor(turn))
        found["caption"].append(torch.tensor(
            [[index.setdefault(c.caption(form), len(index)) for form in range(data.HELD_OUT_FORM)]
             for c in (clip, replace(clip, direction=direction))]))
        if len(found["turn"]) % 500 == 0:
            logging.info("encoded %d / %d clips", len(found["turn"]), len(clips))
    return {name: torch.stack(values) for name, values in found.items()}


@torch.no_grad()
def encode_clips(folder: Path, count: int = CLIPS, short: int = SHORT_CLIPS) -> dict[str, Tensor]:
    """What does not change while the network learns, made once: whole clips as `encode` gives them, further straight
    ones of a window under `short_` names, text [captions, 77, C] (the empty one first), grey [1, 4, 1, h, w] and
    grey_tokens [1, N, W] of a grey picture."""
    path = folder / "causal_wan_encodings.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    demo, index, rng = dynamicrafter.load(read_checkpoint(DYNAMICRAFTER), weight_dtype="fp32"), {"": 0}, Random(11)
    encodings = encode(demo, random_clips(rng, count), FRAMES, index)
    straight = encode(demo, random_clips(rng, short, turning=0), WINDOW, index)
    encodings |= {f"short_{name}": value for name, value in straight.items()}
    text = [demo.clip.encode_from_tokens(demo.clip.tokenize(caption))[0] for caption in index]
    grey = torch.full((1, 64, 64, 3), 0.5)
    encodings |= {"text": torch.stack(text), "grey": demo.vae.encode(grey) * SCALE_FACTOR,
                  "grey_tokens": demo.clip_vision.encode_image(grey).penultimate_hidden_states}
    encodings = {name: value.clone() for name, value in encodings.items()}
    torch.save(encodings, path)
    return encodings


def image_condition(image_BCHW: Tensor, grey_1C1HW: Tensor, frames: int, blank: bool = False) -> Tensor:
    """y [B, 4 + C, T, h, w] as Causal Wan Image to Video makes it: mask 1 and the start image, then grey frames; with
    `blank` all frames are grey."""
    latent = grey_1C1HW.repeat(len(image_BCHW), 1, frames, 1, 1)
    mask = latent.new_zeros(len(latent), MASK_CHANNELS, *latent.shape[2:])
    if not blank:
        latent[:, :, 0] = image_BCHW
        mask[:, :, 0] = 1
    return torch.cat((mask, latent), dim=1)


def demo_network(params: WanParams = PARAMS) -> CausalWan:
    """The untrained network; its last layer is small, so that it begins by predicting nothing."""
    torch.manual_seed(12)
    net = CausalWan(params, nn, torch_attention)
    nn.init.normal_(net.head.head.weight, std=1e-3)
    nn.init.zeros_(net.head.head.bias)
    return net


class Batch(NamedTuple):
    z_BCTHW: Tensor                  # whole clips, or short ones
    y_BYTHW: Tensor
    text_BLC: tuple[Tensor, Tensor]  # before and after the turn
    image_BNW: Tensor
    turn: int
    blank: bool                      # without start image


def draw_batch(encodings: dict[str, Tensor], size: int, rng: Random, generator: torch.Generator) -> Batch:
    """Clips that all turn at one frame or none, or have no start image; one text in ten is dropped.

    So are half of the image tokens: of few clips the network would learn them by heart, and not look at the image.
    """
    blank = rng.random() < BLANK
    turn = rng.choice(TURNS) if not blank and rng.random() < TURNING else 0
    kind = "short_" if turn == 0 and rng.random() < SHORT else ""
    group = (encodings[f"{kind}turn"] == turn).nonzero()[:, 0]
    pick = group[torch.randint(0, len(group), (size,), generator=generator)]
    form = torch.randint(0, data.HELD_OUT_FORM, (size,), generator=generator)
    dropped = torch.rand(size, generator=generator) < 0.1
    text = tuple(encodings["text"][torch.where(dropped, 0, encodings[f"{kind}caption"][pick, part, form])]
                 for part in (0, 1))
    z = encodings[f"{kind}latents"][pick].float()
    unseen = (torch.rand(size, generator=generator) < 0.5) | blank
    tokens = torch.where(unseen[:, None, None], encodings["grey_tokens"], encodings[f"{kind}tokens"][pick])
    return Batch(z, image_condition(z[:, :, 0], encodings["grey"], z.shape[2], blank), text, tokens, turn, blank)


def rollout_plan(frames: int, turn: int) -> Plan:
    """As the demo's workflows sample, in fewer steps and without guidance."""
    steps = make_steps(STEPS, SHIFT, warp=True)
    return Plan(blocks=(BLOCK,) * (frames // BLOCK), steps=steps, first_steps=steps, context_noise=0, window=WINDOW,
                sink=SINK, endless=True, switches=(turn,) if 0 < turn < frames else (), global_sink=True, cfg=1)


@torch.no_grad()
def roll_out(net: CausalWan, batch: Batch, given: int, frames: int, seed: int) -> Tensor:
    """The clips up to frame `given` (whole blocks), and what the network makes of them from there by itself: latents
    [B, C, frames, h, w]."""
    size, channels, _, height, width = batch.z_BCTHW.shape
    plan = rollout_plan(frames, batch.turn)
    cache = KVCache(plan.layout(net.params, height, width), size, torch.float32, "cpu")
    loop = BlockLoop(plan=plan, evaluate=net, caches=[cache], y_BYFHW=batch.y_BYTHW[:, :, :frames],
                     project=lambda prompt: [net.project_context(batch.text_BLC[prompt], batch.image_BNW)],
                     noise=seeded_noise(seed, size, channels, height, width), on_step=lambda *_: None)
    context_BCPHW = batch.z_BCTHW[:, :, :given]
    made = loop.run(context_BCPHW if given else None, None, None)
    return torch.cat((context_BCPHW, *(block.latent_BCFHW for block in made)), dim=2)


def excerpt_loss(net: CausalWan, batch: Batch, excerpt: Excerpt, context_BCTHW: Tensor,
                 generator: torch.Generator) -> Tensor:
    """Loss of one pass over an excerpt, its finished frames taken from `context_BCTHW` (whole clips).

    Frames are numbered as if there were no gap: so the sampler turns the sink's keys ("endless").
    """
    z, y = batch.z_BCTHW[:, :, excerpt.frames], batch.y_BYTHW[:, :, excerpt.frames]
    keys = net.project_context(batch.text_BLC[1], batch.image_BNW)
    sigma = objectives.block_sigmas((len(z), len(excerpt.blocks)), SHIFT, generator)
    noise = torch.randn(z.shape, generator=generator)
    return objectives.causal_flow_loss(net, z, context_BCTHW[:, :, excerpt.frames], y, keys, excerpt.blocks,
                                       excerpt.first, sigma, noise, emphasis=5)


def train(net: CausalWan, encodings: dict[str, Tensor], checkpoint: Path, steps: int, size: int, lr: float, seed: int,
          own_context: bool, save_every: int = 100) -> CausalWan:
    """One stage; with `own_context` the last blocks before the learned ones are the network's own."""
    rng = Random()

    def loss_of(number: int, generator: torch.Generator) -> Tensor:
        rng.seed(generator.initial_seed())
        batch = draw_batch(encodings, size, rng, generator)
        excerpt = draw_excerpt(rng, batch.turn)
        if batch.blank or batch.z_BCTHW.shape[2] == WINDOW:  # without an image all lies in the first block
            excerpt = Excerpt(WINDOW, (BLOCK,) * (WINDOW // BLOCK), 0)
        context = batch.z_BCTHW
        if own_context and not batch.blank:  # without the image a rollout is another video than the clip
            frames = excerpt.end - BLOCK
            given = max(0, frames - BLOCK * rng.randint(1, OWN_BLOCKS))
            made = roll_out(net, batch, given, frames, generator.initial_seed())
            context = torch.cat((made, context[:, :, made.shape[2]:]), dim=2)
        return excerpt_loss(net, batch, excerpt, context, generator)

    return fit(net, loss_of, steps=steps, lr=lr, checkpoint=checkpoint, seed=seed, ema_decay=0.998,
               save_every=save_every)


def export(path: Path, net: CausalWan) -> None:
    """Write the network in native Wan keys as fp16; the header's `config` tells what shapes cannot."""
    config = {"num_heads": net.params.num_heads, "scale_factor": SCALE_FACTOR, "transformer": {"causal_ar": True}}
    weights = {key: value.half().contiguous() for key, value in net.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt", "config": json.dumps(config)})


def make_causal_wan_demo(folder: Path, target: Path, size: int = 8,
                         stages: Sequence[tuple[int, float]] = ((9000, 1.6e-3), (4500, 6e-4))) -> None:
    """Both stages (steps, learning rate) in `folder` (what is there is gone on with), then the file."""
    folder.mkdir(parents=True, exist_ok=True)
    encodings, net = encode_clips(folder), demo_network()
    for number, (steps, lr) in enumerate(stages, start=1):
        net = train(net, encodings, folder / f"causal_wan_{number}.pt", steps, size, lr, seed=20 + number,
                    own_context=number > 1)
    export(target, net)
