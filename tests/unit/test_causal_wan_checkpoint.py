"""Load Causal Wan: layouts, weights, kinds, sizes; every key accounted for."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from causal_wan_stub import HEADER, NETWORK, SIZES, load, prefixed, same, tensors, weights_of
from core_calls import saved_by_core
from safetensors.torch import save_file
from stillmotion.nodes.causal_wan import checkpoint as loader
from stillmotion.nodes.causal_wan.model import CausalWan, WanParams
from stillmotion.nodes.common.attention import torch_attention
from stillmotion.nodes.common.files import Checkpoint, read_checkpoint

MANIFESTS = json.loads(gzip.decompress((Path(__file__).parents[1] / "cases" / "manifests.json.gz").read_bytes()))


def wrapped(found):
    """Keys as saved from a network that is compiled, sharded per block and uses activation checkpointing."""
    return {"model._fsdp_wrapped_module._orig_mod." + key.replace(
        "blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."): value
        for key, value in found.items()}


@pytest.mark.parametrize("kind", SIZES)
def test_sizes_are_read_and_every_weight_arrives(kind, caplog):
    found = tensors(kind)
    with caplog.at_level("INFO"):
        model = load(found, weight_dtype="fp32")
    assert model.model.wan_params == SIZES[kind] and same(model, found)
    assert f"{len(found)} of {len(found)} keys found" in caplog.text
    latent = model.model.latent_format
    assert (latent.latent_channels, latent.latent_dimensions) == (SIZES[kind].out_dim, 3)
    if kind == "small":
        assert torch.equal(model.model.process_latent_in(torch.ones(1, 4, 2, 2, 2)), torch.full((1, 4, 2, 2, 2), 0.5))


@pytest.mark.parametrize("rename", [
    lambda found: found,
    lambda found: prefixed("model.", found),
    lambda found: prefixed("diffusion_model.", found),
    lambda found: prefixed("model.diffusion_model.", found),
    lambda found: prefixed("module.model.", found),
    lambda found: prefixed("_orig_mod.module.", found),
    wrapped,
    lambda found: prefixed("model.diffusion_model.", found) | {"vae.encoder.conv1.weight": torch.ones(1),
                                                               "text_encoders.umt5xxl.logit": torch.ones(1)},
], ids=["native", "model", "diffusion_model", "core", "module", "compiled", "fsdp", "all-in-one"])
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_prefixes(kind, rename):
    assert same(load(rename(tensors(kind)), weight_dtype="fp32"), tensors(kind))


ORIGINALS = {  # top level of the file -> the set that each choice selects
    "self-forcing": (lambda raw, ema: {"generator": prefixed("model.", raw), "generator_ema": prefixed("model.", ema),
                                       "critic": prefixed("model.", raw)}, "ema", ("raw", "ema")),
    "causal-forcing": (lambda raw, ema: {"generator": prefixed("model.", raw), "generator_ema": wrapped(ema)},
                       "ema", ("raw", "ema")),
    "longlive_base": (lambda raw, ema: {"generator": prefixed("model.", raw), "step": 7}, "raw", ("raw",)),
    "model": (lambda raw, ema: {"model": prefixed("model.", raw)}, "raw", ("raw",)),
    "model-flat": (lambda raw, ema: {"model": raw, "optimizer": {"state": {}}}, "raw", ("raw",)),
    "state_dict": (lambda raw, ema: {"state_dict": prefixed("model.", raw)}, "raw", ("raw",)),
    "ema-only": (lambda raw, ema: {"generator_ema": wrapped(ema)}, "ema", ("ema",)),
    "flat": (lambda raw, ema: prefixed("model.", raw), "raw", ("raw",)),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_original_files(tmp_path, name):
    layout, default, held = ORIGINALS[name]
    sets = {"raw": tensors(seed=1), "ema": tensors(seed=2)}
    torch.save(layout(sets["raw"], sets["ema"]), tmp_path / "causal.pt")
    for choice in ("auto", "raw", "ema"):
        found = read_checkpoint(tmp_path / "causal.pt")
        checkpoint = Checkpoint(found.path, found.tensors, HEADER)  # the header sets the number of heads
        if choice != "auto" and choice not in held:
            with pytest.raises(ValueError, match=f"holds no {choice} weights, only {held[0]}. Choose {held[0]}"):
                loader.load(checkpoint, choice)
        else:
            expected = sets[default if choice == "auto" else choice]
            assert same(loader.load(checkpoint, choice, "fp32"), expected), choice
            assert not checkpoint.tensors


def test_the_same_layouts_as_safetensors(tmp_path):
    raw, ema = tensors(seed=1), tensors(seed=2)
    save_file(prefixed("generator.model.", raw) | prefixed("generator_ema.model.", ema), tmp_path / "a.safetensors",
              metadata=HEADER)
    assert same(loader.load(read_checkpoint(tmp_path / "a.safetensors"), "raw", "fp32"), raw)
    save_file(raw, tmp_path / "b.safetensors", metadata=HEADER)
    assert same(loader.load(read_checkpoint(tmp_path / "b.safetensors"), weight_dtype="fp32"), raw)


@pytest.mark.parametrize("path, expected", [
    ("models/diffusion_models/self_forcing_dmd.pt", "ema"),
    ("Causal-Forcing/framewise/causal_forcing.pt", "ema"),
    ("Causal-Forcing/chunkwise/causal_forcing.pt", "raw"),
    ("Causal-Forcing/chunkwise/longvideo.pt", "ema"),
    ("causal-forcing++/framewise-2step.pt", "ema"),
])
def test_published_choice(path, expected):
    assert loader.published_choice(path) == expected


@pytest.mark.parametrize("path, warned", [("causal_forcing.pt", True), ("chunkwise/causal_forcing.pt", False)])
def test_causal_forcing_that_does_not_name_its_kind_is_asked_for_it(path, warned, caplog):
    both = prefixed("generator.", tensors()) | prefixed("generator_ema.", tensors())
    loader.pick(Checkpoint(path, both, {}))
    assert ("Choose raw for chunk-wise" in caplog.text) == warned


def test_what_cores_model_save_writes_loads_again(tmp_path):
    saved = saved_by_core(load(tensors("i2v"), weight_dtype="fp32"), tmp_path / "saved.safetensors")
    assert "model.diffusion_model.head.modulation" in saved
    assert same(load(saved, weight_dtype="fp32"), tensors("i2v"))


def test_nothing_is_copied():
    found = tensors()
    address = found["blocks.0.ffn.0.weight"].data_ptr()
    assert weights_of(load(found, weight_dtype="fp32"))["blocks.0.ffn.0.weight"].data_ptr() == address


def test_a_name_that_falls_together_with_another():
    found = tensors() | {"module.head.modulation": torch.ones(1, 2, 48)}
    with pytest.raises(ValueError, match="1 keys name the same weights twice"):
        load(found)


KEYS = ["patch_embedding.weight", "head.modulation", "head.head.weight", "blocks.0.ffn.0.weight", "blocks.1.modulation",
        "text_embedding.0.weight", "time_embedding.0.weight", "time_projection.1.bias", "img_emb.proj.1.weight",
        "img_emb.proj.0.bias", "blocks.1.cross_attn.k_img.weight", "blocks.0.cross_attn.norm_k_img.weight",
        "blocks.1.self_attn.norm_q.weight", "blocks.0.norm3.bias"]


@pytest.mark.parametrize("key", KEYS)
def test_one_missing_one_misshapen(key):
    found = tensors("i2v")
    without = {name: value for name, value in found.items() if name != key}
    with pytest.raises(ValueError, match=rf"(1 missing: |lacks |read, ){key}") as refused:
        load(without)
    assert "complete" in str(refused.value)
    with pytest.raises(ValueError, match=rf"{key} is \[.*, 1\]"):
        load(without | {key: found[key][..., None]})


@pytest.mark.parametrize("key", ["blocks.0.self_attn.q.other", "extra.weight", "blocks.1.norm4.weight"])
def test_one_extra(key):
    with pytest.raises(ValueError, match=rf"1 not known: {key}\."):
        load(tensors() | {key: torch.ones(2)})


@pytest.mark.parametrize("key", ["blocks.999999.norm3.weight", "blocks.3.norm3.weight", "blocks.02.norm3.weight",
                                 f"blocks.{'9' * 5000}.x", "blocks.x.norm3.weight"])
def test_no_key_asks_for_layers_that_are_not_there(key):
    with pytest.raises(ValueError, match=r"layers are numbered from 0 without a gap.*The file has 3, among them b"):
        load(tensors() | {key: torch.zeros(1)})
    with pytest.raises(ValueError, match="256 at most. The file has 1000"):
        load(tensors() | {f"blocks.{layer}.norm3.weight": torch.zeros(1) for layer in range(1000)})


@pytest.mark.parametrize("shape", [(0, 16, 1, 2, 2), (48, 0, 1, 2, 2), (10 ** 9, 0, 1, 2, 2)])
def test_sizes_that_no_network_has(shape):
    with pytest.raises(ValueError, match="an axis of patch_embedding.weight is .*from 1 to 65536"):
        load(tensors() | {"patch_embedding.weight": torch.zeros(shape)})


@pytest.mark.parametrize("dtype, word", [(torch.bool, "bool"), (torch.int64, "int64"), (torch.complex64, "complex64")])
def test_weights_that_are_no_floating_point_numbers(dtype, word):
    key = "blocks.0.self_attn.q.bias"
    with pytest.raises(ValueError, match=f"{key} is {word}.*Allowed are floating-point"):
        load(tensors() | {key: tensors()[key].to(dtype)})


def shaped(in_dim, out_dim, dim=48, image=False):
    """Keys of a Wan with other channel counts (weights on the meta device)."""
    params = WanParams(**NETWORK | {"in_dim": in_dim, "out_dim": out_dim, "dim": dim, "i2v": image,
                                    "clip_dim": 20 if image else 0})
    return CausalWan(params, torch.nn, torch_attention, device="meta").state_dict()


@pytest.mark.parametrize("found, words", [
    (lambda: shaped(48, 48), "TI2V-5B.*LongLive 2.0.*Use a causal Wan 2.1"),
    (lambda: shaped(48, 16, image=True), "Fun-Control.*Use a causal Wan 2.1"),
    (lambda: shaped(36, 16), "I2V-A14B.*Use a causal Wan 2.1"),
    (lambda: shaped(16, 16, image=True), "16 channels in, 16 out, with image tokens, fits no known Wan"),
    (lambda: shaped(8, 8), "8 channels in, 8 out, without image tokens, fits no known Wan"),
    (lambda: tensors("i2v") | {"control_adapter.conv.weight": torch.ones(1)}, "Wan Camera Control.*Load Diffusion"),
    (lambda: tensors() | {"vace_patch_embedding.weight": torch.ones(1)}, "Wan VACE"),
    (lambda: tensors("i2v") | {"img_emb.emb_pos": torch.ones(1)}, "First-Last-Frame"),
    (lambda: tensors() | {"face_adapter.fuser_blocks.0.k_norm.weight": torch.ones(1)}, "Wan Animate"),
    (lambda: tensors() | {"blocks.0.ffn.0.weight": torch.zeros(80, 24, dtype=torch.uint8),
                          "blocks.0.ffn.0.weight_scale_2": torch.ones(())}, "packed 4-bit.*NVFP4.*Use the bf16"),
    (lambda: tensors() | {"blocks.0.ffn.0.weight": torch.zeros(80, 24, dtype=torch.uint8)}, "packed 4-bit"),
    (lambda: {"blocks.0.attn1.to_q.weight": torch.ones(1), "condition_embedder.x": torch.ones(1)}, "of diffusers.*Use"),
    (lambda: {"base_model.model.blocks.0.self_attn.q.lora_A.weight": torch.ones(1)}, "a LoRA. Choose it under lora"),
    (lambda: {"base_model.model.blocks.0.self_attn.q.base_layer.weight": torch.ones(1),
              "base_model.model.blocks.0.self_attn.q.lora_A.default.weight": torch.ones(1)}, "unmerged LoRA.*Use the"),
    (lambda: {"image_proj_model.latents": torch.ones(1)}, "DynamiCrafter. Use Load DynamiCrafter"),
    (lambda: {"decoder.middle.0.residual.0.gamma": torch.ones(1)}, "a Wan VAE. Use"),
    (lambda: {"token_embedding.weight": torch.ones(1)}, r"a text encoder \(UMT5\). Use"),
    (lambda: {"double_blocks.0.img_attn.qkv.weight": torch.ones(1)}, "Flux. Use"),
    (lambda: {"something.weight": torch.ones(1)}, r"lacks patch_embedding.weight and head.modulation.*something"),
    (lambda: {"vae.x": torch.ones(1)}, "lacks patch_embedding.weight"),
])
def test_other_models(found, words):
    with pytest.raises(ValueError, match=words):
        load(found())


@pytest.mark.parametrize("in_dim, out_dim, dim, layers, words", [
    (48, 48, 3072, 30, "TI2V-5B"), (36, 16, 5120, 40, "I2V-A14B")])
def test_other_models_in_full_size(in_dim, out_dim, dim, layers, words):
    params = WanParams(in_dim=in_dim, out_dim=out_dim, dim=dim, ffn_dim=64, num_heads=dim // 128, num_layers=layers,
                       text_dim=4096, freq_dim=256, i2v=False, clip_dim=0)
    found = CausalWan(params, torch.nn, torch_attention, device="meta").state_dict()
    with pytest.raises(ValueError, match=words):
        load(prefixed("generator.model.", found), {})


@pytest.mark.parametrize("config, words", [
    ("{", "not JSON"), ("[1]", "not a JSON object"), ('{"transformer": 1}', "not a JSON object"),
    ('{"num_heads": 0}', "num_heads .* is 0.*1 to 1024"), ('{"num_heads": "4"}', "num_heads .* is '4'"),
    ('{"num_heads": true}', "num_heads .* is True"), ('{"scale_factor": 0}', "scale_factor .* is 0.*above 0"),
    ('{"scale_factor": NaN}', "scale_factor .* is nan"), ('{"transformer": {"causal_ar": 1}}', "causal_ar .* is 1"),
    ('{"encoders": 96}', "encoders .* is 96.*name of a demo"),
    ('[' * 100_000, "not JSON"),
    ('{"num_heads": 5}', "num_heads is 5, which does not divide the width 48"),
    ("{}", "48 wide.*no multiple of 128.*header"),
])
def test_bad_header(config, words):
    with pytest.raises(ValueError, match=words):
        load(tensors(), {"config": config})


def test_heads_in_the_transformer_entry():
    assert load(tensors(), {"config": '{"transformer": {"num_heads": 2}}'}).model.wan_params.num_heads == 2


def test_options_are_checked():
    for options, words in (({"weights": "best"}, "weights is 'best'. Choose one of auto, ema, raw"),
                           ({"weight_dtype": "int4"}, "weight_dtype is 'int4'.*fp8_e4m3fn")):
        with pytest.raises(ValueError, match=words):
            load(tensors(), **options)


@pytest.mark.parametrize("path, config, prefix, warned", [
    ("wan2.1_t2v_1.3B_fp16.safetensors", {"num_heads": 4}, "", True),
    ("wan2.1_t2v_1.3B_fp16.safetensors", {"num_heads": 4, "transformer": {"causal_ar": True}}, "", False),
    ("models/Self-Forcing/dmd.pt", {"num_heads": 4}, "", False),
    ("wan_ar_1.3B.safetensors", {"num_heads": 4}, "", False),
    ("one_forcing.pt", {"num_heads": 4}, "", False),
    ("raven_model.pt", {"num_heads": 4}, "", False),
    ("warp.safetensors", {"num_heads": 4}, "", True),
    ("a.pt", {"num_heads": 4}, "generator.", False),
])
def test_bidirectional_weights_are_warned_of(path, config, prefix, warned, caplog):
    load(prefixed(prefix, tensors()), {"config": json.dumps(config)}, path)
    assert ("does not say that it is causal" in caplog.text) == warned


# Full size, from the key and shape lists of the published models.

@pytest.mark.parametrize("name, dim, heads, layers, i2v", [
    ("wan21_t2v_1_3b", 1536, 12, 30, False), ("wan21_i2v_1_3b", 1536, 12, 30, True),
    ("wan21_i2v_14b", 5120, 40, 40, True)])
def test_full_size(name, dim, heads, layers, i2v):
    found = {key: torch.empty(shape, device="meta", dtype=torch.bfloat16) for key, shape in MANIFESTS[name].items()}
    numbers = sum(value.numel() for value in found.values())
    model = load(prefixed("generator_ema.model._fsdp_wrapped_module.", found), {}, weight_dtype="bf16")
    params = model.model.wan_params
    assert (params.dim, params.num_heads, params.num_layers, params.i2v) == (dim, heads, layers, i2v)
    assert (params.text_dim, params.freq_dim, params.clip_dim) == (4096, 256, 1280 if i2v else 0)
    values = weights_of(model).values()
    assert sum(value.numel() for value in values) == numbers
    assert {value.device.type for value in values} == {"meta"}


def test_full_size_missing_key_is_named():
    found = {key: torch.empty(shape, device="meta") for key, shape in MANIFESTS["wan21_i2v_14b"].items()}
    found.pop("blocks.39.cross_attn.v_img.bias")
    with pytest.raises(ValueError, match="1 missing: blocks.39.cross_attn.v_img.bias"):
        load(found, {})
