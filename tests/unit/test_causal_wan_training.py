"""The small causal Wan's recipe: one teacher-forced pass equals the sampler's forward passes, and the file loads."""

import json
from random import Random

import pytest
import torch
from safetensors import safe_open
from stillmotion.nodes.causal_wan import checkpoint as loader
from stillmotion.nodes.causal_wan import conditioning
from stillmotion.nodes.causal_wan.cache import KVCache
from stillmotion.nodes.common.demo import DYNAMICRAFTER_96
from stillmotion.nodes.common.files import read_checkpoint
from stillmotion.nodes.dynamicrafter import checkpoint as dynamicrafter
from stillmotion.nodes.training import objectives
from stillmotion.nodes.training.data import scenes
from stillmotion.nodes.training.recipes import causal_wan as recipe
from stillmotion.nodes.training.recipes import causal_wan_clips as clips_of
from stillmotion.nodes.training.recipes.laws import block_sigmas

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def net():
    """With gates as large as after training: an untrained network hardly attends to other frames."""
    made = recipe.demo_network()
    torch.nn.init.normal_(made.head.head.weight, std=0.05)
    for block in made.blocks:
        torch.nn.init.normal_(block.modulation)
    return made


def encodings(clips=6, turn=0):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    caption = torch.arange(1, 7).view(1, 2, 3).expand(clips, 2, 3)
    return {"latents": random(clips, 4, clips_of.FRAMES, 8, 8).half(), "tokens": random(clips, 17, 48),
            "turn": torch.full((clips,), turn), "caption": caption, "grey": random(1, 4, 1, 8, 8),
            "short_latents": random(clips, 4, clips_of.WINDOW, 8, 8).half(), "short_tokens": random(clips, 17, 48),
            "short_turn": torch.zeros(clips), "short_caption": caption, "text": random(7, 77, 32),
            "grey_tokens": random(1, 17, 48)}


def batch_of(turn=0):
    found = encodings(turn=turn)
    z = found["latents"][:2].float()
    y = recipe.image_condition(z[:, :, 0], found["grey"], clips_of.FRAMES)
    return recipe.Batch(z, y, (found["text"][1:3], found["text"][4:6]), found["tokens"][:2], turn, False)


def test_frames_see_what_the_sampler_would_show_them():
    found = objectives.teacher_mask((2, 1, 1), first=1).int().tolist()
    assert found == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0],  # clean: two frames, one frame
                     [1, 1, 0, 1, 0], [1, 1, 1, 0, 1]]                   # noisy: the second block, the third


@pytest.mark.parametrize("turn", [0, 8])
@torch.no_grad()
def test_one_pass_equals_the_blocks_one_after_the_other_with_a_cache(net, turn):
    batch, excerpt = batch_of(turn), recipe.draw_excerpt(Random(1), turn)
    excerpt = excerpt._replace(end=clips_of.WINDOW)
    frames, first = excerpt.frames, excerpt.first
    z, y = batch.z_BCTHW[:, :, frames], batch.y_BYTHW[:, :, frames]
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(z.shape, generator=generator)
    sigma_BN = block_sigmas((len(z), len(excerpt.blocks)), recipe.SHIFT, generator)
    keys = net.project_context(batch.text_BLC[1], batch.image_BNW)
    context = torch.randn(z.shape, generator=generator)

    def loss(context):
        return objectives.causal_flow_loss(net, z, context, y, keys, excerpt.blocks, first, sigma_BN, noise).item()

    layout = net.params.cache_layout(capacity=len(frames), sink=4, height=8, width=8, relative_sink=False)
    cache, start, errors = KVCache(layout, len(z), torch.float32, "cpu"), 0, []
    for index, count in enumerate(excerpt.blocks):
        ids = range(start, start + count)
        own, condition = slice(start, start + count), y[:, :, start:start + count]
        sigma = sigma_BN[:, index].view(-1, 1, 1, 1, 1)
        noisy = (1 - sigma) * z[:, :, own] + sigma * noise[:, :, own]
        t_BF = 1000 * sigma_BN[:, index:index + 1].expand(-1, count)
        flow = net(torch.cat((noisy, condition), dim=1), t_BF, keys, ids, cache)
        if index >= first:
            errors.append((flow - (noise - z)[:, :, own]).square())
        net(torch.cat((context[:, :, own], condition), dim=1), torch.zeros_like(t_BF), keys, ids, cache)
        start += count
    found = torch.cat(errors, dim=2).mean().item()
    assert loss(context) == pytest.approx(found, abs=1e-5)
    assert loss(z) != pytest.approx(found, abs=1e-4)  # another context makes a difference


