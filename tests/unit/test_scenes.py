"""Drawn scenes: positions, captions, and what is held out from training."""
from dataclasses import replace
from itertools import product
from random import Random

import pytest
import torch
from stillmotion.nodes.training.data import scenes


def test_one_combination_in_five_is_held_out_and_never_drawn():
    combinations = set(product(scenes.SHAPES, scenes.COLOURS, scenes.DIRECTIONS))
    held_out = {c for c in combinations if scenes.is_held_out(*c)}
    assert 0.18 < len(held_out) / len(combinations) < 0.22
    rng = Random(0)
    drawn = {(s.shape, s.colour, s.direction) for s in (scenes.random_object(rng) for _ in range(3000))}
    assert drawn == combinations - held_out
    unseen = [scenes.random_object(rng, held_out=True) for _ in range(50)]
    assert all((s.shape, s.colour, s.direction) in held_out for s in unseen)


def test_captions_name_what_is_drawn():
    scene = replace(scenes.random_object(Random(1)), shape="star", pattern="striped", colour="red", ground="brown",
                    style="checked", direction="left")
    assert scene.caption() == "a red striped star moves left on a checked brown background"
    plain = replace(scene, pattern="plain", style="plain")
    assert plain.caption(1) == "red star moving left, brown background"
    camera = replace(scenes.random_camera(Random(1)), picture="city", move="zooms in")
    assert camera.caption() == "the camera zooms in over a city"


@pytest.mark.parametrize("direction", list(scenes.DIRECTIONS))
def test_objects_stay_inside_whichever_way_they_go(direction):
    rng = Random(2)
    for _ in range(8):
        scene = replace(scenes.random_object(rng), direction=direction, style="plain")
        frames = scenes.draw(scene)
        ground = frames[0, 0, 0]
        edges = torch.cat((frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]))
        assert (edges == ground).all() and not (frames == ground).all()


@pytest.mark.parametrize("make", [scenes.random_object, scenes.random_camera])
def test_a_returning_clip_ends_as_it_began(make):
    frames = scenes.draw(make(Random(3), returns=True))
    assert frames.shape == (16, scenes.SIZE, scenes.SIZE, 3) and frames.dtype == torch.uint8
    assert torch.equal(frames[0], frames[-1]) and not torch.equal(frames[0], frames[7])


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_every_shape_has_the_area_of_its_circle_and_a_sharp_outline(shape):
    axis = torch.arange(128) + 0.5 - 64
    distance = scenes.signed_distance(shape, axis[None, :], axis[:, None], 20.0)
    assert (distance < 0).sum().item() == pytest.approx(3.1416 * 400, rel=0.2)
    cover = (0.5 - distance).clamp(0, 1)
    soft = ((cover > 0) & (cover < 1)).sum().item()
    assert soft < 2.2 * 2 * 3.1416 * 20  # about a pixel along the outline
    assert torch.allclose(cover, cover.flip(1), atol=1e-4)  # all shapes are symmetric


@pytest.mark.parametrize("move, opposite", [("pans left", "pans right"), ("pans up", "pans down"),
                                            ("zooms in", "zooms out")])
def test_opposite_moves_cancel(move, opposite):
    """The opposite move, started from the last frame of a move, returns to its start."""
    scene = replace(scenes.random_camera(Random(4)), move=move, picture="hills", zoom=1.0, x=0.0, y=0.0)
    way = 15 / scene.fs
    x, y, grows = scenes.MOVES[move]
    back = replace(scene, move=opposite, x=x * scenes.MOTION * way, y=y * scenes.MOTION * way,
                   zoom=2.718281828 ** (grows * scenes.ZOOM * way))
    difference = scenes.draw(scene).int() - scenes.draw(back).flip(0).int()
    assert difference.abs().float().mean() < 0.05


def test_scenes_are_drawn_from_their_description_alone():
    rng = Random(5)
    for make in (scenes.random_object, scenes.random_camera):
        scene = make(rng)
        assert torch.equal(scenes.draw(scene, 4), scenes.draw(replace(scene), 16)[:4])
