"""run.py convert and list: what a converted file holds, that it loads the same, and what files are said to be."""

import json
import os

import causal_wan_stub as wan
import dynamicrafter_stub as dynamicrafter
import host
import models
import pytest
import torch
from safetensors.torch import save_file
from stillmotion.nodes.causal_wan import checkpoint as wan_loader
from stillmotion.nodes.common.files import Checkpoint, read_checkpoint
from stillmotion.nodes.diagnosis.convert import convert
from stillmotion.nodes.diagnosis.identify import describe
from stillmotion.nodes.dynamicrafter import checkpoint as dynamicrafter_loader

CONFIG = {**dynamicrafter.HEADER, "stillmotion.config": json.dumps(dynamicrafter.tiny())}
TRAINING = {"model_ema.decay": torch.ones(1), "model_ema.diffusion_modelx": torch.ones(4)}


@pytest.fixture
def ckpt(tmp_path):
    """As training saves it: nested, with an optimizer and an average."""
    torch.save({"state_dict": dynamicrafter.tensors() | TRAINING, "optimizer": {"lr": 1e-4}, "step": 7},
               tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def converted(source, **options):
    target = source.with_name("out.safetensors")
    convert(read_checkpoint(source), target, **options)
    return read_checkpoint(target)


def load(checkpoint):
    model = dynamicrafter_loader.load(Checkpoint(checkpoint.path, dict(checkpoint.tensors), CONFIG))
    return model, model.model.model.diffusion_model.state_dict()


def test_a_training_checkpoint_becomes_a_file_of_what_is_needed(ckpt):
    original, found = read_checkpoint(ckpt), converted(ckpt)
    dropped = original.tensors.keys() - found.tensors.keys()
    assert dropped == {*TRAINING, "betas", "alphas_cumprod", "cond_stage_model.model.logit_scale",
                       "embedder.model.logit_scale", "embedder.model.positional_embedding"}
    assert all(torch.equal(value, original.tensors[key]) for key, value in found.tensors.items())
    (_, before), (loaded, after) = load(original), load(found)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert None not in loaded and "out.safetensors" in os.listdir(ckpt.parent)


def test_half_the_size_without_encoders(ckpt):
    found = converted(ckpt, dtype="fp16", encoders=False)
    assert {value.dtype for value in found.tensors.values()} == {torch.float16}
    loaded, _ = load(found)
    assert loaded.clip is loaded.clip_vision is None and loaded.vae is not None
    assert "DynamiCrafter 512 or 512_interp" in describe(found) and describe(found).endswith("fp16, with VAE")


@pytest.mark.parametrize("weights, seed", [("auto", 2), ("raw", 1)])
def test_an_original_causal_wan_file(tmp_path, weights, seed):
    source = tmp_path / "self_forcing_dmd.pt"
    torch.save({"generator": wan.tensors(seed=1), "generator_ema": wan.tensors(seed=2), "critic": wan.tensors(seed=3)},
               source)
    assert "causal Wan, text to video" in describe(read_checkpoint(source))
    found = converted(source, weights=weights)
    expected = wan.tensors(seed=seed)
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[key], value) for key, value in expected.items())
    assert wan_loader.read_header(found.metadata, "out").causal  # as the original's keys said
    assert describe(found).startswith("causal Wan, text to video")


def test_weights_that_share_memory_are_both_kept(tmp_path):
    table = torch.randn(4, 4)
    torch.save({"a.weight": table, "b.weight": table, "c.weight": table[1:]}, tmp_path / "tied.pt")
    found = converted(tmp_path / "tied.pt").tensors
    assert torch.equal(found["a.weight"], table) and torch.equal(found["b.weight"], table)
    assert torch.equal(found["c.weight"], table[1:])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/stillmotion-was-here",)


def test_what_is_refused(ckpt, tmp_path):
    for target, options, words in (
            ("out.ckpt", {}, "must end in .safetensors"), ("new.safetensors", {"dtype": "int4"}, "allowed are keep"),
            ("there.safetensors", {}, "is there already. Give another name")):
        (tmp_path / "there.safetensors").write_bytes(b"mine")
        with pytest.raises(ValueError, match=words):
            convert(read_checkpoint(ckpt), tmp_path / target, **options)
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"
    torch.save({"x.weight": torch.full((2, 2), 1e5)}, tmp_path / "large.pt")
    with pytest.raises(ValueError, match="x.weight has numbers up to 100000, too large for fp16. Choose bf16"):
        converted(tmp_path / "large.pt", dtype="fp16")
    with pytest.raises(ValueError, match="no DynamiCrafter checkpoint, so it has no encoders"):
        converted(tmp_path / "large.pt", encoders=False)
    save_file({"x.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="1 weights in 8 or 4 bits"):
        converted(tmp_path / "small.safetensors", dtype="fp16")
    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="could run code"):
        converted(tmp_path / "evil.ckpt")
    assert not os.path.exists("/tmp/stillmotion-was-here")
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".", "out"))]


def test_the_commands(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models.host, "reexec", lambda comfyui: os.environ["STILLMOTION_COMFYUI"])
    monkeypatch.setattr(models.inprocess, "import_pack", lambda comfyui, cpu=None: None)  # the tests have it already
    target = tmp_path / "models" / "checkpoints" / "small.safetensors"
    target.parent.mkdir(parents=True)
    models.convert([str(ckpt), str(target), "--dtype", "bf16", "--without_encoders"])
    told = capsys.readouterr().out
    assert told.startswith(f"{target}\n") and "bf16, with VAE" in told
    (target.parent / "page.ckpt").write_text("<html>")
    models.list_models(["--models", str(tmp_path / "models")])
    told = capsys.readouterr().out
    assert f"{target}\n  0.01 GB, DynamiCrafter 512 or 512_interp, " in told
    assert f"{target.parent / 'page.ckpt'}\n  0.00 GB, not usable: " in told and "a web page" in told
    with pytest.raises(SystemExit, match=f"error: {target} is there already"):
        models.convert([str(ckpt), str(target)])


@pytest.mark.parametrize("name, words", [("dynamicrafter_demo", "DynamiCrafter of another size"),
                                         ("dynamicrafter_96_demo", "DynamiCrafter of another size"),
                                         ("causal_wan_demo", "causal Wan, image to video"),
                                         ("video_unet_demo", "Video U-Net of this pack")])
def test_the_demos_are_known(name, words):
    assert describe(read_checkpoint(host.PACK / "nodes" / "demo" / f"{name}.safetensors")).startswith(words)


def test_other_files_are_named(tmp_path):
    for key, words in (("double_blocks.0.img_attn.qkv.weight", "Flux"), ("blocks.0.lora_A.weight", "a LoRA"),
                       ("strange", "not known to this pack")):
        assert describe(Checkpoint("x.pt", {key: torch.ones(2, 2)}, {})).startswith(words)
