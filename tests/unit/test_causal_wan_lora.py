"""LoRAs on causal Wan, and the node that loads both."""

import comfy.sd
import folder_paths
import pytest
import torch
from causal_wan_stub import HEADER, LAYERS, load, lora_halves, named, run, same, tensors, weights_of
from safetensors.torch import save_file
from stillmotion.nodes.causal_wan import nodes_loading as nodes
from stillmotion.nodes.causal_wan.lora import add_lora
from stillmotion.nodes.common.files import Checkpoint, read_checkpoint


@pytest.fixture(autouse=True)
def as_in_the_host():
    with torch.inference_mode():
        yield


LORAS = {
    "longlive": lambda: {"generator_lora": named("base_model.model."),
                         "critic_lora": {"base_model.model.x.lora_A.weight": torch.ones(1, 1)}, "step": 3},
    "flat": lambda: named("base_model.model."),
    "peft-of-wrapper": lambda: named("base_model.model.model."),
    "peft-in-training": lambda: named("base_model.model.", "lora_A.default.weight", "lora_B.default.weight"),
    "fsdp": lambda: {"generator_lora": {key.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): value
                                        for key, value in named("base_model.model.").items()}},
    "bare": lambda: named(""),
    "core": lambda: named("diffusion_model."),
    "kohya": lambda: named("lora_unet_", "lora_down.weight", "lora_up.weight", (".", "_")),
}


def merged(strength):
    """The weights with B @ A added by hand."""
    found = tensors()
    for layer, (down, up) in lora_halves().items():
        found[f"{layer}.weight"] = found[f"{layer}.weight"] + strength * (up @ down)
    return found


@pytest.mark.parametrize("name", LORAS)
def test_lora_equals_merging_by_hand(tmp_path, name, caplog):
    torch.save(LORAS[name](), tmp_path / "lora.pt")
    base = load(tensors(), weight_dtype="fp32")
    with caplog.at_level("INFO"):
        patched = add_lora(base, read_checkpoint(tmp_path / "lora.pt"), 0.7)
    assert "LoRA of 40 keys on 20 weights" in caplog.text and "are ignored" not in caplog.text
    by_hand = run(load(merged(0.7), weight_dtype="fp32"))
    plain = run(base)
    found = run(patched)
    assert (found - by_hand).norm() / by_hand.norm() < 1e-4 < (found - plain).norm() / plain.norm()
    for key, value in weights_of(patched).items():
        assert torch.allclose(value, merged(0.7)[key], atol=1e-5), key
    assert torch.equal(run(base), plain) and same(base, tensors())


@pytest.mark.parametrize("name", ["core", "kohya"])
def test_cores_lora_loader_gives_the_same(name):
    base = load(tensors(), weight_dtype="fp32")
    patched = comfy.sd.load_lora_for_models(base, None, LORAS[name](), 0.7, 0)[0]
    run(patched)
    assert all(torch.allclose(value, merged(0.7)[key], atol=1e-5) for key, value in weights_of(patched).items())


def test_alpha_of_a_lora_for_core():
    found = named("diffusion_model.") | {f"diffusion_model.{layer}.alpha": torch.tensor(6.0) for layer in LAYERS}
    patched = add_lora(load(tensors(), weight_dtype="fp32"), Checkpoint("lora.safetensors", found, {}))
    run(patched)
    assert torch.allclose(weights_of(patched)["blocks.0.ffn.0.weight"], merged(2.0)["blocks.0.ffn.0.weight"], atol=1e-5)


