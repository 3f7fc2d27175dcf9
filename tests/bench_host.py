"""What ComfyUI's own means of speed do to the DynamiCrafter demo: seconds, and what they cost in quality.

Each variant samples the same video as the plain run; "psnr" compares the decoded frames with the plain run's, in dB.
A step cache leaves out evaluations, so that its speed-up is the same on every device; attention functions and 8-bit
weights are faster on GPUs that have kernels for them.
"""
import statistics

import bench_dynamicrafter
from bench_tools import describe, timed


def add_arguments(parser):
    bench_dynamicrafter.add_arguments(parser)


def attention_override(model):
    """Another attention function through the option that ComfyUI's nodes for sage, flash and others set."""
    from comfy.ldm.modules.attention import attention_sub_quad

    def override(function, *args, **kwargs):
        return attention_sub_quad(*args, **kwargs)

    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


def variants(loaded, options, folder):
    """MODELs by name."""
    from types import SimpleNamespace

    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
    small, *_ = bench_dynamicrafter.load_model(SimpleNamespace(**vars(options) | {"dtype": "fp8_e4m3fn"}), folder)
    model = loaded.model
    return {"plain": model, "plain again": model, "attention override": attention_override(model),
            "EasyCache, threshold 0.1": EasyCacheNode.execute(model, 0.1, 0.15, 0.95, False).result[0],
            "EasyCache, threshold 0.2": EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False).result[0],
            "LazyCache, threshold 0.2": LazyCacheNode.execute(model, 0.2, 0.15, 0.95, False).result[0],
            "fp8_e4m3fn weights": small.model}


def measure(options, folder):
    """Seconds and PSNR of every variant as a dict."""
    import torch
    from stillmotion.nodes.ddim.sampler import sample_latent
    loaded, _, name, width, height, frames = bench_dynamicrafter.load_model(options, folder)
    settings = bench_dynamicrafter.make_settings(options)
    positive, negative, shape = bench_dynamicrafter.make_conditioning(loaded, width, height, frames)
    models, seconds, pictures = variants(loaded, options, folder), {}, {}

    def run(model):
        return sample_latent(model, positive, negative, {"samples": torch.zeros(shape)}, 1, settings)[0]["samples"]

    for key, model in models.items():
        pictures[key] = loaded.vae.decode(run(model))
    for _ in range(options.runs):
        for key, model in models.items():
            seconds.setdefault(key, []).append(timed(lambda: run(model))[1])
    plain = statistics.median(seconds["plain"])

    def psnr(frames):
        error = (frames - pictures["plain"]).square().mean().item()
        return round(-10 * torch.tensor(error).log10().item(), 1) if error else "identical"

    return {"model": name, **describe(options, loaded.model.load_device), "steps": settings.steps,
            "variants": {key: {"times_faster": round(plain / statistics.median(seconds[key]), 2),
                               "psnr": psnr(pictures[key])} for key in models},
            "latents_agree": psnr(pictures["plain again"]) == "identical"}
