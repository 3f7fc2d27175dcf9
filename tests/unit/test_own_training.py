"""What web/pages/own_training.md and workflows/training offer runs as written: own classes, YAML files."""

import json
import re
import sys
from pathlib import Path

import host
import pytest
import torch
from stillmotion.nodes.common.demo import CAUSAL_WAN, DYNAMICRAFTER
from stillmotion.nodes.common.files import read_checkpoint
from stillmotion.nodes.training import load as parts
from stillmotion.nodes.training.config import make_config
from stillmotion.nodes.training.data.clips import MovingShapes
from stillmotion.nodes.training.data.folders import write_shapes
from stillmotion.nodes.training.families import base
from stillmotion.nodes.training.families.registry import load_model, make_family
from stillmotion.nodes.training.parallel import make_processes
from stillmotion.nodes.training.run import Training

PAGE = host.PACK / "web" / "pages" / "own_training.md"
EXAMPLES = sorted((host.WORKFLOWS / "training").glob("*.yaml"))
TINY = {"steps": 2, "batch_size": 2, "accumulation": 1, "num_frames": 4, "frame_size": "32", "model_channels": 16,
        "channel_mult": [1, 2], "num_res_blocks": 1, "device": "cpu", "vae_psnr": 0.0}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(base, "SAMPLE_STEPS", 2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "clips"
    write_shapes(MovingShapes(10, frames=4, size=(32, 32)), folder)
    numbers = {f"shape_{i:05}.mp4": [i / 10, 5.0] for i in range(10)}
    (folder / "conditions.json").write_text(json.dumps(numbers))
    return folder


def train(settings):
    """What workflows/train.py does."""
    dataset, model = parts.load_dataset(settings), load_model(settings)
    encoders = parts.load_encoders(settings, parts.works_in_pixels(model, settings), model)
    family, result = make_family(model, encoders, settings, dataset), Path(settings.output)
    processes = make_processes(settings.mixed_precision, settings.device)
    Training(family, dataset, settings, result, result.with_suffix(""), processes).run()
    return family, dataset


@pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * path.stem.startswith("dynamicrafter"))
    for path in EXAMPLES])
def test_every_example_runs_with_the_demo_in_place_of_your_checkpoint(path, clips, tmp_path):
    family = make_config(path, {}).family
    given = {**TINY, "data_dir": str(clips), "output": str(tmp_path / "m.safetensors"), "encoders": "demo", "vae": "",
             "clip": "", "block": 2}
    if family in ("dynamicrafter", "causal_wan"):
        given["checkpoint"] = str({"dynamicrafter": DYNAMICRAFTER, "causal_wan": CAUSAL_WAN}[family])
    settings = make_config(path, given)
    if settings.mixed_precision != "no":
        pytest.importorskip("accelerate")
    trained, _ = train(settings)
    assert (tmp_path / "m.safetensors").exists()
    if settings.train == "lora":
        assert all("lora_" in key or key.endswith("alpha")
                   for key in read_checkpoint(tmp_path / "m.safetensors").tensors)


def test_every_example_is_in_the_table():
    text = PAGE.read_text()
    assert {path.name for path in EXAMPLES} == set(re.findall(r"^\| `(\w+\.yaml)`", text, re.MULTILINE))


def test_the_classes_of_the_page_carry_conditions_from_the_data_set_to_the_network(clips, tmp_path, monkeypatch):
    codes = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in codes] == ["my_data.py", "my_network.py", "node.py"]
    for name, code in codes:
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    settings = make_config(None, {**TINY, "space": "pixels", "data_dir": str(clips), "seed": 3,
                                  "dataset": "my_data:Streets", "network": "my_network:Bounded",
                                  "output": str(tmp_path / "m.safetensors")})
    family, dataset = train(settings)
    captions = {dataset[i]["caption"].startswith("a video of") for i in range(10)}
    assert captions == {True, False} and dataset[3]["condition"].tolist() == pytest.approx([0.3, 5.0])
    assert torch.equal(dataset[3]["video"], dataset[3]["video"])
    batch = family.encode(dataset[3])
    assert batch["condition"].tolist() == pytest.approx([0.3, 5.0])
    import node
    model = node.load(tmp_path / "m.safetensors", parts.load_class("my_network:Bounded", torch.nn.Module))
    net = model.model.diffusion_model
    assert net.params.additional_condition_dim == 2 and "Bounded" in [kind.__name__ for kind in type(net).__mro__]
    assert net.additional_embed.weight.abs().sum() > 0
    with pytest.raises(ValueError, match="has no numbers of an additional condition, this model takes 2"):
        family.encode({"video": dataset[0]["video"], "caption": "", "name": "x"})


@pytest.mark.parametrize("name, words", [
    ("no_such_module:Clips", "there is no module no_such_module in"), ("json:Clips", "Clips in json is no subclass"),
    ("json", "the class in json is no subclass of Clips. Derive it from stillmotion.nodes.training.data.clips.Clips"),
])
def test_classes_that_cannot_be_used(name, words, clips):
    with pytest.raises(ValueError, match=words):
        parts.load_dataset(make_config(None, {"data_dir": str(clips), "dataset": name}))
