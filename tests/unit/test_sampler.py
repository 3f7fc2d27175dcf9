"""The DDIM sampler inside ComfyUI's sampling machinery, with a stub network, against a plain float64 loop."""
import dataclasses
import random
from fractions import Fraction

import comfy.latent_formats
import comfy.lora
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.supported_models_base
import comfy.utils
import pytest
import torch
from comfy import conds, model_base, model_patcher
from comfy_extras import nodes_custom_sampler as custom
from stillmotion.nodes.diffusion.ddim import Clip
from stillmotion.nodes.diffusion.schedule import DiffusionParams
from stillmotion.nodes.sampling import nodes
from stillmotion.nodes.sampling import sampler as ours

SHAPE = (2, 4, 3, 4, 6)
PARAMS = {
    "eps": DiffusionParams("eps", 0.00085, 0.012, False, None, "uniform", 0.0),
    "v": DiffusionParams("v", 0.00085, 0.012, False, None, "uniform_trailing", 0.0),
    "zsnr": DiffusionParams("v", 0.00085, 0.012, True, 0.7, "uniform_trailing", 0.7),
}


@pytest.fixture(autouse=True)
def as_in_the_host():
    with torch.inference_mode():
        yield


class StubNet(torch.nn.Module):
    """Depends on x, timestep, text and image, with a Linear that a LoRA can patch."""

    def __init__(self, dtype=None, device=None, operations=torch.nn):
        super().__init__()
        self.dtype, self.calls, self.batches = dtype, 0, []
        self.mix = operations.Linear(4, 4, bias=False, dtype=dtype, device=device)

    def forward(self, x, t, context=None, image_tokens=None, **kwargs):
        self.calls += 1
        self.batches.append(x.shape[0])
        def view(v):
            return v.reshape(-1, 1, 1, 1, 1)
        pushed = self.mix(x.movedim(1, -1)).movedim(-1, 1)
        told = view(context.mean((1, 2))) + 0.3 * view(image_tokens.mean((1, 2)))
        return torch.tanh(pushed + told) + 0.1 * torch.cos(view(t) / 100) * torch.sin(3 * x + told)


class VideoLatents(comfy.latent_formats.SD15):
    latent_dimensions = 3

    def __init__(self):
        super().__init__()
        self.taesd_decoder_name = None


class StubBase(model_base.BaseModel):
    def extra_conds(self, **kwargs):
        out = super().extra_conds(**kwargs)
        if "image_tokens" in kwargs:
            out["image_tokens"] = conds.CONDRegular(kwargs["image_tokens"])
        return out


class StubConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {}
    latent_format = VideoLatents


def stub_model(kind):
    params = PARAMS[kind]
    config = StubConfig({})
    config.sampling_settings = {"linear_start": 0.00085, "linear_end": 0.012, "zsnr": params.zero_snr}
    config.set_inference_dtype(torch.float32, None)
    kind = model_base.ModelType.V_PREDICTION if params.parameterization == "v" else model_base.ModelType.EPS
    base = StubBase(config, kind, unet_model=StubNet)
    torch.manual_seed(7)
    torch.nn.init.normal_(base.diffusion_model.mix.weight, std=0.5)
    base.diffusion_params = params
    cpu = torch.device("cpu")
    return model_patcher.ModelPatcher(base, cpu, cpu)


def conditioning():
    torch.manual_seed(3)
    texts, images = torch.randn(2, 1, 5, 8), torch.randn(2, 1, 6, 8)
    return [[[texts[i], {"image_tokens": images[i]}]] for i in range(2)]


def empty_latent():
    return {"samples": torch.zeros(SHAPE)}


BASE = ours.DDIMSettings(
    steps=6, cfg=3.0, eta=1.0, spacing="auto", guidance_rescale=-1.0, denoise=1.0, image_cfg=0.0,
    clip=Clip("off", 3.0, False), start_step=0, end_step=1000, tables="fixed")


def settings(**changes):
    return dataclasses.replace(BASE, **changes)


