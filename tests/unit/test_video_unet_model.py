"""The video U-Net as a ComfyUI MODEL: files, samplers, conditions, nodes."""
import json

import comfy.sd
import comfy.utils
import folder_paths
import node_helpers
import pytest
import torch
from core_calls import saved_by_core
from safetensors import safe_open
from stillmotion.nodes.common.files import read_checkpoint
from stillmotion.nodes.common.vae import fold_frames, pixel_vae
from stillmotion.nodes.ddim.sampler import DDIMSettings, model_schedule, sample_latent
from stillmotion.nodes.ddim.schedule import make_alphas_cumprod
from stillmotion.nodes.ddim.step import Clip
from stillmotion.nodes.video_unet import checkpoint as loader
from stillmotion.nodes.video_unet.conditioning import clip_conditions
from stillmotion.nodes.video_unet.config import HEADER, from_json, to_json
from stillmotion.nodes.video_unet.nodes import LoadVideoUNet, VideoUNetConditions
from video_unet_stub import LoudnessUNet, as_checkpoint, make_config, make_model, make_params, random_network

import nodes as core

CLIPPED = Clip("static", 3.0, False)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def text(width=32, seed=0, tokens=77):
    return [[torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)), {"pooled_output": None}]]


def settings(steps, clip=CLIPPED, cfg=2.0, eta=0.0):
    return DDIMSettings(steps, cfg, eta, "auto", -1.0, 1.0, 0.0, clip, 0, steps, "fixed")


def conditions(model, images=None, given="none", vae=None, batch=1, **size):
    values, latent = clip_conditions(model.model.video_unet, vae, images, given,
                                     *(size.get(name, 0) for name in ("width", "height", "frames")), batch)
    return (*(node_helpers.conditioning_set_values(text(seed=seed), values) for seed in (1, 2)), {"samples": latent})


# ---- samplers ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction, schedule", [("v", "cosine"), ("eps", "cosine"), ("v", "linear")])
def test_the_host_sees_the_schedule_that_was_trained_with(prediction, schedule):
    model = make_model(prediction=prediction, schedule=schedule)
    sampling, found = model.get_model_object("model_sampling"), model_schedule(model)
    alphas = make_alphas_cumprod(model.model.video_unet.diffusion)
    assert (1 / (1 + sampling.sigmas.double() ** 2) / alphas - 1).abs().max() < 1e-5
    assert sampling.timestep(sampling.sigmas).tolist() == list(range(1000))
    assert found.parameterization == prediction and torch.equal(found.alphas_cumprod, alphas)
    assert found.spacing == "uniform_trailing"


def direct_ddim(net, config, noise, frames, texts, cfg, steps):
    """An independent implementation of the same sampling."""
    x, alphas = noise.double(), make_alphas_cumprod(config.diffusion)
    timesteps = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
    for i, t in enumerate(timesteps):
        pair = [net(torch.cat((x.float(), frames), dim=1), torch.tensor([float(t)]), c).double() for c in texts]
        out, a = pair[1] + cfg * (pair[0] - pair[1]), alphas[t]
        before = alphas[timesteps[i + 1]] if i + 1 < steps else alphas[0]
        if config.prediction == "v":
            x0, eps = a.sqrt() * x - (1 - a).sqrt() * out, a.sqrt() * out + (1 - a).sqrt() * x
        else:
            x0, eps = (x - (1 - a).sqrt() * out) / a.sqrt(), out
        x = before.sqrt() * x0.clamp(-3, 3) + (1 - before).sqrt() * eps
    return x / config.scale_factor


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_the_ddim_node_walks_as_written_down(prediction):
    config = make_config(prediction=prediction)
    net = random_network(config.params)
    model = make_model(config, net)
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1))

    class Patches:
        """A VAE that stores the mean colour of each 8 x 8 patch."""

        def encode(self, pixels):
            mean = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
            return torch.cat((mean, mean[:, :1]), dim=1)
    positive, negative, latent = conditions(model, images, "first frames", Patches())
    noise = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(2))
    out, report = sample_latent(model, positive, negative, latent, 1, settings(5), start_noise=noise)
    given = positive[0][1]["concat_latent_image"] * config.scale_factor
    mask = torch.zeros_like(given[:, :1])
    mask[:, :, :2] = 1
    expected = direct_ddim(net, config, noise, torch.cat((given, mask), dim=1),
                           (positive[0][0], negative[0][0]), 2.0, 5)
    assert given[:, :, :2].any() and not given[:, :, 2:].any()
    assert (out["samples"] - expected).norm() / expected.norm() < 2e-4
    assert out["samples"].abs().max() <= 3 / config.scale_factor + 0.05  # a little noise of the first timestep remains


