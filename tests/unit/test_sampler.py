"""The DDIM sampler inside ComfyUI's sampling code, with a stub network, compared with a plain float64 loop."""
import random

import comfy.lora
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy import model_base
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras import nodes_model_advanced
from sampler_stub import PARAMS, SHAPE, StubConfig, conditioning, empty_latent, plain_ddim, run, settings, stub_model
from stillmotion.nodes.ddim import nodes
from stillmotion.nodes.ddim import sampler as ours
from stillmotion.nodes.ddim.step import Clip


@pytest.fixture(autouse=True)
def as_in_the_host():
    with torch.inference_mode():
        yield


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


def test_no_step_to_take_leaves_the_latent():
    latent = {"samples": torch.ones(SHAPE)}
    model, (positive, _) = stub_model("v"), conditioning()
    guider = custom.Guider_Basic(model)
    guider.set_conds(positive)
    sampler, sigmas = select(model, settings())
    assert sigmas[-1:].tolist() == [0.0]
    torch.testing.assert_close(custom_advanced(guider, sampler, sigmas[-1:], latent), latent["samples"])


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
    """A patched sigma table is used as well; only the dynamic rescale is then unknown."""
    for kind in ("eps", "v"):
        foreign, chosen = stub_model(kind), settings(spacing="uniform", guidance_rescale=0.0)
        del foreign.model.diffusion_params
        torch.testing.assert_close(run(kind, chosen, model=foreign)[0]["samples"], run(kind, chosen)[0]["samples"],
                                   rtol=1e-4, atol=1e-4)
    patched = stub_model("v")
    patched.add_object_patch("model_sampling", stub_model("eps").model.model_sampling)
    assert ours.model_schedule(patched).parameterization == "eps"
    same = stub_model("zsnr")
    same.add_object_patch("model_sampling", stub_model("zsnr").model.model_sampling)
    assert ours.model_schedule(same).spacing == "uniform_trailing"


def test_eps_with_zero_terminal_snr_is_refused():
    patched, = nodes_model_advanced.ModelSamplingDiscrete().patch(stub_model("eps"), "eps", True)
    with pytest.raises(ValueError, match="zero terminal SNR.*Switch zsnr off"):
        ours.model_schedule(patched)


def test_flow_models_are_refused():
    model = stub_model("v")
    config = StubConfig({})
    config.sampling_settings = {"shift": 3.0}
    model.add_object_patch("model_sampling", model_base.model_sampling(config, model_base.ModelType.FLOW))
    with pytest.raises(ValueError, match="flow models use KSampler"):
        ours.model_schedule(model)