def run(kind, chosen, latent=None, seed=5, **kwargs):
    model = kwargs.pop("model", None) or stub_model(kind)
    positive, negative = conditioning()
    return ours.sample_latent(model, positive, negative, latent or empty_latent(), seed, chosen, **kwargs)


def plain_ddim(kind, chosen, x, step_noise, latent=None, mask=None, noise=None):
    """The variance-preserving loop written down once more, in float64, without ComfyUI and without our tables."""
    params = PARAMS[kind]
    net = stub_model(kind).model.diffusion_model.double()
    (text, image), (empty, grey) = [(c[0][0].double(), c[0][1]["image_tokens"].double()) for c in conditioning()]
    bar = 1.0
    bars = []
    for i in range(1000):
        bar *= 1 - (0.00085 ** 0.5 + (0.012 ** 0.5 - 0.00085 ** 0.5) * i / 999) ** 2
        bars.append(bar)
    if params.zero_snr:
        root = [b ** 0.5 for b in bars]
        bars = [((r - root[-1]) * root[0] / (root[0] - root[-1])) ** 2 for r in root]
    scales = [1 + (params.base_scale - 1) * min(i / 399, 1) if params.base_scale else 1.0 for i in range(1000)]
    total = int(chosen.steps / chosen.denoise)
    if (params.spacing if chosen.spacing == "auto" else chosen.spacing) == "uniform":
        times = [min(1 + 1000 * i // total, 999) for i in range(total)]
    else:
        times = [round(Fraction(1000 * (i + 1), total)) - 1 for i in range(total)]
    begin = total - chosen.steps + chosen.start_step
    if begin:
        a = bars[times[total - 1 - begin]]
        x = a ** 0.5 * latent + (1 - a) ** 0.5 * noise
    amount = params.guidance_rescale if chosen.guidance_rescale == -1 else chosen.guidance_rescale
    for k in range(begin, min(total, total - chosen.steps + chosen.end_step)):
        i = total - 1 - k
        t, before = times[i], times[i - 1] if i else 0
        a, a_prev = bars[t], bars[before]
        if mask is not None:
            x = mask * x + (1 - mask) * (a ** 0.5 * latent + (1 - a) ** 0.5 * noise)
        def predict(context, tokens):
            return net(x, x.new_full((SHAPE[0],), t), context.expand(2, -1, -1), tokens.expand(2, -1, -1))
        both, none = predict(text, image), predict(empty, grey)
        out = none + chosen.cfg * (both - none)
        if chosen.image_cfg:
            seen = predict(empty, image)
            out = none + chosen.image_cfg * (seen - none) + chosen.cfg * (both - seen)
        for b in range(SHAPE[0]):
            out[b] *= 1 + amount * ((both[b].std() / out[b].std()).item() - 1)
        if params.parameterization == "v":
            x0, eps = a ** 0.5 * x - (1 - a) ** 0.5 * out, a ** 0.5 * out + (1 - a) ** 0.5 * x
        else:
            x0, eps = (x - (1 - a) ** 0.5 * out) / a ** 0.5, out
        if chosen.clip.mode == "static":
            x0 = x0.clamp(-chosen.clip.limit, chosen.clip.limit)
        if chosen.clip.mode == "dynamic":
            for b in range(SHAPE[0]):
                reach = max(float(torch.quantile(x0[b].abs().flatten(), 0.995)), chosen.clip.limit)
                x0[b] = x0[b].clamp(-reach, reach) / reach * chosen.clip.limit
        if chosen.clip.mode != "off" and chosen.clip.recompute_eps:
            eps = (x - a ** 0.5 * x0) / (1 - a) ** 0.5
        if i:
            x0 = x0 * scales[before] / scales[t]
        variance = 0.0 if a_prev == a else (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        sigma = chosen.eta * variance ** 0.5
        x = a_prev ** 0.5 * x0 + max(1 - a_prev - sigma ** 2, 0) ** 0.5 * eps + sigma * step_noise(k)
    return x if mask is None else mask * x + (1 - mask) * latent


def random_settings(index):
    draw = random.Random(index)
    kind = draw.choice(list(PARAMS))
    clip = Clip(draw.choice(["off", "static", "dynamic"]), draw.choice([1.0, 3.0]), draw.random() < 0.3)
    steps = draw.choice([1, 2, 3, 5, 7, 11, 20, 25, 61])
    chosen = settings(
        steps=steps, cfg=draw.choice([1.0, 3.0, 7.5]), eta=draw.choice([0.0, 0.5, 1.0]),
        spacing=draw.choice(["auto", "uniform", "uniform_trailing"]), denoise=draw.choice([1.0, 1.0, 0.6, 0.35]),
        guidance_rescale=draw.choice([-1.0, 0.0, 0.3, 1.0]), image_cfg=draw.choice([0.0, 0.0, 1.0, 2.5]), clip=clip,
        start_step=draw.choice([0, 0, steps // 3]))
    return kind, chosen, draw.random() < 0.25


@pytest.mark.parametrize("index", range(40))
def test_random_settings_equal_the_plain_float64_loop(index):
    kind, chosen, masked = random_settings(index)
    torch.manual_seed(index)
    latent = {"samples": torch.randn(SHAPE) * 5}
    noise, steps_noise = torch.randn(SHAPE), torch.randn(1 + int(chosen.steps / chosen.denoise), *SHAPE)
    mask = (torch.rand(1, *SHAPE[2:]) > 0.5).float() if masked else None
    if masked:
        latent["noise_mask"] = mask
    result, report = run(kind, chosen, latent, start_noise=noise, noise=lambda k: steps_noise[k])
    expected = plain_ddim(
        kind, chosen, noise.double(), lambda k: steps_noise[k].double(), latent["samples"].double() * 0.18215,
        None if mask is None else mask[:, None].double(), noise.double()) / 0.18215
    assert result["samples"].isfinite().all()
    error = (result["samples"] - expected).norm() / expected.norm()
    assert error < 5e-6, (kind, chosen, masked)
    assert len(report.timesteps) == chosen.steps - chosen.start_step
    if masked:
        kept = mask[:, None].expand(SHAPE) == 0
        assert torch.equal(result["samples"][kept], latent["samples"][kept])


def select(model, chosen):
    return nodes.DDIMSamplerSelect.execute(
        model, chosen.steps, chosen.eta, chosen.spacing, chosen.guidance_rescale, chosen.denoise, chosen.clip.mode,
        chosen.clip.limit, chosen.clip.recompute_eps, chosen.tables).result


def custom_advanced(guider, sampler, sigmas, latent, seed=5):
    noise = custom.Noise_RandomNoise(seed)
    return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).result[0]["samples"]


@pytest.mark.parametrize("kind", list(PARAMS))
def test_select_with_cores_guider_equals_the_node(kind):
    model, chosen = stub_model(kind), settings(denoise=0.7)
    latent = {"samples": torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))}
    guider = custom.CFGGuider.execute(model, *conditioning(), chosen.cfg).result[0]
    result = custom_advanced(guider, *select(model, chosen), latent)
    torch.testing.assert_close(result, run(kind, chosen, latent, model=model)[0]["samples"])


def test_basic_guider_equals_cfg_1():
    model, chosen = stub_model("zsnr"), settings(cfg=1.0)
    guider = custom.BasicGuider.execute(model, conditioning()[0]).result[0]
    result = custom_advanced(guider, *select(model, chosen), empty_latent())
    torch.testing.assert_close(result, run("zsnr", chosen, model=model)[0]["samples"])


def test_masks_hold_without_our_node_and_change_with_cores_differential_diffusion():
    torch.manual_seed(2)
    latent = {"samples": torch.randn(SHAPE), "noise_mask": (torch.rand(1, *SHAPE[2:]) > 0.5).float()}
    kept = latent["noise_mask"][:, None].expand(SHAPE) == 0
    model = stub_model("v")
    guider = custom.CFGGuider.execute(model, *conditioning(), 3.0).result[0]
    result = custom_advanced(guider, *select(model, settings()), latent)
    torch.testing.assert_close(result[kept], latent["samples"][kept])
    assert (result[~kept] - latent["samples"][~kept]).abs().mean() > 0.1
    model.set_model_denoise_mask_function(lambda sigma, mask, extra_options: torch.zeros_like(mask))
    frozen = run("v", settings(), {**latent, "noise_mask": torch.ones(1, *SHAPE[2:])}, model=model)[0]["samples"]
    torch.testing.assert_close(frozen, latent["samples"])


def test_foreign_sigmas_are_refused():
    model = stub_model("v")
    sampler, _ = select(model, settings())
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 6)
    guider = custom.BasicGuider.execute(model, conditioning()[0]).result[0]
    with pytest.raises(ValueError, match="DDIM Sampler Select"):
        custom_advanced(guider, sampler, sigmas, empty_latent())


@pytest.mark.parametrize("kind", list(PARAMS))
def test_a_run_in_two_parts_equals_the_whole(kind):
    whole = run(kind, settings())[0]
    first = run(kind, settings(end_step=4))[0]
    second = run(kind, settings(start_step=4), first, start_noise=torch.zeros(SHAPE))[0]
    torch.testing.assert_close(second["samples"], whole["samples"], rtol=1e-4, atol=1e-4)


def test_every_possible_start_step_of_1000_uniform_steps_is_found():
    sampler, _ = ours.make_sampler(stub_model("zsnr"), settings(steps=1000, spacing="uniform"))
    table = sampler.sigmas().tolist()
    for first in range(0, 1000, 37):
        assert ours._span(table, table[first:]) == (first, 1000)


def test_cfg_1_makes_one_prediction_and_three_way_makes_one_batch_of_three():
    for chosen, batch in ((settings(cfg=1.0), 2), (settings(), 4), (settings(image_cfg=2.0), 6)):
        model = stub_model("zsnr")
        run("zsnr", chosen, model=model)
        assert model.model.diffusion_model.batches == [batch] * chosen.steps


def test_seed_decides_everything_and_step_noise_is_not_the_start_noise():
    results = [run("zsnr", settings(), seed=seed)[0]["samples"] for seed in (5, 5, 6)]
    assert torch.equal(results[0], results[1])
    assert (results[0] - results[2]).abs().mean() > 0.1
    noise = ours.seeded_noise(5, SHAPE, torch.device("cpu"))
    drawn = [comfy.sample.prepare_noise(torch.zeros(SHAPE), 5)] + [noise(k) for k in range(8)]
    drawn += [ours.seeded_noise(6, SHAPE, torch.device("cpu"))(k) for k in range(8)]
    correlation = torch.corrcoef(torch.stack(drawn).flatten(1)) - torch.eye(len(drawn))
    assert correlation.abs().max() < 0.25


def test_lora_through_cores_patches_equals_merged_weights():
    torch.manual_seed(11)
    down, up = torch.randn(2, 4), torch.randn(4, 2)
    lora = {"mix.lora_down.weight": down, "mix.lora_up.weight": up}
    key = "diffusion_model.mix.weight"
    model, merged = stub_model("zsnr"), stub_model("zsnr")
    plain = run("zsnr", settings(), model=model)[0]["samples"]
    patched = model.clone()
    assert patched.add_patches(comfy.lora.load_lora(lora, {"mix": key}), 0.8) == [key]
    merged.model.diffusion_model.mix.weight += 0.8 * up @ down
    result = run("zsnr", settings(), model=patched)[0]["samples"]
    expected = run("zsnr", settings(), model=merged)[0]["samples"]
    assert (result - expected).norm() / expected.norm() < 1e-4
    assert (result - plain).norm() / plain.norm() > 1e-2
    again = run("zsnr", settings(), model=model)[0]["samples"]
    assert torch.equal(again, plain)


def test_cores_cfg_patches_apply():
    model = stub_model("v")
    model.set_model_sampler_cfg_function(lambda args: args["cond"])
    torch.testing.assert_close(run("v", settings(), model=model)[0]["samples"],
                               run("v", settings(cfg=1.0))[0]["samples"], rtol=1e-4, atol=1e-4)


def test_interrupt_stops_before_the_next_step():
    model = stub_model("v")
    def stop_at_second(step, x0, x, steps):
        assert steps == 6 and x0.shape == x.shape == SHAPE
        if step == 1:
            comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run("v", settings(), model=model, callback=stop_at_second)
    assert model.model.diffusion_model.calls == 2


def test_a_model_without_params_gets_its_schedule_from_core():
    """A patched sigma table counts as well; only the dynamic rescale is unknown then."""
    for kind in ("eps", "v"):
        foreign, chosen = stub_model(kind), settings(spacing="uniform", guidance_rescale=0.0)
        del foreign.model.diffusion_params
        torch.testing.assert_close(run(kind, chosen, model=foreign)[0]["samples"], run(kind, chosen)[0]["samples"],
                                   rtol=1e-4, atol=1e-4)
    patched = stub_model("v")
    patched.add_object_patch("model_sampling", stub_model("eps").model.model_sampling)
    assert ours.model_schedule(patched).parameterization == "eps"


def test_flow_models_are_refused():
    model = stub_model("v")
    config = StubConfig({})
    config.sampling_settings = {"shift": 3.0}
    model.add_object_patch("model_sampling", model_base.model_sampling(config, model_base.ModelType.FLOW))
    with pytest.raises(ValueError, match="flow models use KSampler"):
        ours.model_schedule(model)


@pytest.mark.parametrize("steps", [7, 20, 25, 61, 122])
def test_original_tables_end_in_nan_where_the_fixed_ones_do_not(steps):
    report = run("zsnr", settings(steps=steps, tables="original"))[1]
    assert report.verdict()[0] == "bad" and "fixed tables" in report.verdict()[1]
    result, report = run("zsnr", settings(steps=steps))
    assert result["samples"].isfinite().all() and len(report.timesteps) == steps


def test_original_uniform_table_out_of_range_is_explained():
    with pytest.raises(ValueError, match="timestep 1000.*Choose the fixed tables"):
        run("eps", settings(steps=9, tables="original"))


@pytest.mark.parametrize("changes, words", [
    ({"steps": 0}, "choose 1 to 1000"), ({"steps": 1001}, "choose 1 to 1000"),
    ({"spacing": "karras"}, "choose one of auto, uniform, uniform_trailing"),
    ({"tables": "new"}, "choose one of fixed, original"),
    ({"denoise": 0.0}, "denoise"), ({"denoise": 1.5}, "denoise"),
    ({"guidance_rescale": -0.5}, "-1 for the model's own"),
    ({"start_step": 6}, "only 6 steps"), ({"start_step": 4, "end_step": 4}, "no step"),
])
def test_bad_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        settings(**changes)


def test_too_many_steps_for_the_denoise():
    with pytest.raises(ValueError, match="1250 steps, but there are 1000"):
        run("v", settings(steps=50, denoise=0.04))


def bad_inputs():
    """(name, words of the message, what to change on latent, positive, negative, keyword arguments)"""
    def latent(samples):
        return lambda a: a["latent"].update(samples=samples)
    broken = torch.zeros(SHAPE)
    broken[0, 0, 0, 0, 0] = float("nan")
    def image(shape):
        return lambda a: a["positive"][0][1].update(concat_latent_image=torch.zeros(shape))
    return [
        ("image latent", "another model", latent(torch.zeros(1, 4, 8, 8))),
        ("channels", "another model", latent(torch.zeros(1, 16, 3, 4, 6))),
        ("empty", "is empty", latent(torch.zeros(0, *SHAPE[1:]))),
        ("nan", "1 NaN or Inf values", latent(broken)),
        ("noise shape", "start noise is 1 x 4", lambda a: a.update(start_noise=torch.zeros(1, *SHAPE[1:]))),
        ("noise nan", "has to be finite", lambda a: a.update(start_noise=broken)),
        ("frames", "same DynamiCrafter Image to Video node", image((1, 4, 5, 4, 6))),
        ("batch", "holds 3 images", image((3, *SHAPE[1:]))),
        ("negative tokens", "negative conditioning has no image tokens", lambda a: a["negative"][0][1].clear()),
        ("positive tokens", "positive conditioning has no image tokens", lambda a: a["positive"][0][1].clear()),
        ("no negative", "negative conditioning is empty", lambda a: a["negative"].clear()),
        ("image cfg", "no image to guide by", lambda a: (a["positive"][0][1].clear(), a["negative"][0][1].clear())),
    ]


@pytest.mark.parametrize("words, change", [pytest.param(*case[1:], id=case[0]) for case in bad_inputs()])
def test_bad_inputs(words, change):
    positive, negative = conditioning()
    arguments = {"latent": empty_latent(), "positive": positive, "negative": negative, "start_noise": None}
    change(arguments)
    model = stub_model("zsnr")
    with pytest.raises(ValueError, match=words):
        ours.sample_latent(model, settings=settings(image_cfg=1.0), seed=1, **arguments)
    assert model.model.diffusion_model.calls == 0


def test_the_nodes():
    model, (positive, negative) = stub_model("zsnr"), conditioning()
    values = dict(seed=5, steps=6, cfg=3.0, eta=1.0, spacing="auto", guidance_rescale=-1.0, denoise=1.0, image_cfg=0.0,
                  clip_x0="off", clip_value=3.0, recompute_eps=False, start_step=0, end_step=1000, tables="fixed")
    declared = [i.id for i in nodes.DDIMSampler.define_schema().inputs]
    assert declared == ["model", "positive", "negative", "latent", *values, "noise"]
    latent, report = nodes.DDIMSampler.execute(model, positive, negative, empty_latent(), **values).result
    assert torch.equal(latent["samples"], run("zsnr", settings())[0]["samples"])
    plot, text, passed = nodes.SamplingReport.execute(report).result
    assert plot.ndim == 4 and plot.shape[3] == 3 and plot.dtype == torch.float32 and 0 <= plot.min() < plot.max() <= 1
    assert text.startswith(report.verdict()[0]) and passed is (report.verdict()[0] != "bad")
    for node in (nodes.DDIMSampler, nodes.DDIMSamplerSelect, nodes.SamplingReport):
        schema = node.define_schema()
        assert all(entry.tooltip for entry in schema.inputs + schema.outputs)


def test_out_of_memory_gives_advice():
    model, (positive, negative) = stub_model("zsnr"), conditioning()
    def fail(*args):
        raise comfy.model_management.OOM_EXCEPTION("full")
    model.set_model_unet_function_wrapper(fail)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION, match="smaller preset"):
        nodes.DDIMSampler.execute(model, positive, negative, empty_latent(), 1, 6, 3.0, 1.0, "auto", -1.0, 1.0, 0.0,
                                  "off", 3.0, False, 0, 1000, "fixed")


def test_progress_and_a_preview_at_every_step():
    from comfy.cli_args import LatentPreviewMethod, args
    seen, before = [], args.preview_method
    args.preview_method = LatentPreviewMethod.Auto
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, **kwargs: seen.append((value, total, preview[1].size)))
    try:
        positive, negative = conditioning()
        nodes.DDIMSampler.execute(stub_model("zsnr"), positive, negative, empty_latent(), 1, 6, 3.0, 1.0, "auto", -1.0,
                                  1.0, 0.0, "off", 3.0, False, 2, 1000, "fixed")
    finally:
        args.preview_method = before
        comfy.utils.set_progress_bar_global_hook(None)
    assert seen == [(step, 4, (SHAPE[4], SHAPE[3])) for step in (1, 2, 3, 4)]
