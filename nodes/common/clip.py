"""The two towers of an open_clip model as ComfyUI's own CLIP and CLIP_VISION.

Weights are renamed into ComfyUI's classes, so that prompt weights, long prompts, clip skip, LoRA, casting and
offloading work as with any other text encoder. Head counts are not in the weights: they come from an open_clip
model configuration (`{"embed_dim", "vision_cfg", "text_cfg"}`).
"""

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import comfy.clip_model
import comfy.clip_vision
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import torch
import torch.nn.functional as F
from comfy import sd1_clip

from .core_model import managed
from .values import DEEPEST, WIDEST, flag, number, parse_json, shown, whole, word
from .vocabulary import VocabularyClip

# ViT-H-14 of open_clip, the towers of every published DynamiCrafter (and, for text, of Stable Diffusion 2).
VIT_H = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
# open_clip's defaults.
VISION_DEFAULTS = {"image_size": 224, "layers": 12, "width": 768, "head_width": 64, "patch_size": 16, "mlp_ratio": 4.0}
TEXT_DEFAULTS = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
TOKENIZER_WORDS = 49408

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def open_clip_config(arch, folder):
    """Model configuration of the open_clip architecture `arch`.

    Looked up in `folder` (`<arch>.json`, then `open_clip_config.json`), then among those shipped with open_clip.
    """
    word(arch, "The architecture (arch) of a tower")
    if arch == "ViT-H-14":
        return VIT_H
    for name in (f"{arch}.json", "open_clip_config.json"):
        path = Path(folder) / name
        if path.is_file():
            return parse_json(path.read_bytes(), str(path))
    import open_clip

    config = open_clip.get_model_config(arch)
    if config is None:
        raise ValueError(f"open_clip has no architecture {arch!r}. Put its model configuration (JSON) next to the "
                         f"YAML, in {folder}, as open_clip_config.json.")
    return config


def text_config(config):
    """Text tower of an open_clip model configuration, defaults filled in."""
    return _tower(config, "text_cfg", TEXT_DEFAULTS)


def vision_config(config):
    """Vision tower of an open_clip model configuration, defaults filled in."""
    return _tower(config, "vision_cfg", VISION_DEFAULTS)


def _tower(config, name, defaults):
    """Raises ValueError for towers of another architecture and for invalid sizes."""
    given = config.get(name)
    unknown = sorted(set(given) - set(defaults)) if isinstance(given, dict) else [shown(given)]
    if unknown:
        raise ValueError(f"The open_clip configuration's {name} is not a plain transformer tower: "
                         f"{', '.join(unknown)}. Allowed: {', '.join(defaults)}.")
    tower = {**defaults, **given, "embed_dim": config.get("embed_dim")}
    for entry, value in tower.items():
        where = f"{entry} in the open_clip configuration's {name}"
        if entry == "mlp_ratio":
            number(value, where, 0, 64)
        else:
            whole(value, where, high=DEEPEST if entry == "layers" else WIDEST)
    heads = tower["heads"] if "heads" in tower else tower["width"] // tower["head_width"]
    if not heads or tower["width"] % heads:
        raise ValueError(f"The open_clip configuration's {name} is {tower['width']} wide, which is not "
                         "divisible by its attention heads. Correct width, and heads or head_width.")
    if tower.get("patch_size", 1) > tower.get("image_size", 1):
        raise ValueError(f"The open_clip configuration's {name} has patches of {tower['patch_size']} pixels in images "
                         f"of {tower['image_size']}. Correct patch_size or image_size.")
    quick = flag(config.get("quick_gelu", False), "quick_gelu in the open_clip configuration")
    tower["hidden_act"] = "quick_gelu" if quick else "gelu"
    tower["mlp_width"] = whole(int(tower["width"] * tower["mlp_ratio"]), f"width x mlp_ratio of {name}")
    return tower


def text_shapes(tower):
    """open_clip key -> shape of a text tower's weights."""
    width = tower["width"]
    return {
        "positional_embedding": (tower["context_length"], width),
        "text_projection": (width, tower["embed_dim"]),
        "token_embedding.weight": (tower["vocab_size"], width),
        **_pair("ln_final", width),
        **_block_shapes(tower),
    }


