"""The block-autoregressive sampler inside ComfyUI's sampling code compared with the block loop run directly."""

from types import SimpleNamespace

import comfy.lora
import comfy.model_management
import comfy.utils
import pytest
import torch
from causal_wan_stub import (
    HEIGHT,
    SIZES,
    WIDTH,
    conditioning,
    distance,
    draw,
    latent,
    load,
    sample,
    settings,
    strong_tensors,
    tensors,
    timeline_of,
)
from comfy.cli_args import LatentPreviewMethod, args
from comfy.patcher_extension import WrappersMP
from stillmotion.nodes.causal_wan import nodes_sampling as nodes
from stillmotion.nodes.causal_wan.blocks import BlockLoop
from stillmotion.nodes.causal_wan.cache import KVCache
from stillmotion.nodes.causal_wan.conditioning import CHUNK, CLAMP, CONCAT, PREFIX, StartFrames
from stillmotion.nodes.causal_wan.model import CausalWan
from stillmotion.nodes.causal_wan.noise import seeded_noise
from stillmotion.nodes.causal_wan.run import make_plan, parse_steps, prepare
from stillmotion.nodes.common.attention import torch_attention


@pytest.fixture(autouse=True)
def as_in_the_host():
    with torch.inference_mode():
        yield


def by_hand(kind, frames, batch, start, switches, seed=3, **changes):
    """The loop over the bare network, with the same weights, noise and conditions."""
    params, host = SIZES[kind], load(strong_tensors(kind)).model
    network = CausalWan(params, torch.nn, torch_attention)
    network.load_state_dict(strong_tensors(kind))
    plan = make_plan(settings(**changes), frames, start, switches)
    texts = [conditioning(kind, frames, 1), *(timeline_of(kind, frames, *switches) or ((), ()))[1]]

    def keys(text, branch):
        _, values = conditioning(kind, frames, branch + 1)[0]
        tokens = values["clip_vision_output"].penultimate_hidden_states.expand(batch, -1, -1) if params.i2v else None
        return network.project_context(text[0][0].expand(batch, -1, -1), tokens)

    y = None
    if params.i2v:
        values = conditioning(kind, frames, 1)[0][1]
        given = (1 - values["concat_mask"]).expand(batch, 4, -1, -1, -1)
        image = host.process_latent_in(values["concat_latent_image"]).expand(batch, -1, -1, -1, -1)
        y = torch.cat((given, image), dim=1)
    caches = [KVCache(plan.layout(params, HEIGHT, WIDTH), batch, torch.float32, "cpu") for _ in range(plan.branches)]
    loop = BlockLoop(
        plan=plan, caches=caches, y_BYFHW=y, on_step=lambda *_: None, evaluate=lambda *given: network(*given),
        noise=seeded_noise(seed, batch, params.out_dim, HEIGHT, WIDTH),
        project=lambda prompt: [keys(texts[prompt], 0), keys(conditioning(kind, frames, 2), 1)][:plan.branches])
    context = held = None
    if start is not None and start.frames:
        given = host.process_latent_in(latent(kind, frames, batch, start)["samples"][:, :, :start.frames])
        context, held = (None, given) if start.mechanism == CLAMP else (given, None)
    blocks = [block.latent_BCFHW for block in loop.run(context, held, None)]
    if context is not None:
        blocks.insert(0, context[:, :, :1] if start.still else context)
    return host.process_latent_out(torch.cat(blocks, dim=2))


