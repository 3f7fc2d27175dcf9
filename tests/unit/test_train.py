"""Runs of the trainer: batches, resume, what a run leaves, stages, 2-D weights."""

import json
import pickle
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stillmotion.nodes.common.saving import holding
from stillmotion.nodes.training import loop
from stillmotion.nodes.training.config import TrainConfig, make_config
from stillmotion.nodes.training.curves import read_curves
from stillmotion.nodes.training.data.clips import MovingShapes
from stillmotion.nodes.training.encoding import Batches
from stillmotion.nodes.training.families.base import Family
from stillmotion.nodes.training.families.inflate import inflate, sd_names
from stillmotion.nodes.training.loop import fit, learning_rate
from stillmotion.nodes.training.resume import saved_settings
from stillmotion.nodes.training.run import Training
from stillmotion.nodes.video_unet.unet import VideoUNetParams, new_network

PARAMS = VideoUNetParams(channels=4, model_channels=16, channel_mult=(1, 2), num_res_blocks=1, spatial_attention=(1,),
                         head_channels=16, context_dim=8, additional_condition_dim=0)


def index_of(item):
    return {"index": torch.tensor(int(item["name"][-5:]))}


def test_every_epoch_visits_every_clip_whoever_reads():
    def batches(**settings):
        return Batches(MovingShapes(5, frames=1, size=(16, 16)), [0, 1, 2, 4], index_of, size=3, seed=7, **settings)

    alone = batches()
    seen = [alone(number)["index"].tolist() for number in range(6)]
    assert all(set(seen[n] + seen[n + 1]) == {0, 1, 2, 4} for n in (0, 2, 4)) and seen[0] != seen[2]
    assert batches()(3)["index"].tolist() == seen[3]  # as after a resume
    other = batches(stride=2)
    varied = Batches(MovingShapes(5, frames=1, size=(16, 16), mirror=True), [0, 1, 2, 4], index_of, size=3, seed=7)
    assert [other(number)["index"].tolist() for number in (1, 3, 5)] == seen[1::2]
    assert [varied(number)["index"].tolist() for number in range(6)] == seen and not varied.kept


@pytest.fixture(autouse=True)
def every_loss_is_read(monkeypatch):
    monkeypatch.setattr(loop, "LOOK_EVERY", 1)


class Toy(Family):
    """Linear regression on clips that are single numbers."""

    vae = None

    def __init__(self):
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 1)
        self.encoders = self

    def encode(self, item):
        return {"x": torch.tensor([float(ord(letter)) / 100 for letter in item["caption"][:4]])}

    def loss(self, net, batch, generator, dropout):
        noise = 0.1 * torch.randn(batch["x"].shape, generator=generator)
        return (net(batch["x"] + noise) - batch["x"].sum(1, keepdim=True)).square().mean()

    def sample(self, net, batch, seed):
        return {"toy": (batch["x"].view(-1, 1, 1, 2, 2), 0)}

    def truth(self, batch):
        return batch["x"].view(-1, 1, 1, 2, 2)

    def pixels(self, latent):
        return latent.movedim(1, -1).expand(*latent.shape[:1], 1, 2, 2, 3).clamp(0, 1)

    def export(self, path, net, metadata):
        save_file(net.state_dict(), path, metadata=metadata)


class Stopped(Exception):
    pass


def train_toy(folder, stop_at=None, **settings):
    """(weights, losses by step)"""
    losses = {}

    def on_progress(progress):
        losses[progress.step] = progress.loss
        if progress.step == stop_at:
            raise Stopped

    config = TrainConfig(**{"steps": 30, "batch_size": 2, "save_every": 10, "sample_every": 10, "learning_rate": 0.05,
                            "warmup": 0, "ema_decay": 0.5, **settings})
    training = Training(Toy(), MovingShapes(20, frames=1, size=(16, 16)), config, folder / "m.safetensors",
                        folder / "m", on_progress=on_progress)
    try:
        training.run()
    except Stopped:
        return None, losses
    return load_file(folder / "m.safetensors"), losses


def test_a_stopped_training_goes_on_bit_for_bit(tmp_path):
    weights, losses = train_toy(tmp_path / "whole")
    _, before = train_toy(tmp_path / "stopped", stop_at=17)
    resumed, after = train_toy(tmp_path / "stopped", resume=True)
    assert list(before) == list(range(1, 18)) and list(after) == list(range(18, 31))
    assert {**before, **after} == losses
    assert all(torch.equal(resumed[key], weights[key]) for key in weights)


