"""Load Causal Wan: layouts, weights, kinds, sizes, LoRA; every key accounted for."""

import gzip
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from stillmotion.nodes.causal_wan import checkpoint as loader
from stillmotion.nodes.causal_wan import nodes
from stillmotion.nodes.causal_wan.attention import torch_attention
from stillmotion.nodes.causal_wan.lora import add_lora
from stillmotion.nodes.causal_wan.model import CausalWan, WanParams
from stillmotion.nodes.common.files import Checkpoint, read_checkpoint

MANIFESTS = json.loads(gzip.decompress((Path(__file__).parents[1] / "cases" / "manifests.json.gz").read_bytes()))
HEADER = {"config": json.dumps({"num_heads": 4, "scale_factor": 0.5, "transformer": {"causal_ar": True}})}
NETWORK = {"in_dim": 16, "out_dim": 16, "dim": 48, "ffn_dim": 80, "num_heads": 4, "num_layers": 2, "text_dim": 24,
           "freq_dim": 32, "i2v": False, "clip_dim": 0}
SIZES = {"t2v": WanParams(**NETWORK),
         "i2v": WanParams(**NETWORK | {"in_dim": 36, "i2v": True, "clip_dim": 20}),
         "small": WanParams(**NETWORK | {"in_dim": 12, "out_dim": 4, "i2v": True, "clip_dim": 20})}


@pytest.fixture(autouse=True)
def as_in_the_host():
    with torch.inference_mode():
        yield


def tensors(kind="t2v", seed=0):
    """Random weights of a tiny model in native keys."""
    return dict(_tensors(kind, seed))


@cache
def _tensors(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    network = CausalWan(SIZES[kind], torch.nn, torch_attention, device="meta").state_dict()
    return {key: torch.randn(value.shape, generator=generator) * 0.1 for key, value in network.items()}


def load(found, metadata=HEADER, path="causal.safetensors", **options):
    return loader.load(Checkpoint(path, dict(found), metadata), **options)


def weights_of(model):
    return model.model.diffusion_model.state_dict()


def same(model, expected):
    found = weights_of(model)
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def prefixed(prefix, found):
    return {prefix + key: value for key, value in found.items()}


def wrapped(found):
    """As a network that was compiled, sharded block by block, with activation checkpoints, saves itself."""
    return {"model._fsdp_wrapped_module._orig_mod." + key.replace(
        "blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."): value
        for key, value in found.items()}


# Layouts

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


ORIGINALS = {  # top level of the file -> which set each choice takes
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
        checkpoint = Checkpoint(found.path, found.tensors, HEADER)  # so small a model needs its heads named
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


def test_what_cores_model_save_writes_loads_again():
    saved = load(tensors("i2v"), weight_dtype="fp32").model.state_dict_for_saving()
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


# Every key

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
    assert "whole" in str(refused.value) or "get it whole" in str(refused.value)
    with pytest.raises(ValueError, match=rf"{key} is \[.*, 1\]"):
        load(without | {key: found[key][..., None]})


@pytest.mark.parametrize("key", ["blocks.0.self_attn.q.other", "extra.weight", "blocks.1.norm4.weight"])
def test_one_extra(key):
    with pytest.raises(ValueError, match=rf"1 not known: {key}\."):
        load(tensors() | {key: torch.ones(2)})


# Refusals

def shaped(in_dim, out_dim, dim=48, image=False):
    """Keys of a Wan with other channels (weights on the meta device)."""
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
    (lambda: tensors() | {"scaled_fp8": torch.ones(0)}, "scale factors .scaled_fp8.*Use"),
    (lambda: {"blocks.0.attn1.to_q.weight": torch.ones(1), "condition_embedder.x": torch.ones(1)}, "of diffusers.*Use"),
    (lambda: {"base_model.model.blocks.0.self_attn.q.lora_A.weight": torch.ones(1)}, "a LoRA. Choose it under lora"),
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
    ("{", "not JSON"), ("[1]", "no JSON object"), ('{"transformer": 1}', "no JSON object"),
    ('{"num_heads": 0}', "0 as num_heads"), ('{"num_heads": "4"}', "'4' as num_heads"),
    ('{"num_heads": 5}', "5 heads do not share the width 48"), ("{}", "48 wide.*no multiple of 128.*header"),
])
def test_bad_header(config, words):
    with pytest.raises(ValueError, match=words):
        load(tensors(), {"config": config})


def test_heads_in_the_transformer_entry():
    assert load(tensors(), {"config": '{"transformer": {"num_heads": 2}}'}).model.wan_params.num_heads == 2