@pytest.mark.parametrize("kind, frames, batch, start, switches, changes", [
    ("t2v", 4, 1, None, (), {}),
    ("t2v", 6, 2, None, (), {"cfg": 3.0, "window": 4, "sink": 1}),
    ("t2v", 5, 1, None, (), {"independent_first": True, "first_steps": "1000 750 250", "context_noise": 20.0}),
    ("t2v", 5, 1, None, (), {"short_last": True, "warp": False, "shift": 8.0, "steps": "1000, 757, 522"}),
    ("t2v", 8, 1, None, (3, 6), {"cfg": 2.0, "window": 4, "sink": 2}),
    ("t2v", 8, 1, None, (5,), {"window": 4, "sink": 2, "global_sink": False, "endless": True}),
    ("t2v", 5, 2, StartFrames(PREFIX, 1, 2, False), (), {"window": 3, "sink": 1}),
    ("t2v", 7, 1, StartFrames(PREFIX, 3, 2, False), (), {}),
    ("t2v", 6, 1, StartFrames(CHUNK, 2, 2, True), (), {"cfg": 2.0}),
    ("t2v", 6, 1, StartFrames(CHUNK, 4, 2, False), (), {}),
    ("t2v", 4, 2, StartFrames(CLAMP, 1, 2, False), (), {}),
    ("i2v", 4, 2, StartFrames(CONCAT, 0, 2, False), (), {"cfg": 2.0}),
    ("i2v", 5, 1, StartFrames(PREFIX, 1, 2, False), (3,), {}),
    ("small", 4, 1, None, (), {"cfg": 1.5}),
], ids=str)
def test_a_run_equals_the_loop_by_hand(kind, frames, batch, start, switches, changes):
    found = sample(kind, frames, batch, start, switches, **changes)
    expected = by_hand(kind, frames, batch, start, switches, **changes)
    assert found.shape == expected.shape
    assert distance(found, expected) < 1e-5


def test_every_setting_shows_in_the_result():
    """Otherwise the runs above could not detect an ignored setting."""
    frames, switches = 8, (6,)
    base = {"window": 4, "sink": 1, "cfg": 2.0}
    plain = sample(frames=frames, switches=switches, **base)
    changes = [{"window": 5}, {"sink": 2}, {"cfg": 1.0}, {"context_noise": 20.0}, {"endless": True}, {"seed": 4},
               {"global_sink": False}, {"shift": 8.0}, {"warp": False}, {"first_steps": "1000"}, {"block": 1}]
    for change in changes:
        assert distance(sample(frames=frames, switches=switches, **{**base, **change}), plain) > 1e-3, change
    assert distance(sample(frames=frames, switches=(4,), **base), plain) > 1e-3


def test_a_still_chunk_is_cut_to_its_first_frame_and_switches_count_what_is_left():
    start = StartFrames(CHUNK, 2, 2, True)
    assert torch.allclose(sample(frames=6, start=start)[:, :, :1], latent("t2v", 6, 1, start)["samples"][:, :, :1],
                          atol=1e-5)
    plain, switched = sample(frames=6, start=start), sample(frames=6, start=start, switches=(2,))
    assert plain.shape[2] == 5
    assert torch.equal(plain[:, :, :3], switched[:, :, :3]) and not torch.allclose(plain[:, :, 3:], switched[:, :, 3:])


def test_a_prompt_from_frame_0_replaces_the_positive_one():
    whole = sample(frames=4, switches=(0,))
    assert not torch.allclose(whole, sample(frames=4))
    assert torch.equal(whole[:, :, :2], sample(frames=4, switches=(0, 2))[:, :, :2])


@pytest.mark.parametrize("changes", [{}, {"window": 4, "sink": 2, "cfg": 2.0}])
def test_a_longer_run_begins_with_the_frames_of_a_shorter_one(changes):
    short, long = sample(frames=6, **changes), sample(frames=10, **changes)
    assert torch.equal(long[:, :, :6], short)
    assert not torch.allclose(short, sample(frames=6, seed=4, **changes))


def test_progress_counts_all_blocks_and_steps():
    told = []
    sample(frames=6, first_steps="1000, 750, 250", callback=lambda *given: told.append(given))
    assert [(step, total) for step, _, _, total in told] == [(step, 7) for step in range(7)]
    assert all(x0.shape == (1, 16, 2, HEIGHT, WIDTH) for _, x0, _, _ in told)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_interrupt_stops_before_the_next_evaluation(at):
    calls = []

    def count(executor, *args, **kwargs):
        calls.append(kwargs["frame_ids"])
        return executor(*args, **kwargs)

    def stop(step, *_):
        if step == at:
            comfy.model_management.interrupt_current_processing(True)

    model = load(strong_tensors(), weight_dtype="fp32")
    model.add_wrapper(WrappersMP.DIFFUSION_MODEL, count)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(frames=6, model=model, callback=stop)
    assert len(calls) == at + 1 + at // 2  # the steps so far plus the passes over finished blocks