def test_gradients_reach_every_parameter(net):
    batch = batch_of()
    recipe.excerpt_loss(net, batch, recipe.draw_excerpt(Random(0), 0), batch.z_BCTHW,
                        torch.Generator().manual_seed(2)).backward()
    without = [name for name, value in net.named_parameters() if value.grad is None or not value.grad.any()]
    net.zero_grad(set_to_none=True)
    assert not without


def test_the_exported_network_loads_with_every_key_accounted_for(net, tmp_path, caplog):
    path = tmp_path / "causal_wan_demo.safetensors"
    recipe.export(path, net)
    assert path.stat().st_size < 6_000_000
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["config"])["transformer"] == {"causal_ar": True}
    with caplog.at_level("INFO"):
        model = loader.load(read_checkpoint(path), weight_dtype="fp32").model
    keys = len(net.state_dict())
    assert f"{keys} of {keys} keys found" in caplog.text and "does not say that it is causal" not in caplog.text
    assert model.wan_params == recipe.PARAMS
    y = torch.ones(1, 4, 1, 1, 1)
    assert torch.allclose(model.process_latent_in(y), y * recipe.SCALE_FACTOR)


def test_conditions_of_training_are_those_of_the_nodes(tmp_path, net, monkeypatch):
    monkeypatch.setattr(clips_of, "PART", 2)
    found = clips_of.encode_clips(tmp_path, {"long": 1, "short": 1})
    assert found["latents"].std() == pytest.approx(1, abs=0.25) and found["text"].isfinite().all()
    demo = dynamicrafter.load(read_checkpoint(DYNAMICRAFTER_96), weight_dtype="fp32")
    image_THWC = next(clips_of.drawn_scenes(Random("long 0"), "long")).frames_THWC[:1] / 255
    entries, latent = conditioning.image_conditions(demo.vae, image_THWC, 96, 96, 16, 4, "auto", True, False, 1)
    recipe.export(tmp_path / "causal.safetensors", net)
    model = loader.load(read_checkpoint(tmp_path / "causal.safetensors")).model
    assert model.encoders_of == "demo, 96x96"
    conds = model.extra_conds(cross_attn=found["text"][:1], noise=latent["samples"], device="cpu", **entries,
                              clip_vision_output=demo.clip_vision.encode_image(image_THWC))
    y = recipe.image_condition(found["latents"][:1, :, 0].float(), found["grey"], 16)
    assert torch.allclose(conds["c_concat"].cond, y, atol=5e-3)
    assert torch.allclose(conds["clip_fea"].cond, found["tokens"][:1], atol=1e-4)


def test_excerpts_are_windows_of_the_sampler():
    rng = Random(3)
    for turn in (0, *clips_of.TURNS) * 30:
        excerpt = recipe.draw_excerpt(rng, turn)
        assert sum(excerpt.blocks) == len(excerpt.frames) == clips_of.WINDOW
        assert excerpt.frames[-1] == excerpt.end - 1 < clips_of.FRAMES
        learned = excerpt.frames[sum(excerpt.blocks[:excerpt.first]):]
        assert learned and (excerpt.first == 0 or learned[0] >= turn)
        if turn:  # everything before the turn is one block, and the trained frames follow it without a gap
            assert learned[0] == turn and excerpt.first == 1


def test_turning_clips_go_on_from_where_they_are():
    scene = scenes.random_object(Random(4), frames=clips_of.FRAMES, fs=clips_of.FS)
    way = "up" if scene.direction != "up" else "left"
    frames = clips_of.draw_turning(scene, 12, way)
    assert len(frames) == clips_of.FRAMES and torch.equal(frames[:12], scenes.draw(scene, clips_of.FRAMES)[:12])
    cover = (frames - scenes.draw_ground(scene).clamp(0, 255).round()).abs().amax(-1).gt(24).float()
    place = torch.arange(float(scenes.SIZE))
    centres = torch.stack([cover.sum(1) @ place, cover.sum(2) @ place], 1) / cover.sum((1, 2))[:, None]
    moved = centres.diff(dim=0)
    for part, direction in ((moved[:11], scene.direction), (moved[11:], way)):
        expected = [scene.speed * part for part in scenes.DIRECTIONS[direction]]
        assert part.mean(0).tolist() == pytest.approx(expected, abs=0.1)


