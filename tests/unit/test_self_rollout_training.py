"""Runs of self-rollout: settings, data sets, resume, several processes."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import bench_self_rollout
import folder_paths
import pytest
import torch
from rollout_stub import I2V, T2V, model, training
from safetensors.torch import load_file
from stillmotion.nodes.training.config import TrainConfig, make_config
from stillmotion.nodes.training.data.clips import MovingShapes
from stillmotion.nodes.training.data.nodes import PromptList
from stillmotion.nodes.training.data.prompts import Prompts
from stillmotion.nodes.training.data.shards import LatentShards, pack
from stillmotion.nodes.training.load import load_dataset, load_encoders
from stillmotion.nodes.training.nodes import TrainVideoModel
from stillmotion.nodes.training.self_rollout.family import SelfRolloutFamily
from stillmotion.nodes.training.self_rollout.nodes import SelfRollout
from stillmotion.nodes.training.self_rollout.settings import SelfRolloutSettings

STUB = Path(__file__).parents[1] / "rollout_stub.py"
GIVEN = {"family": "causal_wan", "objective": "self_rollout", "checkpoint": "student", "teacher": "teacher"}


class Stopped(Exception):
    pass


def run(folder, stop_at=None, **given):
    """The run and its weights."""
    def on_progress(progress):
        if progress.step == stop_at:
            raise Stopped

    made = training(folder, on_progress=on_progress, **given)
    try:
        made.run()
    except Stopped:
        return made, None
    return made, load_file(folder / "m.safetensors")


def test_the_defaults_are_the_papers_below_the_yaml_below_the_flags(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("objective: self_rollout\nfamily: causal_wan\ncheckpoint: s\nteacher: t\nlearning_rate: 1e-5\n")
    config = make_config(path, {"fake_updates": 3, "adam_beta2": 0.999})
    assert (config.learning_rate, config.fake_updates, config.fake_learning_rate) == (1e-5, 3, 4e-7)
    assert (config.clip_norm, config.ema_decay, config.ema_start, config.num_frames) == (10, 0.99, 200, 81)
    assert config.batch_size * config.accumulation == 64 and config.teacher_cfg == 4 and config.block == 0
    assert config.switches() == [] and make_config(path, {"stream_frames": 240}).switches() == [*range(21, 202, 18)]
    assert make_config(None, {}).clip_norm == TrainConfig().clip_norm == 1
    assert make_config(path, {"objective": "denoising"}).clip_norm == 1  # the flag decides which defaults apply


def test_the_settings_of_the_page_are_valid_and_the_first_are_the_defaults(tmp_path):
    page = (Path(__file__).parents[2] / "web" / "pages" / "self_rollout.md").read_text(encoding="utf-8")
    short, long = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    for text in (short, long):
        (tmp_path / "page.yaml").write_text(text, encoding="utf-8")
        config = make_config(tmp_path / "page.yaml", {})
        if text == short:
            plain = make_config(None, GIVEN)
            different = {name for name, value in vars(config).items() if vars(plain)[name] != value}
    assert different == {"checkpoint", "teacher", "fake_score", "vae", "clip", "clip_type", "data_dir", "block",
                         "mixed_precision", "negative_prompt"}
    assert config.switches() == [*range(21, 202, 18)] and (config.rollout_window, config.rollout_sink) == (12, 3)


@pytest.mark.parametrize("given, words", [
    ({"family": "dynamicrafter"}, "is for family causal_wan"), ({"teacher": ""}, "needs a teacher"),
    ({"stages": ["64:5"]}, "all videos of a training at one size.*begin anew at the large one"),
    ({"from_scratch": True}, "a student that makes passable videos from the first step on.*leave from_scratch away"),
    ({"train": "projector_temporal"}, "choose all or lora"),
    ({"score_max": 1000.0}, "below 1000"), ({"teacher_cfg": 0}, "above 0"),
    ({"adam_beta1": 1}, "below 1"), ({"rollout_sink": -1}, "0 or more"),
    ({"stream_frames": 20}, "each must be at most the next"), ({"stream_frames": 240, "stream_new": 21}, "smaller")])
def test_bad_settings_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        make_config(None, {**GIVEN, **given})


def test_both_networks_learn_and_the_student_every_second_step(tmp_path):
    made, weights = run(tmp_path)
    state = torch.load(tmp_path / "m" / "state_1.pt", weights_only=True)
    counts = [{int(entry["step"]) for entry in state[name]["state"].values()}
              for name in ("optimizer", "fake_optimizer")]
    assert counts == [{3}, {6}] and int(state["averaged"]["n_averaged"]) == 2  # from step 2 on
    before = {name: dict(model(I2V, seed).model.diffusion_model.named_parameters())
              for name, seed in (("student", 1), ("teacher", 2))}
    assert all(not torch.equal(value, before["student"][key]) for key, value in made.family.net.named_parameters())
    real, fake = (dict(net.named_parameters()) for net in (made.family.method.real, made.family.method.fake))
    assert all(torch.equal(value, real[key]) and not torch.equal(value, fake[key])
               for key, value in before["teacher"].items())
    average, student = state["averaged"], state["net"]
    assert torch.equal(weights["head.head.weight"], average["module.head.head.weight"].half())
    assert not torch.equal(student["head.head.weight"], average["module.head.head.weight"])
    assert (tmp_path / "m" / "samples" / "step_0000006.png").exists()


LORA = {"train": "lora", "lora_rank": 2, "fake_lora": True}


@pytest.mark.parametrize("place, given", [
    ("between steps", {}), ("between steps", LORA), ("between the student and the fake score", {})])
def test_a_stopped_training_goes_on_bit_for_bit(tmp_path, monkeypatch, place, given):
    _, whole = run(tmp_path / "whole", **given)
    if place == "between steps":
        run(tmp_path / "cut", stop_at=4, **given)
    else:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            cut = training(tmp_path / "cut")
            fake_loss, calls = cut.family.method.fake_loss, []

            def stopping(*arguments):
                calls.append(1)
                if len(calls) == 5:  # in step 4, after the student's update
                    raise Stopped
                return fake_loss(*arguments)

            patch.setattr(cut.family.method, "fake_loss", stopping)
            cut.run()
        assert torch.load(tmp_path / "cut" / "m" / "state_1.pt", weights_only=True)["ahead"]
    _, resumed = run(tmp_path / "cut", resume=True, **given)
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_a_loss_that_is_no_number_stops_with_advice_and_is_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="give lower learning rates"):
        run(tmp_path, fake_learning_rate=1e30)
    assert not (tmp_path / "m" / "state_1.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, LORA], ids=["all", "lora"])
def test_two_processes_make_the_steps_of_one(tmp_path, given):
    pytest.importorskip("accelerate")
    found = {}
    for name, accumulation, launcher in (("alone", 2, ()), ("two", 1, (
            "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"))):
        done = subprocess.run([sys.executable, *launcher, str(STUB), str(tmp_path / name), str(accumulation),
                               json.dumps(given)],
                              env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found[name] = torch.load(tmp_path / name / "m" / "state_1.pt", weights_only=True)
    for part in ("net", "fake"):
        for key, value in found["alone"][part].items():
            torch.testing.assert_close(found["two"][part][key], value, rtol=1e-4, atol=1e-6, msg=f"{part}: {key}")


def test_prompts_alone_make_text_to_video(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle moves left\n\n a blue square moves up \n", encoding="utf-8")
    settings = make_config(None, {**GIVEN, "data_dir": str(tmp_path / "prompts.txt"), "num_frames": 4,
                                  "frame_size": "24x16"})
    prompts = load_dataset(settings)
    assert prompts.summary() == "2 prompts for videos of 4 frames, 24x16"
    assert [item["caption"] for item in prompts] == ["a red circle moves left", "a blue square moves up"]
    with pytest.raises(ValueError, match="prompts alone, and this training learns from clips"):
        load_dataset(make_config(None, {"data_dir": str(tmp_path / "prompts.txt")}))
    with pytest.raises(ValueError, match="width is 24: it must be a multiple of 16"):
        run(tmp_path / "odd", dataset=prompts, params=T2V)
    made, weights = run(tmp_path / "run", dataset=Prompts(prompts.prompts, 4, (16, 16)), params=T2V, steps=2)
    assert made.family.shape(made.shown) == (2, 4, 4, 2, 2) and made.first.height > 0
    with pytest.raises(ValueError, match="learns from start images, and this data set has prompts alone"):
        run(tmp_path / "i2v", dataset=prompts)
    with pytest.raises(ValueError, match="There is no prompt"):
        Prompts(["", " "], 4, (16, 16))


@pytest.mark.parametrize("params, given", [(I2V, {}), (T2V, {"first_latent": True})], ids=["i2v", "first latent"])
def test_shards_of_prompt_latent_and_reference_image(tmp_path, params, given):
    pytest.importorskip("lmdb")
    first = training(tmp_path / "as clips", params=params, steps=2, **given)
    pack(MovingShapes(6, 4, (16, 16)), tmp_path / "packed", first.family.encoders.latent, "demo")
    made, _ = run(tmp_path / "as shards", dataset=LatentShards(tmp_path / "packed"), params=params, steps=2, **given)
    clips, shards = (each.family.encode(each.dataset[3]) for each in (first, made))
    assert clips.keys() == shards.keys() == ({"z", "text", "tokens", "y"} if params.i2v else {"z", "text"})
    assert all(torch.allclose(value, shards[key], atol=5e-3) for key, value in clips.items())
    known = made.family.conditions(made.shown)
    if given:
        assert torch.equal(known.first_BC1HW, made.shown["z"][:, :, :1])
    else:
        assert known.image_BNW.shape == (4, 17, 48) and known.y_BYFHW.shape[1] == 8


def test_a_rollout_goes_on_over_several_steps(tmp_path):
    given = {"stream_frames": 9, "gradient_frames": 4, "stream_new": 2, "stream_switch_first": 1, "rollout_window": 6,
             "rollout_sink": 2, "steps": 5}
    made, seen = training(tmp_path, **given), []
    fake_loss = made.family.method.fake_loss
    made.family.method.fake_loss = lambda piece, draw: seen.append(piece) or fake_loss(piece, draw)
    made.run()
    assert [piece.lead for piece in seen] == [0, 2, 2, 0, 2]  # 4 + 2 + 2 latent frames, then a new video
    assert all(piece.x0_BCFHW.shape[2] == 4 and not piece.x0_BCFHW.requires_grad for piece in seen)
    assert torch.equal(seen[0].x0_BCFHW[:, :, 2:], seen[1].x0_BCFHW[:, :, :2])
    assert math.isfinite(made.loss)


def test_models_that_do_not_fit_are_refused():
    settings = make_config(None, {**GIVEN, "num_frames": 4, "frame_size": "16"})
    encoders = training(Path("unused")).family.encoders
    with pytest.raises(ValueError, match="needs a teacher: a bidirectional Wan"):
        SelfRolloutFamily(model(I2V, 1), None, None, encoders, settings)
    with pytest.raises(ValueError, match="The fake score has in_dim 4, the student 12"):
        SelfRolloutFamily(model(I2V, 1), model(I2V, 2), model(T2V, 2), encoders, settings)


def node_values(**changed):
    """The node's widgets at their defaults."""
    inputs = SelfRollout.define_schema().inputs
    return {**{each.id: each.default for each in inputs if hasattr(each, "default")}, **changed}