def test_what_a_training_leaves(tmp_path, caplog):
    caplog.set_level("INFO")
    _, losses = train_toy(tmp_path, checkpoint_every=20)
    folder = tmp_path / "m"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["epoch"]) for row in rows] == [(10, 2), (20, 3), (30, 4)]  # 18 clips, 2 a step
    assert [row["learning_rate"] for row in rows] == [learning_rate(step - 1, 30, 0.05, 0) for step in (10, 20, 30)]
    line = r"m: step 30 of 30, epoch 4, loss [0-9.]+, learning rate [0-9.e-]+, 0 min 0 s left"
    assert re.search(line, (folder / "train.log").read_text())
    assert rows[0]["loss"] == pytest.approx(sum(losses[i] for i in range(1, 11)) / 10)
    assert rows[2]["validation"] < rows[0]["validation"] and rows[0]["psnr"] == 100
    assert (folder / "step_0000020.safetensors").exists() and (folder / "samples" / "step_0000030.png").exists()
    with safe_open(folder / "best.safetensors", "pt") as file:
        best = json.loads(file.metadata()["stillmotion.training"])
    assert best["step"] == min(rows, key=lambda row: row["validation"])["step"]


def test_a_run_is_neither_overwritten_nor_gone_on_with_by_other_settings(tmp_path):
    train_toy(tmp_path, steps=2)
    with pytest.raises(ValueError, match="holds a run already"):
        train_toy(tmp_path, steps=2)
    with pytest.raises(ValueError, match="other settings: num_frames 16, now 8. Go on with those"):
        train_toy(tmp_path, steps=2, num_frames=8, batch_size=4, resume=True)
    with pytest.raises(ValueError, match="no run to go on with"):
        train_toy(tmp_path / "other", resume=True)
    train_toy(tmp_path, steps=4, resume=True)


def test_to_resume_the_settings_of_the_run_stand_in_for_the_defaults(tmp_path, caplog):
    given = {"output": str(tmp_path / "m.safetensors"), "resume": True}
    train_toy(tmp_path, stop_at=12, caption_dropout=0.3)
    config = make_config(None, given, saved_settings)
    assert (config.steps, config.batch_size, config.caption_dropout, config.resume) == (30, 2, 0.3, True)
    path = tmp_path / "again.yaml"
    path.write_text("batch_size: 4\nsteps: 20\n")
    config = make_config(path, {**given, "steps": 15}, saved_settings)
    assert (config.steps, config.batch_size, config.caption_dropout) == (15, 4, 0.3)
    with caplog.at_level("INFO"):
        train_toy(tmp_path, resume=True, batch_size=4, caption_dropout=0.3)
    assert "Settings changed since the start: batch_size 2, now 4." in caplog.text
    assert json.loads((tmp_path / "m" / "settings.json").read_text())["batch_size"] == 4


def test_a_loss_that_is_no_number_stops_with_advice(tmp_path):
    with pytest.raises(FloatingPointError, match="lower learning rate"):
        train_toy(tmp_path, learning_rate=1e30, clip_norm=1e30)
    assert not list((tmp_path / "m").glob("state*"))


def test_a_lower_rate_is_accepted_by_resume(tmp_path):
    train_toy(tmp_path, stop_at=12)
    train_toy(tmp_path, resume=True, learning_rate=0.01)
    assert (tmp_path / "m.safetensors").exists()


def test_what_a_killed_or_older_run_left_is_gone_on_with(tmp_path, caplog):
    weights, _ = train_toy(tmp_path / "whole")
    folder = tmp_path / "m"
    train_toy(tmp_path, stop_at=12)
    settings = json.loads((folder / "settings.json").read_text())
    added = {"clip_type", "timesteps", "shift", "lora_rank", "lora_targets", "optimizer", "vae_psnr", "dataset",
             "network"}
    older = {name: value for name, value in settings.items() if name not in added} | {"block": 4}
    assert len(older) == len(settings) - len(added)
    (folder / "settings.json").write_text(json.dumps(older))
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 12, "lo')
    train_toy(tmp_path, stop_at=22, resume=True)
    assert [step for step, _ in read_curves(folder).loss] == [10, 20]
    (folder / "settings.json").write_text("")
    found, _ = train_toy(tmp_path, resume=True)
    assert "settings.json is empty or damaged" in caplog.text
    assert all(torch.equal(found[key], weights[key]) for key in weights)
    assert json.loads((folder / "settings.json").read_text())["batch_size"] == 2


