"""Data sets of clips: items, seeds, mirroring, normalisation, workers."""
import pickle

import pytest
import torch
from stillmotion.nodes.training.data import shapes as data
from stillmotion.nodes.training.data.clips import IMAGENET_MEAN, IMAGENET_STD, Clips, MovingShapes, swap_sides
from torch.utils.data import DataLoader


def same(a, b):
    return a["caption"] == b["caption"] and a["name"] == b["name"] and torch.equal(a["video"], b["video"])


def test_items_are_clips_in_range_with_caption_and_name():
    shapes = MovingShapes(3, frames=8)
    item = shapes[1]
    assert item["video"].shape == (3, 8, 64, 64) and item["video"].dtype == torch.float32
    assert -1 <= item["video"].min() < -0.2 and item["video"].max() <= 1
    clip, form = shapes.clip(1)
    assert item["caption"] == clip.caption(form) and item["name"] == "shape_00001"
    assert torch.equal(((item["video"] + 1) * 127.5).round().byte(), data.draw_clip(clip, 8).permute(3, 0, 1, 2))
    assert len(list(shapes)) == 3  # iteration ends with IndexError


def test_same_seed_same_items_and_another_seed_others():
    first, again, other = MovingShapes(4, seed=5), MovingShapes(4, seed=5), MovingShapes(4, seed=6)
    assert all(same(a, b) for a, b in zip(first, again))
    assert not any(same(a, b) for a, b in zip(first, other))


def test_held_out_shapes_never_occur_in_training():
    for held_out in (False, True):
        clips = [MovingShapes(60, held_out=held_out).clip(i) for i in range(60)]
        assert {data.is_held_out(c.shape, c.colour, c.direction) for c, _ in clips} == {held_out}
        assert {form == data.HELD_OUT_FORM for _, form in clips} == {held_out}


def test_larger_shapes_are_the_same_scene():
    small, large = MovingShapes(1)[0]["video"], MovingShapes(1, size=(128, 128))[0]["video"]
    shrunk = torch.nn.functional.avg_pool3d(large, (1, 2, 2))
    assert (small - shrunk).abs().mean() < 0.01


def test_wide_clips_are_the_square_ones_with_more_background():
    square, wide = MovingShapes(1, size=(64, 64))[0], MovingShapes(1, size=(64, 96))[0]
    assert torch.equal(wide["video"][..., 16:80], square["video"]) and wide["caption"] == square["caption"]
    assert (wide["video"] - square["video"][:, :1, :1, :1]).abs().amax((0, 1, 2)).nonzero().flatten().min() >= 16


@pytest.mark.parametrize("settings, words", [
    ({"count": 0}, "count = 0"), ({"count": 1, "frames": 33}, "1 to 32"), ({"count": 1, "frames": 0}, "frames = 0"),
    ({"count": 1, "size": (8, 64)}, "64x8"), ({"count": 1, "normalise": "half"}, "imagenet")])
def test_settings_that_cannot_be_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        MovingShapes(**settings)


def test_mirrored_clips_swap_left_and_right_in_their_captions():
    plain, mirrored = MovingShapes(20), MovingShapes(20, mirror=True)
    flipped = 0
    for a, b in zip(plain, mirrored):
        if not torch.equal(a["video"], b["video"]):
            flipped += 1
            assert torch.equal(a["video"].flip(-1), b["video"]) and b["caption"] == swap_sides(a["caption"])
        else:
            assert a["caption"] == b["caption"]
    assert 4 < flipped < 16


def test_swapped_words():
    assert swap_sides("Left, then RIGHT and rightmost; left-handed, leftover, bright") == (
        "Right, then LEFT and leftmost; right-handed, leftover, bright")
    assert swap_sides("moves leftward") == "moves rightward"


def test_each_epoch_draws_anew_and_comes_back():
    shapes = MovingShapes(12, mirror=True)
    first = [item["video"] for item in shapes]
    shapes.set_epoch(1)
    assert not all(torch.equal(a, b["video"]) for a, b in zip(first, shapes))
    shapes.set_epoch(0)
    assert all(torch.equal(a, b["video"]) for a, b in zip(first, shapes))


def test_imagenet_normalisation():
    plain, normalised = MovingShapes(1)[0]["video"], MovingShapes(1, normalise="imagenet")[0]["video"]
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.allclose(normalised * std + mean, (plain + 1) / 2, atol=1e-6)


class Louder(MovingShapes):
    def augment_text(self, caption, rng):
        return f"{caption} {rng.randrange(1000)}"

    def augment_frames(self, video_CTHW, rng):
        return video_CTHW * rng.uniform(0.5, 0.9)


def test_text_and_frames_are_augmented_by_overriding():
    plain, louder = MovingShapes(1)[0], Louder(1)[0]
    assert louder["caption"].startswith(plain["caption"] + " ")
    assert 0.49 < louder["video"].abs().max() / plain["video"].abs().max() < 0.91
    assert same(louder, Louder(1)[0])


def test_workers_give_each_item_once_and_the_same():
    shapes = Louder(9, frames=2, mirror=True)
    loader = DataLoader(shapes, batch_size=2, num_workers=2, multiprocessing_context="fork", persistent_workers=True)
    for epoch in (0, 1):
        shapes.set_epoch(epoch)
        batches = list(loader)
        assert [n for b in batches for n in b["name"]] == [shapes[i]["name"] for i in range(9)]
        assert torch.equal(torch.cat([b["video"] for b in batches]), torch.stack([i["video"] for i in shapes]))


def test_a_data_set_can_be_pickled_for_workers_that_are_spawned():
    assert same(pickle.loads(pickle.dumps(MovingShapes(3, mirror=True)))[2], MovingShapes(3, mirror=True)[2])


def test_a_source_must_say_how_it_reads():
    with pytest.raises(NotImplementedError):
        Clips().read(0, None)
