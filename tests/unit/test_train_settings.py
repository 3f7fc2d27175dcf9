"""Settings of workflows/train.py: YAML, flags, refusals; and what every family and recipe keeps to."""

import argparse
import sys
from pathlib import Path

import pytest
from stillmotion.nodes.training.config import TrainConfig, add_flags, make_config
from stillmotion.nodes.training.families import FAMILIES
from stillmotion.nodes.training.families.registry import module_of
from stillmotion.nodes.training.trackers import open_trackers

PACK = Path(__file__).parents[2]


def flags(line):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(line.split()))


def test_a_flag_wins_over_the_yaml_only_where_it_is_given(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("batch_size: 8\nlearning_rate: 3e-4\nwandb: true\nframe_size: 32\nchannel_mult: [1, 2]\n")
    assert flags("") == {}
    config = make_config(path, flags(""))
    assert (config.batch_size, config.learning_rate, config.wandb, config.size()) == (8, 3e-4, True, (32, 32))
    assert config.num_frames == TrainConfig().num_frames and config.channel_mult == [1, 2]
    config = make_config(path, flags("--batch_size 4 --no_wandb"))  # 4 is also the default, but was given explicitly
    assert (config.batch_size, config.learning_rate, config.wandb) == (4, 3e-4, False)


def test_a_vae_has_defaults_of_its_own_below_the_yaml_and_the_flags(tmp_path):
    (tmp_path / "vae.yaml").write_text("family: vae\nbatch_size: 3\n")
    config = make_config(tmp_path / "vae.yaml", {"steps": 7})
    assert (config.learning_rate, config.batch_size, config.steps) == (1e-3, 3, 7)
    config = make_config(tmp_path / "vae.yaml", {"family": "video_unet"})  # the flag decides which defaults apply
    assert (config.learning_rate, config.steps) == (TrainConfig().learning_rate, 0)


def test_the_flags_of_the_document_are_there():
    line = ("--data_dir d --batch_size 1 --num_epochs 2 --learning_rate 1e-3 --num_frames 8 --frame_size 32 "
            "--model_channels 32 --max_samples 5 --no_wandb")
    config = make_config(None, flags(line))
    assert (config.data_dir, config.num_epochs, config.model_channels, config.max_samples) == ("d", 2, 32, 5)


@pytest.mark.parametrize("text, words", [
    ("bach_size: 3", "bach_size does not fit.*Settings: family"), ("batch_size: many", "batch_size does not fit"),
    ("- 1", "holds no settings"), ("a: [", "cannot be read as YAML"), ("batch_size: 0", "batch_size is 0"),
    ("family: sora", "choose one of video_unet"), ("family: causal_wan", "needs a checkpoint"),
    ("train: projector_temporal", "is for family dynamicrafter"), ("from_scratch: true", "none was given"),
    ("frame_size: 64by64", "WIDTHxHEIGHT"), ("stages: ['32']", "SIZE:STEPS"), ("stages: ['32:5']", "the full size"),
    ("ema_decay: 1", "from 0 to"), ("output: model.ckpt", "must end in .safetensors"), ("seed: -1", "0 or more"),
])
def test_bad_settings(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match=words):
        make_config(path, {})


def test_trackers_are_named_where_they_are_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        open_trackers(TrainConfig(wandb=True), tmp_path)
    assert open_trackers(TrainConfig(), tmp_path) == []


def test_recipes_stand_above_the_trainer():
    for path in (PACK / "nodes" / "training").rglob("*.py"):
        assert "recipes" in path.parts or "recipes" not in path.read_text(), path


def test_every_family_is_one_module_and_one_line():
    for name in FAMILIES:
        module = module_of(name)
        if name == "vae":
            assert callable(module.new)
        else:
            assert module.DEMOS and all(path.exists() for path in module.DEMOS.values()) and callable(module.from_model)
    assert {path.stem for path in (PACK / "nodes" / "training" / "families").glob("*.py")} == {
        "__init__", "base", "registry", "inflate", *FAMILIES}


def test_the_help_is_printed():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert "a cosine to 1 %" in " ".join(parser.format_help().split())
