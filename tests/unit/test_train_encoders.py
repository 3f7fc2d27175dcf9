"""What a run does before its first step: VAE, captions, memory; and encodings that stay on disk."""

import json
import logging
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from stillmotion.nodes.common.demo import DYNAMICRAFTER, VIDEO_UNET
from stillmotion.nodes.common.files import Checkpoint, read_checkpoint
from stillmotion.nodes.common.vae import small_vae
from stillmotion.nodes.dynamicrafter import checkpoint as dynamicrafter
from stillmotion.nodes.training import load, loop
from stillmotion.nodes.training.average import Average
from stillmotion.nodes.training.config import TrainConfig
from stillmotion.nodes.training.data.clips import Clips, MovingShapes
from stillmotion.nodes.training.encoding import Encoders
from stillmotion.nodes.training.families import base
from stillmotion.nodes.training.families.registry import load_model, make_family
from stillmotion.nodes.training.memory import fixed_bytes
from stillmotion.nodes.training.run import Training
from stillmotion.nodes.video_unet import checkpoint as video_unet

SMALL = {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "batch_size": 2, "steps": 2,
         "save_every": 2, "sample_every": 2, "num_frames": 2, "frame_size": "32"}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(base, "SAMPLE_STEPS", 2)


@pytest.fixture(scope="module")
def demo():
    return dynamicrafter.load(read_checkpoint(DYNAMICRAFTER), weight_dtype="fp32")


@pytest.fixture
def calls(monkeypatch, demo):
    """How often clips and captions were encoded."""
    found = Counter()

    def counted(name, function):
        def call(*arguments):
            found[name] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(Encoders, "latent", counted("clips", Encoders.latent))
    monkeypatch.setattr(demo.clip, "encode_from_tokens", counted("captions", demo.clip.encode_from_tokens))
    return found


class Noise(Clips):
    """Frames that no VAE keeps."""

    def __len__(self):
        return 12

    def read(self, index, rng):
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (2, 32, 32, 3), generator=generator), "noise", f"noise_{index:05}"


def train(path, dataset, vae, clip, **changes):
    config = TrainConfig(**{**SMALL, **changes}, output=str(path / "m.safetensors"))
    family = make_family(None, Encoders(vae, clip, None), config, dataset)
    Training(family, dataset, config, path / "m.safetensors", path / "m").run()
    return load_file(path / "m.safetensors")


def test_a_vae_that_loses_the_clips_stops_before_anything_is_written(demo, tmp_path):
    with pytest.raises(ValueError, match=r"PSNR of 1?\d\.\d dB, and 20 are needed.*encoders.*space pixels.*family vae"):
        train(tmp_path, Noise(), demo.vae, demo.clip)
    assert not list(tmp_path.iterdir())
    train(tmp_path, Noise(), demo.vae, demo.clip, vae_psnr=0.0)


