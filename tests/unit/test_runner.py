"""The runner's parts that need no server: options, graph edits, user-facing messages."""

import importlib.util
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import client
import graph
import host
import launch
import numpy as np
import pipeline
import pytest
from PIL import Image

spec = importlib.util.spec_from_file_location("workflows_run", host.WORKFLOWS / "run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)

SCHEMAS = {
    "Sampler": {"input": {"required": {
        "model": ["MODEL", {}], "seed": ["INT", {"control_after_generate": True}], "steps": ["INT", {}],
        "kind": ["COMBO", {"options": ["a", "b"]}]}, "optional": {"cfg": ["FLOAT", {}], "noise": ["LATENT", {}]}}},
    "OldLoader": {"input": {"required": {"name": [["x", "y"], {}], "strength": ["FLOAT", {"forceInput": True}]}}},
}


# ---- options ----

def test_short_form_is_preset_seed_device():
    options = run.parse(["512", "42", "cuda:1"])
    assert (options.preset, options.seed, options.device) == ("512", 42, "cuda:1")
    assert run.parse(["512", "cuda"]).device == "cuda"
    assert run.parse(["--steps", "3", "256", "7"]).seed == 7
    assert run.parse(["--seed", "5", "256", "cpu"]).device == "cpu"
    assert run.parse([]).seed == 123 and run.parse([]).preset == "demo"


def test_long_names_of_the_original_command_line_work():
    options = run.parse(["1024", "--image_path", str(run.EXAMPLE), "--prompt_text", "hello", "--num_inference_steps",
                         "7", "--video_length", "9", "--output_dir", "out", "--eta", "0", "--batch_size", "2"])
    assert (options.steps, options.frames, options.output, options.eta) == (7, 9, Path("out"), 0.0)
    assert run.jobs(options) == [(run.EXAMPLE, "hello", Path("out/stillmotion_star_1024_seed123"))]


def test_a_subcommand_gets_the_arguments_after_its_name(monkeypatch, capsys):
    monkeypatch.setitem(run.SUBCOMMANDS, "recite", ("recite", "say the arguments again"))
    monkeypatch.setitem(sys.modules, "recite", SimpleNamespace(main=lambda arguments: f"heard {arguments}"))
    monkeypatch.setattr(sys, "argv", ["run.py", "recite", "demo", "--seed", "1"])
    assert run.main() == "heard ['demo', '--seed', '1']"
    with pytest.raises(SystemExit):
        run.parse(["--help"])
    assert "run.py recite     say the arguments again" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    (["777"], "'777' is neither a preset (demo, 256, 512, 1024) nor a command (batch, "),
    ([str(run.EXAMPLE)], f"given as --image {run.EXAMPLE}"),
    (["--width", "100"], "--width is 100: it must be a multiple of 8, such as 96"),
    (["--height", "4"], "--height is 4: it must be a multiple of 8, such as 8"),
    (["512", "abc"], "unexpected 'abc'"),
    (["512", "1", "cpu", "more"], "at most a preset, a seed and a device"),
    (["--steps", "0"], "--steps is 0"),
    (["--steps", "1001"], "at most 1000"),
    (["--frames", "-1"], "--frames is -1"),
    (["--image", "missing.png", "--prompt", "x"], "no file missing.png"),
    (["--prompt_dir", "missing"], "no folder missing"), (["--limit", "2"], "among the images of --prompt_dir"),
    (["--fps", "nan"], "--fps is nan"), (["--seed", "-1"], "--seed is -1"),
    (["--server", "127.0.0.1:8188", "--device", "cpu"], "leave out --device"),
])
def test_bad_options_are_refused_before_anything_starts(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run.parse(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_folder_of_images_and_prompts(tmp_path, capsys):
    for name in ("b.png", "a.jpg", "c.webp", "alone.png", f"{'x' * 200}.png"):
        (tmp_path / name).write_bytes(b"image")
    for name in ("a", "b", "c", "unused", "x" * 200):
        (tmp_path / f"{name}.txt").write_text(f" prompt {name[0]}\n")
    jobs = run.jobs(run.parse(["512", "9", "--prompt_dir", str(tmp_path)]))
    folder = Path("results/dynamicrafter_pipeline_512_seed9")
    assert jobs == [(tmp_path / "a.jpg", "prompt a", folder / "a"), (tmp_path / "b.png", "prompt b", folder / "b"),
                    (tmp_path / "c.webp", "prompt c", folder / "c"),
                    (tmp_path / f"{'x' * 200}.png", "prompt x", folder / ("x" * 60))]
    told = capsys.readouterr().err
    assert "2 left out" in told and "alone.png: there is no alone.txt" in told and "unused.txt" in told


def test_a_folder_with_one_file_of_prompts_a_filter_and_a_limit(tmp_path):
    for name in ("cat10.png", "cat2.png", "cat9.png", "dog.png"):
        (tmp_path / name).touch()
    (tmp_path / "prompts.txt").write_text("two\nnine\nten\nbarks\n")
    options = ["--prompt_dir", str(tmp_path), "--filter", "cat*", "--limit", "2", "--output", "out"]
    assert run.jobs(run.parse(options)) == [(tmp_path / "cat2.png", "two", Path("out/cat2")),
                                            (tmp_path / "cat9.png", "nine", Path("out/cat9"))]
    with pytest.raises(host.HostError, match="that fits --filter bird lies in"):
        run.jobs(run.parse([*options[:3], "bird"]))
    (tmp_path / "dog.png").unlink()
    with pytest.raises(host.HostError, match="prompts.txt has 4 lines for 3 pictures"):
        run.jobs(run.parse(options))


def test_a_folder_without_pairs_is_refused(tmp_path):
    (tmp_path / "cat.txt").write_text("a cat")
    with pytest.raises(host.HostError, match="no image with a same-named .txt or a line"):
        run.jobs(run.parse(["--prompt_dir", str(tmp_path)]))


def test_pictures_are_sent_as_they_are_or_in_a_form_that_every_server_reads(tmp_path, monkeypatch, capsys):
    plain, moving, wide = tmp_path / "plain.png", tmp_path / "moving.gif", tmp_path / "wide.bmp"
    Image.new("RGB", (20, 10), "red").save(plain)
    Image.new("RGB", (20, 10), "red").save(moving, save_all=True, append_images=[Image.new("RGB", (20, 10), "blue")])
    Image.new("RGB", (5000, 10), "red").save(wide)
    monkeypatch.setattr(pipeline, "LARGEST_SENT", 100_000)
    assert pipeline.file_of(plain) == (plain.read_bytes(), "plain.png")
    for path, size in ((moving, (20, 10)), (wide, (4096, 8))):
        data, name = pipeline.file_of(path)
        with Image.open(io.BytesIO(data)) as sent:
            assert name == f"{path.stem}.png" and getattr(sent, "n_frames", 1) == 1 and sent.size == size
            assert sent.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert capsys.readouterr().err == "wide.bmp is large: it is sent with 4096x8 pixels\n"
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(tmp_path / "grey.png")
    with pytest.raises(client.JobError, match="grey.png is grey with 16 bits. Save a copy with 8 bits"):
        pipeline.file_of(tmp_path / "grey.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(client.JobError, match="bad.png is no picture"):
        pipeline.file_of(tmp_path / "bad.png")


def test_presets_find_their_checkpoint_by_name():
    names = ["dynamicrafter_512_fp16_pruned.safetensors", "dynamicrafter_512_interp_v1.ckpt", "tooncrafter_512.ckpt",
             "dynamicrafter_512_v1/model.ckpt", "sd15.safetensors"]
    assert pipeline.choose_checkpoint("512", names) == "dynamicrafter_512_v1/model.ckpt"
    assert pipeline.choose_checkpoint("512", names[:2]) == names[0]
    assert pipeline.choose_checkpoint("1024", names) is None
    text = pipeline.missing_checkpoint("1024", Path("models/checkpoints"))
    assert "Doubiiu/DynamiCrafter_1024" in text and str(Path("models/checkpoints/dynamicrafter_1024.ckpt")) in text


FOUND = host.Host("python", "ComfyUI")


@pytest.mark.parametrize("device, arguments", [
    ("cpu", ["--cpu"]), ("cuda", []), ("cuda:1", ["--cuda-device", "1"]), ("2", ["--cuda-device", "2"])])
def test_device_names(device, arguments, monkeypatch):
    monkeypatch.setattr(launch, "count_gpus", lambda found: 3)
    assert launch.device_arguments(FOUND, device) == arguments


@pytest.mark.parametrize("device, gpus, words", [
    ("tpu", 1, "'tpu' is unknown: use auto, cpu, cuda or cuda:N"), ("cuda", 0, "finds no GPU. Use auto or cpu"),
    ("cuda:2", 2, "'cuda:2' is not there: .* finds 2 GPU")])
def test_a_device_that_is_not_there_is_refused(device, gpus, words, monkeypatch):
    monkeypatch.setattr(launch, "count_gpus", lambda found: gpus)
    with pytest.raises(host.HostError, match=words):
        launch.device_arguments(FOUND, device)


def test_auto_asks_torch_only_where_the_variant_does_not_tell(tmp_path):
    assert launch.device_arguments(host.Host(tmp_path / "no python", tmp_path, "cpu"), "auto") == ["--cpu"]
    with pytest.raises(FileNotFoundError):
        launch.device_arguments(host.Host(tmp_path / "no python", tmp_path), "auto")


# ---- graphs ----

def test_edits_reach_the_api_graph_and_the_ui_workflow():
    api = {"7": {"class_type": "Sampler", "inputs": {"seed": 1, "steps": 2, "kind": "a", "cfg": 1.0}}}
    ui = {"nodes": [{"id": 7, "type": "Sampler", "widgets_values": [1, "fixed", 2, "a", 1.0]}]}
    graph.set_inputs(api, ui, SCHEMAS, "7", seed=5, kind="b", cfg=2.5, steps=None)
    assert api["7"]["inputs"] == {"seed": 5, "steps": 2, "kind": "b", "cfg": 2.5}
    assert ui["nodes"][0]["widgets_values"] == [5, "fixed", 2, "b", 2.5]
    assert graph.widget_names(SCHEMAS["OldLoader"]) == ["name"]
    with pytest.raises(KeyError, match="no widget 'noise'"):
        graph.set_inputs(api, None, SCHEMAS, "7", noise=0)
    with pytest.raises(KeyError, match="0 nodes of class Other"):
        graph.find_node(api, "Other")


# ---- messages ----

def entry(**data):
    error = {"node_id": "3", "node_type": "Sampler", "exception_type": "ValueError", "exception_message": "", **data}
    return {"status": {"messages": [["execution_start", {}], ["execution_error", error]]}, "outputs": {}}


def test_a_failed_node_is_named_with_its_message():
    with pytest.raises(client.JobError, match=r"Sampler \(node 3\) failed: steps = 0") as error:
        client.finished(entry(exception_message="steps = 0 was given\n"), {})
    assert client.ADVICE not in str(error.value)


@pytest.mark.parametrize("data", [
    {"exception_type": "torch.OutOfMemoryError", "exception_message": "CUDA out of memory. Tried to allocate 2 GiB"},
    {"exception_type": "RuntimeError", "exception_message": "DefaultCPUAllocator: can't allocate memory"},
    {"exception_type": "MemoryError", "exception_message": ""},
])
def test_out_of_memory_comes_with_advice(data):
    with pytest.raises(client.JobError) as error:
        client.finished(entry(**data), {})
    assert client.ADVICE in str(error.value)
