"""workflows/generate.py without a server: options, prompts from a stream, wiring for other models, preview sheet."""
import importlib.util
import io
import json
import types

import client
import host
import numpy as np
import pytest
from PIL import Image

spec = importlib.util.spec_from_file_location("workflows_generate", host.WORKFLOWS / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


def test_the_command_line_of_the_document():
    options = generate.parse(["--checkpoint", "a.safetensors", "--prompts", "a red circle", "a blue square",
                              "--save_gif", "--save_frames", "--visualize"])
    assert options.prompts == ["a red circle", "a blue square"] and options.checkpoint == "a.safetensors"
    assert options.save_gif and options.save_frames and options.visualize
    given = vars(generate.parse([]))
    assert all(given[name] is None for name in ("seed", "steps", "guidance_scale", "eta", "num_frames", "fps", "width"))


@pytest.mark.parametrize("arguments, words", [
    (["--steps", "0"], "--steps is 0"), (["--steps", "1001"], "at most 1000"), (["--fps", "-1"], "--fps is -1"),
    (["--num_frames", "0"], "--num_frames is 0"), (["--prompts", "a", " "], "empty prompt"),
    (["--prompts"], "expected at least one"), (["--models", "missing"], "no folder missing"),
    (["--server", "127.0.0.1:1", "--comfyui", "x"], "leave out --comfyui"),
])
def test_bad_options(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        generate.parse(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("text, prompts", [
    ("one\n two \n\nthree\n", ["one", "two"]), ("one\ntwo", ["one", "two"]), ("", []), ("\n", []),
])
def test_prompts_are_read_until_an_empty_line_or_the_end(text, prompts):
    assert list(generate.ask(io.StringIO(text))) == prompts


def test_file_names():
    assert generate.file_stem(1, "A red circle, moves LEFT!") == "01_a_red_circle_moves_left"
    assert generate.file_stem(2, "../../etc") == "02_etc" and generate.file_stem(3, "\u00e9\u00e9") == "03"
    assert len(generate.file_stem(4, "x" * 300)) == 63


def graph():
    return {"1": {"class_type": "Stillmotion_LoadDynamiCrafter", "inputs": {}},
            "2": {"class_type": generate.LOADER, "inputs": {"checkpoint": "demo", "vae": ["1", 3]}},
            "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "x"}},
            "4": {"class_type": "VAEDecode", "inputs": {"samples": ["9", 0], "vae": ["1", 3]}}}


def test_a_model_in_pixels_decodes_with_its_own_vae():
    job = graph()
    generate.adapt(job, {"space": "pixels", "text_encoder": "demo"}, None, None)
    assert job["4"]["inputs"]["vae"] == ["2", 1] and "vae" not in job["2"]["inputs"]
    assert job["3"]["inputs"]["clip"] == ["1", 1]


def test_a_model_with_another_text_encoder_and_vae():
    job = graph()
    generate.adapt(job, {"space": "latent", "text_encoder": "clip_l"}, "clip_l.safetensors", "sd.safetensors")
    assert job["3"]["inputs"]["clip"] == ["clip", 0] and job["clip"]["inputs"]["clip_name"] == "clip_l.safetensors"
    assert job["2"]["inputs"]["vae"] == ["vae", 0] and job["4"]["inputs"]["vae"] == ["2", 1]
    with pytest.raises(host.HostError, match="--clip"):
        generate.adapt(graph(), {"space": "latent", "text_encoder": "clip_l"}, None, None)


@pytest.mark.parametrize("encoder, demo", [("demo", "demo"), ("demo, 96x96", "demo, 96x96"), ("clip_l", "demo")])
def test_a_model_gets_the_demo_whose_encoders_it_was_trained_with(encoder, demo):
    job = graph()
    generate.adapt(job, {"space": "latent", "text_encoder": encoder}, "clip_l.safetensors", None)
    assert job["1"]["inputs"]["checkpoint"] == demo


def stub_pipe(answer):
    one = client.Client("http://127.0.0.1:1")

    def ask(path):
        if isinstance(answer, Exception):
            raise answer
        return answer
    one.json = ask
    return types.SimpleNamespace(checkpoint="some.safetensors", client=one)


def test_the_header_is_read_from_the_server():
    found = {generate.HEADER: json.dumps({"space": "pixels", "text_encoder": "demo", "more": 1})}
    assert generate.read_config(stub_pipe(found)) == {"space": "pixels", "text_encoder": "demo"}
    for answer in ({"format": "pt"}, None, client.BadStatus("", 404, "")):
        assert generate.read_config(stub_pipe(answer)) is None
    for header in ("{no json", "[]", '["space"]', '{"space": "pixels"}'):
        with pytest.raises(client.StrangeServer):
            generate.read_config(stub_pipe({generate.HEADER: header}))


def png(colour):
    data = io.BytesIO()
    Image.new("RGB", (64, 32), colour).save(data, "PNG")
    return data.getvalue()


def test_the_preview_sheet(tmp_path):
    path = tmp_path / "new" / "preview.png"
    generate.draw_sheet([("red", [png("red")] * 8), ("blue", [png("blue")] * 3)], path)
    sheet = np.asarray(Image.open(path)).astype(int)
    red, blue = ((np.abs(sheet - colour).max(-1) < 5).sum() for colour in ((255, 0, 0), (0, 0, 255)))
    assert (red, blue) == (8 * 128 * 64, 3 * 128 * 64)
    assert [file.name for file in path.parent.iterdir()] == ["preview.png"]
    assert generate.draw_sheet([("red", [png("red")])], path).name == "preview-2.png"
    assert generate.draw_sheet([("red", [png("red")])], path, overwrite=True) == path
    assert {file.name for file in path.parent.iterdir()} == {"preview.png", "preview-2.png"}
