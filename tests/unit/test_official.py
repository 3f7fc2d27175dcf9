"""get_fixed_ddim_sampler and image_guided_synthesis_fixed on a stub with the official model's attributes."""
import types

import pytest
import torch
from stillmotion.nodes.ddim.official import exact_alphas_cumprod, get_fixed_ddim_sampler, image_guided_synthesis_fixed
from stillmotion.nodes.ddim.schedule import DiffusionParams, make_alphas_cumprod, make_scale_arr, make_timesteps

SHAPE = (2, 4, 3, 4, 4)


class StubModel:
    """Latents are 8x8 means of four fixed mixes of the colours; the network depends on all of its inputs."""
    uncond_type = "empty_seq"
    linear_start, linear_end = 0.00085, 0.012

    def __init__(self, parameterization="v", dtype=torch.float32):
        zero_snr = parameterization == "v"
        params = DiffusionParams(parameterization, 0.00085, 0.012, zero_snr, None, "uniform", 0.0)
        self.parameterization, self.rescale_betas_zero_snr = parameterization, zero_snr
        self.use_dynamic_rescale = zero_snr
        self.alphas_cumprod = make_alphas_cumprod(params).to(dtype)
        self.scale_arr = make_scale_arr(0.7).to(dtype)
        self.model = types.SimpleNamespace(conditioning_key="hybrid")
        self.mix = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.3, 0.3, 0.3]])
        self.prompts, self.calls, self.encoded = [], [], []

    def get_learned_conditioning(self, prompts):
        self.prompts.append(list(prompts))
        return torch.stack([torch.full((5, 6), len(p) / 10) for p in prompts])

    def embedder(self, image_BCHW):
        return image_BCHW.mean((2, 3))[:, None].repeat(1, 7, 2)

    def image_proj_model(self, tokens):
        return 2 * tokens[:, :3]

    def encode_first_stage(self, x_BCHW):
        self.encoded.append(x_BCHW)
        return torch.einsum("lc,bchw->blhw", self.mix, torch.nn.functional.avg_pool2d(x_BCHW, 8))

    def decode_first_stage(self, z_BCTHW):
        return z_BCTHW[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4)

    def apply_model(self, x, t, cond, fs):
        self.calls.append((t[0].item(), cond, fs))
        told = cond["c_crossattn"][0].mean((1, 2)) + fs / 100 + torch.cos(t / 200)
        return torch.tanh(x + cond["c_concat"][0] + told.view(-1, 1, 1, 1, 1))


def videos():
    return torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def synthesis(model, seed=3, **changes):
    torch.manual_seed(seed)
    values = dict(n_samples=1, ddim_steps=20, ddim_eta=1.0, unconditional_guidance_scale=7.5, fs=24,
                  timestep_spacing="uniform_trailing", guidance_rescale=0.7) | changes
    return image_guided_synthesis_fixed(model, ["a cat", "a dog runs"], videos(), SHAPE, **values)


@pytest.mark.parametrize("steps", [7, 20, 25, 61, 122])
def test_the_switch_between_original_and_fixed(steps):
    assert synthesis(StubModel(), ddim_steps=steps, original=True).isnan().any()
    model = StubModel()
    result = synthesis(model, ddim_steps=steps)
    assert result.isfinite().all() and result.shape == (2, 1, 3, 3, 32, 32)
    assert [call[0] for call in model.calls[::2]] == make_timesteps(steps, "uniform_trailing")[::-1]


def test_fixed_equals_original_where_that_is_sound():
    three_way = {"multiple_cond_cfg": True, "cfg_img": 2.0}
    for changes in ({"ddim_steps": 50}, {"ddim_steps": 30}, {"ddim_steps": 5, **three_way}):
        fixed, original = (synthesis(StubModel(), original=original, **changes) for original in (False, True))
        assert (fixed - original).norm() / original.norm() < 2e-3
    fixed, original = (synthesis(StubModel("eps"), ddim_steps=10, timestep_spacing="uniform", guidance_rescale=0.0,
                                 original=original) for original in (False, True))
    assert (fixed - original).norm() / original.norm() < 1e-4