@pytest.mark.parametrize("sampler, scheduler, steps", [("euler", "normal", 4), ("euler_ancestral", "ddim_uniform", 4),
                                                       ("dpmpp_2m", "karras", 4), ("ddpm", "simple", 4)])
def test_core_samplers_run(sampler, scheduler, steps):
    model = make_model()
    positive, negative, latent = conditions(model, batch=2)
    out = core.common_ksampler(model, 1, steps, 2.0, sampler, scheduler, positive, negative, latent)[0]["samples"]
    assert out.shape == (2, 4, 6, 8, 8) and out.isfinite().all() and out.abs().max() < 100


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_ancestral_sampling_takes_all_1000_steps(prediction):
    model = make_model(prediction=prediction)
    model.model.diffusion_model.forward = lambda x, *_, **__: 0.1 * x[:, :4]  # tests the loop, not the network
    positive, negative, latent = conditions(model, frames=1, width=8, height=8)
    visited = []
    out, report = sample_latent(model, positive, negative, latent, 1, settings(1000, eta=1.0, cfg=1.0),
                                callback=lambda step, *_: visited.append(step))
    assert visited == list(range(1000)) and out["samples"].isfinite().all()
    assert report.timesteps == list(range(999, -1, -1))


def test_text_given_frames_and_seed_change_the_result():
    model, vae = make_model(space="pixels", spatial_factor=1, height=8, width=8, scale_factor=1.0,
                            params=make_params(channels=3)), pixel_vae()
    images = torch.rand(2, 8, 8, 3, generator=torch.Generator().manual_seed(3))

    def run(seed=1, **changes):
        positive, negative, latent = conditions(model, vae=vae, **changes)
        return sample_latent(model, positive, negative, latent, seed, settings(3))[0]["samples"]
    results = [run(), run(seed=2), run(images=images[:1], given="first frames"), run(images=images, given="both ends")]
    assert torch.equal(results[0], run())
    assert len({round(result.double().sum().item(), 3) for result in results}) == 4
    assert vae.decode(results[0]).shape == (1, 6, 8, 8, 3)


def test_a_prompt_needs_no_conditions_node_and_another_encoder_is_named():
    model = make_model()
    latent = {"samples": torch.zeros(1, 4, 6, 8, 8)}
    assert sample_latent(model, text(), text(), latent, 1, settings(2))[0]["samples"].isfinite().all()
    with pytest.raises(ValueError, match="768 wide, but this model was .* 32.*trained with demo.*checkpoint demo"):
        sample_latent(model, text(768), text(768), latent, 1, settings(2))
    positive, negative, _ = conditions(model)
    with pytest.raises(ValueError, match="4 x 6 x 8 x 8"):
        core.common_ksampler(model, 1, 2, 2.0, "euler", "normal", positive, negative,
                             {"samples": torch.zeros(1, 4, 5, 8, 8)})


def test_an_additional_condition_travels_with_the_conditioning():
    model = make_model(params=make_params(additional_condition_dim=3))
    latent = {"samples": torch.zeros(1, 4, 3, 4, 4)}

    def run(level):
        prompt = node_helpers.conditioning_set_values(text(), {"additional_condition": torch.full((1, 3), level)})
        return sample_latent(model, prompt, text(seed=1), latent, 1, settings(2))[0]["samples"]
    assert not torch.equal(run(0.0), run(2.0))