def test_options_are_checked():
    for options, words in (({"weights": "best"}, "'best' is unknown: choose one of auto, ema, raw"),
                           ({"weight_dtype": "int4"}, "'int4' is unknown.*fp8_e4m3fn")):
        with pytest.raises(ValueError, match=words):
            load(tensors(), **options)


@pytest.mark.parametrize("path, config, prefix, warned", [
    ("wan2.1_t2v_1.3B_fp16.safetensors", {"num_heads": 4}, "", True),
    ("wan2.1_t2v_1.3B_fp16.safetensors", {"num_heads": 4, "transformer": {"causal_ar": True}}, "", False),
    ("models/Self-Forcing/dmd.pt", {"num_heads": 4}, "", False),
    ("wan_ar_1.3B.safetensors", {"num_heads": 4}, "", False),
    ("warp.safetensors", {"num_heads": 4}, "", True),
    ("a.pt", {"num_heads": 4}, "generator.", False),
])
def test_bidirectional_weights_are_warned_of(path, config, prefix, warned, caplog):
    load(prefixed(prefix, tensors()), {"config": json.dumps(config)}, path)
    assert ("does not say that it is causal" in caplog.text) == warned


# Types

def run(model, kind="t2v"):
    """The loaded MODEL's x0 for a fixed input, by the way of core's samplers."""
    generator = torch.Generator().manual_seed(9)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    params = SIZES[kind]
    image = {"clip_fea": noise(1, 5, params.clip_dim)} if params.i2v else {}
    y = noise(1, params.in_dim - params.out_dim, 3, 4, 6) if params.i2v else None
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    return model.model.apply_model(noise(1, params.out_dim, 3, 4, 6), torch.tensor([0.7]), c_concat=y,
                                   c_crossattn=noise(1, 7, params.text_dim), **image)


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weight_types(name, dtype, stored):
    model = load({key: value.to(stored) for key, value in tensors().items()}, weight_dtype=name)
    assert {value.dtype for value in weights_of(model).values()} == {dtype}
    assert model.model.get_dtype() == dtype


def test_auto_follows_the_host():
    expected = comfy.model_management.unet_dtype(model_params=1, weight_dtype=torch.float32)
    assert load(tensors()).model.get_dtype() == expected


@pytest.mark.parametrize("kind", SIZES)
def test_eight_bits_for_matrices_only(kind):
    exact, small = load(tensors(kind), weight_dtype="fp32"), load(tensors(kind), weight_dtype="fp8_e4m3fn")
    for key, value in weights_of(small).items():
        assert value.dtype == (torch.float8_e4m3fn if value.ndim == 2 else torch.bfloat16), key
    difference = ((run(small, kind) - run(exact, kind)).norm() / run(exact, kind).norm()).item()
    assert 0 < difference < 0.1


def test_the_network_answers_as_the_plain_one():
    """Through the host's attention and layers, for core's samplers: x0 = x - sigma * flow, all frames seen."""
    for kind, params in SIZES.items():
        plain = CausalWan(params, torch.nn, torch_attention)
        plain.load_state_dict(tensors(kind))
        generator = torch.Generator().manual_seed(9)
        tokens = torch.randn(1, 5, params.clip_dim, generator=generator) if params.i2v else None
        y = torch.randn(1, params.in_dim - params.out_dim, 3, 4, 6, generator=generator)
        x = torch.randn(1, params.out_dim, 3, 4, 6, generator=generator)
        text = torch.randn(1, 7, params.text_dim, generator=generator)
        flow = plain(torch.cat((x, y), dim=1), torch.full((1, 3), 700.0), plain.project_context(text, tokens),
                     range(3))
        found = run(load(tensors(kind), weight_dtype="fp32"), kind)
        assert torch.allclose(found, x - 0.7 * flow, atol=1e-5)


# Conditioning

def conditioning(**changes):
    tower = SimpleNamespace(penultimate_hidden_states=torch.ones(1, 5, 20))
    mask = torch.ones(1, 1, 3, 4, 6)
    mask[:, :, :1] = 0
    return {"noise": torch.zeros(1, 16, 3, 4, 6), "device": torch.device("cpu"), "cross_attn": torch.ones(1, 7, 24),
            "concat_latent_image": torch.zeros(1, 16, 3, 4, 6), "concat_mask": mask,
            "clip_vision_output": tower} | changes


