"""The host part of bench.py: what ComfyUI's own nodes and options for speed bring to the demos of both U-Nets.

A run with each is compared with the plain run of the same seed, with 20 steps and eta 1: how
many times faster, as the median over alternating runs, and the PSNR of the decoded frames. A cache leaves steps out and
so makes another video; an attention function only rounds otherwise, and its latents must agree.
"""
import statistics
import time
from contextlib import contextmanager
from random import Random

from bench_tools import NODES, TOLERANCE, describe, timed

PROMPT = "a blue square moves right on a black background"
SIZE, FRAMES, STEPS = 96, 16, 20


def add_arguments(parser):
    parser.set_defaults(preset=None, runs=3)


def runs():
    """Name -> (MODEL, function that samples with this MODEL, or with one made of it, and returns the latent); VAE."""
    import torch
    from stillmotion.nodes.common.files import read_checkpoint
    from stillmotion.nodes.ddim.sampler import DDIMSettings, sample_latent
    from stillmotion.nodes.ddim.step import Clip
    from stillmotion.nodes.dynamicrafter import checkpoint
    from stillmotion.nodes.dynamicrafter.conditioning import image_conditions
    from stillmotion.nodes.training.data import scenes
    from stillmotion.nodes.video_unet import checkpoint as video_unet
    from stillmotion.nodes.video_unet.conditioning import clip_conditions

    parts = checkpoint.load(read_checkpoint(NODES / "demo/dynamicrafter_96_demo.safetensors"), weight_dtype="fp32")
    small = video_unet.load(read_checkpoint(NODES / "demo/video_unet_demo.safetensors"), "fp32")
    texts = [parts.clip.encode_from_tokens(parts.clip.tokenize(text)) for text in (PROMPT, "")]
    images = scenes.draw(scenes.random_object(Random(0)), 1).float() / 255
    latent, tokens, grey = image_conditions(parts.clip_vision, parts.vae, images, None, "animate", SIZE, SIZE, FRAMES,
                                            1)
    shared = {"concat_latent_image": latent, "frame_stride": 0}
    given = clip_conditions(small.model.video_unet, None, None, "none", SIZE, SIZE, FRAMES, 1)[0]

    def sampler(values, cfg):
        settings = DDIMSettings(steps=STEPS, cfg=cfg, eta=1.0, spacing="auto", guidance_rescale=-1.0, denoise=1.0,
                                image_cfg=0.0, clip=Clip("off", 3.0, False), start_step=0, end_step=1000,
                                tables="fixed")
        conds = [[[text, extra]] for text, extra in zip(texts, values)]
        return lambda model: sample_latent(model, *conds, {"samples": torch.zeros_like(latent)}, 1,
                                           settings)[0]["samples"]

    return {"DynamiCrafter": (parts.model, sampler([{**shared, "image_tokens": tokens},
                                                    {**shared, "image_tokens": grey}], 7.5)),
            "Video U-Net": (small, sampler([given, given], 2.0))}, parts.vae


@contextmanager
def attention(model, function):
    """Let the layers of a MODEL attend by another of ComfyUI's functions, as its options for the command line do."""
    layers = [layer for layer in model.model.diffusion_model.modules() if hasattr(layer, "attention")]
    own = [layer.attention for layer in layers]
    try:
        for layer in layers:
            layer.attention = function
        yield
    finally:
        for layer, function in zip(layers, own):
            layer.attention = function


def ways():
    """Name -> (whether the latent must stay the same, function of `run` and MODEL that returns the latent)"""
    from comfy.ldm.modules import attention as functions
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    def cached(node, threshold):
        return False, lambda run, model: run(node.execute(model, threshold, 0.15, 0.95, False).args[0])

    def attending(function):
        def call(run, model):
            with attention(model, function):
                return run(model)
        return True, call

    caches = {f"{node.__name__.removesuffix('Node')}, threshold {threshold}": cached(node, threshold)
              for node in (EasyCacheNode, LazyCacheNode) for threshold in (0.2, 0.1)}
    return caches | {name: attending(getattr(functions, name))
                     for name in ("attention_pytorch", "attention_sub_quad", "attention_split")}


def seconds(call, device):
    """Time of a run; on a CPU that of the process, so that other work on the machine does not count."""
    if device.type != "cpu":
        return timed(call)[1]
    start = time.process_time()
    call()
    return time.process_time() - start


def evaluations(call, model):
    """The result of a run, and how often it evaluates the network."""
    import torch

    seen = []
    first = next(layer for layer in model.model.diffusion_model.modules() if isinstance(layer, torch.nn.Conv2d))
    hook = first.register_forward_hook(lambda *_: seen.append(1))
    try:
        return call(), len(seen)
    finally:
        hook.remove()


def measure(options, folder):
    """For each model and each way the evaluations of the network, how many times faster, PSNR in dB, difference of the
    latents."""
    import torch
    from comfy.ldm.modules.attention import optimized_attention

    (models, vae), found, agree = runs(), {}, True
    for name, (model, run) in models.items():
        plain, device = run(model), model.load_device
        frames, found[name] = vae.decode(plain), {}
        for way, (same, call) in ways().items():
            latent, count = evaluations(lambda: call(run, model), model)
            pairs = [(seconds(lambda: call(run, model), device), seconds(lambda: run(model), device))
                     for _ in range(options.runs)]
            error = (vae.decode(latent) - frames).square().mean()
            difference = ((latent - plain).norm() / plain.norm()).item()
            agree &= not same or difference <= TOLERANCE[options.dtype]
            found[name][way] = {
                "evaluations": count, "times_faster": round(statistics.median(b / a for a, b in pairs), 2),
                "psnr": None if same or not error else round((-10 * torch.log10(error)).item(), 1),
                "latents_differ_by": difference}
        found[name]["plain_step_s"] = round(statistics.median(b for _, b in pairs) / STEPS, 4)
    return {**found, "own_attention": optimized_attention.__name__, "steps": STEPS, "latents_agree": agree,
            **describe(options, device)}