def test_lora_through_cores_patches_equals_merged_weights():
    down, up = draw(7, 2, 48), draw(8, 48, 2)
    key = "blocks.0.self_attn.q.weight"
    lora = comfy.lora.load_lora({"q.lora_down.weight": down, "q.lora_up.weight": up}, {"q": "diffusion_model." + key})
    patched = load(strong_tensors(), weight_dtype="fp32").clone()
    patched.add_patches(lora, 0.5)
    merged = load({**strong_tensors(), key: strong_tensors()[key] + 0.5 * up @ down}, weight_dtype="fp32")
    found, expected, plain = sample(model=patched), sample(model=merged), sample()
    assert distance(found, expected) < 1e-4
    assert distance(found, plain) > 1e-2


def halve(executor, *args, **kwargs):
    return 0.5 * executor(*args, **kwargs)


def halve_attention(model):
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda attention, *args, **kwargs: 0.5 * attention(*args, **kwargs)


WRAPPERS = {
    "network": lambda model: model.add_wrapper(WrappersMP.DIFFUSION_MODEL, halve),
    "model": lambda model: model.add_wrapper(WrappersMP.APPLY_MODEL, halve),
    "function": lambda model: model.set_model_unet_function_wrapper(
        lambda apply, given: 0.5 * apply(given["input"], given["timestep"], **given["c"]))}
PATCHES = {
    "attention": halve_attention,
    "block": lambda model: model.set_model_patch_replace(
        lambda given, rest: {"img": 0.5 * rest["original_block"](given)["img"]}, "dit", "double_block", 0)}


@pytest.mark.parametrize("name", PATCHES | WRAPPERS)
def test_patches_and_wrappers_act_on_their_model_alone(name):
    model = load(strong_tensors(), weight_dtype="fp32")
    plain, changed = sample(model=model), model.clone()
    (PATCHES | WRAPPERS)[name](changed)
    assert distance(sample(model=changed), plain) > 1e-2
    assert torch.equal(sample(model=model), plain)


def test_every_kind_of_wrapper_gets_the_flow():
    found = []
    for wrap in WRAPPERS.values():
        model = load(strong_tensors(), weight_dtype="fp32")
        wrap(model)
        found.append(sample(model=model))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_patches_are_told_branch_and_noise_level():
    told = []

    def listen(executor, x, t, *args, transformer_options, **kwargs):
        told.append((transformer_options["cond_or_uncond"], transformer_options["sigmas"].tolist()))
        return executor(x, t, *args, transformer_options=transformer_options, **kwargs)

    model = load(strong_tensors(), weight_dtype="fp32")
    model.add_wrapper(WrappersMP.DIFFUSION_MODEL, listen)
    sample(frames=2, batch=2, model=model, cfg=2.0, shift=1.0)
    assert told == [(branch, [sigma] * 2) for sigma in (1.0, 0.5) for branch in ([0], [1])]


def test_the_cache_is_counted_in_the_memory_that_core_makes_free(monkeypatch, caplog):
    model, asked = load(strong_tensors(), weight_dtype="fp32"), []
    real = comfy.model_management.load_models_gpu
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models, memory_required=0, **rest: (
        asked.append(memory_required), real(models, memory_required=memory_required, **rest)))
    caplog.set_level("INFO")
    for cfg in (1.0, 2.0):
        run = prepare(model, conditioning("t2v", 8, 1), conditioning("t2v", 8, 2), latent("t2v", 8), None, 0,
                      settings(cfg=cfg, window=4))
        run.sample()
    cache = 2 * 4 * 2 * 3 * 48 * 2 * 4  # keys and values, frames, rows, columns, width, layers, bytes
    block = model.model.memory_required([2, 16, 2, HEIGHT, WIDTH])
    text = 2 * 48 * 2 * 4  # keys and values, width, layers, bytes; the prompts have 6 and 7 tokens
    assert asked == [block + cache + 6 * text, block + 2 * (cache + 7 * text)]
    assert "3 blocks" not in caplog.text and "4 blocks to make in 8 steps; cache" in caplog.text
    assert "4 latent frames, 2 guidance branches" in caplog.text


