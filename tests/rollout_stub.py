"""A tiny self-rollout for the tests. As a script, `rollout_stub.py FOLDER ACCUMULATION SETTINGS` trains three steps of
it, with further settings in JSON."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import importable  # noqa: F401  makes the pack importable without a server
import torch
from stillmotion.nodes.causal_wan.base import make_model
from stillmotion.nodes.causal_wan.model import WanParams
from stillmotion.nodes.common.core_model import make_patcher
from stillmotion.nodes.training.config import make_config
from stillmotion.nodes.training.data.clips import MovingShapes
from stillmotion.nodes.training.load import load_encoders
from stillmotion.nodes.training.parallel import make_processes
from stillmotion.nodes.training.self_rollout.family import SelfRolloutFamily
from stillmotion.nodes.training.self_rollout.run import SelfRolloutTraining

# as wide as the demo's text encoder and vision tower
I2V = WanParams(in_dim=12, out_dim=4, dim=16, ffn_dim=16, num_heads=2, num_layers=2, text_dim=32, freq_dim=8, i2v=True,
                clip_dim=48)
T2V = replace(I2V, in_dim=4, i2v=False, clip_dim=0)


def model(params, seed):
    """A MODEL with random weights."""
    made, draw = make_model(params, 0.18215, torch.float32), torch.Generator().manual_seed(seed)
    weights = {key: 0.3 * torch.randn(value.shape, generator=draw)
               for key, value in made.diffusion_model.state_dict().items()}
    made.diffusion_model.load_state_dict(weights, assign=True)
    return make_patcher(made)


def training(folder, dataset=None, params=I2V, on_progress=lambda progress: None, processes=None, **given):
    """Six steps with a student's update in every second, on clips of four frames in blocks of two."""
    settings = make_config(None, {
        "family": "causal_wan", "objective": "self_rollout", "checkpoint": "student", "teacher": "teacher", "block": 2,
        "rollout_steps": [1000, 500], "gradient_frames": 4, "num_frames": 4, "frame_size": "16", "vae_psnr": 0,
        "accumulation": 1, "steps": 6, "fake_updates": 2, "ema_start": 2, "save_every": 3, "sample_every": 6,
        "learning_rate": 1e-3, "fake_learning_rate": 1e-3, **given})
    encoders = load_encoders(settings, pixels=False)
    family = SelfRolloutFamily(model(params, 1), model(params, 2), None, encoders, settings)
    return SelfRolloutTraining(family, dataset or MovingShapes(6, 4, (16, 16)), settings, folder / "m.safetensors",
                               folder / "m", processes or make_processes(), on_progress)


if __name__ == "__main__":
    training(Path(sys.argv[1]), accumulation=int(sys.argv[2]), steps=3, **json.loads(sys.argv[3])).run()
