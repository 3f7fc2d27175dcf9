"""Time and memory of DynamiCrafter in ComfyUI, and how much faster it is than a plain sampling loop.

    python tests/bench.py                               the demo model
    python tests/bench.py --case FOLDER                 a reference case (model.safetensors, config.yaml, case.json)
    python tests/bench.py --preset 512 --dtype fp16     full size with random weights: 256, 512, 1024
    options: --steps N  --frames N  --size WxH  --cfg X  --runs N  --device cpu|cuda  --dtype fp32|bf16|fp16
             --comfyui PATH  --output FILE

The plain loop runs the same network in the same precision with the same attention, but condition and negative one
after the other and with the context projected anew at every step. Both run in turns; the ratio is the median over the
runs. Their latents have to agree. The figures are the last line, as JSON. Exits 1 if the latents differ.
"""
import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent / "workflows"), str(TESTS)]

import host  # noqa: E402

PRESETS = {"256": (256, 256), "512": (512, 320), "1024": (1024, 576)}
# How far the latents of the two loops may lie apart: rounding differs with the batch size.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--case", type=Path, metavar="FOLDER", help="a reference case")
    model.add_argument("--preset", choices=PRESETS, help="full size, random weights")
    parser.add_argument("--dtype", choices=TOLERANCE, default="fp32", help="of the weights")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: CUDA where there is a GPU")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--frames", type=int, help="default: 16, or the case's")
    parser.add_argument("--size", metavar="WxH", help="pixels; default: the model's own")
    parser.add_argument("--cfg", type=float, default=7.5)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--comfyui", metavar="PATH", help="an existing ComfyUI folder to run in")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures here as well")
    return parser.parse_args()


def prepare_host(options):
    """Re-executes in the host's Python; afterwards ComfyUI and the pack can be imported."""
    host.check_python()
    host.reexec(options.comfyui)
    import torch
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but PyTorch finds no GPU here.")
    import conftest  # noqa: F401
    from comfy.cli_args import args
    args.cpu = options.device == "cpu" or not torch.cuda.is_available()


# ---- models ----------------------------------------------------------------------------------------------

def load_model(options, folder):
    """(loaded parts, seconds, name, width, height, frames)"""
    from comfy import model_management
    from stillmotion.nodes.common.files import read_checkpoint
    from stillmotion.nodes.dynamicrafter import checkpoint

    path, yaml_path, variant, frames = TESTS.parent / "nodes/demo/dynamicrafter_demo.safetensors", None, "auto", 16
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
        width, height = map(int, options.size.lower().split("x"))
    start = time.perf_counter()
    loaded = checkpoint.load(read_checkpoint(path), variant, options.dtype, yaml_path)
    model_management.load_models_gpu([loaded.model])
    return loaded, time.perf_counter() - start, name, width, height, options.frames or frames


def write_random_checkpoint(path, variant, dtype):
    """A published checkpoint without towers, its weights random but of a size that keeps activations in range."""
    import torch
    from safetensors.torch import save_file
    from stillmotion.nodes.common.vae import vae_shapes
    from stillmotion.nodes.dynamicrafter import base, checkpoint, config

    parsed = config.parse(config.published(variant), variant)
    model = base.make_model(parsed.unet, parsed.diffusion, parsed.scale_factor, torch.float32)
    layout = model.model_config.process_unet_state_dict_for_saving(model.diffusion_model.state_dict())
    shapes = {key: tuple(value.shape) for key, value in layout.items()}
    shapes |= {checkpoint.VAE + key: shape for key, shape in vae_shapes(parsed.ddconfig, parsed.embed_dim).items()}
    generator = torch.Generator().manual_seed(0)

    def weight(key, shape):
        if len(shape) < 2:
            return torch.full(shape, float(key.endswith("weight")), dtype=checkpoint.WEIGHT_DTYPES[dtype])
        fan_in = max(1, torch.Size(shape[1:]).numel())
        values = torch.randn(shape, generator=generator) * fan_in ** -0.5
        return values.to(checkpoint.WEIGHT_DTYPES[dtype])

    tensors = {key: weight(key, shape) for key, shape in shapes.items() if key != "scale_arr"}
    if "scale_arr" in layout:
        tensors["scale_arr"] = layout["scale_arr"]
    save_file(tensors, path)


def make_conditioning(loaded, width, height, frames):
    """(positive, negative, latent shape): encoded where the file has towers, else random of the published shapes."""
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


# ---- the two loops ---------------------------------------------------------------------------------------

def make_settings(options):
    from stillmotion.nodes.diffusion.ddim import Clip
    from stillmotion.nodes.sampling.sampler import DDIMSettings

    return DDIMSettings(
        steps=options.steps, cfg=options.cfg, eta=1.0, spacing="auto", guidance_rescale=-1.0, denoise=1.0,
        image_cfg=0.0, clip=Clip("off", 3.0, False), start_step=0, end_step=1000, tables="fixed")


def plain_loop(model, positive, negative, shape, settings, seed):
    """Two passes a step, nothing kept between steps, no host around it: the latent [B, 4, T, h, w], VAE scale."""
    import comfy.sample
    import torch
    from stillmotion.nodes.diffusion import guidance
    from stillmotion.nodes.diffusion.ddim import ddim_step
    from stillmotion.nodes.sampling.sampler import make_sampler, seeded_noise

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


def timed(function):
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def peak_megabytes(device):
    import torch
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    if sys.platform == "win32":
        import psutil
        return psutil.Process().memory_info().peak_wset / 2 ** 20
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def measure(options, folder):
    """All figures of one model as a dict."""
    import torch
    from stillmotion.nodes.sampling.sampler import sample_latent

    loaded, load_seconds, name, width, height, frames = load_model(options, folder)
    model, settings = loaded.model, make_settings(options)
    device = model.load_device
    positive, negative, shape = make_conditioning(loaded, width, height, frames)

    def ours():
        return sample_latent(model, positive, negative, {"samples": torch.zeros(shape)}, 1, settings)[0]["samples"]

    def plain():
        return plain_loop(model, positive, negative, shape, settings, 1)

    latent, expected = ours(), plain()  # loads the weights and warms up
    error = ((latent.cpu() - expected).norm() / expected.norm()).item()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    pairs = [(timed(ours)[1], timed(plain)[1]) for _ in range(options.runs)]
    peak = peak_megabytes(device)
    images, decode_seconds = timed(lambda: loaded.vae.decode(latent))
    return {
        "model": name, "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "weights": options.dtype, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "width": width, "height": height, "frames": frames, "steps": settings.steps, "cfg": settings.cfg,
        "load_s": round(load_seconds, 3), "step_s": round(statistics.median(a for a, _ in pairs) / settings.steps, 4),
        "plain_step_s": round(statistics.median(b for _, b in pairs) / settings.steps, 4),
        "times_faster_than_plain": round(statistics.median(b / a for a, b in pairs), 3),
        "decode_frame_s": round(decode_seconds / images.shape[1], 4),
        "peak_memory_sampling_mb": round(peak), "peak_memory_mb": round(peak_megabytes(device)),
        "latents_differ_by": error, "latents_agree": error <= TOLERANCE[options.dtype],
    }


def main():
    options = parse_arguments()
    prepare_host(options)
    import torch
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="stillmotion-bench-") as folder:
        figures = measure(options, Path(folder))
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))
    return 0 if figures["latents_agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
