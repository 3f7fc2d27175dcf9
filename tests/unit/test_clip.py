"""Towers in core's classes: same output as open_clip's forward and core's own loaders, and same behaviour as core's."""

import json

import comfy.clip_vision
import comfy.sd
import kornia
import open_clip
import pytest
import torch
from stillmotion.nodes.common import clip as towers

CONFIGS = {
    "tiny": {"embed_dim": 24,
             "vision_cfg": {"image_size": 28, "layers": 2, "width": 40, "head_width": 8, "patch_size": 7},
             "text_cfg": {"width": 32, "heads": 2, "layers": 3}},
    "quick": {"embed_dim": 48, "quick_gelu": True,
              "vision_cfg": {"image_size": 32, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8},
              "text_cfg": {"width": 48, "heads": 6, "layers": 2, "mlp_ratio": 2.0, "context_length": 20}},
}


@pytest.fixture(autouse=True)
def inference():
    """ComfyUI runs nodes in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    return make(CONFIGS[request.param])


def make(config):
    """open_clip's model with random weights, our two towers with the same weights, and the configuration."""
    torch.manual_seed(5)
    with torch.inference_mode():
        model = open_clip.CLIP(**config).eval()
        for value in model.parameters():
            value.copy_((value + torch.randn_like(value) * 0.05).half())  # exact in core's fp16 towers too
    sd = model.state_dict()
    vision = {key[7:]: value for key, value in sd.items() if key.startswith("visual.")}
    text = {key: value for key, value in sd.items()
            if not key.startswith("visual.") and key not in ("logit_scale", "attn_mask")}
    text_cfg, vision_cfg = towers.text_config(config), towers.vision_config(config)
    assert {key: tuple(value.shape) for key, value in text.items()} == towers.text_shapes(text_cfg)
    assert {key: tuple(value.shape) for key, value in vision.items()} == towers.vision_shapes(vision_cfg)
    return model, towers.text_tower(text, text_cfg, dtype=torch.float32), \
        towers.VisionTower(vision, vision_cfg, dtype=torch.float32), text, vision, config


def error(found, expected):
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm()).item()


def open_clip_text(model, ids, skip):
    x = model.token_embedding(ids) + model.positional_embedding
    length = ids.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)
    for block in model.transformer.resblocks[:len(model.transformer.resblocks) - skip]:
        x = block(x, attn_mask=mask)
    return model.ln_final(x)


def open_clip_vision(visual, x_BCHW):
    x = visual.conv1(x_BCHW).flatten(2).transpose(1, 2)
    x = torch.cat((visual.class_embedding.expand(len(x), 1, -1), x), dim=1) + visual.positional_embedding
    return visual.transformer(visual.ln_pre(x))


def ids_of(clip, prompt):
    return torch.tensor([[token for token, _ in part] for part in clip.tokenize(prompt)["h"]])


@pytest.mark.parametrize("prompt", ["a red circle moves left", ""])
def test_text_equals_open_clip(case, prompt):
    model, clip, _, text, _, config = case
    ids = ids_of(clip, prompt)
    if config["text_cfg"].get("context_length", 77) == 77:
        assert torch.equal(ids, open_clip.tokenize([prompt]))
    assert error(clip.encode(prompt), open_clip_text(model, ids, skip=1)) < 1e-5
    last = towers.text_tower(text, towers.text_config(config), layer="last", dtype=torch.float32)
    assert error(last.encode(prompt), open_clip_text(model, ids, skip=0)) < 1e-5


def test_vision_equals_open_clip(case):
    model, _, vision, *_ = case
    size = vision.image_size
    pixels = torch.rand(2, size, size, 3, generator=torch.Generator().manual_seed(1))
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    x = ((pixels - mean) / std).movedim(-1, 1)
    assert error(towers.encode_tokens(vision, pixels), open_clip_vision(model.visual, x)) < 1e-5
    output = vision.encode_image(pixels)
    assert error(output["image_embeds"], model.encode_image(x)) < 2e-2  # core rounds the pixels to 8 bits
    assert output["last_hidden_state"].shape == open_clip_vision(model.visual, x).shape