def test_some_batches_have_no_start_image():
    found = encodings()
    found["turn"] = torch.tensor([0, 0, *clips_of.TURNS])
    rng, generator = Random(0), torch.Generator().manual_seed(0)
    batches = [recipe.draw_batch(found, 2, rng, generator) for _ in range(200)]
    assert 15 < sum(batch.blank for batch in batches) < 45
    for batch in batches[:50]:
        mask, latent = batch.y_BYTHW[:, :4], batch.y_BYTHW[:, 4:]
        assert mask.any() != batch.blank and (batch.turn == 0 or not batch.blank)
        assert (latent == found["grey"]).all() == batch.blank
    unseen = [(batch.image_BNW == found["grey_tokens"]).all((1, 2)) for batch in batches]
    assert all(grey.all() for grey, batch in zip(unseen, batches) if batch.blank)
    assert 0.4 < torch.cat([grey for grey, batch in zip(unseen, batches) if not batch.blank]).float().mean() < 0.6
    assert {batch.z_BCTHW.shape[2] for batch in batches if not batch.turn} == {clips_of.WINDOW, clips_of.FRAMES}


@pytest.mark.parametrize("turn", [0, 16])
def test_rollouts_are_causal_and_follow_the_prompt_after_the_turn(net, turn):
    batch = batch_of(turn)
    made = recipe.roll_out(net, batch, 0, 24, seed=9)
    assert made.shape == (2, 4, 24, 8, 8) and made.isfinite().all()
    assert torch.allclose(recipe.roll_out(net, batch, 0, 12, seed=9), made[:, :, :12], atol=1e-5)
    other = recipe.roll_out(net, batch._replace(text_BLC=(batch.text_BLC[0], batch.text_BLC[0])), 0, 24, seed=9)
    assert torch.equal(other[:, :, :16], made[:, :, :16])
    assert torch.equal(other[:, :, 16:], made[:, :, 16:]) == (turn == 0)


def test_rollouts_go_on_from_the_clip(net):
    batch = batch_of(16)
    made = recipe.roll_out(net, batch, 12, 20, seed=9)
    assert made.shape[2] == 20 and torch.equal(made[:, :, :12], batch.z_BCTHW[:, :, :12])
    assert not torch.equal(made[:, :, 12:], recipe.roll_out(net, batch, 0, 20, seed=9)[:, :, 12:])


def test_training_in_two_stages(tmp_path):
    found = encodings()
    path = tmp_path / "causal_wan_1.pt"
    turns = clips_of.TURNS
    found["turn"] = torch.tensor([0, 0, *turns])
    net = recipe.demo_network()
    before = net.head.head.weight.clone()
    net = recipe.train(net, found, path, steps=2, size=2, lr=1e-3, seed=1, own_context=False, save_every=1)
    net = recipe.train(net, found, tmp_path / "causal_wan_2.pt", steps=2, size=2, lr=1e-3, seed=2, own_context=True,
                       save_every=1)
    assert not torch.equal(net.head.head.weight, before)
    assert path.with_suffix(".jsonl").read_text().count("\n") == 2


def test_larger_clips_turn_and_stay_inside(monkeypatch):
    monkeypatch.setattr(clips_of, "PART", 10)
    clips = list(clips_of.drawn_scenes(Random(1), "long"))
    assert [clip.turn for clip in clips] == [*clips_of.TURNS] + [0] * 6
    for clip in clips:
        first, last = clip.captions[0][0], clip.captions[1][0]
        assert len(clip.frames_THWC) == clips_of.FRAMES and (first != last) == bool(clip.turn)
        for edge in (clip.frames_THWC[:, 0], clip.frames_THWC[:, -1], clip.frames_THWC[:, :, 0]):
            assert torch.equal(edge, edge[:1].expand_as(edge))  # the object never touches it
        if clip.turn:
            moved = (clip.frames_THWC[1:].int() - clip.frames_THWC[:-1]).abs().sum((1, 2, 3))
            assert moved.min() > 0  # it never jumps back or stands still
    assert {clip.turn for clip in clips_of.drawn_scenes(Random(1), "short")} == {0}


def test_parts_of_larger_clips_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(clips_of, "PART", 2)
    made = clips_of.encode_clips(tmp_path, {"long": 1, "short": 2})
    assert len(list(tmp_path.glob("causal_wan_*.pt"))) == 3
    again = clips_of.encode_clips(tmp_path, {"long": 1, "short": 2})
    assert made.keys() == again.keys() and all(torch.equal(made[key], value) for key, value in again.items())
    assert made["latents"].shape == (2, 4, clips_of.FRAMES, 12, 12)
    assert made["short_latents"].shape == (4, 4, clips_of.WINDOW, 12, 12)
    demo = dynamicrafter.load(read_checkpoint(DYNAMICRAFTER_96), weight_dtype="fp32")
    caption = next(clips_of.drawn_scenes(Random("short 1"), "short")).captions[0][1]
    expected = demo.clip.encode_from_tokens(demo.clip.tokenize(caption))[0]
    assert torch.allclose(made["text"][made["short_caption"][2, 0, 1]], expected, atol=1e-5)