def test_the_image_condition():
    """Four channels that are 1 where a frame is given, then the latent as the network knows it."""
    model = load(tensors("i2v")).model
    found = model.extra_conds(**conditioning())
    y = found["c_concat"].cond
    assert y.shape == (1, 20, 3, 4, 6)
    assert (y[:, :4, 0] == 1).all() and (y[:, :4, 1:] == 0).all()
    assert torch.equal(y[:, 4:], model.process_latent_in(torch.zeros(1, 16, 3, 4, 6)))
    assert found["clip_fea"].cond.shape == (1, 5, 20) and found["c_crossattn"].cond.shape == (1, 7, 24)
    four = torch.cat([conditioning()["concat_mask"]] * 4, dim=1)
    assert torch.equal(model.extra_conds(**conditioning(concat_mask=four))["c_concat"].cond, y)
    assert "c_concat" not in load(tensors()).model.extra_conds(**conditioning())


@pytest.mark.parametrize("changes, words", [
    ({"clip_vision_output": None}, "needs image tokens"),
    ({"concat_latent_image": None}, "needs a masked image latent"),
    ({"concat_mask": None}, "needs a masked image latent"),
    ({"concat_latent_image": torch.zeros(1, 16, 5, 4, 6)}, "latent is 3 x 4 x 6, the conditioning .* 5 x 4 x 6"),
    ({"concat_mask": torch.zeros(1, 1, 3, 4, 8)}, "3 x 4 x 8"),
    ({"concat_latent_image": torch.zeros(1, 4, 3, 4, 6)}, "has 4 channels, this model takes 16"),
    ({"cross_attn": torch.ones(1, 7, 32)}, "text encoder gives tokens 32 wide.*24"),
    ({"clip_vision_output": SimpleNamespace(penultimate_hidden_states=torch.ones(1, 5, 32))}, "vision tower .* 32"),
])
def test_bad_conditioning(changes, words):
    with pytest.raises(ValueError, match=words):
        load(tensors("i2v")).model.extra_conds(**conditioning(**changes))


# Full size, from the lists of keys and shapes of the published models.

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


# LoRA

LAYERS = [f"blocks.{block}.{layer}" for block in range(2) for layer in
          ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v",
           "cross_attn.o", "ffn.0", "ffn.2")]


def lora_halves(rank=3, seed=5):
    generator = torch.Generator().manual_seed(seed)
    found = tensors()
    return {layer: (torch.randn(rank, found[f"{layer}.weight"].shape[1], generator=generator),
                    torch.randn(found[f"{layer}.weight"].shape[0], rank, generator=generator)) for layer in LAYERS}


def named(prefix, down="lora_A.weight", up="lora_B.weight", replace=(".", ".")):
    return {f"{prefix}{layer.replace(*replace)}.{name}": value for layer, pair in lora_halves().items()
            for name, value in zip((down, up), pair)}


LORAS = {
    "longlive": lambda: {"generator_lora": named("base_model.model."),
                         "critic_lora": {"base_model.model.x.lora_A.weight": torch.ones(1, 1)}, "step": 3},
    "flat": lambda: named("base_model.model."),
    "peft-of-wrapper": lambda: named("base_model.model.model."),
    "peft-in-training": lambda: named("base_model.model.", "lora_A.default.weight", "lora_B.default.weight"),
    "fsdp": lambda: {"generator_lora": {key.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): value
                                        for key, value in named("base_model.model.").items()}},
    "bare": lambda: named(""),
    "core": lambda: named("diffusion_model."),
    "kohya": lambda: named("lora_unet_", "lora_down.weight", "lora_up.weight", (".", "_")),
}


def merged(strength):
    """The weights with B @ A added by hand."""
    found = tensors()
    for layer, (down, up) in lora_halves().items():
        found[f"{layer}.weight"] = found[f"{layer}.weight"] + strength * (up @ down)
    return found


@pytest.mark.parametrize("name", LORAS)
def test_lora_equals_merging_by_hand(tmp_path, name, caplog):
    torch.save(LORAS[name](), tmp_path / "lora.pt")
    base = load(tensors(), weight_dtype="fp32")
    with caplog.at_level("INFO"):
        patched = add_lora(base, read_checkpoint(tmp_path / "lora.pt"), 0.7)
    assert "LoRA of 40 keys on 20 weights" in caplog.text and "left aside" not in caplog.text
    by_hand = run(load(merged(0.7), weight_dtype="fp32"))
    plain = run(base)
    found = run(patched)
    assert (found - by_hand).norm() / by_hand.norm() < 1e-4 < (found - plain).norm() / plain.norm()
    for key, value in weights_of(patched).items():
        assert torch.allclose(value, merged(0.7)[key], atol=1e-5), key
    assert torch.equal(run(base), plain) and same(base, tensors())


