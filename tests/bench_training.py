"""A training step of the video U-Net: samples per second and peak memory, with and without gradient checkpointing.

Each variant runs in its own process, so that the peaks are independent. The network, clips and loss are those of
workflows/train.py; memory is what the steps add to the loaded process (on a GPU: PyTorch's total allocation).
"""
import json
import subprocess
import sys
from pathlib import Path

import bench_self_rollout

# model_channels, levels, blocks per level, latent edge
PRESETS = {"demo": (48, (1, 2), 1, 8), "document": (128, (1, 2, 4), 2, 8), "256": (128, (1, 2, 4), 2, 32)}
CHANNELS, CONTEXT, WARM = 4, 32, 1


def add_arguments(parser):
    parser.add_argument("--objective", choices=["denoising", "self_rollout"], default="denoising",
                        help="self_rollout: what causal Wan on its own videos needs, counted")
    presets = {"denoising": PRESETS, "self_rollout": bench_self_rollout.PRESETS}[
        parser.parse_known_args()[0].objective]
    parser.add_argument("--preset", choices=presets, default="demo", help="size of the network and its latents")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=16)


def measure(options, folder):
    """Figures of both variants; the losses of the same steps must agree."""
    if options.objective == "self_rollout":
        return bench_self_rollout.measure(options, folder)
    figures = {"preset": options.preset, "batch": options.batch, "frames": options.frames}
    for name, checkpointed in (("plain", False), ("checkpointed", True)):
        job = {"preset": options.preset, "batch": options.batch, "frames": options.frames, "runs": options.runs,
               "checkpointed": checkpointed, "device": options.device}
        done = subprocess.run([sys.executable, __file__, json.dumps(job)], capture_output=True, text=True, check=True)
        figures[name] = json.loads(done.stdout.splitlines()[-1])
    plain, again = figures["plain"].pop("loss"), figures["checkpointed"].pop("loss")
    return {**figures, "latents_agree": abs(plain - again) <= 1e-4 * abs(plain)}


def run(job):
    """Run one variant in this process: the median step of `runs`."""
    import importable  # noqa: F401  makes the pack importable without a server
    import torch
    from bench_tools import peak_megabytes, timed
    from stillmotion.nodes.ddim.schedule import DiffusionParams, make_alphas_cumprod
    from stillmotion.nodes.training.families.registry import checkpoint_blocks
    from stillmotion.nodes.training.objectives import video_unet_loss
    from stillmotion.nodes.video_unet.unet import Block, VideoUNetParams, new_network
    device = torch.device(job["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    width, levels, depth, edge = PRESETS[job["preset"]]
    net = new_network(VideoUNetParams(
        channels=CHANNELS, model_channels=width, channel_mult=levels, num_res_blocks=depth,
        spatial_attention=(len(levels) - 1,), head_channels=16, context_dim=CONTEXT, additional_condition_dim=0),
        seed=0).to(device)
    if job["checkpointed"]:
        checkpoint_blocks(net, (Block,))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    alphas = make_alphas_cumprod(DiffusionParams("v", 0.0, 0.0, False, None, "uniform_trailing", 0.0, "cosine"))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(job["batch"], CHANNELS, job["frames"], edge, edge, generator=generator).to(device)
    text = torch.randn(job["batch"], 77, CONTEXT, generator=generator).to(device)
    mask = torch.zeros(job["batch"], job["frames"], device=device)

    def step():
        loss = video_unet_loss(net, z, mask, text, alphas.float(), "v", generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    before = 0 if device.type == "cuda" else peak_megabytes(device)
    times = [timed(step) for _ in range(WARM + job["runs"])]
    seconds = sorted(taken for _, taken in times[WARM:])[job["runs"] // 2]
    print(json.dumps({"samples_per_second": round(job["batch"] / seconds, 3), "step_seconds": round(seconds, 4),
                      "peak_megabytes": round(peak_megabytes(device) - before), "loss": times[-1][0]}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    run(json.loads(sys.argv[1]))
