"""The demo models' recipes: their parts with untrained networks, for errors that training would not reveal."""
from random import Random

import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from outlines import follow
from stillmotion.nodes.common.files import read_checkpoint
from stillmotion.nodes.dynamicrafter import checkpoint
from stillmotion.nodes.training.data import scenes
from stillmotion.nodes.training.recipes import (
    autoencoder,
    dynamicrafter_96,
    encodings,
    fast,
    parts,
    towers,
    video_unet_96,
)
from stillmotion.nodes.training.recipes import dynamicrafter_64 as demo
from tracking import psnr

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def filled(net, seed=0):
    """Random weights everywhere: ComfyUI's layers leave theirs uninitialized, and some of ours start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return net.eval()


@pytest.fixture(scope="module")
def nets():
    return {"vae": filled(AutoencoderKL(embed_dim=4, ddconfig=autoencoder.DDCONFIG)),
            "clip": filled(CLIP(**demo.OPEN_CLIP)), "unet": filled(dynamicrafter_96.new_unet())}


@torch.no_grad()
def test_layers_for_the_compiler_give_the_same_results():
    vae = filled(AutoencoderKL(embed_dim=4, ddconfig=autoencoder.DDCONFIG))
    images = torch.randn(2, 3, 32, 32)
    latents, x = vae.encoder(images), torch.randn(1, 4, 4, 4)
    decoded = vae.decoder(x)
    fast.channels_last(fast.make_compilable(vae))
    assert torch.allclose(vae.encoder(images), latents, atol=1e-4)
    assert torch.allclose(vae.decoder(x), decoded, atol=1e-4)
    assert all(type(m) is not fast.Upsample for m in vae.modules())


@torch.no_grad()
def test_a_video_unet_for_the_compiler_gives_the_same_results():
    net = filled(dynamicrafter_96.new_unet())
    inputs = (torch.randn(1, 8, 16, 4, 4), torch.tensor([500]), torch.randn(1, 77, 32), torch.randn(1, 17, 48),
              torch.tensor([18]))
    before, keys = net(*inputs), list(net.state_dict())
    fast.channels_last(fast.make_compilable(net))
    assert torch.allclose(net(*inputs), before, atol=1e-3) and list(net.state_dict()) == keys


def test_what_a_caption_does_not_say_is_not_learned_from_it():
    scene = scenes.random_object(Random(1))
    assert [c == towers.UNNAMED for c in towers.said(scene, 0)] == [False] * 5 + [True, False]
    camera = scenes.random_camera(Random(1))
    named, unnamed = towers.said(camera, 0), towers.said(camera, 2)  # the third phrasing does not name the picture
    assert named[:5] == unnamed[:5] == [towers.UNNAMED] * 5 and named[6] == unnamed[6]
    assert named[5] != towers.UNNAMED and unnamed[5] == towers.UNNAMED
    assert {towers.said(scenes.random_camera(Random(i)), 0)[6] for i in range(60)} == set(range(4, 10))


def test_encodings_belong_to_their_clips(nets, tmp_path, monkeypatch):
    monkeypatch.setattr(encodings, "PART", 3)
    made = encodings.encode_clips(tmp_path, nets["vae"], nets["clip"], count=2)
    again = encodings.encode_clips(tmp_path, nets["vae"], nets["clip"], count=2)
    assert all(torch.equal(made[name], again[name]) for name in made)
    side = scenes.SIZE // 8
    assert made["latents"].shape == (6, 4, 16, side, side) and made["grey"].shape == made["image"][:1].shape
    rng = Random(1001)
    drawn = [encodings.random_scene(rng) for _ in range(3)]
    tokenize = SimpleTokenizer(context_length=77)
    for clip, scene in enumerate(drawn, start=3):
        assert made["fs"][clip] == scene.fs and made["ends"][clip] == scene.returns
        for form in range(scenes.HELD_OUT_FORM):
            with torch.no_grad():
                text = demo.text_features(nets["clip"], tokenize([scene.caption(form)]))[0]
            assert torch.allclose(made["text"][made["caption"][clip, form]], text, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(made["text"][0], demo.text_features(nets["clip"], tokenize([""]))[0], atol=1e-5)


def test_the_exported_file_loads(nets, tmp_path):
    dynamicrafter_96.export(tmp_path / "demo.safetensors", nets["vae"], nets["clip"], nets["unet"])
    assert (tmp_path / "demo.safetensors").stat().st_size < 16_000_000
    loaded = checkpoint.load(read_checkpoint(tmp_path / "demo.safetensors"))
    weights = loaded.model.model.diffusion_model.state_dict()
    for key, value in nets["unet"].state_dict().items():
        assert torch.allclose(weights[key].float(), value, atol=1e-3)
    with torch.inference_mode():
        assert loaded.vae.encode(torch.rand(1, 96, 96, 3)).shape == (1, 4, 1, 12, 12)


def test_a_compiler_that_loses_gradients_is_found_out():
    net, x = filled(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))), torch.randn(4, 8)

    def right():
        return net(x).float().square().mean()

    def wrong():
        return net[1](net[0](x).detach() + 0 * net[0](x)).float().square().mean()

    fast.check_gradients(net, right, right)
    with pytest.raises(RuntimeError, match="wrong gradients of 2 weights"):
        fast.check_gradients(net, right, wrong)
    assert all(parameter.grad is None for parameter in net.parameters())


@torch.no_grad()
def test_a_widened_autoencoder_gives_the_same_pictures():
    narrow = filled(AutoencoderKL(embed_dim=4, ddconfig={**autoencoder.DDCONFIG, "ch": 32}))
    wide = autoencoder.widened(narrow)
    images, latents = torch.rand(1, 3, 32, 32), torch.randn(1, 4, 4, 4)
    assert torch.allclose(wide.encoder(images), narrow.encoder(images), atol=1e-4)
    assert torch.allclose(wide.decoder(latents), narrow.decoder(latents), atol=1e-4)
    weight = wide.encoder.mid.block_1.conv1.weight
    assert not torch.allclose(weight[:, ::2], weight[:, 1::2])  # the two can be trained independently


def test_exported_parts_come_back(nets, tmp_path):
    clip, path = filled(CLIP(**demo.OPEN_CLIP)), tmp_path / "demo.safetensors"
    clip.token_embedding.weight.data[100:49000] = 0
    dynamicrafter_96.export(path, nets["vae"], clip, nets["unet"])
    assert path.stat().st_size < 13_000_000
    fresh = {"autoencoder": AutoencoderKL(embed_dim=4, ddconfig=autoencoder.DDCONFIG), "towers": CLIP(**demo.OPEN_CLIP),
             "unet": dynamicrafter_96.new_unet()}
    for (part, net), old in zip(fresh.items(), (nets["vae"], clip, nets["unet"])):
        back = parts.load(part, filled(net, seed=1), path).state_dict()
        assert all(torch.allclose(back[key], value, atol=1e-3) for key, value in old.state_dict().items()), part


def test_the_kept_autoencoder_and_towers_know_the_scenes(tmp_path):
    vae, clip = encodings.encoders(tmp_path)
    rng, ious, errors = Random(42), [], []
    for _ in range(8):
        scene = scenes.random_object(rng, held_out=True)
        true = scenes.draw(scene, 1)
        with torch.no_grad():
            latents = autoencoder.encode_frames(vae, true.movedim(-1, 1).float() / 127.5 - 1).transpose(0, 1)
            decoded = vae.decoder(vae.post_quant_conv(latents / demo.SCALE_FACTOR)).clamp(-1, 1)
        frames = ((decoded + 1) * 127.5).round().byte().movedim(1, -1).numpy()
        ground = scenes.draw_ground(scene).clamp(0, 255).round().numpy()
        ious.append(follow(frames, true.numpy(), ground).iou_T[0])
        errors.append(psnr(frames, true.numpy()))
    assert sum(ious) / 8 > 0.92 and sum(errors) / 8 > 31
    tokens = SimpleTokenizer(context_length=77)(["a red star moves left", "a red star moves right", ""])
    with torch.no_grad():
        left, right, empty = demo.text_features(clip, tokens)
    assert (left - right).norm() > 1 and (left - empty).norm() > 1
    assert not list(tmp_path.iterdir())  # nothing was trained


@pytest.mark.slow
def test_every_stage_trains_and_goes_on(nets, tmp_path, monkeypatch):
    """Without the compiler, which takes minutes."""
    monkeypatch.setattr(torch, "compile", lambda part, **_: part)
    monkeypatch.setattr(encodings, "PART", 2)
    for recipe in (autoencoder, towers):
        monkeypatch.setattr(recipe, "BATCH", 2)
    monkeypatch.setattr(towers, "draw_pool", lambda folder: (
        [make(Random(i)) for make in (scenes.random_object, scenes.random_camera) for i in range(4)],
        torch.rand(8, 3, 32, 32)))
    monkeypatch.setattr(towers, "BATCH", 8)
    monkeypatch.setattr(autoencoder, "stills", lambda count, seed: torch.rand(2, 3, 32, 32))
    made = encodings.encode_clips(tmp_path, nets["vae"], nets["clip"], count=1)
    monkeypatch.setattr(autoencoder, "NARROW_STEPS", 1)
    for steps in (1, 2):
        assert autoencoder.train_autoencoder(tmp_path, steps) and towers.train_towers(tmp_path, steps)
        assert dynamicrafter_96.train_unet(tmp_path, made, steps, 2) and video_unet_96.train(tmp_path, made, steps, 2)
        assert autoencoder.train_decoder(tmp_path, nets["vae"], torch.rand(2, 3, 32, 32), steps, 2)
        for stage in ("autoencoder_96", "towers_96", "unet_96", "video_unet_96", "decoder_96"):
            assert torch.load(tmp_path / f"{stage}.pt", weights_only=True)["step"] == steps
