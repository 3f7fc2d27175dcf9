"""Load DynamiCrafter: layouts, variants, sizes, families; every key accounted for."""

import gzip
import json
from pathlib import Path

import pytest
import torch
import yaml
from core_calls import saved_by_core
from dynamicrafter_stub import HEADER, OPEN_CLIP, tensors, tiny
from safetensors.torch import save_file
from stillmotion.nodes.common.files import Checkpoint, read_checkpoint
from stillmotion.nodes.dynamicrafter import checkpoint as loader
from stillmotion.nodes.dynamicrafter.config import parse, published, read_yaml

MANIFESTS = json.loads(gzip.decompress((Path(__file__).parents[1] / "cases" / "manifests.json.gz").read_bytes()))
TOWERS = ("cond_stage_model.", "embedder.")


def load(found, **options):
    header = HEADER | {"stillmotion.config": json.dumps(tiny())}
    return loader.load(Checkpoint("model.ckpt", dict(found), header), **options)


def weights_of(loaded):
    return loaded.model.model.diffusion_model.state_dict()


def test_every_weight_arrives():
    found = tensors()
    loaded = load(found, weight_dtype="fp32")
    for key, value in weights_of(loaded).items():
        name = key if key.startswith("image_proj_model.") else f"model.diffusion_model.{key}"
        assert torch.equal(value, found[name]), key
    for key, value in loaded.vae.get_sd().items():
        assert torch.equal(value, found[f"first_stage_model.{key}"]), key
    text = loaded.clip.cond_stage_model.clip_h.transformer.text_model
    assert torch.equal(text.embeddings.token_embedding.weight, found["cond_stage_model.model.token_embedding.weight"])
    assert loaded.clip_vision.model.vision_model.embeddings.position_embedding.weight.shape == (5, 24)
    assert loaded.clip.encode("a red circle").shape == (1, 77, 16)


@pytest.mark.parametrize("variant, size", [("256", (256, 256)), ("512", (512, 320)), ("512_interp", (512, 320)),
                                           ("1024", (1024, 576))])
def test_the_published_models_know_their_size_and_strength(variant, size):
    config = parse(published(variant), "")
    assert config.size == size and (config.diffusion.steps, config.diffusion.cfg) == (50, 7.5)
    changed = published(variant)
    changed["model"]["params"]["image_size"] = [8, 8, 8]
    with pytest.raises(ValueError, match="image_size is .8, 8, 8.. It must be height and width"):
        parse(changed, "x.yaml")


def test_nothing_is_copied():
    """Weights that already have the right dtype are not copied, so that a memory-mapped file is not held twice."""
    found = tensors()
    key = "model.diffusion_model.input_blocks.0.0.weight"
    address = found[key].data_ptr()
    assert weights_of(load(found, weight_dtype="fp32"))["input_blocks.0.0.weight"].data_ptr() == address


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weight_types(name, dtype, stored):
    loaded = load({key: value.to(stored) for key, value in tensors().items()}, weight_dtype=name)
    assert {value.dtype for value in weights_of(loaded).values()} == {dtype}
    assert loaded.clip.cond_stage_model.clip_h.transformer.dtype == loaded.clip_vision.dtype == dtype


def run(loaded):
    """The loaded MODEL's output for a fixed input."""
    model = loaded.model.model
    generator = torch.Generator().manual_seed(9)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    with torch.inference_mode():
        return model.apply_model(noise(1, 4, 4, 8, 8), torch.tensor([2.0]), c_concat=noise(1, 4, 4, 8, 8),
                                 c_crossattn=noise(1, 77, 16), image_tokens=noise(1, 5, 24),
                                 frame_stride=torch.tensor([3]))


def test_eight_bits():
    exact, small = load(tensors(), weight_dtype="fp32"), load(tensors(), weight_dtype="fp8_e4m3fn")
    types = {value.dtype for value in weights_of(small).values()}
    assert types == {torch.float8_e4m3fn, torch.bfloat16}
    difference = ((run(small) - run(exact)).norm() / run(exact).norm()).item()
    assert 0 < difference < 0.1