def test_alpha_of_a_lora_for_core():
    found = named("diffusion_model.") | {f"diffusion_model.{layer}.alpha": torch.tensor(6.0) for layer in LAYERS}
    patched = add_lora(load(tensors(), weight_dtype="fp32"), Checkpoint("lora.safetensors", found, {}))
    run(patched)
    assert torch.allclose(weights_of(patched)["blocks.0.ffn.0.weight"], merged(2.0)["blocks.0.ffn.0.weight"], atol=1e-5)


def test_lora_that_does_not_fit(caplog):
    base = load(tensors(), weight_dtype="fp32")

    def add(found):
        return add_lora(base, Checkpoint("lora.pt", found, {}))

    with pytest.raises(ValueError, match="none of its 2 keys is a LoRA for this model.*Choose a LoRA for Wan 2.1"):
        add({f"base_model.model.double_blocks.0.img_attn.qkv.{half}.weight": torch.ones(2, 2)
             for half in ("lora_A", "lora_B")})
    with pytest.raises(ValueError, match="none of its 1 keys"):
        add({"blocks.0.ffn.0.weight": torch.ones(80, 48)})
    with pytest.raises(ValueError, match="1 matrices of the LoRA lack their other half: .*ffn.0.lora_B"):
        add({key: value for key, value in named("").items() if key != "blocks.0.ffn.0.lora_A.weight"})
    with pytest.raises(ValueError, match=r"of another size: .*ffn.0.weight is \[80, 48\] here, \[160, 48\] in"):
        add(named("") | {"blocks.0.ffn.0.lora_B.weight": torch.ones(160, 3)})
    assert not base.patches
    add(named("") | {"blocks.7.ffn.0.lora_A.weight": torch.ones(3, 48),
                     "blocks.7.ffn.0.lora_B.weight": torch.ones(80, 3)})
    assert "2 of 42 keys match nothing in this model" in caplog.text


# The node

@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Model folders of their own."""
    for folder in ("diffusion_models", "checkpoints", "loras"):
        (tmp_path / folder).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder,
                            ([str(tmp_path / folder)], folder_paths.supported_pt_extensions))
    folder_paths.filename_list_cache.clear()
    yield tmp_path
    folder_paths.filename_list_cache.clear()


def test_the_node_loads_from_both_folders_with_a_lora(folders):
    save_file(tensors(), folders / "diffusion_models" / "causal.safetensors", metadata=HEADER)
    save_file(tensors(seed=1), folders / "checkpoints" / "causal2.safetensors", metadata=HEADER)
    torch.save(LORAS["longlive"](), folders / "loras" / "lora.pt")
    options = {part.id: part.options for part in nodes.LoadCausalWan.define_schema().inputs if hasattr(part, "options")}
    assert options["checkpoint"] == ["demo", "causal.safetensors", "causal2.safetensors"]
    assert options["lora"] == ["none", "lora.pt"] and options["weights"] == ["auto", "ema", "raw"]

    def execute(checkpoint="causal.safetensors", lora="none", strength=1.0):
        return nodes.LoadCausalWan.execute(checkpoint, "auto", lora, strength, "fp32")[0]

    assert same(execute(), tensors()) and same(execute("causal2.safetensors"), tensors(seed=1))
    patched = execute(lora="lora.pt", strength=0.7)
    by_hand = run(load(merged(0.7), weight_dtype="fp32"))
    assert (run(patched) - by_hand).norm() / by_hand.norm() < 1e-4
    for given, words in (({"checkpoint": "other.pt"}, "no file 'other.pt' in models/diffusion_models or models/check"),
                         ({"lora": "demo"}, "no file 'demo' in models/loras. Files there: lora.pt")):
        with pytest.raises(ValueError, match=words):
            execute(**given)


def test_the_node_notices_a_changed_file(folders):
    path = folders / "diffusion_models" / "causal.safetensors"
    save_file(tensors(), path, metadata=HEADER)
    first = nodes.LoadCausalWan.fingerprint_inputs(checkpoint="causal.safetensors", lora="none")
    assert first == nodes.LoadCausalWan.fingerprint_inputs(checkpoint="causal.safetensors", lora="none")
    save_file(tensors() | {"more": torch.ones(1)}, path, metadata=HEADER)
    assert first != nodes.LoadCausalWan.fingerprint_inputs(checkpoint="causal.safetensors", lora="none")
    assert all(part.tooltip for part in (*nodes.LoadCausalWan.define_schema().inputs,
                                         *nodes.LoadCausalWan.define_schema().outputs))