def test_behaves_like_cores_clip(case):
    _, clip, *_ = case
    plain = clip.encode("a red circle")
    weighted = clip.encode("a (red:1.5) circle")
    empty = clip.encode("")
    word = 2  # start token, "a", "red"
    assert error(weighted[:, word], empty[:, word] + 1.5 * (plain[:, word] - empty[:, word])) < 1e-5
    assert error(weighted[:, :word], plain[:, :word]) < 1e-5
    window = plain.shape[1]
    assert clip.encode("left " * (window + 10)).shape == (1, 2 * window, plain.shape[2])
    skipped = clip.clone()
    skipped.clip_layer(-1)
    model, ids = case[0], ids_of(clip, "a red circle")
    assert error(skipped.encode("a red circle"), open_clip_text(model, ids, skip=0)) < 1e-5
    assert error(clip.encode("a red circle"), plain) == 0


def test_lora_equals_merging(case):
    _, clip, _, text, _, config = case
    generator = torch.Generator().manual_seed(3)
    width = config["text_cfg"]["width"]
    up, down = torch.randn(width, 4, generator=generator), torch.randn(4, width, generator=generator)
    name = "lora_te_text_model_encoder_layers_0_self_attn_out_proj"
    lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(4.0)}
    _, patched = comfy.sd.load_lora_for_models(None, clip, lora, 0.0, 0.5)
    key = "transformer.resblocks.0.attn.out_proj.weight"
    merged = towers.text_tower({**text, key: text[key] + 0.5 * up @ down}, towers.text_config(config),
                               dtype=torch.float32)
    before = clip.encode("a blue square")
    assert error(patched.encode("a blue square"), merged.encode("a blue square")) < 1e-4
    assert error(patched.encode("a blue square"), before) > 1e-2
    assert error(clip.encode("a blue square"), before) == 0


def test_text_equals_cores_loader():
    """Core detects the SD2 text encoder by its depth; its width is changed through core's own option."""
    config = {"embed_dim": 32, "vision_cfg": CONFIGS["tiny"]["vision_cfg"],
              "text_cfg": {"width": 32, "heads": 4, "layers": 24}}
    _, clip, _, text, *_ = make(config)
    size = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4}
    core = comfy.sd.load_text_encoder_state_dicts(
        [dict(text)], model_options={"clip_h_model_config": size, "dtype": torch.float32})
    for prompt in ("a red circle moves (left:1.3)", "word " * 100):
        assert error(clip.encode(prompt), core.encode(prompt)) == 0
    assert clip.tokenize("a red circle") == core.tokenize("a red circle")


def test_vision_equals_cores_class(case, tmp_path):
    _, _, ours, _, weights, config = case
    core = core_vision(tmp_path, weights, config)
    pixels = torch.rand(1, 50, 90, 3, generator=torch.Generator().manual_seed(2))
    assert error(towers.encode_tokens(ours, pixels), towers.encode_tokens(core, pixels)) < 1e-6
    ours_out, core_out = ours.encode_image(pixels), core.encode_image(pixels)
    for name in ("last_hidden_state", "image_embeds"):
        assert error(ours_out[name], core_out[name]) < 1e-6


def core_vision(folder, weights, config):
    tower = towers.vision_config(config)
    (folder / "vision.json").write_text(json.dumps({
        "hidden_act": tower["hidden_act"], "hidden_size": tower["width"], "image_size": tower["image_size"],
        "intermediate_size": tower["mlp_width"], "model_type": "clip_vision_model", "num_channels": 3,
        "num_attention_heads": tower["width"] // tower["head_width"], "num_hidden_layers": tower["layers"],
        "patch_size": tower["patch_size"], "projection_dim": tower["embed_dim"]}))
    core = comfy.clip_vision.ClipVisionModel(folder / "vision.json")
    missing, extra = core.load_sd(comfy.clip_vision.convert_to_transformers(dict(weights), ""))
    assert not missing and not extra
    return core