def test_lora_that_does_not_fit(caplog):
    base = load(tensors(), weight_dtype="fp32")

    def add(found):
        return add_lora(base, Checkpoint("lora.pt", found, {}))

    with pytest.raises(ValueError, match="none of its 2 keys is a LoRA for this model.*Choose a LoRA for Wan 2.1"):
        add({f"base_model.model.double_blocks.0.img_attn.qkv.{half}.weight": torch.ones(2, 2)
             for half in ("lora_A", "lora_B")})
    with pytest.raises(ValueError, match="none of its 1 keys"):
        add({"blocks.0.ffn.0.weight": torch.ones(80, 48)})
    with pytest.raises(ValueError, match="1 matrices of the LoRA lack their other half: .*ffn.0.lora_B"):
        add({key: value for key, value in named("").items() if key != "blocks.0.ffn.0.lora_A.weight"})
    with pytest.raises(ValueError, match=r"of another size: .*ffn.0.weight is \[80, 48\] here, \[160, 48\] in"):
        add(named("") | {"blocks.0.ffn.0.lora_B.weight": torch.ones(160, 3)})
    for name, value, words in (
            ("lora_A", torch.ones(4, 48), r"1 pairs of the LoRA do not fit each other: .*lora_A.* is \[4, 48\]"),
            ("lora_B", torch.ones(80), r"1 pairs of the LoRA do not fit each other: .*lora_B.weight \[80\]"),
            ("lora_A", torch.ones(3, 48).bool(), "1 weights are not of a kind.*lora_A.weight is bool"),
            ("alpha", torch.ones(2), r"ffn.0.alpha is \[1.0, 1.0\]. It must be one number"),
            ("alpha", torch.tensor(float("nan")), r"ffn.0.alpha is \[nan\]. It must")):
        key = f"blocks.0.ffn.0.{name}" + (".weight" if "lora" in name else "")
        with pytest.raises(ValueError, match=words):
            add(named("") | {key: value})
    assert not base.patches
    add(named("") | {"blocks.7.ffn.0.lora_A.weight": torch.ones(3, 48),
                     "blocks.7.ffn.0.lora_B.weight": torch.ones(80, 3)})
    assert "2 of 42 keys match nothing in this model" in caplog.text


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Separate model folders."""
    for folder in ("diffusion_models", "checkpoints", "loras"):
        (tmp_path / folder).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder,
                            ([str(tmp_path / folder)], folder_paths.supported_pt_extensions))
    folder_paths.filename_list_cache.clear()
    yield tmp_path
    folder_paths.filename_list_cache.clear()


def test_the_node_loads_from_both_folders_with_a_lora(folders):
    save_file(tensors(), folders / "diffusion_models" / "causal.safetensors", metadata=HEADER)
    save_file(tensors(seed=1), folders / "checkpoints" / "causal2.safetensors", metadata=HEADER)
    torch.save(LORAS["longlive"](), folders / "loras" / "lora.pt")
    options = {part.id: part.options for part in nodes.LoadCausalWan.GET_SCHEMA().inputs if hasattr(part, "options")}
    assert options["checkpoint"] == ["demo", "causal.safetensors", "causal2.safetensors"]
    assert options["lora"] == ["none", "lora.pt"] and options["weights"] == ["auto", "ema", "raw"]

    def execute(checkpoint="causal.safetensors", lora="none", strength=1.0):
        return nodes.LoadCausalWan.execute(checkpoint, "auto", lora, strength, "fp32")[0]

    assert same(execute(), tensors()) and same(execute("causal2.safetensors"), tensors(seed=1))
    patched = execute(lora="lora.pt", strength=0.7)
    by_hand = run(load(merged(0.7), weight_dtype="fp32"))
    assert (run(patched) - by_hand).norm() / by_hand.norm() < 1e-4
    for given, words in (({"checkpoint": "other.pt"}, "no file 'other.pt' in models/diffusion_models or models/check"),
                         ({"lora": "demo"}, "no file 'demo' in models/loras. Choose one of: lora.pt")):
        with pytest.raises(ValueError, match=words):
            execute(**given)


def test_the_node_notices_a_changed_file(folders):
    path = folders / "diffusion_models" / "causal.safetensors"
    save_file(tensors(), path, metadata=HEADER)
    first = nodes.LoadCausalWan.fingerprint_inputs(checkpoint="causal.safetensors", lora="none")
    assert first == nodes.LoadCausalWan.fingerprint_inputs(checkpoint="causal.safetensors", lora="none")
    save_file(tensors() | {"more": torch.ones(1)}, path, metadata=HEADER)
    assert first != nodes.LoadCausalWan.fingerprint_inputs(checkpoint="causal.safetensors", lora="none")


def test_the_schema_is_complete():
    schema = nodes.LoadCausalWan.GET_SCHEMA()
    assert schema.node_id == "Stillmotion_LoadCausalWan"
    assert all(part.tooltip for part in (*schema.inputs, *schema.outputs))
