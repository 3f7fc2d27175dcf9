"""Interrupted runs resumed from the blocks on disk, compared with uninterrupted runs."""

from threading import Thread

import comfy.lora
import comfy.model_management
import folder_paths
import pytest
import torch
from causal_wan_stub import conditioning, draw, latent, load, make_run, sample, settings, strong_tensors
from stillmotion.nodes.causal_wan import nodes_sampling as nodes
from stillmotion.nodes.causal_wan.conditioning import CHUNK, CLAMP, CONCAT, PREFIX, StartFrames
from stillmotion.nodes.causal_wan.fingerprint import digest, model_digests
from stillmotion.nodes.causal_wan.resume import BlockFolder
from stillmotion.nodes.common.saving import holding


@pytest.fixture(autouse=True)
def as_in_the_host():
    with torch.inference_mode():
        yield


def resume(path, callback=None, **arguments):
    """Queue a run once that stores its blocks in `path`."""
    run = make_run(**arguments)
    return run.sample(callback, BlockFolder(path, run.fingerprint()))["samples"]


def stop_after(steps):
    def callback(step, *_):
        if step + 1 == steps:
            comfy.model_management.interrupt_current_processing(True)
    return callback


def names(path):
    return sorted(file.name for file in path.iterdir())


RUNS = {
    "text": dict(frames=8),
    "batch, guidance, window": dict(frames=8, batch=2, cfg=2.0, window=4, sink=1),
    "switches": dict(frames=10, switches=(4, 6), window=4, sink=2),
    "new sink, endless, guidance": dict(frames=10, switches=(5,), window=4, sink=2, global_sink=False, endless=True,
                                        cfg=2.0),
    "first block": dict(frames=9, independent_first=True, first_steps="1000 750 250", context_noise=20.0),
    "short last block": dict(frames=7, short_last=True, cfg=1.5),
    "prefix": dict(frames=7, start=StartFrames(PREFIX, 1, 2, False), window=3, sink=1),
    "still chunk": dict(frames=8, start=StartFrames(CHUNK, 2, 2, True), switches=(3,)),
    "clamp": dict(frames=8, start=StartFrames(CLAMP, 1, 2, False)),
    "image to video": dict(kind="i2v", frames=8, start=StartFrames(CONCAT, 0, 2, False), cfg=2.0, switches=(4,)),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_goes_on_bit_for_bit(name, tmp_path):
    arguments = RUNS[name]
    whole = sample(**arguments)
    for steps in (3, 5):
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            resume(tmp_path, stop_after(steps), **arguments)
    kept, told, run = names(tmp_path), [], make_run(**arguments)
    assert len(kept) == 2
    assert torch.equal(resume(tmp_path, lambda step, *_: told.append(step), **arguments), whole)
    assert told == list(range(len(run.plan.first_steps) + len(run.plan.steps), run.steps))
    assert set(kept) < set(names(tmp_path))


def test_a_finished_run_is_read_without_a_step(tmp_path):
    whole = resume(tmp_path, frames=6)
    assert torch.equal(resume(tmp_path, lambda *_: pytest.fail("a step was made"), frames=6), whole)


@pytest.mark.parametrize("changes", [{}, {"window": 4, "sink": 1}, {"window": 8, "sink": 2, "endless": True},
                                      {"batch": 2, "cfg": 2.0, "switches": (2,)}, {"kind": "i2v", "window": 6}])
def test_a_longer_video_goes_on_from_a_shorter_one_and_back(changes, tmp_path):
    short = resume(tmp_path, frames=6, **changes)
    long = resume(tmp_path, frames=12, **changes)
    assert torch.equal(long, sample(frames=12, **changes)) and torch.equal(long[:, :, :6], short)
    assert torch.equal(resume(tmp_path, lambda *_: pytest.fail("a step was made"), frames=6, **changes), short)


def test_prompts_of_blocks_that_are_not_made_yet_may_change(tmp_path):
    resume(tmp_path, frames=4)
    assert torch.equal(resume(tmp_path, frames=8, switches=(4,)), sample(frames=8, switches=(4,)))


def test_a_missing_block_is_made_anew_and_the_later_ones_are_kept(tmp_path):
    whole = resume(tmp_path, frames=8)
    (tmp_path / "block_000001.safetensors").unlink()
    told = []
    assert torch.equal(resume(tmp_path, lambda step, *_: told.append(step), frames=8), whole)
    assert told == [2, 3]


def lora(strength):
    model = load(strong_tensors(), weight_dtype="fp32").clone()
    found = {"q.lora_down.weight": draw(7, 2, 48), "q.lora_up.weight": draw(8, 48, 2)}
    model.add_patches(comfy.lora.load_lora(found, {"q": "diffusion_model.blocks.0.self_attn.q.weight"}), strength)
    return model


def scaled(factor):
    model = load(strong_tensors(), weight_dtype="fp32")
    model.set_model_unet_function_wrapper(lambda apply, given: factor * apply(given["input"], given["timestep"],
                                                                             **given["c"]))
    return model


CHANGES = {
    "seed": ({"seed": 4}, "seed was 3, now it is 4"),
    "steps": ({"steps": "1000, 250"}, r"steps was \[1000, 500\], now it is \[1000, 250\]"),
    "first steps": ({"first_steps": "1000"}, r"first_steps was \[1000, 500\], now it is \[1000\]"),
    "shift": ({"shift": 8.0}, "shift was 5.0, now it is 8.0"),
    "warp": ({"warp": False}, "warp was True"),
    "window": ({"window": 4}, "window was -1, now it is 4"),
    "sink": ({"sink": 1}, "sink was 0"),
    "endless": ({"endless": True}, "endless was False"),
    "noise": ({"context_noise": 9.0}, "context_noise was 0.0"),
    "cfg": ({"cfg": 2.0}, "cfg was 1.0, now it is 2.0; negative was None"),
    "refresh": ({"global_sink": False}, "global_sink was True"),
    "batch": ({"batch": 2}, r"latent size was \[1, 16, 4, 6\], now it is \[2, 16, 4, 6\]"),
    "block": ({"block": 1}, r"Of block 0: frames was 2, now it is 1.*delete block_000000.safetensors and the files"),
    "first": ({"frames": 7, "independent_first": True}, "Of block 0: frames was 2, now it is 1"),
    "prompt": ({"switches": (2,)}, r"Of block 1: prompt was 0 \(\w+\), now it is 1 \("),
    "start": ({"start": StartFrames(CLAMP, 1, 2, False)}, r"start was \[\], now it is \['in-block clamp', 1, 2, False"),
    "model": ({"model": load({key: 1.001 * value for key, value in strong_tensors().items()}, weight_dtype="fp32")},
              r"run. model was \w+, now it is"),
    "kind": ({"kind": "i2v"}, "model was"),
    "dtype": ({"model": load(strong_tensors(), weight_dtype="bf16")},
              "weights was torch.float32, now it is torch.bfloat16"),
    "lora": ({"model": lora(0.5)}, r"run. model patches was \w+, now it is"),
    "wrapper": ({"model": scaled(0.5)}, "model patches was"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_named_with_both_values(name, tmp_path):
    change, words = CHANGES[name]
    resume(tmp_path, frames=6)
    before = [(file.name, file.stat().st_mtime_ns) for file in sorted(tmp_path.iterdir())]
    with pytest.raises(ValueError, match=words) as told:
        resume(tmp_path, lambda *_: pytest.fail("a step was made"), **{"frames": 6, **change})
    assert "holds blocks of another run" in str(told.value) and "name another folder" in str(told.value)
    assert [(file.name, file.stat().st_mtime_ns) for file in sorted(tmp_path.iterdir())] == before


def test_a_shorter_last_block_cannot_be_continued(tmp_path):
    resume(tmp_path, frames=5, short_last=True)
    with pytest.raises(ValueError, match="Of block 2: frames was 1, now it is 2.*delete block_000002.safetensors"):
        resume(tmp_path, frames=8)
    (tmp_path / "block_000002.safetensors").unlink()
    assert torch.equal(resume(tmp_path, frames=8), sample(frames=8))


def test_the_text_and_the_image_count(tmp_path):
    found = [make_run("i2v", 6).fingerprint()]
    for seed in (1, 2):
        (_, values), = conditioning("i2v", 6, 1)
        values["concat_latent_image"][:, :, -1] += seed
        changed = nodes.prepare(load(strong_tensors("i2v"), weight_dtype="fp32"), [[draw(seed, 1, 6, 24), values]],
                                conditioning("i2v", 6, 2), latent("i2v", 6), None, 3, settings())
        found.append(changed.fingerprint())
    assert found[0].settings == found[1].settings == found[2].settings
    assert [block["y"] for block in found[0].blocks[:2]] == [block["y"] for block in found[1].blocks[:2]]
    assert found[0].blocks[2]["y"] != found[1].blocks[2]["y"] != found[2].blocks[2]["y"]
    assert found[0].blocks[0]["prompt"] == found[1].blocks[0]["prompt"] != found[2].blocks[0]["prompt"]


def test_lora_strength_function_state_and_use_of_the_model_count_rightly():
    model = lora(0.5)
    before = model_digests(model)
    sample(model=model)  # its patches are now merged into the weights
    assert model_digests(model) == before == model_digests(lora(0.5))
    assert model_digests(lora(0.6))["model"] == before["model"]
    assert model_digests(lora(0.6))["model patches"] != before["model patches"]
    assert model_digests(scaled(0.5)) == model_digests(scaled(0.5)) != model_digests(scaled(0.6))


@pytest.mark.parametrize("a, b", [(1, 1.0), ("1", 1), ([1, [2]], [[1], 2]), ({"a": 1}, {"b": 1}), (None, 0),
                                  (torch.zeros(2, 3), torch.zeros(3, 2)), (torch.zeros(2), torch.zeros(2).bfloat16()),
                                  (torch.zeros(4), torch.tensor([0, 0, 0, 1e-9]))])
def test_digests_tell_values_apart(a, b):
    assert digest(a) != digest(b) and digest(a, b) != digest(b, a) and digest(a) == digest(a)


def test_digests_do_not_hang_on_order_or_place():
    assert digest({"a": 1, "b": {3, 4}}) == digest({"b": {4, 3}, "a": 1})
    assert digest(torch.arange(6).view(2, 3).T) == digest(torch.arange(6).view(2, 3).T.contiguous())


@pytest.mark.parametrize("damage, words", [
    (lambda file: file.write_bytes(file.read_bytes()[:-20]), "not a whole block file"),
    (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"), "its numbers are not those that were written"),
    (lambda file: file.write_bytes(b""), "not a whole block file"),
    (lambda file: file.write_bytes(b"text" * 30), "not a whole block file"),
])
def test_damaged_blocks_are_named(damage, words, tmp_path):
    whole = resume(tmp_path, frames=8)
    for index in (1, 2):
        damage(tmp_path / f"block_{index:06}.safetensors")
    with pytest.raises(ValueError, match=rf"block_000001.safetensors \({words}.*block_000002.*Delete these files"):
        resume(tmp_path, lambda *_: pytest.fail("a step was made"), frames=8)
    for index in (1, 2):
        (tmp_path / f"block_{index:06}.safetensors").unlink()
    assert torch.equal(resume(tmp_path, frames=8), whole)


def test_a_full_disk_leaves_no_half_block(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="Free space on the disk"):
        resume(tmp_path, frames=6)
    assert names(tmp_path) == []


WIDGETS = dict(seed=3, steps="1000, 500", first_steps="", shift=5.0, warp=True, block=2, independent_first=False,
               short_last_block=False, window=4, sink=1, endless=False, context_noise=0.0, cfg=2.0, refresh_sink=False)


def run_node(folder):
    model = load(strong_tensors(), weight_dtype="fp32")
    return nodes.BlockAutoregressiveSampler.execute(model, conditioning("t2v", 6, 1), conditioning("t2v", 6, 2),
                                                    latent("t2v", 6), resume_folder=folder, **WIDGETS).result[0]


def test_the_node_keeps_its_blocks_in_the_output_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    found = run_node(" runs/one ")["samples"]
    assert torch.equal(found, run_node("")["samples"])
    assert len(names(tmp_path / "output" / "runs" / "one")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", ".", "a/../.."])
def test_folders_outside_the_output_folder_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    with pytest.raises(ValueError, match="is not in ComfyUI's output folder"):
        run_node(name)
    assert not list(tmp_path.iterdir())


def test_a_linked_folder_in_the_output_folder_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    for name in ("disk", "output"):
        (tmp_path / name).mkdir()
    (tmp_path / "output" / "runs").symlink_to(tmp_path / "disk")
    run_node("runs/one")
    assert len(names(tmp_path / "disk" / "one")) == 3


@pytest.mark.parametrize("name, words", [("a\0b", "NUL"), ("a" * 300, "too long"), ("a\nb", "line ends")])
def test_names_that_no_folder_can_have_are_refused(name, words, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    with pytest.raises(ValueError, match=f"resume_folder .*{words}"):
        run_node(name)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_another_run_uses_is_refused_before_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    with holding(tmp_path / "runs", "The resume folder"):
        with pytest.raises(ValueError, match="The resume folder .*runs is in use by process .*name another folder"):
            run_node("runs")
    assert len(run_node("runs")["samples"]) and len(names(tmp_path / "runs")) == 3


def test_two_that_write_the_same_blocks_at_once_do_not_get_in_each_others_way(tmp_path):
    fingerprint = make_run(frames=8).fingerprint()
    folders, errors = [BlockFolder(tmp_path, fingerprint) for _ in range(2)], []

    def write(folder):
        try:
            for index in range(4):
                folder.keep(index, draw(index, 1, 4, 2, 8, 8))
        except OSError as error:
            errors.append(error)

    threads = [Thread(target=write, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(names(tmp_path)) == 4
    BlockFolder(tmp_path, fingerprint)
