"""The CLIP towers of the 96x96 demo models: small open_clip towers trained on captions and images of drawn scenes."""
from __future__ import annotations

import logging
from pathlib import Path
from random import Random

import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from .. import objectives
from ..data import scenes
from ..loop import fit
from .dynamicrafter_64 import OPEN_CLIP, text_features, tower_pixels

POOL = 4000                 # images drawn once; captions are drawn anew for every batch
CAMERA = 0.3                # fraction of images without a single object
STEPS, BATCH = 500, 96
MOTIONS = (*scenes.DIRECTIONS, *scenes.MOVES)
NAMED = (scenes.SHAPES, scenes.PATTERNS, tuple(scenes.COLOURS), tuple(scenes.GROUNDS), scenes.STYLES, scenes.PICTURES,
         MOTIONS)           # attributes that a caption may name
UNNAMED = -100              # the class that cross-entropy ignores


def exposure(scene: scenes.Scene, rng: Random) -> Tensor:
    """A still [3, H, W] in [-1, 1] that shows the motion: frames blended with increasing weight, as a fading trail.
    Stills alone would teach the text tower nothing about directions."""
    frames_THWC = scenes.draw(scene, scenes.FRAMES)[::3].float()
    weights = torch.linspace(0.05, 1, len(frames_THWC)) ** rng.uniform(0.5, 4)
    blended = (frames_THWC * (weights / weights.sum())[:, None, None, None]).sum(0)
    return blended.movedim(-1, 0) / 127.5 - 1


def said(scene: scenes.Scene, form: int) -> list[int]:
    """The class of every attribute in `NAMED`; `UNNAMED` for those that captions of this form do not name."""
    if isinstance(scene, scenes.ObjectScene):
        values = (scene.shape, scene.pattern, scene.colour, scene.ground, scene.style, None, scene.direction)
    else:
        values = (None,) * 5 + (scene.picture if "{picture}" in scenes.CAMERA_FORMS[form] else None, scene.move)
    return [UNNAMED if value is None else names.index(value) for names, value in zip(NAMED, values)]


def shuffled(caption: str, rng: Random) -> str:
    """The words shuffled in one case in four: the words matter, not their positions."""
    words = caption.split()
    return " ".join(rng.sample(words, len(words))) if rng.random() < 0.25 else caption


def draw_pool(folder: Path, count: int = POOL) -> tuple[list[scenes.Scene], Tensor]:
    """Scenes, and the vision tower's inputs for them [count, 3, size, size]; drawn once."""
    rng = Random(5)
    pool = [scenes.random_camera(rng) if rng.random() < CAMERA else scenes.random_object(rng) for _ in range(count)]
    path = folder / "exposures.pt"
    if not path.exists():
        logging.info("drawing %d pictures for the towers", count)
        torch.save(torch.cat([tower_pixels(exposure(scene, rng)[None]) for scene in pool]), path)
    return pool, torch.load(path, weights_only=True)


def train_towers(folder: Path, steps: int = STEPS) -> nn.Module:
    """The two CLIP towers, trained contrastively, while the text tower also classifies the attributes in a caption.

    Images teach little about direction and pattern. Without the second loss the text tower encodes both only in the
    word's own token, where the denoiser learns to use them late or never.
    """
    torch.manual_seed(1)
    tokenize, sizes = SimpleTokenizer(context_length=77), [len(names) for names in NAMED]
    nets = nn.ModuleDict({"clip": CLIP(**OPEN_CLIP), "heads": nn.Linear(OPEN_CLIP["embed_dim"], sum(sizes))})
    pool, pixels = draw_pool(folder)
    rng = Random()

    def loss_of(number: int, generator: torch.Generator) -> Tensor:
        rng.seed(generator.initial_seed())
        chosen = [(i, rng.randrange(scenes.HELD_OUT_FORM)) for i in rng.sample(range(len(pool)), BATCH)]
        tokens = tokenize([shuffled(pool[i].caption(form), rng) for i, form in chosen])
        said_BA = torch.tensor([said(pool[i], form) for i, form in chosen])
        scores = nets["heads"](text_features(nets["clip"], tokens).mean(1)).split(sizes, dim=1)
        return (objectives.contrastive_loss(nets["clip"], pixels[[i for i, _ in chosen]], tokens)
                + objectives.attribute_loss(scores, said_BA))

    clip = fit(nets, loss_of, steps=steps, lr=2e-3, checkpoint=folder / "towers_96.pt", ema_decay=0.98,
               save_every=50)["clip"]
    seen = torch.zeros(len(clip.token_embedding.weight), 1)
    rng, forms = Random(6), range(scenes.HELD_OUT_FORM + 1)
    drawn = [make(rng) for make in (scenes.random_object, scenes.random_camera) for _ in range(1000)]
    seen[tokenize(["", *(scene.caption(form) for scene in drawn for form in forms)]).unique()] = 1
    clip.token_embedding.weight.data.mul_(seen)  # untrained rows carry no information, and zeros compress
    return clip.eval()