@pytest.mark.slow
def test_full_size_equals_cores_loaders():
    """ViT-H with random fp16 weights, through the functions behind core's Load CLIP and Load CLIP Vision."""
    generator = torch.Generator().manual_seed(0)

    def weights(shapes):
        return {key: (torch.randn(shape, generator=generator) * 0.02 + ("ln_" in key and "weight" in key)).half()
                for key, shape in shapes.items()}

    text_cfg, vision_cfg = towers.text_config(towers.VIT_H), towers.vision_config(towers.VIT_H)
    text = weights(towers.text_shapes(text_cfg))
    core = comfy.sd.load_text_encoder_state_dicts([dict(text)])
    ours = towers.text_tower(dict(text), text_cfg)
    assert error(ours.encode("a red circle moves left"), core.encode("a red circle moves left")) < 1e-5
    del text, core, ours
    vision = weights(towers.vision_shapes(vision_cfg))
    core = comfy.clip_vision.load_clipvision_from_sd(
        {f"visual.{key}": value for key, value in vision.items()}, "visual.", convert_keys=True)
    pixels = torch.rand(1, 300, 500, 3, generator=generator)
    expected = towers.encode_tokens(core, pixels, width=1280)
    del core
    assert error(towers.encode_tokens(towers.VisionTower(vision, vision_cfg), pixels, width=1280), expected) < 1e-5


@pytest.mark.parametrize("height, width", [(28, 28), (320, 512), (576, 1024), (17, 400), (400, 17), (10, 9), (57, 29)])
def test_squash_is_kornias(height, width):
    x = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height))
    expected = kornia.geometry.resize(x, (28, 28), interpolation="bicubic", align_corners=True, antialias=True)
    assert error(towers.squash(x, 28), expected) < 1e-5


def test_other_towers_are_refused(case):
    _, _, vision, *_ = case
    pixels = torch.rand(1, 16, 16, 3)
    with pytest.raises(ValueError, match=r"wide, but the model needs 1280.*Load CLIP Vision"):
        towers.encode_tokens(vision, pixels, width=1280)
    siglip = type("Other", (), {"model": torch.nn.Linear(1, 1)})()
    with pytest.raises(ValueError, match="not a CLIP tower"):
        towers.encode_tokens(siglip, pixels)


def test_bad_configurations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="timm_model_name"):
        towers.vision_config({"embed_dim": 8, "vision_cfg": {"timm_model_name": "x"}})
    with pytest.raises(ValueError, match=r"layers in the open_clip configuration's vision_cfg is \[1, 2, 3, 4\]"):
        towers.vision_config({"embed_dim": 8, "vision_cfg": {"layers": [1, 2, 3, 4]}})
    tower = towers.text_config({"embed_dim": 8, "text_cfg": {"vocab_size": 100}})
    with pytest.raises(ValueError, match="100 tokens"):
        towers.text_tower({}, tower)
    with pytest.raises(ValueError, match="no architecture 'Tiny'.*open_clip_config.json"):
        towers.open_clip_config("Tiny", tmp_path)


def test_open_clip_config_is_found(tmp_path):
    assert towers.open_clip_config("ViT-H-14", tmp_path) == towers.VIT_H
    known = open_clip.get_model_config("ViT-H-14")
    for name in ("vision_cfg", "text_cfg"):
        assert towers.VIT_H[name] == {key: known[name][key] for key in towers.VIT_H[name]}
    assert towers.open_clip_config("ViT-B-32", tmp_path)["vision_cfg"]["patch_size"] == 32
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CONFIGS["tiny"]))
    assert towers.open_clip_config("Tiny", tmp_path) == CONFIGS["tiny"]
