"""The DynamiCrafter part of bench.py: the pack's DDIM sampler vs. a plain sampling loop.

The plain loop runs the same network in the same precision with the same attention, but evaluates positive and negative
one after the other and projects the context again at every step.
"""
import json
import statistics
import time

from bench_tools import NODES, TOLERANCE, describe, peak_megabytes, pixels, random_weights, timed

PRESETS = {"256": (256, 256), "512": (512, 320), "1024": (1024, 576)}


def add_arguments(parser):
    parser.add_argument("--preset", choices=PRESETS, help="full size, random weights")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--frames", type=int, help="default: 16, or the case's")
    parser.add_argument("--cfg", type=float, default=7.5)


def load_model(options, folder):
    """(loaded parts, seconds, name, width, height, frames)"""
    from comfy import model_management
    from stillmotion.nodes.common.files import read_checkpoint
    from stillmotion.nodes.dynamicrafter import checkpoint

    path, yaml_path, variant, frames = NODES / "demo/dynamicrafter_demo.safetensors", None, "auto", 16
    name, (width, height) = "demo", (64, 64)
    if options.case:
        case = json.loads((options.case / "case.json").read_text())
        path, yaml_path = options.case / "model.safetensors", options.case / "config.yaml"
        name, width, height, frames = options.case.name, case["W"], case["H"], case["T"]
    if options.preset:
        path, variant = folder / "model.safetensors", options.preset
        write_random_checkpoint(path, variant, options.dtype)
        name, (width, height) = f"{variant}, random weights", PRESETS[variant]
    if options.size:
        width, height = pixels(options.size)
    start = time.perf_counter()
    loaded = checkpoint.load(read_checkpoint(path), variant, options.dtype, yaml_path)
    model_management.load_models_gpu([loaded.model])
    return loaded, time.perf_counter() - start, name, width, height, options.frames or frames


def write_random_checkpoint(path, variant, dtype):
    """Write a checkpoint in a published layout, without towers and with random weights."""
    import torch
    from safetensors.torch import save_file
    from stillmotion.nodes.common.vae import vae_shapes
    from stillmotion.nodes.dynamicrafter import base, checkpoint, config

    parsed = config.parse(config.published(variant), variant)
    model = base.make_model(parsed.unet, parsed.diffusion, parsed.scale_factor, torch.float32)
    layout = model.model_config.process_unet_state_dict_for_saving(model.diffusion_model.state_dict())
    shapes = {key: tuple(value.shape) for key, value in layout.items()}
    shapes |= {checkpoint.VAE + key: shape for key, shape in vae_shapes(parsed.ddconfig, parsed.embed_dim).items()}
    shapes.pop("scale_arr", None)
    tensors = random_weights(shapes, checkpoint.WEIGHT_DTYPES[dtype])
    if "scale_arr" in layout:
        tensors["scale_arr"] = layout["scale_arr"]
    save_file(tensors, path)


