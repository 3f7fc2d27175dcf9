"""Core's U-Net nodes between our loaders and samplers in a real ComfyUI server, with the pack loaded as usual."""

import json
import shutil

import graph
import host
import numpy as np
import pytest
from client import JobError
from core_calls import lossless_frames
from stillmotion.nodes.training.data import shapes as data
from tracking import track

SAMPLER = "Stillmotion_DDIMSampler"
NODES = {"FreeU": dict(b1=1.1, b2=1.2, s1=0.9, s2=0.2), "FreeU_V2": dict(b1=1.3, b2=1.4, s1=0.9, s2=0.2),
         "HyperTile": dict(tile_size=64, swap_size=2, max_depth=0, scale_depth=False),
         "TomePatchModel": dict(ratio=0.5),
         "PatchModelAddDownscale": dict(block_number=2, downscale_factor=2.0, start_percent=0.0, end_percent=0.5,
                                        downscale_after_skip=True, downscale_method="bicubic",
                                        upscale_method="bicubic"),
         "PerturbedAttentionGuidance": dict(scale=3.0), "SelfAttentionGuidance": dict(scale=0.5, blur_sigma=2.0),
         "RenormCFG": dict(cfg_trunc=100.0, renorm_cfg=1.0), "ContextWindowsManual": dict(
             context_length=8, context_overlap=4, context_schedule="standard_static", context_stride=1,
             closed_loop=False, fuse_method="pyramid", dim=2)}
# The demos have spatial attention only at half size.
REFUSED = {name: {"HyperTile", "TomePatchModel", "SelfAttentionGuidance"}
           for name in ("animate", "video_unet_text_to_video")}


def make_job(client, name, steps, frames, node=None, **inputs):
    """A shipped graph with few steps and a core node between the model and the sampler.

    animate runs with the 64x64 demo: its plain shape can be tracked, and it reacts more to changes of its middle layers
    (by 0.2 to 0.9 levels where the 96x96 demo changes by 0.02).
    """
    job = json.loads((host.WORKFLOWS / "api" / f"{name}.json").read_text())
    if name == "animate":
        loader, image = graph.find_node(job, "Stillmotion_LoadDynamiCrafter"), graph.find_node(job, "LoadImage")
        prompt = job[graph.find_node(job, "Stillmotion_DynamiCrafterImageToVideo")]["inputs"]["positive"][0]
        job[loader]["inputs"]["checkpoint"], job[image]["inputs"]["image"] = "demo", "stillmotion_start.png"
        job[prompt]["inputs"]["text"] = "a red circle moves right on a white background"
    for entry in job.values():
        if "frames" in entry["inputs"]:
            entry["inputs"]["frames"] = frames
    sampler = job[graph.find_node(job, SAMPLER)]["inputs"]
    sampler["steps"] = steps
    if node:
        known = client.json(f"/object_info/{node}")[node]["input"]
        newer = {key: spec[1]["default"] for key, spec in known["required"].items() if key not in {"model", *inputs}}
        job["core"] = {"class_type": node, "inputs": {**newer, **inputs, "model": sampler["model"]}}
        sampler["model"] = ["core", 0]
    return job


@pytest.mark.parametrize("name", REFUSED)
def test_every_node_acts_or_says_why_not(client, name):
    plain = lossless_frames(client, make_job(client, name, 2, 10))
    refused = set()
    for node, inputs in NODES.items():
        try:
            frames = lossless_frames(client, make_job(client, name, 2, 10, node, **inputs))
        except JobError as error:
            refused.add(node)
            assert "Remove that node from the model" in str(error)
            continue
        assert frames.shape == plain.shape and np.abs(frames.astype(int) - plain).mean() > 0.05, node
    assert refused == REFUSED[name]


def test_a_long_clip_in_windows_moves_without_a_jump(client):
    """48 frames in windows of 16, the length the demo was trained with."""
    windows = NODES["ContextWindowsManual"] | {"context_length": 16, "context_overlap": 8}
    frames = lossless_frames(client, make_job(client, "animate", 8, 48, "ContextWindowsManual", **windows))
    path_T2 = track(frames.astype(float), data.COLOURS, data.BACKGROUNDS, data.DIRECTIONS).path_T2
    assert len(frames) == 48 and np.isfinite(path_T2).all()
    assert np.linalg.norm(np.diff(path_T2, axis=0), axis=1).max() < 3  # pixels from frame to frame
    assert path_T2[-1, 0] - path_T2[0, 0] > 5                         # "moves right"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="compiling needs a C++ compiler")
@pytest.mark.parametrize("name", REFUSED)
def test_a_compiled_model_makes_the_same_frames(client, name):
    plain = lossless_frames(client, make_job(client, name, 2, 4))
    frames = lossless_frames(client, make_job(client, name, 2, 4, "TorchCompileModel", backend="inductor"))
    assert np.abs(frames.astype(int) - plain).max() <= 2