def test_a_subclass_is_a_model_too():
    config, latent = make_config(), {"samples": torch.zeros(1, 4, 3, 4, 4)}
    torch.manual_seed(0)
    net = LoudnessUNet(config.params, torch.nn, None)
    for value in net.parameters():
        value.data.normal_(std=0.05)
    model = loader.load(as_checkpoint(net, config), "fp32", LoudnessUNet)

    def run(level):
        prompt = node_helpers.conditioning_set_values(text(), {"additional_condition": torch.full((1, 9), level)})
        return sample_latent(model, prompt, prompt, latent, 1, settings(2))[0]["samples"]
    assert not torch.equal(run(0.0), run(2.0))
    with pytest.raises(ValueError, match="listen.weight.*subclass"):
        loader.load(as_checkpoint(net, config))


# ---- conditions --------------------------------------------------------------------------------------------

def test_given_frames_lie_at_their_places():
    config = make_config(space="pixels", spatial_factor=1, height=8, width=8, params=make_params(channels=3))
    images = torch.rand(2, 8, 8, 3)

    def places(given, frames):
        values, latent = clip_conditions(config, pixel_vae(), frames, given, 0, 0, 0, 3)
        assert latent.shape == (3, 3, 6, 8, 8) and not latent.any()
        mask = 1 - values["concat_mask"][0, 0, :, 0, 0]
        clip = values["concat_latent_image"][0].movedim(0, -1)
        assert not clip[mask == 0].any()
        return mask.tolist(), clip[mask == 1]
    assert places("none", None)[0] == [0] * 6
    mask, shown = places("first frames", images)
    assert mask == [1, 1, 0, 0, 0, 0] and torch.allclose(shown, images * 2 - 1)
    mask, shown = places("both ends", images)
    assert mask == [1, 0, 0, 0, 0, 1] and torch.allclose(shown, images * 2 - 1)


@pytest.mark.parametrize("changes, words", [
    ({"given": "some"}, "Choose one of none, first frames, both ends"),
    ({"given": "none"}, "given is none"),
    ({"images": None}, "no images are connected"),
    ({"given": "both ends"}, "3 images.*takes 2"),
    ({"images": torch.full((3, 16, 16, 3), torch.nan)}, "NaN"),
    ({"vae": None}, "no VAE"),
    ({"frames": 3}, "fill 3 of 3 frames"),
    ({"width": 60}, "multiple of 8. Nearest: 56 or 64"),
    ({"batch": 0}, "batch_size is 0"),
    ({"vae": pixel_vae()}, r"\[1, 3, 3, 64, 64\].*\[1, 4, 3, 8, 8\].*VAE that the model was"),
])
def test_conditions_that_do_not_fit_are_refused(changes, words):
    values = {"vae": pixel_vae(), "images": torch.rand(3, 16, 16, 3), "given": "first frames", "width": 0, "height": 0,
              "frames": 0, "batch": 1} | changes
    with pytest.raises(ValueError, match=words):
        clip_conditions(make_config(), *values.values())


def test_frames_of_a_video_vae_are_counted_in_latents():
    config = make_config(temporal_factor=4, frames=17)
    assert clip_conditions(config, None, None, "none", 0, 0, 0, 1)[1].shape == (1, 4, 5, 8, 8)
    with pytest.raises(ValueError, match="frames is 16.*Nearest: 13 or 17"):
        clip_conditions(config, None, None, "none", 0, 0, 16, 1)


def test_image_vaes_take_clips():
    vae = pixel_vae()
    clip = torch.rand(5, 8, 8, 3)
    assert vae.encode(clip).shape == (1, 3, 5, 8, 8)
    assert torch.allclose(vae.decode(vae.encode(clip))[0], clip, atol=1e-6)
    assert fold_frames(vae) is vae
    plain = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    assert fold_frames(plain).encode(clip).shape == (1, 3, 5, 8, 8) and plain.encode(clip).shape == (5, 3, 8, 8)


# ---- files and nodes ---------------------------------------------------------------------------------------

