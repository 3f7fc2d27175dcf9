"""Train Video Model as ComfyUI runs it: in inference mode, leaving its input models unchanged."""

import json

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from stillmotion.nodes.causal_wan import checkpoint as causal_wan
from stillmotion.nodes.common.demo import CAUSAL_WAN
from stillmotion.nodes.common.demo import DYNAMICRAFTER as DEMO
from stillmotion.nodes.common.files import read_checkpoint
from stillmotion.nodes.dynamicrafter import checkpoint as dynamicrafter
from stillmotion.nodes.dynamicrafter.attention import SpatialTransformer
from stillmotion.nodes.training.data.clips import MovingShapes
from stillmotion.nodes.training.families import base
from stillmotion.nodes.training.families.base import plain_weights
from stillmotion.nodes.training.nodes import TrainVideoModel
from stillmotion.nodes.video_unet.nodes import LoadVideoUNet

from nodes import LoraLoaderModelOnly

SETTINGS = {"name": "tiny", "resume": False, "steps": 3, "batch_size": 2, "learning_rate": 1e-3, "model_channels": 16,
            "train": "all", "caption_dropout": 0.1, "motion_weight": 1.0, "seed": 0, "sample_every": 3,
            "mixed_precision": "no", "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def demo():
    with torch.inference_mode():
        return dynamicrafter.load(read_checkpoint(DEMO), weight_dtype="fp32")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for kind in ("output", "temp"):
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    for kind in ("checkpoints", "diffusion_models", "loras"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"}))
    monkeypatch.setattr(base, "SAMPLE_STEPS", 2)  # sample quality does not matter here
    return tmp_path


def run(demo, data_set=None, **changes):
    """Run the node in inference mode, in which its data set is created too."""
    with torch.inference_mode():
        return TrainVideoModel.execute(data_set or MovingShapes(10, frames=4, size=(16, 16), mirror=True), demo.clip,
                                       **{**SETTINGS, **changes})


def weights_of(model):
    return {key: value.clone() for key, value in model.model.state_dict().items()}


def test_a_new_model_in_inference_mode(demo, folders):
    shown = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: shown.append((total, value, preview)))
    try:
        with torch.inference_mode():
            done = run(demo, MovingShapes(10, frames=4, size=(32, 32)), vae=demo.vae)
            model, curves, name = done.args
            assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert name == "tiny_00001.safetensors" and curves.shape[-1] == 3
    steps = [value for total, value, _ in shown if total == 3]  # newer releases skip some ticks in between
    assert steps == sorted(steps) and steps[-1] == 3
    assert any(preview for _, _, preview in shown)
    left = Image.open(folders / "temp" / done.ui.as_dict()["images"][0]["filename"])  # on the node
    assert left.width == curves.shape[2] and left.height > curves.shape[1]
    with safe_open(folders / "checkpoints" / name, "pt") as file:
        header = file.metadata()
    about = json.loads(header["stillmotion.training"])
    assert about["step"] == 3 and about["settings"]["batch_size"] == 2
    assert about["settings"]["frame_size"] == "32"  # the clips are not upscaled
    assert json.loads(header["stillmotion.video_unet"])["params"]["model_channels"] == 16
    assert model.model.video_unet.frames == 4 and model.model.video_unet.height == 32
    found = {path.name for path in (folders / "output" / "training" / "tiny_00001").iterdir()}
    assert {"state_1.pt", "best.safetensors", "curves.png", "metrics.jsonl", "samples", "settings.json"} <= found


def test_pixels_and_the_models_of_the_host_stay_as_they_are(demo):
    clip = {key: value.clone() for key, value in demo.clip.cond_stage_model.state_dict().items()}
    first = run(demo).args[0]
    assert first.model.video_unet.space == "pixels"
    before = weights_of(first)
    second, _, name = run(demo, model=first, steps=1).args
    assert name == "tiny_00002.safetensors"
    assert all(torch.equal(value, before[key]) for key, value in weights_of(first).items())
    assert all(torch.equal(value, clip[key]) for key, value in demo.clip.cond_stage_model.state_dict().items())
    assert second.model.video_unet == first.model.video_unet


def test_cancelled_it_saves_and_goes_on_where_it_was(demo, folders):
    whole = weights_of(run(demo, name="whole").args[0])

    def cancel(value, total, preview, **_):
        if (total, value) == (3, 1):
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(cancel)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(demo)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    state = torch.load(folders / "output" / "training" / "tiny_00001" / "state_1.pt", weights_only=True)
    assert state["step"] == 1
    resumed, _, name = run(demo, resume=True).args
    assert name == "tiny_00001.safetensors"
    assert all(torch.equal(value, whole[key]) for key, value in weights_of(resumed).items())


def previews_have_the_colours(model, vae):
    """Whether a sampler's preview of a latent is what the VAE decodes it to."""
    clip = MovingShapes(1, frames=4, size=(32, 32))[0]["video"].movedim(0, -1)
    with torch.inference_mode():
        latent = vae.encode(clip / 2 + 0.5)
        preview = model.model.latent_format.latent_rgb_factors_reshape
        seen = [preview(model.model.process_latent_in(latent))[0, :, 0].movedim(0, -1) for _ in clip]
        return torch.allclose(torch.stack(seen) / 2 + 0.5, vae.decode(latent)[0], atol=0.02)


@pytest.mark.parametrize("family", ["video U-Net", "DynamiCrafter"])
def test_previews_of_a_trained_model_have_the_colours_of_the_video(demo, family):
    """Straight from the node and, for a new video U-Net, from its loader with the VAE."""
    data_set = MovingShapes(10, frames=4, size=(32, 32))
    given = {} if family == "video U-Net" else {"model": demo.model, "clip_vision": demo.clip_vision}
    model, _, name = run(demo, data_set, vae=demo.vae, steps=1, **given).args
    assert previews_have_the_colours(model, demo.vae)
    if not given:
        with torch.inference_mode():
            loaded = LoadVideoUNet.execute(name, "fp32", demo.vae).args[0]
        assert previews_have_the_colours(loaded, demo.vae)


def trained(before, after):
    """Names of the weights that differ by more than half-precision rounding."""
    return {key for key, value in before.items() if not torch.allclose(value, after[key], rtol=2e-3, atol=1e-5)}


def test_dynamicrafter_projector_and_temporal_layers(demo, folders):
    before = weights_of(demo.model)
    data_set = MovingShapes(10, frames=4, size=(32, 32))
    model, _, name = run(demo, data_set, model=demo.model, vae=demo.vae, clip_vision=demo.clip_vision, steps=2,
                         train="projector_temporal", learning_rate=1e-2).args
    changed = trained(before, weights_of(model))
    spatial = tuple(f"diffusion_model.{name}." for name, module in demo.model.model.diffusion_model.named_modules()
                    if isinstance(module, SpatialTransformer))
    assert not any(key.startswith(spatial) for key in changed)
    for part in ("image_proj_model.", "temopral_conv.", "init_attn."):
        assert any(part in key for key in changed), part
    assert all(torch.equal(value, before[key]) for key, value in weights_of(demo.model).items())
    again = dynamicrafter.load(read_checkpoint(folders / "checkpoints" / name), weight_dtype="fp32")  # a complete file
    assert again.vae is not None and again.clip is not None
    assert not trained(weights_of(again.model), weights_of(model))


def test_causal_wan_is_trained_further_and_loads_again(demo, folders):
    model = causal_wan.load(read_checkpoint(CAUSAL_WAN), weight_dtype="fp32")
    before = weights_of(model)
    data_set = MovingShapes(10, frames=8, size=(32, 32))
    result, _, name = run(demo, data_set, model=model, vae=demo.vae, clip_vision=demo.clip_vision, steps=2,
                          learning_rate=1e-2).args
    assert trained(before, weights_of(result)) and (folders / "diffusion_models" / name).exists()
    assert result.model.wan_params == model.model.wan_params
    assert all(torch.equal(value, before[key]) for key, value in weights_of(model).items())
    with pytest.raises(ValueError, match="split into blocks of 4. Give the data set 4 or 8 frames, or set block to"):
        run(demo, MovingShapes(10, frames=6, size=(32, 32)), model=model, vae=demo.vae, clip_vision=demo.clip_vision)


@pytest.mark.parametrize("family", ["dynamicrafter", "causal_wan"])
def test_a_lora_changes_the_model_in_cores_loader_as_it_was_trained(demo, folders, family):
    if family == "dynamicrafter":
        model, data_set = demo.model, MovingShapes(10, frames=4, size=(32, 32))
    else:
        model, data_set = causal_wan.load(read_checkpoint(CAUSAL_WAN), weight_dtype="fp32"), MovingShapes(
            10, frames=8, size=(32, 32))
    before = weights_of(model)
    result, _, name = run(demo, data_set, model=model, vae=demo.vae, clip_vision=demo.clip_vision, steps=2,
                          train="lora", lora_rank=3, learning_rate=1e-2).args
    assert all(torch.equal(value, before[key]) for key, value in weights_of(model).items())
    state = torch.load(folders / "output" / "training" / "tiny_00001" / "state_1.pt", weights_only=True)
    assert all(".lora_" in key for key in state["net"])  # the frozen weights are not saved
    adapters = {key.removeprefix("module."): value for key, value in state["averaged"].items()}
    loaded = LoraLoaderModelOnly().load_lora_model_only(model, name, 1.0)[0]
    for patched in (result, loaded):
        found = plain_weights(patched)
        for key, weight in plain_weights(model).items():
            layer = key.removesuffix(".weight")
            if f"{layer}.lora_up.weight" in adapters:
                weight = weight + adapters[f"{layer}.lora_up.weight"] @ adapters[f"{layer}.lora_down.weight"]
            torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-6)
    with safe_open(folders / "loras" / name, "pt") as file:
        layers = {key.rsplit(".lora", 1)[0] for key in file.keys() if ".lora_up" in key}
        assert layers and file.get_tensor(f"{min(layers)}.alpha").item() == 3
        assert any(file.get_tensor(f"{layer}.lora_up.weight").abs().max() > 1e-3 for layer in layers)


