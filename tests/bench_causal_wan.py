"""The causal Wan part of bench.py: the pack's block sampler with its ring cache vs. a plain rolling loop.

The plain loop runs the same network in the same precision with the same attention and noise. In every
layer of every forward pass it concatenates the cached keys with the new ones and, once they exceed the window,
concatenates sink and window again; it projects the context in every forward pass. A second one, "plain_kept", projects
the context once, so that only the cache differs. Prompts are random: they do not affect the time. With --compile the
plain loops stay eager.
"""
import json
import statistics
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

from bench_tools import NODES, TOLERANCE, describe, peak_megabytes, pixels, random_weights, timed

PRESETS = {"1.3b": {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30},
           "14b": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}}
WAN = {"in_dim": 16, "out_dim": 16, "text_dim": 4096, "freq_dim": 256, "i2v": False, "clip_dim": 0}


def counts(text):
    return [int(word) for word in text.split(",")]


def add_arguments(parser):
    parser.add_argument("--preset", choices=PRESETS, help="full size, text to video, random weights, 832x480")
    parser.add_argument("--layers", type=int, help="fewer than the preset has, for a quick look")
    parser.add_argument("--blocks", type=counts, default="4,8,16", metavar="N,N,...",
                        help="lengths of the videos, in blocks; default 4,8,16")
    parser.add_argument("--block", type=int, default=3, help="latent frames of a block")
    parser.add_argument("--window", type=int, help="latent frames; default: four blocks")
    parser.add_argument("--sink", type=int, help="latent frames; default: one block")
    parser.add_argument("--steps", default="1000, 750, 500, 250")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks, as compile nodes do")


def preset_params(options):
    from stillmotion.nodes.causal_wan.model import WanParams
    return WanParams(**WAN | PRESETS[options.preset] | ({"num_layers": options.layers} if options.layers else {}))


# ---- models ----------------------------------------------------------------------------------------------

def load_model(options):
    """(MODEL, name, latent height, latent width, text tokens)"""
    import torch
    from comfy import model_management
    from stillmotion.nodes.causal_wan import checkpoint
    from stillmotion.nodes.causal_wan.model import CausalWan
    from stillmotion.nodes.common.attention import torch_attention
    from stillmotion.nodes.common.core_model import WEIGHT_DTYPES
    from stillmotion.nodes.common.files import Checkpoint, read_checkpoint

    name, (width, height), words, found = "demo", (64, 64), 77, None
    if options.case:
        case = json.loads((options.case / "case.json").read_text())
        name, (width, height), words = options.case.name, (8 * case["w"], 8 * case["h"]), case["text_len"]
    if options.preset:
        params = preset_params(options)
        name, (width, height), words = f"causal {options.preset}, random weights", (832, 480), 512
        network = CausalWan(params, torch.nn, torch_attention, device="meta").state_dict()
        found = Checkpoint(name, random_weights({key: value.shape for key, value in network.items()},
                                                WEIGHT_DTYPES[options.dtype]), {})
    if options.size:
        width, height = pixels(options.size)
    path = options.case / "model.safetensors" if options.case else NODES / "demo/causal_wan_demo.safetensors"
    model = checkpoint.load(found or read_checkpoint(path), "auto", options.dtype)
    model_management.load_models_gpu([model])
    return model, name, height // 8, width // 8, words


def make_conditionings(params, frames, height, width, words):
    """Random (positive, negative); for image-to-video with an image in the first frame."""
    import torch
    generator = torch.Generator().manual_seed(1)
    image = {}
    if params.i2v:
        mask = torch.ones(1, 1, frames, height, width)
        mask[:, :, 0] = 0
        tokens = torch.randn(1, 257, params.clip_dim, generator=generator)
        image = {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=tokens), "concat_mask": mask,
                 "concat_latent_image": torch.randn(1, params.out_dim, frames, height, width, generator=generator)}
    return [[[torch.randn(1, words, params.text_dim, generator=generator), image]] for _ in range(2)]


