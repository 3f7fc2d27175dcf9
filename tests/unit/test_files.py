"""Reading checkpoints: every accepted wrapping gives the same tensors, every bad file a clear error."""

import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from stillmotion.nodes.common import files

WEIGHTS = {"model.a": torch.arange(20000.0), "first.b": torch.ones(2, 3)}


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran-when-loaded",)


def same(found):
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [
    lambda w: w,
    lambda w: {"state_dict": w, "epoch": 3, "global_step": 7},
    lambda w: {"module": {f"_forward_module.{k}": v for k, v in w.items()}, "dp_world_size": 8},
    lambda w: {"module": w},
    lambda w: {"model": w, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "step": 3},
    lambda w: {"model_state_dict": w, "epoch": 3},
    lambda w: {"state_dict": {"model": {f"module.{k}": v for k, v in w.items()}}},
    lambda w: {f"_orig_mod.module.{k}": v for k, v in w.items()},
    lambda w: {k.replace(".", "._fsdp_wrapped_module._checkpoint_wrapped_module."): v for k, v in w.items()},
    lambda w: w | {7: torch.ones(1)},
], ids=["flat", "state_dict", "deepspeed", "module", "model", "model_state_dict", "twice", "ddp-compiled", "fsdp",
        "a number for a name"])
def test_pickles(tmp_path, wrap, zipped):
    path = tmp_path / "model.ckpt"
    torch.save(wrap(WEIGHTS), path, _use_new_zipfile_serialization=zipped)
    found = files.read_checkpoint(path)
    same(found.tensors)
    assert found.metadata == {}