@pytest.mark.parametrize("content", [b"", b"cut", pickle.dumps({"step": 3})])
def test_a_damaged_state_is_named(tmp_path, content):
    train_toy(tmp_path, stop_at=12)
    (tmp_path / "m" / "state_1.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"state_1.pt (is cut off or damaged|holds no net)"):
        train_toy(tmp_path, resume=True)


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    (tmp_path / "m").mkdir()
    with holding(tmp_path / "m", "it"), pytest.raises(ValueError, match="is in use by process"):
        train_toy(tmp_path)
    train_toy(tmp_path, steps=2)


def test_a_full_disk_leaves_the_state_before_and_nothing_else(tmp_path, monkeypatch):
    train_toy(tmp_path, stop_at=12)
    before = (tmp_path / "m" / "state_1.pt").read_bytes()

    def full(state, path):
        path.write_bytes(b"part of a state")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe #0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="could not save .*state_1.pt: .*MB of space are left.*Free space on the disk"):
        train_toy(tmp_path, resume=True)
    assert (tmp_path / "m" / "state_1.pt").read_bytes() == before
    left = {path.name for path in (tmp_path / "m").iterdir()}
    assert left == {"settings.json", "state_1.pt", "state_1.jsonl", "metrics.jsonl", "curves.png", "samples",
                    "best.safetensors", "train.log"}


def test_sizes_that_the_model_could_not_use_are_refused_before_training(tmp_path):
    class Eights(Toy):
        side_multiple = 8

    for settings, width in (({"frame_size": "60"}, 60), ({"frame_size": "64", "stages": ["36:2", "64:2"]}, 36)):
        training = Training(Eights(), MovingShapes(4, frames=1, size=(64, 64)), TrainConfig(**settings),
                            tmp_path / "m.safetensors", tmp_path / "m")
        with pytest.raises(ValueError, match=f"width is {width}.*multiple of 8"):
            training.run()
    assert list(tmp_path.iterdir()) == []


def test_stages_go_from_low_to_high_resolution(tmp_path):
    sizes = []

    class Sized(Toy):
        def encode(self, item):
            sizes.append(tuple(item["video"].shape[1:]))
            return super().encode(item)

    config = TrainConfig(stages=["16:3", "32:2"], frame_size="32", num_frames=2, batch_size=2)
    config.check()
    Training(Sized(), MovingShapes(4, frames=2, size=(32, 32)), config, tmp_path / "m.safetensors",
             tmp_path / "m").run()
    changes = [size for size, before in zip(sizes, [None, *sizes]) if size != before]
    assert changes == [(2, 16, 16), (2, 32, 32)]
    steps = [json.loads((tmp_path / "m" / f"state_{n}.jsonl").read_text())["step"] for n in (1, 2)]
    assert steps == [3, 2]


def test_one_clip_is_learned_by_heart(tmp_path):
    net = new_network(PARAMS, seed=0)
    clip = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    losses = []

    def loss_of(number, generator):
        noise = torch.randn(clip.shape, generator=generator)
        x = torch.cat((0.5 ** 0.5 * (clip + noise), torch.zeros(1, 5, 3, 4, 4)), dim=1)
        loss = (net(x, torch.tensor([500]), torch.ones(1, 5, 8)) - clip).square().mean()
        losses.append(loss.item())
        return loss

    fit(net, loss_of, steps=80, lr=1e-2, checkpoint=tmp_path / "state.pt", warmup=5, save_every=80)
    assert losses[0] > 0.8 and sum(losses[-10:]) / 10 < 0.05


def test_2d_weights_are_copied_and_temporal_layers_begin_as_the_identity():
    teacher, net = new_network(PARAMS, seed=5), new_network(PARAMS, seed=6)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layers = dict(sd_names(net))
    flat = {}
    for key, value in teacher.state_dict().items():
        layer, _, kind = key.rpartition(".")
        if layer in layers:
            flat[f"model.diffusion_model.{layers[layer]}.{kind}"] = value[:, :4] if key == "input.weight" else value
    counts = inflate(net, flat)
    assert counts.copied == len(flat) > 20 and counts.copied + counts.fresh == len(net.state_dict())
    assert torch.equal(net.down[0]["blocks"][0].res.conv1.weight, teacher.down[0]["blocks"][0].res.conv1.weight)
    assert torch.equal(net.input.weight[:, :4], teacher.input.weight[:, :4]) and not net.input.weight[:, 4:].any()

    def run(x):
        return net(x, torch.tensor([500]), torch.ones(1, 5, 8))

    x = torch.randn(1, 9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    frames = torch.cat([run(x[:, :, i:i + 1]) for i in range(3)], dim=2)
    assert run(x).abs().max() > 0.01
    torch.testing.assert_close(run(x), frames, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="None of the 2-D weights fits"):
        inflate(net, {"something.else": torch.zeros(3)})
