"""The causal Wan network alone: cached vs. uncached, per-frame timesteps, patches and rejected inputs."""

import math

import pytest
import torch
from block_loop_stub import CHANNELS, CLIP, HEIGHT, TEXT, WIDTH, make_network, make_plan, visible_frames
from stillmotion.nodes.causal_wan.cache import KVCache
from stillmotion.nodes.causal_wan.rope import axis_pairs, make_rotation
from stillmotion.nodes.common.fused import rotate


def random_inputs(frames, batch=1, channels=CHANNELS):
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(batch, channels, frames, HEIGHT, WIDTH, generator=generator),
            torch.rand(batch, frames, generator=generator) * 1000, torch.randn(batch, 5, TEXT, generator=generator),
            torch.randn(batch, 4, CLIP, generator=generator))


@pytest.mark.parametrize("i2v", [False, True])
@pytest.mark.parametrize("blocks, window, sink", [((1,) * 6, -1, 0), ((3, 3), -1, 0), ((1, 2, 3), -1, 0),
                                                  ((2, 2, 2, 2), 4, 1), ((3, 1, 2, 3), 5, 2)])
@torch.inference_mode()
def test_cached_attention_equals_full_causal_attention(i2v, blocks, window, sink):
    """One block at a time with the cache, compared with one forward pass over all frames with the causal mask."""
    network, plan = make_network(i2v), make_plan(blocks, window=window, sink=sink)
    x, t, text, image = random_inputs(plan.frames, 2, network.params.in_dim)
    keys = network.project_context(text, image if i2v else None)
    cache = KVCache(plan.layout(network.params, HEIGHT, WIDTH), 2, torch.float32, "cpu")
    flows, start = [], 0
    for count in blocks:
        frames = slice(start, start + count)
        flows.append(network(x[:, :, frames], t[:, frames], keys, range(start, start + count), cache))
        start += count
    full = network(x, t, keys, range(plan.frames), mask_FF=visible_frames(plan))
    cached = torch.cat(flows, dim=2)
    assert ((cached - full).norm() / full.norm()).item() < 1e-6
    unmasked = network(x, t, keys, range(plan.frames))
    assert ((unmasked - full).norm() / full.norm()).item() > 1e-4


@torch.inference_mode()
def test_an_endless_video_never_looks_further_than_the_window():
    """With one layer a key depends only on its own frame, so sink and window can be recomputed side by side."""
    network, window, sink = make_network(layers=1), 5, 2
    plan = make_plan((2,) * 20, window=window, sink=sink, endless=True)
    x, t, text, _ = random_inputs(plan.frames)
    keys = network.project_context(text)
    cache = KVCache(plan.layout(network.params, HEIGHT, WIDTH), 1, torch.float32, "cpu")
    for start in range(0, plan.frames, 2):
        end = start + 2
        seen = [*range(min(sink, end)), *range(max(sink, end - (window - sink)), end)]
        virtual = range(len(seen))
        for _ in range(2):  # a second pass over the same block
            flow = network(x[:, :, start:end], t[:, start:end], keys, range(start, end), cache)
            expected = network(x[:, :, seen], t[:, seen], keys, virtual)[:, :, -2:]
            assert ((flow - expected).norm() / expected.norm()).item() < 1e-5


@torch.inference_mode()
def test_every_frame_has_a_timestep_of_its_own():
    network = make_network()
    x, t, text, _ = random_inputs(3)
    keys = network.project_context(text)
    alone = torch.eye(3, dtype=torch.bool)  # no frame attends to another
    before = network(x, t, keys, range(3), mask_FF=alone)
    t[:, 1] += 100
    after = network(x, t, keys, range(3), mask_FF=alone)
    assert torch.equal(before[:, :, [0, 2]], after[:, :, [0, 2]])
    assert not torch.allclose(before[:, :, 1], after[:, :, 1], atol=1e-3)


@torch.inference_mode()
def test_only_the_distance_between_frames_counts():
    """Rotary positions far beyond any table: same flow at frame 0 and at frame 100000."""
    network = make_network()
    x, t, text, _ = random_inputs(3)
    keys = network.project_context(text)
    near, far, spread = (network(x, t, keys, ids) for ids in (range(3), range(100000, 100003), (0, 5, 9)))
    assert ((far - near).norm() / near.norm()).item() < 1e-5
    assert ((spread - near).norm() / near.norm()).item() > 1e-4


def test_rotation_turns_by_frame_row_and_column():
    assert axis_pairs(128) == (22, 21, 21) and axis_pairs(12) == (2, 2, 2)
    rotation = make_rotation([7], 2, 3, 12)
    angle = torch.atan2(rotation[..., 1], rotation[..., 0])
    expected = [[0.7168147, 0.07, row, row / 100, column, column / 100] for row in range(2) for column in range(3)]
    assert torch.allclose(angle, torch.tensor(expected), atol=1e-6)  # 7 rad minus one turn, and 7 / 100
    ones = rotate(torch.ones(1, 6, 24), rotation, heads=2)
    cos, sin = math.cos(1), math.sin(1)  # pair 4, 5 rotates with the row, here row 1 by one rad
    assert ones[0, 5, 4:6].tolist() == pytest.approx([cos - sin, sin + cos], abs=1e-6)
    assert torch.equal(ones[..., :12], ones[..., 12:])


@torch.inference_mode()
def test_core_block_patches_act():
    network = make_network()
    x, t, text, _ = random_inputs(2)
    keys, seen = network.project_context(text), []

    def patch(args, extra):
        seen.append(sorted(args))
        return {"img": extra["original_block"](args)["img"] * 0.5}

    options = {"patches_replace": {"dit": {("double_block", 1): patch}}}
    plain, patched = network(x, t, keys, range(2)), network(x, t, keys, range(2), transformer_options=options)
    assert seen == [["img", "pe", "transformer_options", "txt", "vec"]]
    assert not torch.allclose(plain, patched)


def test_bad_inputs_are_refused():
    network, image_network = make_network(), make_network(True)
    x, t, text, image = random_inputs(2)
    with pytest.raises(ValueError, match=f"text embedding is 7 wide, but the model takes {TEXT}"):
        network.project_context(text[..., :7])
    with pytest.raises(ValueError, match="clip_fea"):
        image_network.project_context(text)
    with pytest.raises(ValueError, match=rf"clip_fea has shape \[1, 4, 3\].*{CLIP}"):
        image_network.project_context(text, image[..., :3])
    with pytest.raises(ValueError, match="latent is 5 x 4"):
        network(x[..., :5], t, network.project_context(text), range(2))