def count(options):
    """The operations of an evaluation with a full window, by bench_count.py."""
    import bench_count
    import torch
    from stillmotion.nodes.causal_wan.cache import KVCache
    from stillmotion.nodes.causal_wan.model import CausalWan
    from stillmotion.nodes.common.core_model import WEIGHT_DTYPES

    params, dtype, settings = preset_params(options), WEIGHT_DTYPES[options.dtype], make_settings(options, True)
    width, height = (side // 8 for side in pixels(options.size or "832x480"))
    network = CausalWan(params, torch.nn, bench_count.attention, dtype=dtype, device="meta")
    cache = KVCache(params.cache_layout(capacity=settings.window, sink=settings.sink, height=height, width=width,
                                        relative_sink=False), 1, dtype, "meta")
    frames = range(2 * settings.window, 2 * settings.window + settings.block)
    x = bench_count.meta(1, params.in_dim, settings.block, height, width, dtype=dtype)
    keys = network.project_context(bench_count.meta(1, 512, params.text_dim, dtype=dtype))

    def evaluate():
        network(x, bench_count.meta(1, settings.block), keys, frames, cache)

    return {"preset": options.preset, "dtype": options.dtype, **bench_count.count(evaluate)}


# ---- the plain loop --------------------------------------------------------------------------------------

class RollingCache:
    """Cached keys and values of every layer, concatenated with those of each pass. Replaces the pack's `KVCache`."""

    def __init__(self, layers, window, sink, frame_tokens):
        self.kept, self.joined = [None] * layers, [None] * layers
        self.start, self.window, self.sink, self.tokens = 0, window, sink, frame_tokens

    def open(self, frame_ids):
        if frame_ids[0] != self.start:  # the previous block is finished
            self.start, self.kept = frame_ids[0], list(self.joined)

    def write(self, layer, key, value):
        import torch
        pair = key, value
        if self.kept[layer] is not None:
            pair = tuple(torch.cat(parts, dim=1) for parts in zip(self.kept[layer], pair))
        if self.window != -1 and pair[0].shape[1] > self.window * self.tokens:
            sink, recent = self.sink * self.tokens, (self.window - self.sink) * self.tokens
            pair = tuple(torch.cat((part[:, :sink], part[:, -recent:]), dim=1) for part in pair)
        self.joined[layer] = pair
        return pair


def rolling_attention(module, cache, layer):
    """The forward of a self-attention with a rolling cache."""
    from stillmotion.nodes.common.fused import norm_rotate

    def forward(x, step, _):
        heads, rotation = module.heads, step.window.rotation_LP2
        query, key = (norm_rotate(project(x), norm, rotation, heads)
                      for project, norm in ((module.q, module.norm_q), (module.k, module.norm_k)))
        key, value = cache.write(layer, key, module.v(x))
        return module.o(module.attention(query, key, value, heads, transformer_options=step.transformer_options))
    return forward


def rolling_flow(network, x, t, keys, frame_ids, cache):
    """The network's flow with a rolling cache in every layer."""
    cache.open(frame_ids)
    with ExitStack() as patched:
        for index, block in enumerate(network.blocks):
            patched.enter_context(mock.patch.object(block.self_attn, "forward",
                                                    rolling_attention(block.self_attn, cache, index)))
        return network(x, t, keys, frame_ids=frame_ids)


def plain_loop(model, conditionings, shape, settings, seed, keep_context):
    """The latent [1, C, T, h, w] in the VAE's scale; runs the network without ComfyUI around it."""
    import torch
    from stillmotion.nodes.causal_wan.noise import seeded_noise
    from stillmotion.nodes.causal_wan.run import inference_dtype, parse_steps
    from stillmotion.nodes.causal_wan.schedule import make_steps, predict_x0, renoise

    base, device, dtype = model.model, model.load_device, inference_dtype(model.model)
    network, params = base.diffusion_model, base.wan_params
    _, channels, frames, height, width = shape
    noise = seeded_noise(seed, 1, channels, height, width)
    steps = make_steps(parse_steps(settings.steps), settings.shift, settings.warp)
    caches = [RollingCache(params.num_layers, settings.window, settings.sink, (height // 2) * (width // 2))
              for _ in range(1 if settings.cfg == 1 else 2)]

    def tokens(conditioning):
        text, values = conditioning[0]
        image = values["clip_vision_output"].penultimate_hidden_states.to(device, dtype) if params.i2v else None
        return text.to(device, dtype), image

    y = None
    if params.i2v:
        values = conditionings[0][0][1]
        image = base.process_latent_in(values["concat_latent_image"])
        y = torch.cat(((1 - values["concat_mask"]).expand(-1, 4, -1, -1, -1), image), 1).to(device)
    given = [tokens(conditioning) for conditioning in conditionings]
    kept = [network.project_context(*pair) for pair in given[:len(caches)]] if keep_context else None

    def evaluate(x, timestep, start):
        ids = range(start, start + x.shape[2])
        t = torch.full((1, len(ids)), timestep, device=device)
        x = (x if y is None else torch.cat((x, y[:, :, start:ids.stop]), 1)).to(dtype)
        flows = [rolling_flow(network, x, t, kept[branch] if keep_context else network.project_context(*given[branch]),
                              ids, cache).float() for branch, cache in enumerate(caches)]
        return flows[0] if len(flows) == 1 else flows[1] + settings.cfg * (flows[0] - flows[1])

    blocks = []
    for start in range(0, frames, settings.block):
        x = noise(start, settings.block, 0).to(device)
        for number, step in enumerate(steps):
            x0 = predict_x0(x, evaluate(x, step.timestep, start), step.sigma)
            if number + 1 < len(steps):
                x = renoise(x0, noise(start, settings.block, number + 1).to(device), steps[number + 1].sigma)
        evaluate(x0, 0.0, start)
        blocks.append(x0)
    return base.process_latent_out(torch.cat(blocks, 2)).cpu()


# ---- figures ---------------------------------------------------------------------------------------------

def compiled(model):
    """A clone whose transformer blocks are compiled, through ComfyUI's own wrapper."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    model = model.clone()
    set_torch_compile_wrapper(model, backend="inductor", keys=[
        f"diffusion_model.blocks.{index}" for index in range(model.model.wan_params.num_layers)])
    return model


def make_settings(options, windowed):
    from stillmotion.nodes.causal_wan.run import BlockSettings
    sink = options.block if options.sink is None else options.sink
    return BlockSettings(
        steps=options.steps, first_steps="", shift=5.0, warp=True, block=options.block, independent_first=False,
        short_last=False, window=(options.window or 4 * options.block) if windowed else -1,
        sink=sink if windowed else 0, endless=False, context_noise=0.0, cfg=options.cfg, global_sink=True)


def make_loops(model, running, settings, conditionings, shape):
    """The loops to compare, by name, each without arguments; `running` is our model, compiled or not."""
    import torch
    from stillmotion.nodes.causal_wan.run import prepare

    def ours():
        latent = {"samples": torch.zeros(shape)}
        return prepare(running, *conditionings, latent, None, 1, settings).sample()["samples"].cpu()

    def plain(keep_context=False):
        return plain_loop(model, conditionings, shape, settings, 1, keep_context)

    return {"ours": ours, "plain": plain, "plain_kept": lambda: plain(True)}


def measure_length(options, model, running, settings, shape, words):
    """Figures for one length, with or without a window."""
    import torch
    from stillmotion.nodes.causal_wan.run import inference_dtype, make_plan

    params, device = model.model.wan_params, model.load_device
    frames, height, width = shape[2:]
    loops = make_loops(model, running, settings, make_conditionings(params, frames, height, width, words), shape)
    latents, peaks = {}, {}
    for name, loop in loops.items():  # load the weights and warm up
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        latents[name], peaks[name] = loop(), round(peak_megabytes(device))
    rounds = [{name: timed(loop)[1] for name, loop in loops.items()} for _ in range(options.runs)]
    seconds = {name: statistics.median(one[name] for one in rounds) for name in loops}
    ratio = {name: round(statistics.median(one[name] / one["ours"] for one in rounds), 3) for name in loops}
    video = frames if params.out_dim == 4 else 4 * frames - 3  # small models have a per-frame VAE
    figures = {
        "blocks": frames // settings.block, "latent_frames": frames, "video_frames": video, "window": settings.window,
        "seconds": round(seconds["ours"], 4), "fps": round(video / seconds["ours"], 3),
        "plain_fps": round(video / seconds["plain"], 3), "times_faster_than_plain": ratio["plain"],
        "times_faster_than_plain_kept": ratio["plain_kept"],
        "cache_bytes": make_plan(settings, frames, None, ()).cache_bytes(
            params, height, width, 1, inference_dtype(model.model).itemsize),
        "latents_differ_by": max(((latents["ours"] - other).norm() / other.norm()).item()
                                 for other in latents.values())}
    return figures | ({"peak_memory_mb": peaks} if device.type == "cuda" else {})


def measure(options, folder):
    """All figures of one model as a dict; `folder` is unused."""
    model, name, height, width, words = load_model(options)
    running = compiled(model) if options.compile else model
    rows = []
    for windowed in (False, True):
        for blocks in options.blocks:
            settings = make_settings(options, windowed)
            shape = (1, model.model.wan_params.out_dim, blocks * options.block, height, width)
            rows.append(measure_length(options, model, running, settings, shape, words))
            print(rows[-1], flush=True)
    return {
        "model": name, **describe(options, model.load_device), "layers": model.model.wan_params.num_layers,
        "width": 8 * width, "height": 8 * height, "block": options.block, "sink": settings.sink,
        "steps": options.steps, "cfg": options.cfg, "compile": options.compile, "lengths": rows,
        "peak_memory_mb": round(peak_megabytes(model.load_device)),
        "latents_agree": all(row["latents_differ_by"] <= TOLERANCE[options.dtype] for row in rows)}