def nan_latent(arguments):
    arguments["latent"]["samples"][0, 0, 0, 0, 0] = torch.nan


def refused():
    def put(**entries):
        return lambda arguments: arguments.update(entries)

    def drop(name):
        return lambda arguments: arguments["positive"][0][1].pop(name)

    def change(**changes):
        return lambda arguments: arguments.update(settings=settings(**changes))

    def i2v(then):
        def turn(arguments):
            arguments.update(model=load(strong_tensors("i2v")), positive=conditioning("i2v", 4, 1))
            then(arguments)
        return turn

    other = {"samples": torch.zeros(1, 16, 6, HEIGHT, WIDTH)}
    return {
        "foreign model": (put(model=SimpleNamespace(model=object())), "Use Load Causal Wan"),
        "channels": (put(latent={"samples": torch.zeros(1, 4, 4, 4, 6)}), "1 x 4 x 4 x 4 x 6, this model takes .* 16"),
        "odd size": (put(latent={"samples": torch.zeros(1, 16, 4, 5, 6)}), "multiples of 2"),
        "nan": (nan_latent, "1 NaN"),
        "mask": (put(latent={**latent("t2v", 4), "noise_mask": 1}), "noise mask"),
        "frames": (change(block=3), "Valid blocks for this length: 1, 2, 4.*3 or 6"),
        "other block": (put(latent=latent("t2v", 4, 1, StartFrames(CLAMP, 1, 4, False))), "the same block"),
        "window": (change(window=3, sink=2), "give at least 4, or -1"),
        "steps": (change(steps="1000, x"), "whole numbers separated by commas"),
        "rising": (change(first_steps="500, 1000"), "falling numbers"),
        "shift": (change(shift=0.0), "shift is 0"),
        "cfg": (change(cfg=-1.0), "cfg is -1"),
        "concat on t2v": (put(latent=latent("t2v", 4, 1, StartFrames(CONCAT, 0, 2, False))), "text-to-video model"),
        "a video": (put(latent={"samples": draw(30, 1, 16, 4, HEIGHT, WIDTH)}), "holds a video already"),
        "no entries": (put(positive=[], timeline=timeline_of("t2v", 4, 2)), "positive conditioning has 0 entries"),
        "all given": (put(latent=latent("t2v", 4, 1, StartFrames(CHUNK, 4, 2, False))), "nothing is left"),
        "no tokens": (i2v(drop("clip_vision_output")), "needs image tokens"),
        "no y": (i2v(drop("concat_latent_image")), "masked image latent"),
        "y of another size": (i2v(put(latent=other)), "latent is 6 x 4 x 6, but the conditioning .* 4 x 4 x 6"),
        "switch in the last block": (put(timeline=timeline_of("t2v", 4, 2, 3)),
                                     "from latent frame 3 is never used: no block .* begin at 0, 2 .the last one at 2"),
        "two switches in one block": (put(timeline=timeline_of("t2v", 4, 1, 2)), "frame 1 is never used: the next"),
        "independent first": (put(latent=latent("t2v", 5)), "switch independent_first on, or .* short_last_block"),
        "no independent first": (change(independent_first=True), "switch independent_first off"),
        "concat, independent first": (i2v(put(positive=conditioning("i2v", 5, 1),
                                              latent=latent("i2v", 5, 1, StartFrames(CONCAT, 0, 2, False)))),
                                      "5 latent frames do not split .* switch independent_first on"),
        "switch too late": (put(timeline=timeline_of("t2v", 4, 2, 4)), "starts at latent frame 4.*0 to 3"),
        "two entries": (put(positive=2 * conditioning("t2v", 4, 1)), "positive conditioning has 2 entries"),
        "region": (put(positive=[[draw(1, 1, 5, 24), {"area": (1, 1, 0, 0)}]]), "has area"),
        "batch": (put(positive=[[draw(1, 3, 5, 24), {}]]), "c_crossattn for 3 videos, the latent a batch of 1"),
        "text width": (put(positive=[[draw(1, 1, 5, 32), {}]]), "text encoder gives tokens 32 wide"),
    }


