"""How well a small causal Wan or its teacher follows image and prompt, how far it drifts, in how many passes.

    python tests/measure_causal_wan.py nodes/demo/causal_wan_demo.safetensors --steps 1000,750,500,250 --cfg 1
    python tests/measure_causal_wan.py STUDENT.safetensors --steps 1000,750,500,250 --cfg 1
    python tests/measure_causal_wan.py STUDENT.safetensors --steps 1000,500 --cfg 1 --frames 64
    python tests/measure_causal_wan.py TEACHER.safetensors --bidirectional --steps 30 --cfg 1.5 --frames 16

Held-out objects of the 96x96 demos; the prompt turns round every 16 frames, so that the object stays inside. For each
16 frames: share of clips with the right direction, share with the right hue (within 10 degrees in every frame), and the
mean overlap of the object with its true outline at its place (intersection over union). The last line is the figures as
JSON.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent / "workflows" / "runner"), str(TESTS)]

import host  # noqa: E402

PART = 16   # frames between turns
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", default="1000,750,500,250", help="denoising steps; of a teacher: their number")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--frames", type=int, default=64, help="whole 16")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--bidirectional", action="store_true", help="a teacher: the whole video at once, 16 frames")
    options = parser.parse_args()
    host.check_python()
    host.reexec()
    import importable  # noqa: F401
    import torch
    with torch.inference_mode():
        print(json.dumps(measured(options)))


def measured(options):
    from stillmotion.nodes.causal_wan import checkpoint
    from stillmotion.nodes.common.demo import DYNAMICRAFTER_96
    from stillmotion.nodes.common.files import read_checkpoint
    from stillmotion.nodes.dynamicrafter import checkpoint as dynamicrafter
    from stillmotion.nodes.training.data import scenes as data
    from stillmotion.nodes.training.recipes import causal_wan as recipe
    from stillmotion.nodes.training.recipes.causal_wan_clips import FS
    demo = dynamicrafter.load(read_checkpoint(DYNAMICRAFTER_96), weight_dtype="fp32")
    found = checkpoint.load(read_checkpoint(options.checkpoint), weight_dtype="fp32", causal=not options.bidirectional)
    net, rng, rows = recipe.demo_network(found.model.wan_params), Random(77), []
    net.load_state_dict(found.model.diffusion_model.state_dict())
    while len(rows) < options.clips:
        scene = data.random_object(rng, held_out=True, frames=PART, fs=FS)
        latent, passes = made(net.eval(), demo, scene, options, len(rows))
        pixels = demo.vae.decode(latent / recipe.SCALE_FACTOR)[0].clamp(0, 1).mul(255).round().numpy()
        rows.append(judged(pixels, scene, data))
    parts = [{name: round(sum(row[part][name] for row in rows) / len(rows), 4) for name in rows[0][part]}
             for part in range(len(rows[0]))]
    return {"checkpoint": options.checkpoint.name, "steps": options.steps, "cfg": options.cfg, "clips": len(rows),
            "passes_a_block": passes, "parts": parts}


def made(net, demo, scene, options, seed):
    """(latent [1, C, F, h, w], passes of the network a block) from the scene's first frame."""
    import torch
    from stillmotion.nodes.causal_wan.blocks import BlockLoop, Plan, guided_x0
    from stillmotion.nodes.causal_wan.cache import KVCache
    from stillmotion.nodes.causal_wan.noise import seeded_noise
    from stillmotion.nodes.causal_wan.schedule import make_steps
    from stillmotion.nodes.training.data import scenes as data
    from stillmotion.nodes.training.recipes import causal_wan as recipe
    from stillmotion.nodes.training.recipes.causal_wan_clips import WINDOW
    image = data.draw(scene, 1).float() / 255
    latent, grey = (demo.vae.encode(each) * recipe.SCALE_FACTOR for each in (image, torch.full_like(image, 0.5)))
    y = recipe.image_condition(latent[:, :, 0], grey, options.frames)
    tokens = demo.clip_vision.encode_image(image).penultimate_hidden_states
    captions = [replace(scene, direction=way).caption(0) for way in (scene.direction, OPPOSITE[scene.direction])]
    texts = [demo.clip.encode_from_tokens(demo.clip.tokenize(caption)) for caption in ("", *captions)]
    keys = [net.project_context(text, tokens) for text in texts]
    draw = seeded_noise(seed, 1, latent.shape[1], *latent.shape[3:])
    branches = 1 if options.cfg == 1 else 2
    if options.bidirectional:
        x, count = draw(0, options.frames, 0), int(options.steps)
        sigmas = [1 - i / count for i in range(count)]
        levels = [*(recipe.SHIFT * s / (1 + (recipe.SHIFT - 1) * s) for s in sigmas), 0.0]
        for now, after in zip(levels, levels[1:]):
            t = torch.full((1, options.frames), 1000 * now)
            flows = [net(torch.cat((x, y), dim=1), t, key, range(options.frames))
                     for key in (keys[1], keys[0])[:branches]]
            x0 = guided_x0(x, now, flows, options.cfg)
            x = x0 + after / now * (x - x0)
        return x, count * branches
    steps = make_steps([int(step) for step in options.steps.split(",")], recipe.SHIFT, warp=True)
    plan = Plan(blocks=(recipe.BLOCK,) * (options.frames // recipe.BLOCK), steps=steps, first_steps=steps,
                context_noise=0, window=WINDOW, sink=recipe.SINK, endless=True, global_sink=True,
                switches=tuple(range(PART, options.frames, PART)), cfg=options.cfg)
    caches = [KVCache(plan.layout(net.params, *latent.shape[3:]), 1, torch.float32, "cpu") for _ in range(branches)]
    loop = BlockLoop(plan=plan, evaluate=net, caches=caches, y_BYFHW=y, noise=draw, on_step=lambda *_: None,
                     project=lambda number: [keys[1 + number % 2], keys[0]][:branches])
    blocks = [block.latent_BCFHW for block in loop.run(None, None, None)]
    return torch.cat(blocks, dim=2), (len(steps) + 1) * branches


def judged(pixels_THWC, scene, data):
    """Figures of every 16 frames."""
    import numpy as np
    from outlines import follow
    from tracking import find_direction
    true = data.draw(scene, 1).numpy().repeat(len(pixels_THWC), axis=0)  # compared at the place where it is found
    found = follow(pixels_THWC, true, data.draw_ground(scene).clamp(0, 255).round().numpy())
    rows = []
    for start in range(0, len(pixels_THWC), PART):
        part = slice(start, start + PART)
        path = found.path_T2[part]
        direction = None if np.isnan(path).any() else find_direction(path, data.DIRECTIONS)[0]
        rows.append({"direction": direction == (scene.direction if start // PART % 2 == 0
                                                else OPPOSITE[scene.direction]),
                     "colour": bool((found.hue_error_T[part] < 10).all()),
                     "outline": float(found.iou_T[part].mean())})
    return rows


if __name__ == "__main__":
    main()
