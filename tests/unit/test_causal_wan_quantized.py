"""Causal Wan in 8 and 4 bits with scale factors: every layout is dequantized to the right values."""

import json

import comfy.quant_ops
import comfy.supported_models_base
import pytest
import torch
from causal_wan_stub import EIGHT, HEADER, SMALL, load, mark, marked, prefixed, run, stored, tensors
from core_calls import saved_by_core
from stillmotion.nodes.causal_wan.fingerprint import model_digests
from stillmotion.nodes.causal_wan.lora import add_lora
from stillmotion.nodes.common import quantized
from stillmotion.nodes.common.files import Checkpoint
from stillmotion.nodes.training.families.base import plain_weights


@pytest.fixture(autouse=True)
def as_in_the_host():
    with torch.inference_mode():
        yield


def marked_in_header(found, scales):
    layers = {f"model.diffusion_model.{layer}": {"format": "float8_e4m3fn"} for layer in scales}
    return found | {f"{layer}.weight_scale": scale[None] for layer, scale in scales.items()}, HEADER | {
        "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def old(found, scales):
    return found | {f"{layer}.scale_weight": scale for layer, scale in scales.items()} | {
        f"{layer}.scale_input": torch.ones(()) for layer in scales} | {
        "scaled_fp8": torch.empty(0, dtype=EIGHT)}, HEADER


def kijai(found, scales):
    return found | {f"{layer}.scale_weight": scale[None] for layer, scale in scales.items()} | {
        "head.head.scale_weight": torch.ones(1), "scaled_fp8": torch.zeros(2, dtype=EIGHT)}, HEADER


def close(model, expected, most=0.02):
    found, expected = run(model).float(), run(load(expected, weight_dtype="fp32")).float()
    difference = ((found - expected).norm() / expected.norm()).item()
    assert difference < most, difference


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("layout", [marked, marked_in_header, old, kijai])
def test_layouts_of_eight_bits(layout, prefix, caplog):
    found, scales, meant = stored()
    found, header = layout(found, scales)
    with caplog.at_level("INFO"):
        model = load(prefixed(prefix, found), header)
    assert f"{len(tensors())} of {len(tensors())} keys found, none left over, 8 in 8 or 4 bits" in caplog.text
    close(model, meant)
    close(model, tensors(), 0.1)


def test_the_other_eight_bits():
    found, scales, meant = stored(torch.float8_e5m2)
    close(load(old(found, scales)[0]), meant)


def test_weights_stay_small_in_memory():
    found, scales, _ = stored()
    model, whole = load(marked(found, scales)[0]), load(tensors(), weight_dtype="fp32")
    saved = sum(3 * found[f"{layer}.weight"].numel() for layer in SMALL)
    assert whole.model_size() - model.model_size() > 0.9 * saved


def test_what_core_saves_loads_again(tmp_path):
    found, scales, meant = stored()
    saved = saved_by_core(load(marked(found, scales)[0]), tmp_path / "saved.safetensors")
    assert "model.diffusion_model.head.modulation" in saved
    if saved["model.diffusion_model.blocks.0.ffn.0.weight"].dtype == EIGHT:
        close(load(saved), meant)
    else:  # before 0.9 core saves such layers in full precision but still marks them as quantized
        with pytest.raises(ValueError, match="is marked as float8_e4m3fn, but its weight is"):
            load(saved)


def test_a_lora_on_it_its_fingerprint_and_its_training():
    found, scales, meant = stored()
    model = load(marked(found, scales)[0])
    halves = {"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 48) * 0.1,
              "blocks.0.ffn.0.lora_B.weight": torch.ones(80, 2)}
    patched = add_lora(model, Checkpoint("lora.pt", halves, {}), 1.0)
    meant["blocks.0.ffn.0.weight"] = meant["blocks.0.ffn.0.weight"] + 0.2
    before = model_digests(model)
    assert model_digests(load(marked(found, scales)[0])) == before != model_digests(patched)
    assert all(torch.allclose(value, meant[key], rtol=0.01) for key, value in plain_weights(patched).items())
    assert plain_weights(patched).keys() == meant.keys()
    close(patched, meant, 0.05)


def reads(name):
    return pytest.mark.skipif(name not in quantized.host_formats(), reason=f"this ComfyUI does not read {name}")


@reads("int8_tensorwise")
@pytest.mark.parametrize("rows", [False, True])
def test_whole_numbers(rows):
    found, scales, meant = stored(torch.int8)
    if rows:
        scales = {layer: scale.repeat(len(found[f"{layer}.weight"]))[:, None] for layer, scale in scales.items()}
    close(load(marked(found, scales, "int8_tensorwise")[0]), meant)


@reads("nvfp4")
def test_four_bits():
    found, meant = tensors(), tensors()
    for layer in SMALL:
        packed = comfy.quant_ops.QuantizedTensor.from_float(found.pop(f"{layer}.weight"), "TensorCoreNVFP4Layout")
        found |= packed.state_dict(f"{layer}.weight") | {f"{layer}.comfy_quant": mark(format="nvfp4")}
        meant[f"{layer}.weight"] = packed.dequantize()
        assert found[f"{layer}.weight"].shape[1] * 2 == meant[f"{layer}.weight"].shape[1]
    close(load(found), meant)
    found["blocks.0.ffn.0.weight_scale"] = found["blocks.0.ffn.0.weight_scale"][:-1]
    with pytest.raises(ValueError, match="ffn.0.weight_scale is .*Expected: 512 scale factors.*nvfp4"):
        load(found)


@pytest.mark.parametrize("format", ["nvfp4", "int8_tensorwise", "mxfp8", "gguf", None, ["x"]])
def test_formats_that_the_host_does_not_read(monkeypatch, format):
    monkeypatch.setattr(quantized, "host_formats", lambda: ["float8_e4m3fn"])
    found = tensors() | {"blocks.0.ffn.0.comfy_quant": mark(format=format)}
    with pytest.raises(ValueError, match="blocks.0.ffn.0 holds weights in the format .*It reads float8_e4m3fn. Use"):
        load(found)


def test_a_host_without_such_layers(monkeypatch):
    for name in ("quant_config", "scaled_fp8"):
        monkeypatch.delattr(comfy.supported_models_base.BASE, name, raising=False)
    assert quantized.host_formats() == []
    with pytest.raises(ValueError, match="does not read. It reads none. Use the bf16"):
        load(marked(*stored()[:2])[0])


@pytest.mark.parametrize("change, words", [
    (lambda f: f.pop("blocks.0.ffn.0.weight"), "marked as float8_e4m3fn, but its weight is missing"),
    (lambda f: f.update({"blocks.0.ffn.0.weight": torch.ones(80, 48)}), r"its weight is \[80, 48\], torch.float32"),
    (lambda f: f.update({"blocks.1.ffn.0.weight": f["blocks.1.ffn.0.weight"][:40]}), r"is \[40, 48\], expected \[80"),
    (lambda f: f.pop("blocks.0.ffn.0.weight_scale"), "ffn.0.weight_scale is missing. Expected: 1 scale"),
    (lambda f: f.update({"blocks.0.ffn.0.weight_scale": torch.ones(80, 1)}), r"weight_scale is \[80, 1\].*Expected: 1"),
    (lambda f: f.update({"blocks.0.ffn.0.weight_scale": torch.tensor(0.0)}), r"weight_scale is \[\], \[0.0\]. Exp"),
    (lambda f: f.update({"blocks.0.ffn.0.weight_scale": torch.tensor(float("nan"))}), r"\[nan\]. Expected: 1 scale"),
    (lambda f: f.update({"blocks.0.ffn.0.comfy_quant": torch.ones(3)}), "comfy_quant is torch.float32.*as bytes"),
    (lambda f: f.update({"blocks.0.ffn.0.comfy_quant": torch.ones(3, dtype=torch.uint8)}), "comfy_quant is not JSON"),
    (lambda f: f.update({"blocks.7.ffn.0.comfy_quant": mark(format="float8_e4m3fn")}), "blocks.7.ffn.0 is marked"),
    (lambda f: f.update({"blocks.0.ffn.2.weight_packed": torch.ones(3)}), "ffn.2.weight_packed. that do not say how"),
    (lambda f: f.update({"blocks.1.self_attn.k.weight": torch.zeros(48, 24, dtype=torch.uint8)}), "packed 4-bit"),
    (lambda f: f.update({"blocks.1.self_attn.k.weight_scale": torch.tensor(2.0)}), "1 not known: .*k.weight_scale"),
])
def test_parts_that_do_not_fit(change, words):
    found = marked(*stored()[:2])[0]
    change(found)
    with pytest.raises(ValueError, match=words):
        load(found)


@pytest.mark.parametrize("text, words", [("{", "not JSON"), ("{}", "no entry layers"),
                                         ('{"layers": [1]}', "not an object"),
                                         ('{"layers": {"blocks.0.ffn.0": 1}}', "has the format 1")])
def test_bad_marks_in_the_header(text, words):
    with pytest.raises(ValueError, match=words):
        load(tensors(), HEADER | {"_quantization_metadata": text})


def test_another_type_is_refused():
    with pytest.raises(ValueError, match="holds 8 layers in 8 or 4 bits.*Choose auto under weight_dtype, not bf16"):
        load(marked(*stored()[:2])[0], weight_dtype="bf16")
    marker_alone = load(tensors() | {"scaled_fp8": torch.empty(0, dtype=EIGHT)}, weight_dtype="fp32")
    close(marker_alone, tensors(), 1e-6)