@pytest.mark.parametrize("variant", ["256", "512", "512_interp", "1024"])
def test_a_file_of_every_layout(tmp_path, variant):
    """The same weights as a pickle, safetensors or DeepSpeed file, with YAML or header, give the same MODEL."""
    found = tensors(variant)
    if variant == "256":
        found = {key.replace("fps_embedding", "framestride_embed"): value for key, value in found.items()}
        assert any("framestride_embed" in key for key in found)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(tiny(variant)))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    torch.save({"state_dict": found, "global_step": 1}, tmp_path / "a.ckpt")
    torch.save({"module": {f"_forward_module.{key}": value for key, value in found.items()}}, tmp_path / "b.pt")
    save_file(found, tmp_path / "c.safetensors")
    header = HEADER | {"stillmotion.config": json.dumps(tiny(variant))}
    save_file(found, tmp_path / "d.safetensors", metadata=header)
    expected = weights = None
    for name in ("a.ckpt", "b.pt", "c.safetensors", "d.safetensors"):
        options = {} if name == "d.safetensors" else {"yaml_path": tmp_path / "model.yaml"}
        loaded = loader.load(read_checkpoint(tmp_path / name), weight_dtype="fp32", **options)
        assert None not in loaded
        assert loaded.model.model.diffusion_params == parse(tiny(variant), "").diffusion
        if expected is None:
            expected, weights = run(loaded), weights_of(loaded)
        assert all(torch.equal(value, weights[key]) for key, value in weights_of(loaded).items())
        # The alignment of memory-mapped weights depends on the file and changes the last bit.
        assert torch.allclose(run(loaded), expected, rtol=1e-4, atol=1e-5), name


PARTS = ["model.diffusion_model.out.2.bias", "image_proj_model.latents", "first_stage_model.quant_conv.weight",
         "cond_stage_model.model.ln_final.weight", "embedder.model.visual.proj",
         "model.diffusion_model.fps_embedding.0.weight", "first_stage_model.decoder.conv_in.bias",
         "embedder.model.visual.transformer.resblocks.1.mlp.c_fc.bias"]


@pytest.mark.parametrize("key", PARTS)
def test_one_missing_one_extra_one_misshapen(key):
    found = tensors()
    load(found)
    for change, words in (
        ({}, rf"1 missing: {key}\."),
        ({key: found[key], f"{key}_copy": found[key]}, rf"1 not known: {key}_copy\."),
        ({key: found[key][..., None]}, rf"{key} is \[.*, 1\], expected \["),
    ):
        rest = {name: value for name, value in found.items() if name != key}
        with pytest.raises(ValueError, match=words) as refused:
            load(rest | change)
        assert "Get the complete file" in str(refused.value) and "YAML" in str(refused.value)


@pytest.mark.parametrize("key, value, words", [
    ("control_stage.weight", torch.ones(1), "1 not known: control_stage.weight"),
    ("embedder.model.other", torch.ones(1), "1 not known: embedder.model.other"),
    ("betas", torch.ones(500), r"betas is \[500\], expected \[1000\]"),
])
def test_keys_outside_the_parts(key, value, words):
    with pytest.raises(ValueError, match=words):
        load(tensors() | {key: value})


def test_known_and_unused_keys_may_be_there_or_not():
    found = tensors()
    reference = weights_of(load(found))
    training = {"model_ema.decay": torch.ones(()), "first_stage_model.loss.logvar": torch.ones(()),
                "model_ema.diffusion_modelout2bias": torch.ones(4)}
    less = {key: value for key, value in found.items() if key not in
            ("betas", "alphas_cumprod", "scale_arr", "embedder.model.positional_embedding",
             "embedder.model.logit_scale", "cond_stage_model.model.logit_scale")}
    for other in (found | training, less):
        again = weights_of(load(other))
        assert all(torch.equal(again[key], value) for key, value in reference.items())