@pytest.mark.parametrize("name", refused())
def test_bad_input_is_refused_before_anything_is_loaded(name, monkeypatch):
    change, words = refused()[name]
    arguments = {"model": load(strong_tensors()), "positive": conditioning("t2v", 4, 1),
                 "negative": conditioning("t2v", 4, 2), "latent": latent("t2v", 4), "timeline": None, "seed": 0,
                 "settings": settings()}
    change(arguments)
    with pytest.raises(ValueError, match=words):
        prepare(**arguments)


def test_at_cfg_1_the_negative_prompt_is_not_looked_at():
    prepare(load(strong_tensors()), conditioning("t2v", 4, 1), [], latent("t2v", 4), None, 0, settings())


@pytest.mark.parametrize("name, limit", [("bf16", 0.1), ("fp16", 0.02), ("fp8_e4m3fn", 0.3)])
def test_small_weight_types_come_near_the_exact_run(name, limit):
    found = sample(frames=6, model=load(tensors(), weight_dtype=name), window=4, sink=1, cfg=2.0)
    exact = sample(frames=6, model=load(tensors(), weight_dtype="fp32"), window=4, sink=1, cfg=2.0)
    assert found.dtype == torch.float32 and 0 < distance(found, exact) < limit


def test_step_lists_are_read():
    assert parse_steps("1000, 750 500,250 ") == [1000, 750, 500, 250]


VALUES = dict(seed=3, steps="1000, 500", first_steps="", shift=5.0, warp=True, block=2, independent_first=False,
              short_last_block=False, window=4, sink=1, endless=False, context_noise=0.0, cfg=2.0, refresh_sink=False)


def run_node(kind, model):
    return nodes.BlockAutoregressiveSampler.execute(
        model, conditioning(kind, 6, 1), conditioning(kind, 6, 2), latent(kind, 6), **VALUES).result


def test_the_node():
    declared = [entry.id for entry in nodes.BlockAutoregressiveSampler.define_schema().inputs]
    assert declared == ["model", "positive", "negative", "latent", *VALUES, "timeline", "vae", "resume_folder", "clip",
                        "fps"]
    found, summary, _ = run_node("t2v", load(strong_tensors(), weight_dtype="fp32"))
    assert torch.equal(found["samples"], sample(frames=6, window=4, sink=1, cfg=2.0))
    assert summary.startswith("6 latent frames; 3 blocks to make in 6 steps; cache")


@pytest.mark.parametrize("kind", ["t2v", "small"])
def test_every_step_shows_the_block_that_is_being_made(kind, monkeypatch):
    seen = []
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **kwargs: seen.append(
        (value, total, preview[1].size)))
    run_node(kind, load(strong_tensors(kind), weight_dtype="fp32"))
    assert seen == [(step, 6, (WIDTH, HEIGHT)) for step in range(1, 7)]


@pytest.mark.parametrize("error, told", [
    (comfy.model_management.OOM_EXCEPTION("full"), "6 latent frames; .* MiB .* Use a smaller window"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "smaller window"),
    (RuntimeError("shapes differ"), "^shapes differ$"),
])
def test_out_of_memory_gives_advice(error, told):
    def fail(*args):
        raise error

    model = load(strong_tensors(), weight_dtype="fp32")
    model.set_model_unet_function_wrapper(fail)
    with pytest.raises(RuntimeError, match=told):
        run_node("t2v", model)