def test_a_saved_network_loads_again(tmp_path):
    config = make_config(schedule="linear", prediction="eps")
    net = random_network(config.params)
    loader.save(tmp_path / "a.safetensors", net, config, {"steps": "12"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["steps"] == "12" and json.loads(file.metadata()[HEADER])["prediction"] == "eps"
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    model = loader.load(read_checkpoint(tmp_path / "a.safetensors"), "fp32")
    assert model.model.video_unet == config
    for key, value in model.model.diffusion_model.state_dict().items():
        assert torch.equal(value, net.state_dict()[key].half().float())


def test_cores_save_model_keeps_the_configuration(tmp_path):
    model = make_model()
    saved_by_core(model, tmp_path / "core.safetensors")
    again = loader.load(read_checkpoint(tmp_path / "core.safetensors"), "fp32")
    assert again.model.video_unet == model.model.video_unet
    before, after = (m.model.diffusion_model.state_dict() for m in (model, again))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_files_of_another_kind_are_refused():
    config = make_config()
    good = as_checkpoint(random_network(config.params), config)
    with pytest.raises(ValueError, match="fp7"):
        loader.load(good, "fp7")
    for change, words in [(lambda f: f.metadata.clear(), "not a video U-Net"),
                          (lambda f: f.metadata.update({HEADER: "{"}), "not JSON"),
                          (lambda f: f.metadata.update({HEADER: "{}"}), "has the entries"),
                          (lambda f: f.tensors.pop("input.bias"), "1 missing: input.bias")]:
        bad = as_checkpoint(random_network(config.params), config)
        change(bad)
        with pytest.raises(ValueError, match=words):
            loader.load(bad)


def test_a_configuration_goes_round_and_bad_values_are_refused():
    config = make_config()
    assert from_json(to_json(config), "here") == config
    for changes, words in [({"schedule": "sine"}, "cosine, linear"), ({"text_encoder": "t5"}, "demo, .*, clip_l"),
                           ({"text_encoder": "clip_l"}, "Set context_dim to 768"),
                           ({"space": "pixels"}, "channels to 3"), ({"scale_factor": 0.0}, "above 0")]:
        with pytest.raises(ValueError, match=words):
            make_config(**changes)


@pytest.fixture
def model_file(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()

    def write(**changes):
        config = make_config(**changes)
        loader.save(tmp_path / "mine.safetensors", random_network(config.params), config)
    yield write
    folder_paths.filename_list_cache.clear()


def test_the_nodes_load_a_file_and_make_its_conditions(model_file):
    model_file()
    model, vae = LoadVideoUNet.execute("mine.safetensors", "fp32").args
    assert "works in latents" in vae.message
    positive, negative, latent = VideoUNetConditions.execute(model, text(), text(), "none", 0, 0, 0, 2).args
    assert latent["samples"].shape == (2, 4, 6, 8, 8)
    assert positive[0][1]["concat_mask"].all() and negative[0][1]["concat_mask"].all()
    folded = LoadVideoUNet.execute("mine.safetensors", "fp32", comfy.sd.VAE(sd={"pixel_space_vae": torch.ones(())}))
    assert folded.args[1].encode(torch.rand(2, 4, 4, 3)).ndim == 5
    with pytest.raises(ValueError, match="ModelPatcher|not a video U-Net"):
        VideoUNetConditions.execute(type("Other", (), {"model": object()})(), text(), text(), "none", 0, 0, 0, 1)
    with pytest.raises(ValueError, match="Choose one of: demo.*mine.safetensors"):
        LoadVideoUNet.execute("yours.safetensors", "fp32")


def test_a_model_in_pixels_comes_with_its_vae(model_file):
    model_file(space="pixels", spatial_factor=1, params=make_params(channels=3))
    vae = LoadVideoUNet.execute("mine.safetensors", "auto").args[1]
    assert vae.decode(torch.zeros(1, 3, 2, 4, 4)).shape == (1, 2, 4, 4, 3)
    with pytest.raises(ValueError, match="works in pixels"):
        LoadVideoUNet.execute("mine.safetensors", "auto", vae)


def test_a_changed_file_is_loaded_anew(model_file):
    model_file()
    first = LoadVideoUNet.fingerprint_inputs(checkpoint="mine.safetensors")
    assert first == LoadVideoUNet.fingerprint_inputs(checkpoint="mine.safetensors")
    model_file(schedule="linear")
    assert first != LoadVideoUNet.fingerprint_inputs(checkpoint="mine.safetensors")