def test_pruned_file_gives_model_and_vae():
    loaded = load({key: value for key, value in tensors().items() if not key.startswith(TOWERS)})
    assert loaded.clip is None and loaded.clip_vision is None
    assert loaded.model is not None and loaded.vae is not None


def test_what_cores_model_save_writes_loads_again(tmp_path):
    saved = saved_by_core(load(tensors()).model, tmp_path / "saved.safetensors") | {"ztsnr": torch.tensor([])}
    assert "v_pred" in saved
    again = load(dict(saved)).model.model.diffusion_model.state_dict()
    assert all(torch.equal(value, saved[key if key.startswith("image_proj_model.") else f"model.diffusion_model.{key}"])
               for key, value in again.items())


def test_options_are_checked():
    for options, words in (({"variant": "768"}, "'768' is unknown.*auto, 256"),
                           ({"weight_dtype": "int4"}, "weight_dtype is 'int4'.*fp8_e4m3fn")):
        with pytest.raises(ValueError, match=words):
            load(tensors(), **options)


# Full size, from the key and shape lists of the published files. Core copies the VAE, so it needs memory.

def full(variant, pruned=False):
    found = {key: torch.zeros(()).half().expand(shape) if key.startswith("first_stage_model.")
             else torch.empty(shape, device="meta", dtype=torch.float16)
             for key, shape in MANIFESTS[variant].items() if not (pruned and key.startswith(TOWERS))}
    if variant != "256":
        found["scale_arr"] = torch.linspace(1, {"512": 0.7, "1024": 0.3}[variant], 1400).half()
    else:
        found = {key.replace("fps_embedding", "framestride_embed"): value for key, value in found.items()}
    return Checkpoint("model.ckpt", found, {})


@pytest.mark.parametrize("variant, pruned", [("256", False), ("512", False), ("1024", False), ("1024", True)])
def test_full_size(variant, pruned):
    checkpoint = full(variant, pruned)
    loaded = loader.load(checkpoint, weight_dtype="fp16")
    assert not checkpoint.tensors
    values = weights_of(loaded).values()
    assert sum(value.numel() for value in values) == 1438854980 + 48787456 + (16 if variant == "256" else 0)
    assert {value.device.type for value in values} == {"meta"}  # no weight was copied
    params = loaded.model.model.diffusion_params
    assert (params.parameterization, params.base_scale) == {
        "256": ("eps", None), "512": ("v", 0.7), "1024": ("v", 0.3)}[variant]
    assert (loaded.clip is None) == (loaded.clip_vision is None) == pruned