def test_clips_of_one_frame_and_names_with_brackets(demo):
    data_set = MovingShapes(10, frames=1, size=(16, 16))
    assert run(demo, data_set, name="a[1]").args[2] == "a[1]_00001.safetensors"
    _, curves, name = run(demo, data_set, name="a[1]", resume=True, steps=4).args
    assert name == "a[1]_00001.safetensors" and curves.shape[-1] == 3
    assert run(demo, data_set, name="a[1]", steps=1).args[2] == "a[1]_00002.safetensors"


def test_sizes_that_the_vae_cannot_take(demo, folders):
    with pytest.raises(ValueError, match="width is 60: it must be a multiple of 8"):
        run(demo, MovingShapes(10, frames=2, size=(60, 60)), vae=demo.vae)
    assert not (folders / "checkpoints").exists()


@pytest.mark.parametrize("changes, words", [
    ({"name": "a/b"}, "plain file name"), ({"name": "a\0b"}, "plain file name"), ({"name": "a" * 201}, "200 bytes"),
    ({"name": "a:b"}, "plain file name"), ({"resume": True}, "no run to go on with"),
    ({"train": "half"}, "choose one of all"), ({"train": "lora"}, "name one"),
    ({"train": "projector_temporal"}, "family dynamicrafter"),
    ({"mixed_precision": "fp8"}, "choose one of no"), ({"batch_size": 0}, "above 0"),
])
def test_bad_input(demo, changes, words):
    with pytest.raises(ValueError, match=words):
        run(demo, **changes)


def test_encoders_that_do_not_belong_to_the_model(demo):
    with pytest.raises(ValueError, match="connect vae and clip_vision"):
        run(demo, model=demo.model, vae=demo.vae)
    pixels = run(demo, steps=1).args[0]
    with pytest.raises(ValueError, match="disconnect the VAE"):
        run(demo, model=pixels, vae=demo.vae)