def count(options):
    """The operations of a step with guidance in one batch and the context already projected, by bench_count.py."""
    import bench_count
    import torch
    from stillmotion.nodes.common.core_model import WEIGHT_DTYPES
    from stillmotion.nodes.dynamicrafter import config, unet

    params, dtype = config.parse(config.published(options.preset), options.preset).unet, WEIGHT_DTYPES[options.dtype]
    width, height = (side // 8 for side in (pixels(options.size) if options.size else PRESETS[options.preset]))
    network = unet.VideoUNet(params, torch.nn, bench_count.attention, dtype=dtype, device="meta")
    clips, frames = 2, options.frames or 16
    x = bench_count.meta(clips, params.in_channels, frames, height, width, dtype=dtype)
    text = bench_count.meta(clips, 77, params.context_dim, dtype=dtype)
    tokens = bench_count.meta(clips, 257, params.resampler.embedding_dim, dtype=dtype)
    numbers, kept = bench_count.meta(clips), {"context_keys": network.project_context(text, tokens, frames)}

    def evaluate():
        network(x, numbers, text, tokens, numbers, transformer_options=kept)

    return {"preset": options.preset, "dtype": options.dtype, **bench_count.count(evaluate)}


def make_conditioning(loaded, width, height, frames):
    """(positive, negative, latent shape): encoded if the file has towers, else random in the published shapes."""
    import torch
    from stillmotion.nodes.dynamicrafter.conditioning import image_conditions

    generator = torch.Generator().manual_seed(1)
    if loaded.clip is None or loaded.clip_vision is None:
        text, empty = torch.randn(2, 1, 77, 1024, generator=generator)
        tokens, grey = torch.randn(2, 1, 257, 1280, generator=generator)
        latent = torch.randn(1, 4, 1, height // 8, width // 8, generator=generator).expand(-1, -1, frames, -1, -1)
    else:
        prompts = ("a red circle moves left", "")
        text, empty = (loaded.clip.encode_from_tokens(loaded.clip.tokenize(prompt)) for prompt in prompts)
        image = torch.rand(1, height, width, 3, generator=generator)
        latent, tokens, grey = image_conditions(loaded.clip_vision, loaded.vae, image, None, "animate", width, height,
                                                frames, 1)
    shared = {"concat_latent_image": latent, "frame_stride": 0}
    return ([[text, {**shared, "image_tokens": tokens}]], [[empty, {**shared, "image_tokens": grey}]], latent.shape)


def make_settings(options):
    from stillmotion.nodes.ddim.sampler import DDIMSettings
    from stillmotion.nodes.ddim.step import Clip

    return DDIMSettings(
        steps=options.steps, cfg=options.cfg, eta=1.0, spacing="auto", guidance_rescale=-1.0, denoise=1.0,
        image_cfg=0.0, clip=Clip("off", 3.0, False), start_step=0, end_step=1000, tables="fixed")


def plain_loop(model, positive, negative, shape, settings, seed):
    """Two forward passes per step, no caching between steps, no ComfyUI: the latent [B, 4, T, h, w], VAE scale."""
    import comfy.sample
    import torch
    from stillmotion.nodes.ddim import guidance
    from stillmotion.nodes.ddim.sampler import make_sampler, seeded_noise
    from stillmotion.nodes.ddim.step import ddim_step

    base, device = model.model, model.load_device
    dtype = base.manual_cast_dtype or base.get_dtype()
    fs = torch.tensor([base.model_config.unet_config["params"].default_fs], device=device)

    def context(conditioning):
        text, values = conditioning[0]
        concat = base.process_latent_in(values["concat_latent_image"])
        return [tensor.to(device, dtype) for tensor in (concat, text, values["image_tokens"])]

    def predict(x, t, concat, text, tokens):
        x = torch.cat([x.to(dtype), concat], 1)
        return base.diffusion_model(x, t, text, image_tokens=tokens, frame_stride=fs).float()

    both, none = context(positive), context(negative)
    sampler, _ = make_sampler(model, settings)
    x = comfy.sample.prepare_noise(torch.zeros(shape), seed).to(device)
    noise = seeded_noise(seed, shape, device)
    for k in range(settings.steps):
        c = sampler.tables.step(settings.steps - 1 - k)
        t = torch.tensor([c.timestep], device=device)
        cond = predict(x, t, *both)
        output = guidance.cfg(predict(x, t, *none), cond, settings.cfg)
        output = guidance.rescale(output, cond, sampler.guidance_rescale)
        x = ddim_step(x, output, sampler.schedule.parameterization, c, settings.clip, noise(k)).x
    return base.process_latent_out(x).cpu()


def measure(options, folder):
    """All figures of one model as a dict."""
    import torch
    from stillmotion.nodes.ddim.sampler import sample_latent

    loaded, load_seconds, name, width, height, frames = load_model(options, folder)
    model, settings = loaded.model, make_settings(options)
    device = model.load_device
    positive, negative, shape = make_conditioning(loaded, width, height, frames)

    def ours():
        return sample_latent(model, positive, negative, {"samples": torch.zeros(shape)}, 1, settings)[0]["samples"]

    def plain():
        return plain_loop(model, positive, negative, shape, settings, 1)

    latent, expected = ours(), plain()  # load the weights and warm up
    error = ((latent.cpu() - expected).norm() / expected.norm()).item()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    pairs = [(timed(ours)[1], timed(plain)[1]) for _ in range(options.runs)]
    peak = peak_megabytes(device)
    images, decode_seconds = timed(lambda: loaded.vae.decode(latent))
    return {
        "model": name, **describe(options, device), "width": width, "height": height,
        "frames": frames, "steps": settings.steps, "cfg": settings.cfg, "load_s": round(load_seconds, 3),
        "step_s": round(statistics.median(a for a, _ in pairs) / settings.steps, 4),
        "plain_step_s": round(statistics.median(b for _, b in pairs) / settings.steps, 4),
        "times_faster_than_plain": round(statistics.median(b / a for a, b in pairs), 3),
        "decode_frame_s": round(decode_seconds / images.shape[1], 4),
        "peak_memory_sampling_mb": round(peak), "peak_memory_mb": round(peak_megabytes(device)),
        "latents_differ_by": error, "latents_agree": error <= TOLERANCE[options.dtype],
    }
