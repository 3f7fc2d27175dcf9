"""Self-rollout with less memory: LoRAs on the student and the fake score, half precision."""

import comfy.sd
import pytest
import torch
from rollout_stub import I2V, model, training
from safetensors.torch import load_file
from stillmotion.nodes.training.families.base import plain_weights
from stillmotion.nodes.training.parallel import Accelerated, make_processes

LORA = {"train": "lora", "lora_rank": 2}


def moved(net, before):
    """Names of weights that are not the same as before."""
    return {key for key, value in before.items() if not torch.equal(net.state_dict()[key], value)}


@pytest.mark.parametrize("fake_lora", [False, True])
def test_the_student_learns_in_a_lora_that_cores_loader_takes(tmp_path, fake_lora):
    made = training(tmp_path, **LORA, fake_lora=fake_lora, lora_targets=["self_attn.", "ffn."])
    nets = {"student": made.family.net, "fake": made.family.method.fake}
    before = {name: {key: value.clone() for key, value in net.state_dict().items()} for name, net in nets.items()}
    made.run()
    changed = {name: moved(net, before[name]) for name, net in nets.items()}
    assert {key.split(".")[-2] for key in changed["student"]} == {"lora_down", "lora_up"}
    assert all("self_attn." in key or "ffn." in key for key in changed["student"])
    assert changed["fake"] == (changed["student"] if fake_lora else before["fake"].keys())
    lora = load_file(tmp_path / "m.safetensors")
    assert len(lora) == 3 * 12 and all(value.dtype == torch.float32 for value in lora.values())
    average = torch.load(tmp_path / "m" / "state_1.pt", weights_only=True)["averaged"]
    patched = plain_weights(comfy.sd.load_lora_for_models(model(I2V, 1), None, lora, 1.0, 0)[0])
    for key, value in plain_weights(model(I2V, 1)).items():
        layer = f"module.{key.removesuffix('.weight')}"
        if f"{layer}.lora_up.weight" in average:
            value = value + average[f"{layer}.lora_up.weight"] @ average[f"{layer}.lora_down.weight"]
        torch.testing.assert_close(patched[key], value, msg=key)
    assert not torch.equal(patched["blocks.0.ffn.0.weight"], before["student"]["blocks.0.ffn.0.weight"])


def test_a_lora_goes_on_only_on_the_weights_it_was_started_with(tmp_path):
    training(tmp_path, **LORA, steps=2).run()
    made = training(tmp_path, **LORA, steps=4, resume=True)
    with torch.no_grad():
        made.family.net.head.head.weight.mul_(2)
    with pytest.raises(ValueError, match="state_1.pt belongs to a run on other frozen weights"):
        made.run()


@pytest.mark.parametrize("given", [{}, {**LORA, "fake_lora": True}], ids=["all", "lora"])
def test_bf16_follows_full_precision(tmp_path, given):
    pytest.importorskip("accelerate")
    given = {**given, "steps": 2, "sample_every": 2}
    plain = training(tmp_path / "plain", **given)
    plain.run()
    half = training(tmp_path / "half", mixed_precision="bf16", processes=make_processes("bf16"), **given)
    half.run()
    assert half.loss == pytest.approx(plain.loss, rel=0.05)
    frozen = {value.dtype for value in half.family.method.fake.parameters() if not value.requires_grad}
    assert frozen == ({torch.bfloat16, torch.float32} if given.get("train") else set())
    assert {value.dtype for value in half.family.net.parameters() if value.requires_grad} == {torch.float32}


def fp16_on_the_cpu():
    """What make_processes gives with fp16 on a GPU: accelerate asks for one, PyTorch's scaler does not."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    return Accelerated(accelerator)


@pytest.mark.parametrize("given", [{}, {**LORA, "fake_lora": True}], ids=["all", "lora"])
def test_fp16_scales_the_losses_of_both_networks_and_limits_their_true_gradients(tmp_path, given):
    """Gradients are clipped hard: clipped before they are unscaled, they would move nothing."""
    given = {**given, "steps": 3, "clip_norm": 1e-8, "learning_rate": 1e-4, "fake_learning_rate": 1e-4}
    plain = training(tmp_path / "plain", **given)
    plain.run()
    half = training(tmp_path / "half", mixed_precision="fp16", processes=fp16_on_the_cpu(), **given)
    half.run()
    states = [torch.load(tmp_path / name / "m" / "state_1.pt", weights_only=True) for name in ("plain", "half")]
    assert not states[0]["scaler"] and states[1]["scaler"]["scale"] > 1024
    for part in ("optimizer", "fake_optimizer"):
        norms = [sum(float(entry["exp_avg_sq"].sum()) for entry in state[part]["state"].values()) for state in states]
        assert norms[1] == pytest.approx(norms[0], rel=0.05)
