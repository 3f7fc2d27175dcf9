"""Bad inputs that ComfyUI passes on to a node are rejected with a message before the node runs."""
import pytest
import torch
from comfy_api.latest import io
from stillmotion.nodes.common.inputs import checked

PICTURE, LATENT = torch.zeros(1, 8, 8, 3), {"samples": torch.zeros(1, 4, 2, 1, 1)}
GOOD = {"image": PICTURE, "latent": LATENT, "conditioning": [[torch.zeros(1, 2, 3), {}]], "model": object(), "steps": 3,
        "cfg": 1.5, "name": "x", "loop": True, "mode": "a"}


class Node(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Node", inputs=[
            io.Image.Input("image"), io.Latent.Input("latent"), io.Conditioning.Input("conditioning"),
            io.Model.Input("model"), io.Int.Input("steps", min=1, max=9), io.Float.Input("cfg", min=0.0, max=9.0),
            io.String.Input("name"), io.Boolean.Input("loop"), io.Combo.Input("mode", options=["a", "b"]),
            io.Image.Input("image2", optional=True)])

    @classmethod
    def execute(cls, **values):
        return values


def test_good_values_pass_and_the_node_stays_what_it_was():
    node = checked(Node)
    assert node.execute(**GOOD) == GOOD and node.execute(**GOOD, image2=None)["image2"] is None
    assert node.__name__ == "Node" and node.GET_SCHEMA().node_id == "Node" and issubclass(node, Node)


@pytest.mark.parametrize("change, words", [
    ({"image": None}, "image is empty: connect it"), ({"steps": None}, "steps is empty: give a value"),
    ({"image": 3}, "image is 3, which is no IMAGE"), ({"image2": "x"}, "image2 is 'x', which is no IMAGE"),
    ({"image": torch.zeros(8, 8, 3)}, r"image is of the shape \[8, 8, 3\]"), ({"image": PICTURE[:0]}, "no IMAGE"),
    ({"image": torch.zeros(1, 8, 8, 2)}, "no IMAGE"),
    ({"latent": {}}, "no LATENT"), ({"latent": {"samples": 3}}, "no LATENT"), ({"latent": [1]}, "no LATENT"),
    ({"conditioning": [1, 2]}, "no CONDITIONING"), ({"conditioning": {}}, "no CONDITIONING"),
    ({"model": "x"}, "no MODEL"), ({"model": {}}, "no MODEL"),
    ({"steps": 0}, "steps is 0: allowed are 1 to 9"), ({"steps": 10}, "allowed are 1 to 9"), ({"steps": "x"}, "number"),
    ({"cfg": float("nan")}, "cfg is nan: give a number"), ({"cfg": float("-inf")}, "give a number"),
    ({"name": 3}, "give text"), ({"name": "a\0"}, "NUL"), ({"name": "\ud800"}, "half a character"),
    ({"loop": "yes"}, "true or false"), ({"mode": ["a"]}, "choose one"), ({"mode": {}}, "choose one"),
    ({"mode": 3}, "choose one")])
def test_other_values_are_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        checked(Node).execute(**GOOD | change)
