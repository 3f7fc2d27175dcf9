"""What a training run shows: the pictures are legible in the node, and nothing in them is cut off."""
import json
from pathlib import Path

import pytest
import torch
from PIL import ImageFont
from stillmotion.nodes.common.drawing import SCALE, Pen, stacked
from stillmotion.nodes.training.curves import Curves, draw_curves
from stillmotion.nodes.training.data.sheet import WIDTH, draw_sheet
from stillmotion.nodes.training.progress import Progress

GRAPH = json.loads((Path(__file__).resolve().parents[2] / "workflows" / "train.json").read_text())
SMALLEST = 14  # of letters, where the node shows the picture: the page's own, of the inputs' names, are 12 to 14
SHARE, INPUTS = 0.95, 500  # of the node's width for the picture; height of its inputs above
CAPTION = "a large magenta triangle moves down and right on a yellow background"
LONG = Curves([(step, 10 ** (1 - step / 3e5)) for step in range(1, 1_000_001, 5000)],
              [(step, 3e-5 * 1e6 / step) for step in range(250_000, 1_000_001, 250_000)],
              [(step, 8 + step / 1e5) for step in range(250_000, 1_000_001, 250_000)])
HEADLINE = Progress(900_000, 1_000_000, 2412, 0.0123, 0.00098, 86400.0, None).text


@pytest.fixture
def written(monkeypatch):
    """[(letters' size, box in the picture: left, top, right, bottom, size of the picture)] of all texts drawn."""
    found, text = [], Pen.text

    def note(pen, x, y, words, size, colour=(0, 0, 0), anchor="lt"):
        box = ImageFont.load_default(size * SCALE).getbbox(words, anchor=anchor)
        whole = pen.draw.im.size
        found.append((size, [edge / SCALE + place for edge, place in zip(box, (x, y, x, y))],
                      [side / SCALE for side in whole]))
        text(pen, x, y, words, size, colour, anchor)

    monkeypatch.setattr(Pen, "text", note)
    return found


def pictures():
    clip = torch.rand(8, 64, 64, 3)
    return {"live": stacked(draw_curves(LONG, HEADLINE), draw_sheet([(f"from the first frames: {CAPTION}", clip),
                                                                     ("from the text", clip),
                                                                     ("the clip itself", clip)])),
            "curves": draw_curves(LONG, "a_name_of_a_model_that_is_rather_long_00012: 1000000 steps"),
            "begun": draw_curves(Curves([(1, 0.9)], [], []), "step 1 of 2"),
            "wide": draw_sheet([(CAPTION * 3, torch.rand(1, 36, 64, 3))] * 2)}


def test_all_letters_are_legible_in_the_node_and_inside_the_picture(written):
    drawn = pictures()
    node, = (node for node in GRAPH["nodes"] if node["type"] == "Stillmotion_TrainVideoModel")
    for picture in drawn.values():
        assert picture.width == WIDTH
    width, height = node["size"]
    shown = min(SHARE * width / WIDTH, (height - INPUTS) / drawn["live"].height)
    assert min(size for size, *_ in written) * shown >= SMALLEST
    assert len(written) > 40
    for _, (left, top, right, bottom), (width, height) in written:
        assert left >= 0 and top >= 0 and right <= width and bottom <= height


def test_no_text_of_the_curves_lies_on_another(written):
    draw_curves(LONG, HEADLINE)
    boxes = [box for _, box, _ in written]
    for i, a in enumerate(boxes):
        for b in boxes[i + 1:]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1]), (a, b)


def test_frames_of_a_wide_clip_leave_no_empty_rows():
    assert pictures()["wide"].height < 2 * (54 + 2 * 26 + 4) + 10