@torch.inference_mode()
def test_the_nodes_train_on_own_videos(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    encoders, student = load_encoders(make_config(None, {}), pixels=False), model(T2V, 1)
    objective, = SelfRollout.execute(model(T2V, 2), **node_values(rollout_steps="1000 500")).args
    assert SelfRolloutSettings(**objective.settings) == SelfRolloutSettings(rollout_steps=[1000, 500])
    prompts, summary = PromptList.execute("a red circle moves left\n", 4, 16, 16).args
    assert summary == "1 prompts for videos of 4 frames, 16x16"
    widgets = {each.id: each.default for each in TrainVideoModel.define_schema().inputs if hasattr(each, "default")}
    given = {**widgets, "name": "own", "steps": 1, "batch_size": 1, "sample_every": 1, "vae": encoders.vae,
             "model": student, "clip_vision": None}
    trained, _, name = TrainVideoModel.execute(prompts, encoders.clip, **given, objective=objective).args
    assert name == "own_00001.safetensors" and trained.model.wan_params == T2V
    about = json.loads((tmp_path / "output" / "training" / "own_00001" / "settings.json").read_text())
    assert (about["objective"], about["clip_norm"], about["rollout_steps"]) == ("self_rollout", 10, [1000, 500])
    with pytest.raises(ValueError, match="Connect Self-Rollout as objective"):
        TrainVideoModel.execute(prompts, encoders.clip, **given)
    with pytest.raises(ValueError, match="rollout_steps is .* give whole numbers"):
        SelfRollout.execute(None, **node_values(rollout_steps="many"))


def test_the_bench_counts_what_the_real_networks_are():
    figures = bench_self_rollout.counted("demo")
    assert figures["parameters"] == {name: 1_210_512 for name in ("student", "teacher", "fake")}
    learned = 4 + 4 + 8
    assert figures["resident_bytes"]["fake score"] == learned * 1_210_512
    assert figures["cache_bytes"] == 2 * 4 * 12 * 16 * 128 * 2  # K and V, layers, finished frames, tokens, width, bytes
    assert figures["activation_bytes"]["checkpointed"] < figures["activation_bytes"]["plain"]
    assert figures["gpus"]["80 GB"] == {"copies": 1, "sharded": 1}