@pytest.mark.parametrize("step", [3, torch.tensor(3)], ids=["number", "tensor"])
def test_several_models_in_one_pickle(tmp_path, step):
    """Each model's keys are prefixed with its dictionary's name; other entries (optimizer, step) are ignored."""
    beside = {"optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}, "name": "x", "step": step}
    torch.save({"generator": WEIGHTS, "generator_ema": {"model.a": torch.zeros(2)}, **beside}, tmp_path / "model.pt")
    found = files.read_checkpoint(tmp_path / "model.pt").tensors
    assert found.keys() == {"generator.model.a", "generator.first.b", "generator_ema.model.a"}
    same(files.take_prefix(found, "generator."))


def test_wrappers_in_safetensors(tmp_path):
    save_file({f"module._orig_mod.{key}": value for key, value in WEIGHTS.items()}, tmp_path / "a.safetensors")
    same(files.read_checkpoint(tmp_path / "a.safetensors").tensors)
    save_file(WEIGHTS | {"model.module.a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="1 keys name the same weights twice"):
        files.read_checkpoint(tmp_path / "a.safetensors")


def test_a_pickle_that_holds_itself(tmp_path):
    loop = {"epoch": 3}
    loop["state_dict"] = loop
    torch.save(loop, tmp_path / "loop.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        files.read_checkpoint(tmp_path / "loop.pt")


def test_pickles_without_numbers(tmp_path):
    for found, words in (({"model.a": torch.empty(3, device="meta")}, "names and shapes without values"),
                         ({1: torch.ones(3)}, "without named tensors"), ({"module": {1: torch.ones(3)}}, "holds no w")):
        torch.save(found, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=words):
            files.read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("value, word", [
    (torch.ones(2, dtype=torch.bool), "bool"), (torch.ones(2, dtype=torch.int64), "int64"),
    (torch.ones(2, dtype=torch.complex64), "complex64"), (torch.ones(2).to_sparse(), "float32, sparse"),
    (torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "quantised")])
def test_kinds_of_weights(value, word):
    files.check_kinds("a.pt", WEIGHTS | {"half": torch.ones(1).half(), "eight": torch.ones(1).to(torch.float8_e5m2)})
    with pytest.raises(ValueError, match=f"a.pt: 1 weights are not of a kind.*: odd is {word}.*Allowed are floating"):
        files.check_kinds("a.pt", WEIGHTS | {"odd": value})


def test_pickle_named_safetensors(tmp_path):
    for zipped in (True, False):
        torch.save(WEIGHTS, tmp_path / "a.safetensors", _use_new_zipfile_serialization=zipped)
        same(files.read_checkpoint(tmp_path / "a.safetensors").tensors)


def test_tables_without_their_zero_rows(tmp_path):
    table = torch.zeros(5, 2)
    table[[1, 3]] = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    tensors = files.without_zero_rows({"a": torch.ones(1), "words.weight": table}, "words.weight")
    assert tensors["words.weight"].shape == (2, 2)
    save_file(tensors, tmp_path / "small.safetensors")
    found = files.read_checkpoint(tmp_path / "small.safetensors").tensors
    assert found.keys() == {"a", "words.weight"} and torch.equal(found["words.weight"], table)
    others = {"words.rows": torch.ones(3, dtype=torch.bool), "words": torch.ones(2, 2)}
    save_file(others, tmp_path / "other.safetensors")
    assert files.read_checkpoint(tmp_path / "other.safetensors").tensors.keys() == others.keys()


def test_safetensors_under_any_name(tmp_path):
    path = tmp_path / "model.ckpt"
    save_file(WEIGHTS, path, metadata={"stillmotion.config": "{}"})
    found = files.read_checkpoint(path)
    same(found.tensors)
    assert found.metadata["stillmotion.config"] == "{}"


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the list of mapped files is Linux's")
def test_a_header_whose_length_begins_like_a_pickle(tmp_path):
    for length in range(8):  # the header's length is a multiple of 8: one of these notes makes it end in 0x80
        for note in ("x" * (32 * length + extra) for extra in range(0, 32, 8)):
            save_file(WEIGHTS, tmp_path / "a.safetensors", metadata={"note": note})
            with open(tmp_path / "a.safetensors", "rb") as file:
                if file.read(1) == b"\x80":
                    return same(files.read_checkpoint(tmp_path / "a.safetensors").tensors)
    raise AssertionError("no note gave such a header")


def test_big_files_are_mapped_not_read(tmp_path):
    torch.save(WEIGHTS, tmp_path / "a.ckpt")
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    held = [files.read_checkpoint(tmp_path / name) for name in ("a.ckpt", "a.safetensors")]
    with open("/proc/self/maps") as maps:
        mapped = maps.read()
    assert all(found.path in mapped for found in held)


def test_an_old_file_is_looked_at_without_its_values(tmp_path, monkeypatch):
    path, read = tmp_path / "old.ckpt", []
    torch.save({"state_dict": WEIGHTS}, path, _use_new_zipfile_serialization=False)
    fill = torch.UntypedStorage._set_from_file
    monkeypatch.setattr(torch.UntypedStorage, "_set_from_file",
                        lambda *given: read.append(given) or fill(*given), raising=False)
    found = files.read_checkpoint(path, values=False).tensors
    assert not read and {key: (value.shape, value.dtype) for key, value in found.items()} == {
        key: (value.shape, value.dtype) for key, value in WEIGHTS.items()}
    assert all(value.is_meta for value in found.values())
    same(files.read_checkpoint(path).tensors)
    assert read
    large = tmp_path / "large.ckpt"
    torch.save({"a": torch.ones(9999)}, large, _use_new_zipfile_serialization=False)
    large.write_bytes(large.read_bytes()[:-999])
    with pytest.raises(ValueError, match="large.ckpt is cut off: its weights take 39996 bytes, and the file has"):
        files.read_checkpoint(large, values=False)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": WEIGHTS, "extra": Runs()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.ckpt is refused.*posix\.mkdir|nt\.mkdir"):
        files.read_checkpoint(path)
    assert not (tmp_path / "ran-when-loaded").exists()


@pytest.mark.parametrize("name", ["zip.ckpt", "old.ckpt", "a.safetensors"])
@pytest.mark.parametrize("keep", [0.02, 0.7, 0.999])
def test_cut_off_file(tmp_path, name, keep):
    path = tmp_path / name
    if name == "a.safetensors":
        save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=name == "zip.ckpt")
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole) * keep)])
    with pytest.raises(ValueError, match=name) as refused:
        files.read_checkpoint(path)
    assert "again" in str(refused.value) or "damaged" in str(refused.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_old_file_cut_at_any_byte(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "whole.pt", _use_new_zipfile_serialization=False)
    whole, path = (tmp_path / "whole.pt").read_bytes(), tmp_path / "cut.pt"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.pt"):
            files.read_checkpoint(path)


@pytest.mark.parametrize("content, word", [
    (b"", "empty"),
    (b"<!DOCTYPE html><html></html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
    (bytes(range(1, 100)), "starts with"),
    (pickle.dumps([1, 2, "three"]), "not a checkpoint|no checkpoint"),
])
def test_not_a_checkpoint(tmp_path, content, word):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=word) as refused:
        files.read_checkpoint(path)
    assert "model.safetensors" in str(refused.value)


def test_other_archives_and_objects(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="no checkpoint"):
        files.read_checkpoint(tmp_path / "a.zip")
    for name in ("list.pt", "empty.pt"):
        with pytest.raises(ValueError, match="holds no weights"):
            files.read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("change, word", [
    (lambda w: w.pop("model.a"), "1 missing: model.a"),
    (lambda w: w.update(other=torch.ones(1)), "1 not known: other"),
    (lambda w: w.update({"first.b": torch.ones(3, 2)}), r"first.b is \[3, 2\], expected \[2, 3\]"),
])
def test_every_key_is_accounted_for(change, word):
    expected = {key: tuple(value.shape) for key, value in WEIGHTS.items()}
    found = dict(WEIGHTS)
    files.check_keys("network", found, expected, "The file was changed.")
    change(found)
    with pytest.raises(ValueError, match=word) as refused:
        files.check_keys("network", found, expected, "The file was changed.")
    assert "The file was changed." in str(refused.value)


def test_take_prefix():
    tensors = dict(WEIGHTS)
    assert list(files.take_prefix(tensors, "model.")) == ["a"]
    assert list(tensors) == ["first.b"]
