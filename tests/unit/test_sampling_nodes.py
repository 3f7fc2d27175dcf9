"""The sampling nodes: bad tables, settings and inputs are rejected before the first step; progress, advice, report."""
import comfy.model_management
import comfy.utils
import pytest
import torch
from sampler_stub import SHAPE, conditioning, empty_latent, run, settings, stub_model
from stillmotion.nodes.ddim import nodes
from stillmotion.nodes.ddim import sampler as ours


@pytest.fixture(autouse=True)
def as_in_the_host():
    with torch.inference_mode():
        yield


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
    ({"steps": 0}, "Choose 1 to 1000"), ({"steps": 1001}, "Choose 1 to 1000"),
    ({"spacing": "karras"}, "Choose one of auto, uniform, uniform_trailing"),
    ({"tables": "new"}, "Choose one of fixed, original"),
    ({"denoise": 0.0}, "denoise"), ({"denoise": 1.5}, "denoise"),
    ({"guidance_rescale": -0.5}, "-1 for the model's own"), ({"cfg": -0.5}, "cfg is -0.5"),
    ({"start_step": 6}, "only 6 steps"), ({"start_step": 4, "end_step": 4}, "leaves no step"),
])
def test_bad_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        settings(**changes)


def test_steps_and_cfg_of_the_model():
    model = stub_model("zsnr")
    assert ours.own_settings(model, 0, -1.0) == (50, 7.5) and ours.own_settings(model, 8, 2.0) == (8, 2.0)
    report = nodes.DDIMSampler.execute(model, *conditioning(), empty_latent(), 1, 0, -1.0, 1.0, "auto", -1.0, 1.0, 0.0,
                                       "off", 3.0, False, 0, 1000, "fixed").result[1]
    assert len(report.timesteps) == 50 and "cfg 7.5" in report.settings
    model.model.diffusion_params = None
    assert ours.own_settings(model, 20, 7.0) == (20, 7.0)
    with pytest.raises(ValueError, match="set both, for example 20 steps"):
        ours.own_settings(model, 0, 7.0)


def test_too_many_steps_for_the_denoise():
    with pytest.raises(ValueError, match="1250 steps, but there are 1000"):
        run("v", settings(steps=50, denoise=0.04))


def bad_inputs():
    """(name, expected text in the message, changes to latent, positive, negative, keyword arguments)"""
    def latent(samples):
        return lambda a: a["latent"].update(samples=samples)
    broken = torch.zeros(SHAPE)
    broken[0, 0, 0, 0, 0] = float("nan")
    def image(shape):
        return lambda a: a["positive"][0][1].update(concat_latent_image=torch.zeros(shape))
    return [
        ("image latent", "Use the latent from the conditioning node", latent(torch.zeros(1, 4, 8, 8))),
        ("channels", "Use the latent from the conditioning node", latent(torch.zeros(1, 16, 3, 4, 6))),
        ("empty", "is empty", latent(torch.zeros(0, *SHAPE[1:]))),
        ("nan", "1 of the latent's 576 values are NaN", latent(broken)),
        ("noise shape", "start noise is 1 x 4", lambda a: a.update(start_noise=torch.zeros(1, *SHAPE[1:]))),
        ("noise nan", "with NaN or Inf values. It must be", lambda a: a.update(start_noise=broken)),
        ("frames", "from the same conditioning node", image((1, 4, 5, 4, 6))),
        ("batch", "holds 3 images", image((3, *SHAPE[1:]))),
        ("negative tokens", "negative conditioning has no image tokens", lambda a: a["negative"][0][1].clear()),
        ("positive tokens", "positive conditioning has no image tokens", lambda a: a["positive"][0][1].clear()),
        ("no negative", "negative conditioning is empty", lambda a: a["negative"].clear()),
        ("image cfg", "holds no image tokens. Set image_cfg to 0",
         lambda a: (a["positive"][0][1].clear(), a["negative"][0][1].clear())),
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


@pytest.mark.parametrize("error, told", [
    (comfy.model_management.OOM_EXCEPTION("full"), "smaller model"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "smaller model"),
    (RuntimeError("shapes differ"), "^shapes differ$"),
])
def test_out_of_memory_gives_advice(error, told):
    model, (positive, negative) = stub_model("zsnr"), conditioning()
    def fail(*args):
        raise error
    model.set_model_unet_function_wrapper(fail)
    with pytest.raises(RuntimeError, match=told):
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