def test_clips_and_captions_are_encoded_once_for_all_runs_of_a_folder(demo, calls, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    shapes, before = MovingShapes(12, frames=2, size=(32, 32)), 12 + 8 + 1  # scale, PSNR, fingerprint of the encoders
    whole = train(tmp_path / "whole", shapes, demo.vae, demo.clip, steps=14)
    captions = {shapes[i]["caption"] for i in range(12)}
    assert calls == {"clips": before + 12, "captions": len(captions) + 2}  # the empty one, and the fingerprint
    assert "The VAE keeps 2" in caplog.text
    calls.clear()
    (tmp_path / "again" / "m").mkdir(parents=True)
    (tmp_path / "whole" / "m" / "encoded").rename(tmp_path / "again" / "m" / "encoded")
    again = train(tmp_path / "again", shapes, demo.vae, demo.clip, steps=14)
    assert calls == {"clips": before, "captions": 2}
    assert all(torch.equal(again[key], value) for key, value in whole.items())


def test_encodings_of_another_vae_are_not_read(demo, tmp_path):
    shapes = MovingShapes(12, frames=2, size=(32, 32))
    train(tmp_path, shapes, demo.vae, demo.clip)
    before = len(list((tmp_path / "m" / "encoded").iterdir()))
    other = dynamicrafter.load(read_checkpoint(DYNAMICRAFTER), weight_dtype="fp32")
    for weight in other.vae.first_stage_model.quant_conv.parameters():
        weight.data[0] *= -1
    for name in ("settings.json", "state_1.pt"):
        (tmp_path / "m" / name).unlink()
    train(tmp_path, shapes, other.vae, demo.clip, vae_psnr=0.0)
    assert len(list((tmp_path / "m" / "encoded").iterdir())) == before + 5  # 4 for training, 1 for validation


def test_vae_and_clip_l_come_from_a_stable_diffusion_checkpoint(monkeypatch):
    """CLIP-L is found by its keys; its many weights are left out here."""
    text = {"text_model.embeddings.token_embedding.weight": torch.zeros(49408, 768, dtype=torch.float16),
            "text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(3072, 768, dtype=torch.float16),
            "text_model.encoder.layers.1.mlp.fc1.weight": torch.zeros(3072, 768, dtype=torch.float16)}
    tensors = {f"cond_stage_model.transformer.{key}": value for key, value in text.items()}
    found = Checkpoint("sd15.safetensors", tensors, {})
    monkeypatch.setattr(load, "read_checkpoint", lambda path: found)
    with pytest.raises(ValueError, match="holds no VAE: name a file of its own"):
        load.load_encoders(TrainConfig(encoders="sd15.safetensors"), pixels=False)
    tensors |= {f"cond_stage_model.transformer.{key}": value for key, value in text.items()}
    encoders = load.load_encoders(TrainConfig(encoders="sd15.safetensors"), pixels=True)
    assert encoders.text("a cat").shape[-1] == 768 and encoders.vae is None


def test_a_demo_is_trained_further_with_its_own_encoders(caplog):
    model = video_unet.load(read_checkpoint(VIDEO_UNET), weight_dtype="fp32")
    own = load.load_encoders(TrainConfig(), pixels=False, model=model)
    assert own.vae.trained_size == own.clip.trained_size == (96, 96)
    assert make_family(model, own, TrainConfig(), None).config.text_encoder == "demo, 96x96" and not caplog.messages
    other = load.load_encoders(TrainConfig(), pixels=False)
    assert other.vae.trained_size == (64, 64)
    make_family(model, other, TrainConfig(), None)
    assert "trained with the encoders of demo, 96x96; given are those of demo." in caplog.messages[-1]
    assert make_family(model, other, TrainConfig(from_scratch=True), None).config.text_encoder == "demo"


@pytest.mark.parametrize("family, name, size", [("dynamicrafter", "demo", 64), ("dynamicrafter", "demo, 96x96", 96),
                                                ("causal_wan", "demo", 96)])
def test_the_demos_are_chosen_by_name_and_not_mixed(family, name, size):
    settings = TrainConfig(family=family, checkpoint=name)
    model = load_model(settings)
    assert load.load_encoders(settings, pixels=False, model=model).vae.trained_size == (size, size)
    if size == 64:
        with pytest.raises(ValueError, match="was trained with those of 'demo'"):
            load.load_encoders(replace(settings, encoders="demo, 96x96"), pixels=False, model=model)


def test_memory_is_counted_as_it_is_used():
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, bias=False))
    net[0].requires_grad_(False)
    found = fixed_bytes(net, "adamw", averaged=True)
    optimizer, average = loop.make_optimizer("adamw", list(net[1].parameters()), 1e-3), Average(net, 0.9)
    net(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    state = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert found == {"weights": 4 * (64 + 8 + 64), "gradients": net[1].weight.grad.nbytes,
                     "optimizer": sum(value.nbytes for value in state), "average": 4 * 64}
    assert average.module[0].weight is net[0].weight and average.module[1].weight is not net[1].weight
    assert list(average.state_dict()) == ["n_averaged", "module.1.weight"]


def test_the_optimizer_in_8_bits_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="8-bit optimizer needs bitsandbytes.*pip install bitsandbytes"):
        loop.make_optimizer("adamw8bit", [], 1e-3)


