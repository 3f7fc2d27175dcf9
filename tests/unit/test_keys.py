"""The mappings between file keys and network keys: loading and saving round-trips every key."""

import pytest
import torch
from causal_wan_stub import load as load_wan
from causal_wan_stub import tensors as wan_tensors
from core_calls import saved_by_core
from dynamicrafter_stub import make as make_crafter
from stillmotion.nodes.causal_wan import keys as wan
from stillmotion.nodes.dynamicrafter import keys as crafter
from stillmotion.nodes.video_unet import keys as video_unet
from video_unet_stub import make_model


@pytest.mark.parametrize("old_names", [False, True])
def test_dynamicrafter_there_and_back(old_names):
    ours = list(make_crafter().model.diffusion_model.state_dict())
    published = [crafter.file_key(key, old_names) for key in ours]
    assert [crafter.network_key(key) for key in published] == ours
    assert list(map(crafter.checkpoint_keys(published), ours)) == published
    assert any("framestride_embed" in key for key in published) == old_names
    assert {key.partition(".")[0] for key in published} == {"model", "image_proj_model"}


@pytest.mark.parametrize("prefix", ["", "model.", "diffusion_model.", "model.diffusion_model."])
def test_causal_wan_without_what_encloses_it(prefix):
    ours = list(wan_tensors("i2v"))
    assert [wan.native_key(prefix + key) for key in ours] == ours


def test_causal_wan_names_of_loras():
    core = "diffusion_model.blocks.0.ffn.0.lora_A.weight"
    for name in ("blocks.0.ffn.0.lora_A.default.weight", "base_model.model.blocks.0.ffn.0.lora_A.weight",
                 "base_model.model.model.blocks.0.ffn.0.lora_A.default.weight", core):
        assert wan.core_lora_key(name) == core
    assert wan.core_lora_key("lora_unet_blocks_0_ffn_0.alpha") == "lora_unet_blocks_0_ffn_0.alpha"


SAVED = {
    "dynamicrafter": (make_crafter, lambda found: {
        crafter.network_key(key): value for key, value in found.items()
        if key.startswith((crafter.UNET, crafter.RESAMPLER))}),
    "video_unet": (make_model, video_unet.network_tensors),
    "causal_wan": (lambda: load_wan(wan_tensors()), lambda found: {
        wan.native_key(key): value for key, value in found.items()})}


@pytest.mark.parametrize("family", SAVED)
def test_core_saves_what_the_keys_lead_back(family, tmp_path):
    make, read = SAVED[family]
    model = make()
    ours = model.model.diffusion_model.state_dict()
    found = read(saved_by_core(model, tmp_path / "saved.safetensors"))
    assert ours.keys() <= found.keys() and not set(found) - ours.keys() - {"stillmotion.video_unet", *video_unet.MARKS}
    assert all(torch.equal(found[key], value) for key, value in ours.items())