def test_what_the_network_is_given():
    model = StubModel()
    synthesis(model, ddim_steps=2, multiple_cond_cfg=True)
    (_, cond, fs), (_, uncond, _), (_, image, _) = model.calls[:3]
    assert len(model.calls) == 6 and fs.tolist() == [24, 24] and fs.dtype == torch.long
    assert model.prompts == [["a cat", "a dog runs"], ["", ""]]
    text, tokens = cond["c_crossattn"][0].split([5, 3], 1)
    torch.testing.assert_close(text[:, 0, 0], torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(tokens[:, 0, :3], 2 * videos()[:, :, 0].mean((2, 3)))
    assert (uncond["c_crossattn"][0] == 0).all()
    torch.testing.assert_close(image["c_crossattn"][0], torch.cat([torch.zeros(2, 5, 6), tokens], 1))
    z = model.encode_first_stage(videos()[:, :, 0])
    for given in (cond, uncond, image):
        torch.testing.assert_close(given["c_concat"][0], z[:, :, None].expand(SHAPE))


@pytest.mark.parametrize("mode", ["loop", "interp"])
def test_both_ends_and_zeros_between(mode):
    model = StubModel()
    synthesis(model, ddim_steps=1, **{mode: True})
    concat = model.calls[0][1]["c_concat"][0]
    for frame in (0, -1):
        torch.testing.assert_close(concat[:, :, frame], model.encode_first_stage(videos()[:, :, frame]))
    assert (concat[:, :, 1] == 0).all()


def test_scale_1_makes_one_call_a_step_and_prompts_can_be_ignored():
    model = StubModel()
    synthesis(model, ddim_steps=4, unconditional_guidance_scale=1.0, text_input=False)
    assert len(model.calls) == 4 and model.prompts == [["", ""]]


def test_samples_differ_and_the_seed_repeats_them():
    first = synthesis(StubModel(), ddim_steps=4, n_samples=2)
    assert first.shape[1] == 2 and (first[:, 0] - first[:, 1]).abs().mean() > 0.01
    assert torch.equal(first, synthesis(StubModel(), ddim_steps=4, n_samples=2))


def test_half_precision_buffers_are_replaced():
    for dtype in (torch.float16, torch.bfloat16):
        exact = exact_alphas_cumprod(StubModel(dtype=dtype))
        assert exact[-1] == 0
        torch.testing.assert_close(exact.float(), StubModel().alphas_cumprod)
    odd = StubModel()
    odd.alphas_cumprod = torch.linspace(0.9, 0.1, 1000)
    assert torch.equal(exact_alphas_cumprod(odd), odd.alphas_cumprod.double())


def sampler_run(sampler, **changes):
    torch.manual_seed(0)
    cond = {"c_crossattn": [torch.ones(2, 5, 6)], "c_concat": [torch.zeros(SHAPE)]}
    return sampler.sample(**dict(S=6, batch_size=2, shape=SHAPE[1:], conditioning=cond, eta=1.0,
                                 fs=torch.tensor([3, 3])) | changes)


def test_sampler_tables_mask_callbacks_and_intermediates():
    sampler = get_fixed_ddim_sampler(StubModel(), 6, 1.0, "uniform_trailing")
    assert sampler.ddim_timesteps.tolist() == make_timesteps(6, "uniform_trailing")
    for name in ("ddim_sigmas", "ddim_alphas", "ddim_alphas_prev", "ddim_sqrt_one_minus_alphas", "ddim_scale_arr",
                 "ddim_scale_arr_prev"):
        assert getattr(sampler, name).shape == (6,) and getattr(sampler, name).dtype == torch.float32
    steps, predictions = [], []
    known, mask = torch.full(SHAPE, 0.5), torch.zeros(SHAPE)
    mask[:, :, 0] = 1
    result, intermediates = sampler_run(
        sampler, mask=mask, x0=known, callback=steps.append, log_every_t=1,
        img_callback=lambda x0, step: predictions.append((step, x0.shape)))
    assert steps == list(range(6)) and predictions == [(i, SHAPE) for i in range(6)]
    assert len(intermediates["x_inter"]) == len(intermediates["pred_x0"]) == 7
    assert (result[:, :, 0] - sampler_run(sampler)[0][:, :, 0]).abs().mean() > 0.1


def test_sampler_extras():
    sampler = get_fixed_ddim_sampler(StubModel("eps"), 6, 1.0)
    plain = sampler_run(sampler)[0]
    assert (sampler_run(sampler, temperature=0.0)[0] - sampler_run(sampler, noise_dropout=0.9)[0]).abs().max() > 0
    halver = types.SimpleNamespace(modify_score=lambda model, e, x, t, c, factor: e * factor)
    changed = sampler_run(sampler, score_corrector=halver, corrector_kwargs={"factor": 0.5})[0]
    assert (changed - plain).abs().max() > 1e-3
    sampler.model.first_stage_model = types.SimpleNamespace(quantize=lambda z: (z.round(), None, None))
    _, intermediates = sampler_run(sampler, quantize_x0=True)
    assert torch.equal(intermediates["pred_x0"][-1], intermediates["pred_x0"][-1].round())
    with pytest.raises(ValueError, match="score_corrector works on eps"):
        sampler_run(get_fixed_ddim_sampler(StubModel(), 6, 1.0), score_corrector=halver)