def test_the_average_of_a_short_run_forgets_its_first_weights():
    net, by_hand = torch.nn.Linear(1, 1, bias=False), 0.0
    warm, published = Average(net, 0.999), Average(net, 0.999, warm_up=False)
    for n in range(40):
        torch.nn.init.constant_(net.weight, n)
        warm.update()
        published.update()
        decay = min(0.999, (1 + n) / (10 + n)) if n else 0
        by_hand = decay * by_hand + (1 - decay) * n
    assert warm.module.weight.item() == pytest.approx(by_hand) and by_hand > 34
    assert published.module.weight.item() < 1


def test_a_new_small_vae_passes_pictures_on_and_begins_near_grey():
    torch.manual_seed(0)
    net, generator = small_vae(16), torch.Generator().manual_seed(1)
    x_NCHW = torch.rand(4, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3) * 2 - 1
    with torch.no_grad():
        z_NCHW = net.encode(x_NCHW)
        grey_NCHW = net.decode(z_NCHW)
    assert 0.2 < z_NCHW.std() < 2 and 0.02 < grey_NCHW.std() < 0.4 and grey_NCHW.mean().abs() < 0.2


def test_the_optimizer_in_8_bits_follows_the_plain_one(tmp_path):
    pytest.importorskip("bitsandbytes")
    losses = []
    for name in loop.OPTIMIZERS:
        torch.manual_seed(0)
        net = torch.nn.Linear(128, 64)  # large enough for 8 bits: from 4096 weights on

        def loss_of(number, generator, net=net):
            x = torch.randn(16, 128, generator=generator)
            return (net(x) - x[:, :64]).square().mean()

        loop.fit(net, loss_of, steps=30, lr=1e-2, checkpoint=tmp_path / f"{name}.pt", optimizer=name, save_every=30)
        losses.append(json.loads((tmp_path / f"{name}.jsonl").read_text())["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_small_vae_is_trained_and_keeps_more_than_before(demo, tmp_path):
    shapes = MovingShapes(12, frames=4, size=(32, 32))
    config = TrainConfig(family="vae", steps=30, batch_size=4, learning_rate=2e-3, num_frames=4, frame_size="32",
                         save_every=10, sample_every=30, ema_decay=0.5, output=str(tmp_path / "v.safetensors"))
    config.check()
    family = make_family(None, load.load_encoders(config, True), config, shapes)
    Training(family, shapes, config, tmp_path / "v.safetensors", tmp_path / "v").run()
    rows = [json.loads(line) for line in (tmp_path / "v" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["validation"] < 0.8 * rows[0]["validation"]
    encoders = load.load_encoders(TrainConfig(vae=str(tmp_path / "v.safetensors")), pixels=False)  # as core's Load VAE
    clip = shapes[11]["video"]  # the one that was held out
    latent = encoders.latent(clip)
    assert latent.shape == (16, 4, 4, 4) and latent.abs().max() < 10
    error = (encoders.pixels(latent[None])[0].movedim(-1, 0) * 2 - 1 - clip).square().mean().item()
    assert -10 * math.log10(error / 4) == pytest.approx(rows[-1]["psnr"], abs=0.5)
    assert encoders.vae.spacial_compression_encode() == 8


def test_a_weights_only_checkpoint_of_dynamicrafter_has_no_towers(demo, tmp_path):
    config = TrainConfig(family="dynamicrafter", checkpoint="demo")
    family = make_family(demo.model, Encoders(demo.vae, demo.clip, demo.clip_vision), config, None)
    family.export_weights(tmp_path / "w.safetensors", family.net, {})
    family.export(tmp_path / "all.safetensors", family.net, {})
    kept, whole = (load_file(tmp_path / f"{name}.safetensors") for name in ("w", "all"))
    assert {key.split(".")[0] for key in whole.keys() - kept.keys()} == {"first_stage_model", "cond_stage_model",
                                                                         "embedder"}
    loaded = dynamicrafter.load(read_checkpoint(tmp_path / "w.safetensors"))
    assert loaded.clip is None and loaded.vae is None