def vision_shapes(tower):
    """open_clip key -> shape of a vision tower's weights, without the prefix `visual.`."""
    width, patch = tower["width"], tower["patch_size"]
    return {
        "class_embedding": (width,),
        "positional_embedding": ((tower["image_size"] // patch) ** 2 + 1, width),
        "proj": (width, tower["embed_dim"]),
        "conv1.weight": (width, 3, patch, patch),
        **_pair("ln_pre", width),
        **_pair("ln_post", width),
        **_block_shapes(tower),
    }


def _pair(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _block_shapes(tower):
    width, inner = tower["width"], tower["mlp_width"]
    shapes = {}
    for i in range(tower["layers"]):
        at = f"transformer.resblocks.{i}"
        shapes |= _pair(f"{at}.ln_1", width) | _pair(f"{at}.ln_2", width)
        shapes |= {f"{at}.attn.in_proj_weight": (3 * width, width), f"{at}.attn.in_proj_bias": (3 * width,)}
        shapes |= _pair(f"{at}.attn.out_proj", width, width)
        shapes |= _pair(f"{at}.mlp.c_fc", inner, width) | _pair(f"{at}.mlp.c_proj", width, inner)
    return shapes


def _core_config(tower):
    return {
        "hidden_size": tower["width"], "intermediate_size": tower["mlp_width"], "hidden_act": tower["hidden_act"],
        "num_hidden_layers": tower["layers"], "projection_dim": tower["embed_dim"],
    }


class TextTransformer(comfy.clip_model.CLIPTextModel):
    """Core's text model with a projection that may be non-square."""

    def __init__(self, config_dict, dtype, device, operations):
        super().__init__(config_dict, dtype, device, operations)
        self.text_projection = operations.Linear(config_dict["hidden_size"], config_dict["projection_dim"], bias=False,
                                                 dtype=dtype, device=device)


class TextEncoder(sd1_clip.SDClipModel):
    """The tower as in Stable Diffusion 2: an inner layer, then ln_final; padding with token 0."""

    def __init__(self, config, layer_idx, device="cpu", dtype=None, model_options={}):
        super().__init__(device=device, dtype=dtype, max_length=config["max_position_embeddings"],
                         layer="hidden", layer_idx=layer_idx, textmodel_json_config=config,
                         model_class=TextTransformer, special_tokens={"start": 49406, "end": 49407, "pad": 0},
                         return_projected_pooled=True, model_options=model_options)


def text_tower(weights, tower, layer="penultimate", dtype=None, embedding_directory=None):
    """CLIP from a text tower's open_clip weights (keys as in `text_shapes`, already checked).

    `layer` is "penultimate" or "last" as in the official YAML; `dtype` None leaves the choice to ComfyUI.
    """
    if tower["vocab_size"] != TOKENIZER_WORDS:
        raise ValueError(f"The text tower has {tower['vocab_size']} tokens, but CLIP's tokenizer has "
                         f"{TOKENIZER_WORDS}. Use a tower that was trained with CLIP's tokenizer.")
    if layer not in ("penultimate", "last"):
        raise ValueError(f"The text layer is {layer!r}. Choose one of penultimate, last.")
    config = {**_core_config(tower), "num_attention_heads": tower["heads"],
              "max_position_embeddings": tower["context_length"], "eos_token_id": 49407}
    encoder = partial(TextEncoder, config, tower["layers"] - (2 if layer == "penultimate" else 1))
    words = partial(sd1_clip.SDTokenizer, max_length=tower["context_length"], pad_with_end=False,
                    embedding_size=tower["width"], embedding_key="clip_h")
    # "h" is the name of the SD2 text encoder in core's LoRA loader.
    target = SimpleNamespace(
        params={}, clip=partial(sd1_clip.SD1ClipModel, clip_name="h", clip_model=encoder),
        tokenizer=partial(sd1_clip.SD1Tokenizer, clip_name="h", tokenizer=words))
    # Built on the meta device; the weights are then assigned, not copied.
    options = {"initial_device": torch.device("meta")} | ({"dtype": dtype} if dtype else {})
    clip = VocabularyClip(target, embedding_directory=embedding_directory, model_options=options)
    clip.known_V = weights["token_embedding.weight"].any(-1)
    transformer = clip.cond_stage_model.clip_h.transformer
    weights = {key: value.to(transformer.dtype) for key, value in weights.items()}
    transformer.load_state_dict(comfy.utils.clip_text_transformers_convert(weights, "", ""), assign=True)
    return clip


class VisionTower(comfy.clip_vision.ClipVisionModel):
    """Core's CLIP_VISION around a tower of any size (core's own loader knows a few sizes)."""

    def __init__(self, weights, tower, dtype=None):
        config = {**_core_config(tower), "num_attention_heads": tower["width"] // tower["head_width"],
                  "image_size": tower["image_size"], "patch_size": tower["patch_size"], "num_channels": 3,
                  "model_type": "clip_vision_model"}
        with TemporaryDirectory() as folder:  # until 0.11 core reads its configuration only from a file
            path = Path(folder, "config.json")
            path.write_text(json.dumps(config))
            super().__init__(path)
        self.dtype = dtype or self.dtype
        with torch.device("meta"):  # rebuilt: core's own has a fixed dtype and allocates memory
            self.model = comfy.clip_model.CLIPVisionModelProjection(config, self.dtype, None, comfy.ops.manual_cast)
        self.model.eval().requires_grad_(False)
        weights = {key: value.to(self.dtype) for key, value in weights.items()}
        weights = comfy.clip_vision.convert_to_transformers(weights, "")
        self.model.load_state_dict(weights, assign=True)
        self.patcher = managed(self.model, self.load_device, self.patcher.offload_device)


def encode_tokens(clip_vision, pixels_BHWC, width=None):
    """All tokens of the tower's last block, before its final norm: [B, 1 + patches, W] for images in 0..1.

    The whole image is squashed to the tower's size, as in the official DynamiCrafter code (arXiv 2310.12190);
    ComfyUI's own preprocessing crops and gives different values. Works with any of core's CLIP_VISION models that is a
    CLIP. Raises ValueError for other towers and, if `width` is given, for tokens of a different width.
    """
    vision = getattr(clip_vision.model, "vision_model", None)
    if vision is None or vision.embeddings.class_embedding is None:
        raise ValueError("This CLIP_VISION is not a CLIP tower (SigLIP or DINO?). Use the one from Load DynamiCrafter, "
                         "or Load CLIP Vision with the CLIP ViT-H/14 of OpenCLIP (LAION-2B).")
    found = vision.embeddings.class_embedding.shape[0]
    if width is not None and found != width:
        raise ValueError(f"This CLIP_VISION gives tokens {found} wide, but the model needs {width}. Use the "
                         "CLIP_VISION from Load DynamiCrafter, or for the published models (1280) Load CLIP Vision "
                         "with the CLIP ViT-H/14 of OpenCLIP (LAION-2B).")
    comfy.model_management.load_model_gpu(clip_vision.patcher)
    pixels_BCHW = pixels_BHWC[..., :3].movedim(-1, 1).to(clip_vision.load_device, torch.float32)
    pixels_BCHW = squash(pixels_BCHW, clip_vision.image_size)
    mean, std = (pixels_BCHW.new_tensor(values).view(3, 1, 1)
                 for values in (clip_vision.image_mean, clip_vision.image_std))
    tokens_BNW = clip_vision.model(pixel_values=(pixels_BCHW - mean) / std, intermediate_output=-2)[0]
    return tokens_BNW.float().to(comfy.model_management.intermediate_device())


def squash(x_BCHW, size):
    """Resize to `size` x `size`, ignoring the aspect ratio: Gaussian blur on sides that shrink, then bicubic with
    aligned corners.

    This is kornia's antialiased resize, which the published models were trained with.
    """
    factors = [side / size for side in x_BCHW.shape[2:]]
    if max(factors) > 1:
        for dim, factor in zip((2, 3), factors):
            x_BCHW = _blur(x_BCHW, dim, sigma=max((factor - 1) / 2, 0.001))
    return F.interpolate(x_BCHW, size=(size, size), mode="bicubic", align_corners=True)


def _blur(x_BCHW, dim, sigma):
    radius = int(max(4 * sigma, 3)) // 2
    offsets = torch.arange(-radius, radius + 1, device=x_BCHW.device, dtype=x_BCHW.dtype)
    kernel = torch.exp(-offsets ** 2 / (2 * sigma ** 2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    lines = x_BCHW.movedim(dim, -1)
    padded = F.pad(lines.flatten(0, -2)[:, None], (radius, radius), mode="reflect")
    return F.conv1d(padded, kernel).view(lines.shape).movedim(-1, dim)
