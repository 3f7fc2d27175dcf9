"""The diagnosis: every finding at its thresholds, a run with a stub and the demo, the node, the script's options."""
import importlib.util
import json
import math

import host
import numpy as np
import pytest
import torch
from sampler_stub import SHAPE, conditioning, empty_latent, stub_model
from stillmotion.nodes.ddim.plot import HEIGHT, WIDTH
from stillmotion.nodes.ddim.report import COLUMNS, SamplingReport
from stillmotion.nodes.diagnosis import judgement as judge
from stillmotion.nodes.diagnosis import nodes
from stillmotion.nodes.diagnosis.plot import draw_diagnosis
from stillmotion.nodes.diagnosis.run import Request, diagnose
from torch import nn

NAN = float("nan")


def script():
    spec = importlib.util.spec_from_file_location("workflows_diagnose", host.WORKFLOWS / "diagnose.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- single findings ----

@pytest.mark.parametrize("scale, level, words", [
    (1.0, "good", "1 is usual"), (0.0, "good", "empty"), (3.0, "doubtful", "VAE's scale factor seems to be missing"),
    (5.49, "bad", "clip x0"), (0.18, "doubtful", "applied twice"), (NAN, "bad", "32 of 32 values are NaN"),
])
def test_latents(scale, level, words):
    found = judge.judge_latent("latent", scale * torch.tensor([-1.0, 1.0]).repeat(16))
    assert found.level == level and words in found.text


def test_zeros_between_given_frames_do_not_count():
    latent = torch.zeros(1, 4, 16, 2, 2)
    latent[:, :, 0] = 1.0
    assert judge.judge_latent("start image", latent).level == "good"


@pytest.mark.parametrize("scale, level", [(1.0, "good"), (0.0, "doubtful"), (1e3, "doubtful"), (NAN, "bad")])
def test_tokens(scale, level):
    assert judge.judge_tokens("text", scale * torch.ones(1, 77, 8)).level == level


@pytest.mark.parametrize("spoil, level, words", [
    (lambda net: None, "good", "0 3.0"),
    (lambda net: net[0].weight.data[0].fill_(NAN), "bad", "NaN or Inf in 0.weight"),
    (lambda net: net[1].weight.data.zero_(), "doubtful", "All zero: 1.weight"),
    (lambda net: net[1].bias.data.zero_(), "good", "norms"),
    (lambda net: net[0].bias.data.fill_(1e4), "doubtful", "Unusually large: 0.bias"),
])
def test_parameters(spoil, level, words):
    net = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    for value in net.parameters():
        value.data.fill_(1.0)
    net[0].bias.data.fill_(0.5 ** 0.5)
    spoil(net)
    found = judge.judge_parameters("parameters", net)
    assert found.level == level and words in found.text and found.text.startswith("16 parameters")


LAYOUTS = {"model.diffusion_model.out.2.weight": "model_ema.diffusion_modelout2weight",
           "generator.model.head.weight": "generator_ema.model.head.weight",
           "net.output.weight": "averaged.module.output.weight"}


@pytest.mark.parametrize("raw_key", LAYOUTS)
@pytest.mark.parametrize("ema, level, words", [
    ([1.1, 2.0], "good", "raw weights 0.045"),
    ([1.0, 2.0], "doubtful", "never updated"), ([0.0, 0.0], "bad", "All zero"),
    ([9.0, 9.0], "bad", "not an average"), ([NAN, 1.0], "bad", "NaN"),
])
def test_averaged_weights(raw_key, ema, level, words):
    found = judge.judge_ema({raw_key: torch.tensor([1.0, 2.0]), LAYOUTS[raw_key]: torch.tensor(ema),
                             "model_ema.decay": torch.tensor(0.99)})
    assert found.level == level and words in found.text


def test_a_file_with_one_set_of_weights_has_no_finding():
    assert judge.judge_ema({"model.diffusion_model.out.2.weight": torch.ones(2), "net.step": torch.ones(1)}) is None


def picture(mean, std):
    values = torch.linspace(-1, 1, 300).view(1, 10, 10, 3)
    return values / values.std() * std + mean


@pytest.mark.parametrize("mean, std, reference, level, words", [
    (0.5, 0.2, None, "good", "0.30 to 0.70 is usual"),
    (0.85, 0.05, None, "doubtful", "dark, bright or plain"),
    (0.85, 0.05, (0.9, 0.05), "good", "for this reference"),
    (0.5, 0.05, None, "doubtful", "0.10 to 0.30"),
    (0.5, 0.005, None, "bad", "one flat colour"),
    (0.9, 0.2, None, "bad", "not within 0..1"),
    (NAN, 0.2, None, "bad", "finding on sampling"),
])
def test_decoded_frames(mean, std, reference, level, words):
    found = judge.judge_decoded(picture(mean, std), picture(*reference) if reference else None)
    assert found.level == level and words in found.text


@pytest.mark.parametrize("noise, level", [(0.02, "good"), (0.15, "doubtful"), (0.5, "bad"), (NAN, "bad")])
def test_the_round_trip(noise, level):
    original = picture(0.5, 0.2)[0]
    back = original + noise * torch.randn(original.shape, generator=torch.Generator().manual_seed(0))
    assert judge.judge_round_trip(original, back).level == level


def test_a_vae_that_works_but_does_not_know_the_picture():
    original = picture(0.5, 0.2)[0]
    back = original + 0.15 * torch.randn(original.shape, generator=torch.Generator().manual_seed(0))
    assert "belongs to the model" in judge.judge_round_trip(original, back).text
    found = judge.judge_round_trip(original, back, sound=True)
    assert found.level == "doubtful" and "unlike the pictures that it was trained on" in found.text
    assert judge.judge_round_trip(original, original, sound=True).level == "good"


def test_the_verdict_has_its_reason():
    levels = {"latent": "good", "VAE": "doubtful", "sampling": "good", "parameters": "bad", "EMA": "bad"}
    findings = tuple(judge.Finding(topic, level, "") for topic, level in levels.items())
    assert judge.Diagnosis(findings, None).text().startswith(
        "bad: parameters, EMA are bad; VAE is doubtful; the other 2 checks are good\n")
    assert judge.Diagnosis(findings[:1], None).text().startswith("good: all 1 checks are good\n")


def sampled(reach, clip_mode):
    columns = {name: [0.0] for name in COLUMNS} | {"x_min": [-reach], "x_max": [reach], "x_std": [1.0], "beyond": [9.0]}
    return SamplingReport("settings", clip_mode, 3.0, 4096, False, [999], columns)


@pytest.mark.parametrize("reach, quality, level", [
    (2.5, (20.0, 21.0), "good"), (2.5, (10.0, 13.0), "doubtful"), (15000.0, (3.3, 5.1), "doubtful"),
    (15000.0, None, "doubtful"), (2.5, None, "good"),
])
def test_what_clipping_does(reach, quality, level):
    found = judge.judge_clipping(sampled(reach, "off"), sampled(2.9, "static"), quality)
    assert found.level == level and "each step: 9." in found.text
    assert ("dB with clipping" if quality else "Connect the true clip") in found.text


def test_psnr():
    assert judge.psnr(torch.zeros(8), torch.full((8,), 0.1)) == pytest.approx(20, abs=1e-4)
    assert math.isfinite(judge.psnr(torch.zeros(8), torch.zeros(8)))


# ---- a run ----

class StubVAE:
    """The first three latent channels are the colours; one latent pixel covers 8 x 8 pixels."""

    def __init__(self):
        self.first_stage_model = nn.Linear(2, 2)

    def decode(self, samples):
        colours = (0.5 + 0.2 * samples[:, :3]).clamp(0, 1)
        return colours.repeat_interleave(8, -1).repeat_interleave(8, -2).movedim(1, -1)

    def encode(self, pixels):
        means = nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat((means - 0.5, means[:, :1]), dim=1) / 0.2

    def spacial_compression_decode(self):
        return 8


def request(**changes):
    return Request(**{"seed": 1, "steps": 4, "cfg": 3.0, "clip_x0": "off", "clip_value": 3.0, "depth": "detailed",
                      "compare_clipping": False, "checkpoint": None} | changes)


def run(asked, model=None, reference=None, spoil=lambda positive, negative: None):
    pair = conditioning()
    spoil(*pair)
    with torch.inference_mode():
        return diagnose(model or stub_model("zsnr"), *pair, empty_latent(), StubVAE(), asked, reference)


def topics(found):
    return [finding.topic for finding in found.findings]


def test_a_detailed_and_a_quick_run():
    found, frames = run(request())
    assert topics(found) == ["latent", "positive text", "negative text", "parameters", "sampling", "VAE weights", "VAE",
                             "decoded frames"]
    assert frames.shape == (3, 32, 48, 3) and len(found.report.timesteps) == 4
    levels = {finding.topic: finding.level for finding in found.findings}
    assert levels["parameters"] == "good" and levels["VAE"] == "doubtful"  # 8 x 8 averaging blurs the disc's edge
    found, _ = run(request(depth="quick"))
    assert topics(found) == ["latent", "positive text", "negative text", "sampling", "decoded frames"]
    assert json.loads(json.dumps(found.data()))["steps"][3]["timestep"] == found.report.timesteps[3]


def test_bad_inputs_end_the_diagnosis_before_sampling():
    model = stub_model("zsnr")
    found, frames = run(request(), model, spoil=lambda p, n: n[0][0].view(-1)[:3].fill_(NAN))
    assert found.level == "bad" and found.report is None and frames is None
    assert model.model.diffusion_model.calls == 0
    assert "3 of 40 values are NaN or Inf" in found.text()
    assert draw_diagnosis(found).size[0] == WIDTH


def test_the_first_bad_layer_is_in_the_verdict():
    model = stub_model("zsnr")
    model.model.diffusion_model.mix.weight.data[0, 0] = NAN
    found, _ = run(request(), model)
    verdict = {finding.topic: finding for finding in found.findings}
    assert verdict["parameters"].level == verdict["sampling"].level == verdict["decoded frames"].level == "bad"
    assert "First from layer mix (Linear)" in verdict["sampling"].text
    assert "First from layer mix" in found.text().split("\n\n")[2]


def test_with_and_without_clipping():
    reference = run(request(clip_x0="static"))[1]
    for clip in ("off", "static"):
        found, _ = run(request(clip_x0=clip, compare_clipping=True), reference=reference)
        finding = found.findings[-1]
        assert finding.topic == "clipping" and "dB with clipping" in finding.text
        counts = finding.text.split("each step: ")[1].split(". ")[0].split(", ")
        assert len(counts) == 4 and all(count.isdigit() for count in counts)
        assert "100.0 dB with clipping" in finding.text  # compared with itself
    assert "Connect the true clip" in run(request(compare_clipping=True))[0].findings[-1].text


@pytest.mark.parametrize("compare, total", [(False, 4), (True, 8)])
def test_the_progress_ends_once(compare, total):
    told = []
    with torch.inference_mode():
        diagnose(stub_model("zsnr"), *conditioning(), empty_latent(), StubVAE(), request(compare_clipping=compare),
                 None, lambda step, x0, x, total: told.append((step + 1, total)))
    assert told == [(step, total) for step in range(1, total + 1)]


def test_a_reference_of_another_size_is_compared_in_brightness_only():
    found, _ = run(request(), reference=picture(0.9, 0.05))
    assert "true clip" not in topics(found) and "for this reference" in found.findings[-1].text


def test_the_plot_grows_with_the_findings():
    found, _ = run(request())
    image = draw_diagnosis(found)
    assert image.size[0] == WIDTH and image.size[1] > HEIGHT + 7 * 38
    assert np.asarray(image).std() > 10


# ---- the node and the script ----

def test_the_node():
    pair = conditioning()
    values = dict(seed=1, steps=3, cfg=2.0, clip_x0="off", clip_value=3.0, depth="detailed", compare_clipping=False,
                  checkpoint="none")
    declared = [entry.id for entry in nodes.DiagnoseModel.define_schema().inputs]
    assert declared == ["model", "positive", "negative", "latent", "vae", *values, "reference"]
    with torch.inference_mode():
        output = nodes.DiagnoseModel.execute(stub_model("v"), *pair, empty_latent(), StubVAE(), **values)
        plot, text, verdict, frames = output.result
        assert plot.shape[2:] == (WIDTH, 3) and text.startswith(verdict) and frames.shape[0] == SHAPE[2]
        assert output.ui["diagnosis"][0]["verdict"] == verdict
        with pytest.raises(ValueError, match="depth is 'deep'. Choose one of detailed, quick"):
            nodes.DiagnoseModel.execute(stub_model("v"), *pair, empty_latent(), StubVAE(), **values | {"depth": "deep"})
        with pytest.raises(ValueError, match="no file 'gone.ckpt'"):
            nodes.DiagnoseModel.execute(stub_model("v"), *pair, empty_latent(), StubVAE(),
                                        **values | {"checkpoint": "gone.ckpt"})


@pytest.mark.parametrize("arguments, words", [
    (["--steps", "0"], "--steps is 0: it must be above 0"), (["--clip_value", "0"], "choose 0.1 to 100"),
    (["--image", "missing.png", "--prompt", "x"], "no file missing.png"),
    (["--image", str(host.WORKFLOWS / "examples" / "stillmotion_start.png")], "needs a --prompt"),
    (["--models", "missing"], "no folder missing"), (["777"], "invalid choice"),
    (["--clip_x0", "often"], "invalid choice"),
    (["--server", "127.0.0.1:1", "--device", "cpu"], "leave out --device"),
])
def test_bad_options_of_the_script(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        script().parse(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err
