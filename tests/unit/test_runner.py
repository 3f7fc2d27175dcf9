"""The runner's parts that need no server: options, graph edits, websocket frames, messages for people."""

import importlib.util
import json
import socket
import struct
import urllib.error
from pathlib import Path

import client
import graph
import host
import launch
import pipeline
import pytest

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
    assert run.jobs(options) == [(run.EXAMPLE, "hello", Path("out/stillmotion_start_1024_seed123"))]


@pytest.mark.parametrize("arguments, words", [
    (["777"], "invalid choice"),
    (["512", "abc"], "unexpected 'abc'"),
    (["512", "1", "cpu", "more"], "at most a preset, a seed and a device"),
    (["--steps", "0"], "--steps is 0"),
    (["--steps", "1001"], "at most 1000"),
    (["--frames", "-1"], "--frames is -1"),
    (["--image", "missing.png", "--prompt", "x"], "no file missing.png"),
    (["--prompt_dir", "missing"], "no image"),
    (["--server", "127.0.0.1:8188", "--device", "cpu"], "leave out --device"),
])
def test_bad_options_are_refused_before_anything_starts(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run.parse(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_folder_of_images_and_prompts(tmp_path):
    for name in ("b.png", "a.jpg", "c.bmp", "alone.png"):
        (tmp_path / name).write_bytes(b"image")
    for name in ("a", "b", "c", "unused"):
        (tmp_path / f"{name}.txt").write_text(f" prompt {name}\n")
    jobs = run.jobs(run.parse(["512", "9", "--prompt_dir", str(tmp_path)]))
    folder = Path("results/dynamicrafter_pipeline_512_seed9")
    assert jobs == [(tmp_path / "a.jpg", "prompt a", folder / "a"), (tmp_path / "b.png", "prompt b", folder / "b"),
                    (tmp_path / "c.bmp", "prompt c", folder / "c")]


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
def test_device_names(device, arguments):
    assert launch.device_arguments(FOUND, device) == arguments


def test_an_unknown_device_is_refused():
    with pytest.raises(host.HostError, match="'tpu' is unknown: use auto, cpu, cuda or cuda:N"):
        launch.device_arguments(FOUND, "tpu")


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


def test_a_batch_is_saved_as_one_file_a_video():
    api = {"1": {"class_type": "VAEDecode", "inputs": {}},
           "2": {"class_type": "Save", "inputs": {"images": ["1", 0], "fps": 8.0}}}
    savers = graph.split_batch(api, "1", "2", 3, 16)
    assert len(set(savers)) == 3
    parts = [api[api[s]["inputs"]["images"][0]]["inputs"] for s in savers]
    assert [(p["image"], p["batch_index"], p["length"]) for p in parts] == [(["1", 0], i * 16, 16) for i in range(3)]
    assert all(api[s]["inputs"]["fps"] == 8.0 for s in savers)


# ---- websocket ----

@pytest.fixture
def events():
    """The client's end of a websocket, and the server's raw socket."""
    ours, theirs = socket.socketpair()
    stream = client.Events.__new__(client.Events)
    stream.socket, stream.buffer, stream.message = ours, b"", b""
    yield stream, theirs
    ours.close()
    theirs.close()


def frame(payload, first=0x81):
    size = len(payload)
    head = bytes([size]) if size < 126 else struct.pack(">BH", 126, size) if size < 65536 else struct.pack(
        ">BQ", 127, size)
    return bytes([first]) + head + payload


@pytest.mark.parametrize("size", [0, 200, 70000])
def test_messages_of_all_lengths_arrive_in_pieces(events, size):
    stream, theirs = events
    message = {"type": "progress", "data": {"text": "x" * size}}
    raw = frame(json.dumps(message).encode())
    theirs.sendall(raw[:1])
    assert stream.next(0.01) is None
    theirs.sendall(raw[1:-1])
    assert stream.next(0.05) is None
    theirs.sendall(raw[-1:])
    assert stream.next(1) == message


def test_previews_are_skipped_pings_answered_fragments_joined_and_an_end_noticed(events):
    stream, theirs = events
    theirs.sendall(frame(b"\0\0\0\1JPEG", 0x82) + frame(b"hello", 0x89) + frame(b'{"a":', 0x01) + frame(b" 1}", 0x80))
    assert stream.next(1) == {"a": 1}
    assert theirs.recv(100) == b"\x8a\x85\0\0\0\0hello"
    theirs.sendall(frame(b"", 0x88))
    with pytest.raises(ConnectionError):
        stream.next(1)


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


def test_a_server_that_was_never_there_is_gone(monkeypatch):
    monkeypatch.setattr(client, "GONE_AFTER_SECONDS", 1)
    with pytest.raises(client.ServerGone, match="Is ComfyUI still running there"):
        client.Client(f"http://127.0.0.1:{launch.free_port()}").run({})


def test_a_download_is_whole_or_not_there(tmp_path, monkeypatch):
    class Breaks:
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def read(self, size):
            raise urllib.error.URLError("cut")

    one = client.Client("http://127.0.0.1:1")
    monkeypatch.setattr(one, "view", lambda entry: Breaks())
    with pytest.raises(urllib.error.URLError):
        one.download({}, tmp_path / "deep" / "video.mp4")
    assert list((tmp_path / "deep").iterdir()) == []