def test_full_size_missing_key_of_256_is_named_as_in_the_file():
    checkpoint = full("256", pruned=True)
    checkpoint.tensors.pop("model.diffusion_model.framestride_embed.2.bias")
    with pytest.raises(ValueError, match="1 missing: model.diffusion_model.framestride_embed.2.bias"):
        loader.load(checkpoint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("end, expected", [(0.7, "512"), (0.3, "1024")])
def test_variant_from_scale_arr(dtype, end, expected):
    found = {"scale_arr": torch.linspace(1, end, 1400).to(dtype)}
    assert loader.detect_variant(found) == expected
    if expected == "512":
        assert loader.detect_variant(found, "512_interp") == "512_interp"
    with pytest.raises(ValueError, match=f"keys of this file say {expected}"):
        loader.detect_variant(found, "256")


def test_variant_from_other_keys():
    alpha = {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.alpha": torch.ones(())}
    assert loader.detect_variant(alpha) == "256"
    assert loader.detect_variant({"model.diffusion_model.framestride_embed.0.weight": torch.ones(1)}) == "256"
    with pytest.raises(ValueError, match="say 256"):
        loader.detect_variant(alpha, "512")
    with pytest.raises(ValueError, match="lacks scale_arr.*Choose the variant"):
        loader.detect_variant({})
    assert loader.detect_variant({}, "1024") == "1024"
    with pytest.raises(ValueError, match="ends at 0.5"):
        loader.detect_variant({"scale_arr": torch.linspace(1, 0.5, 1400)})
    with pytest.raises(ValueError, match=r"scale_arr is \[\], expected \[1400\]"):
        loader.detect_variant({"scale_arr": torch.ones(())})


def test_unknown_size_asks_for_the_yaml():
    with pytest.raises(ValueError, match="32 channels wide.*Give the YAML"):
        loader.load(Checkpoint("model.ckpt", tensors(), {}))


@pytest.mark.parametrize("keys, words", [
    (["first_stage_model.decoder.attn_refinement.0.to_q.weight", "model.diffusion_model.init_attn.0.norm.weight",
      "image_proj_model.latents"], "ToonCrafter: its decoder"),
    (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.final"],
     "Stable Diffusion 1.x"),
    (["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.transformer.x"], "SDXL"),
    (["model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight", "conditioner.embedders.0.x"],
     "Stable Video Diffusion"),
    (["blocks.0.cross_attn.norm_k.weight", "patch_embedding.weight"], "Wan"),
    (["model.diffusion_model.init_attn.0.norm.weight", "cond_stage_model.model.ln_final.weight"], "VideoCrafter"),
    (["lora_unet_x.lora_up.weight"], "a LoRA"),
    (["something.weight"], r"unknown \(something.weight"),
])
def test_other_families(keys, words):
    with pytest.raises(ValueError, match=words):
        loader.load(Checkpoint("model.safetensors", {key: torch.ones(1) for key in keys}, {}))


def test_cil_is_recognised_and_loads(caplog):
    checkpoint = full("512", pruned=True)
    cil = Checkpoint("dynamicrafter-CIL-512-no-watermark-pruned-fp16.safetensors", checkpoint.tensors, {})
    with caplog.at_level("INFO"):
        assert loader.load(cil).model is not None
    assert "CIL fine-tune" in caplog.text


@pytest.mark.parametrize("change, words", [
    (lambda p: p.pop("unet_config"), "has no section unet_config.params"),
    (lambda p: p["unet_config"]["params"].update(use_causal_attention=True), "use_causal_attention to True"),
    (lambda p: p["unet_config"]["params"].pop("model_channels"), r"missing entries: \['model_channels'\]"),
    (lambda p: p["unet_config"]["params"].update(flash=1), r"unknown entries: \['flash'\]"),
    (lambda p: p.update(timesteps=500), "only 1000 timesteps"),
    (lambda p: p.update(parameterization="x0"), "'x0' is unknown"),
    (lambda p: p.update(parameterization="eps"), "zero-terminal-SNR"),
    (lambda p: p["first_stage_config"]["params"].pop("ddconfig"), "has no section ddconfig"),
])
def test_bad_yaml(tmp_path, change, words):
    config = tiny()
    change(config["model"]["params"])
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=words):
        loader.load(Checkpoint("model.ckpt", tensors(), {}), yaml_path=path)
    for text, words in (("a: [1, 2", "not a YAML file"), ("- 1", "not a DynamiCrafter configuration")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            loader.load(Checkpoint("model.ckpt", tensors(), {}), yaml_path=path)


@pytest.mark.parametrize("part, entry, value, words", [
    ("", "scale_factor", 0, "scale_factor is 0.*above 0"), ("", "scale_factor", float("nan"), "scale_factor is nan"),
    ("", "use_dynamic_rescale", 1, "use_dynamic_rescale is 1.*true or false"),
    ("", "linear_end", "0.1x", "linear_end is '0.1x'"), ("", "unet_config", [1], "no section unet_config.params"),
    ("unet_config", "model_channels", 40, "model_channels is 40.*multiple of 32"),
    ("unet_config", "num_res_blocks", 1000, "num_res_blocks of unet_config is 1000"),
    ("unet_config", "channel_mult", 2, "channel_mult of unet_config is 2.*list"),
    ("unet_config", "in_channels", True, "in_channels of unet_config is True"),
    ("image_proj_stage_config", "depth", 1000, "depth of image_proj_stage_config is 1000"),
    ("first_stage_config", "embed_dim", "4", "embed_dim of the VAE is '4'"),
    ("first_stage_config", "ddconfig", 7, "no section ddconfig"),
    ("cond_stage_config", "arch", "../../etc/x", "arch.*letters, digits"),
    ("cond_stage_config", "layer", ["last"], "layer of the text tower is"),
])
def test_every_entry_of_a_yaml_is_checked(tmp_path, part, entry, value, words):
    config = tiny()
    params = config["model"]["params"]
    (params[part]["params"] if part else params)[entry] = value
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    with pytest.raises(ValueError, match=words):
        loader.load(Checkpoint("model.ckpt", tensors(), {}), yaml_path=tmp_path / "model.yaml")


@pytest.mark.parametrize("text", ["${oc.env:SM_SECRET}", "${oc.env:SM_SECRET,none}", "a ${oc.env:SM_SECRET}", "${b.c}",
                                  "${oc.decode:'${oc.env:SM_SECRET}'}", "${nope}", "${model}", "${${b.d}}", "${b.e}",
                                  "${oc.create:{x: 1}}", "${a"])
def test_a_yaml_resolves_nothing_but_plain_references(tmp_path, monkeypatch, text):
    monkeypatch.setenv("SM_SECRET", "hunter2")
    path = tmp_path / "model.yaml"
    path.write_text(f"model: {{params: {{timesteps: \"{text}\"}}}}\n"
                    "b: {c: '${oc.env:SM_SECRET}', d: b.c, e: [1]}\n")
    with pytest.raises(ValueError, match="is not resolved: only|is not a YAML") as refused:
        parse(read_yaml(path), "m.yaml")
    assert "hunter2" not in str(refused.value)


def test_plain_references_of_a_yaml(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("size: {width: 32, name: x}\na: ${size.width}\nb: [\"${size.name}\", 1e-4]\n")
    assert read_yaml(path) == {"size": {"width": 32, "name": "x"}, "a": 32, "b": ["x", 1e-4]}
    path.write_text("a: &a [1]\nb: [*a, *a]\n")
    with pytest.raises(ValueError, match="aliases.*Write them out"):
        read_yaml(path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_forward_module.module."])
def test_wrapped_files(tmp_path, prefix):
    found = tensors()
    torch.save({"model": {prefix + key: value for key, value in found.items()}, "step": 3}, tmp_path / "a.pt")
    wrapped = read_checkpoint(tmp_path / "a.pt")
    assert wrapped.tensors.keys() == found.keys()
    assert load(wrapped.tensors).model is not None


@pytest.mark.parametrize("key", ["model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias", "betas"])
def test_weights_that_are_no_floating_point_numbers(key):
    with pytest.raises(ValueError, match=f"1 weights are not of a kind.*{key} is int64"):
        load(tensors() | {key: tensors()[key].long()})
    assert load(tensors() | {"model_ema.num_updates": torch.tensor(3)}).model is not None


@pytest.mark.parametrize("change, words", [
    ({"stillmotion.config": "{"}, "stillmotion.config, is not JSON"),
    ({"stillmotion.open_clip": None}, "stillmotion.open_clip, is not JSON"),
    ({"stillmotion.open_clip": "[]"}, "stillmotion.open_clip, is not a JSON object"),
    ({"stillmotion.open_clip": json.dumps(OPEN_CLIP | {"text_cfg": {"layers": 1000}})}, "layers in .* is 1000"),
    ({"stillmotion.open_clip": json.dumps(OPEN_CLIP | {"text_cfg": {"heads": 3}})}, "not divisible by its attention"),
    ({"stillmotion.open_clip": json.dumps(OPEN_CLIP | {"embed_dim": None})}, "embed_dim in .* is None"),
])
def test_bad_headers(change, words):
    header = HEADER | {"stillmotion.config": json.dumps(tiny())} | change
    with pytest.raises(ValueError, match=words):
        loader.load(Checkpoint("a.safetensors", tensors(), {key: text for key, text in header.items() if text}))
