"""run.py live: its options, the graph it queues, and what it makes of the server's messages."""
import base64
import threading

import graph
import live
import pytest
from errors import StrangeServer

DEMO = ["--prompt", "a blue square moves up"]


def job(*arguments):
    return live.job_of(live.parse([*DEMO, *arguments]), None)


def test_the_demo_goes_on_until_stopped_with_a_text_encoder():
    found, sampler = job("--seed", "5")
    values = found[sampler]["inputs"]
    assert found[sampler]["class_type"] == live.TO_FILE and "timeline" not in values
    assert (values["length"], values["seed"], values["fps"], values["clip"]) == (-1, 5, 8.0, ["2", 1])
    assert "a blue square moves up" in [node["inputs"].get("text") for node in found.values()]
    assert all(value[0] in found for node in found.values() for value in node["inputs"].values()
               if isinstance(value, list))


def test_prompts_and_a_length_are_those_given(tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("0: a\n8: b")
    found, sampler = job("--prompts", str(lines), "--frames", "48", "--width", "96")
    timeline, start = (found[graph.find_node(found, kind)]["inputs"] for kind in (live.TIMELINE, live.START))
    assert timeline["prompts"] == "0: a\n8: b" and found[sampler]["inputs"]["timeline"][0] in found
    assert (start["length"], start["width"], found[sampler]["inputs"]["length"]) == (48, 96, 48)


def test_a_checkpoint_brings_wans_text_encoder_vae_and_settings():
    found, sampler = job("--checkpoint", "longlive_base.pt", "--lora", "lora.pt", "--frames", "241")
    values, start = found[sampler]["inputs"], found[graph.find_node(found, live.START)]["inputs"]
    loader = found[graph.find_node(found, live.LOADER)]["inputs"]
    assert (loader["checkpoint"], loader["lora"]) == ("longlive_base.pt", "lora.pt")
    assert found[values["clip"][0]]["inputs"]["clip_name"].startswith("umt5")
    assert found[values["vae"][0]]["inputs"]["vae_name"] == "wan_2.1_vae.safetensors"
    assert (values["length"], values["window"], values["cfg"], values["fps"]) == (241, 12, 1.0, 16.0)
    assert (start["width"], start["length"], start["block"]) == (832, 9, 3)
    assert "LoadImage" not in {node["class_type"] for node in found.values()}
    assert all(value[0] in found for node in found.values() for value in node["inputs"].values()
               if isinstance(value, list))


@pytest.mark.parametrize("arguments, words", [
    (["--frames", "0"], "--frames is 0"), (["--prompt", " "], "--prompt is empty"),
    (["--lora", "a"], "belongs to a --checkpoint"), (["--prompts", "missing.txt"], "no file missing.txt"),
    (["--image", __file__, "--checkpoint", "a"], "from text"),
])
def test_wrong_options_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit):
        live.parse(arguments)
    assert words in capsys.readouterr().err


def test_blocks_are_saved_and_prompts_printed(tmp_path, capsys):
    show = live.Show(tmp_path)
    show.heard("stillmotion.live", {"kind": "begin", "prompt_id": "a", "node_id": "6", "blocks": None})
    assert show.run == {"prompt_id": "a", "node_id": "6"} and show.begun.is_set()
    show.heard("stillmotion.live", {"kind": "block", "block": 1, "frame": 0, "count": 4,
                                    "data": base64.b64encode(b"film").decode()})
    show.heard("stillmotion.live", {"kind": "prompt", "block": 2, "frame": 4, "text": "a\x1b[31m b"})
    show.heard("progress", {"kind": "block"})
    assert (tmp_path / "block_0001.mp4").read_bytes() == b"film" and show.sent == ["4: a b"]
    told = capsys.readouterr().out
    assert "block 1: frames 1 to 4" in told and "block 2 begins with: a b" in told
    for wrong in ({}, {"block": "x", "frame": 0, "count": 4, "data": ""}, {"block": 1, "frame": 0, "count": 4,
                                                                          "data": "?"}):
        with pytest.raises(StrangeServer, match="not understood"):
            show.heard("stillmotion.live", {"kind": "block", **wrong})


def test_lines_typed_early_wait_for_the_run(tmp_path):
    show, sent = live.Show(tmp_path), []

    class Pipe:
        class client:
            @staticmethod
            def json(path, body, kind):
                sent.append((path, body))
                return {"message": "fine"}

    thread = threading.Thread(target=live.read_prompts, args=(Pipe, show, Lines(["up\n", "\n"])))
    thread.start()
    assert sent == []
    show.run = {"prompt_id": "a", "node_id": "6"}
    show.begun.set()
    thread.join(10)
    assert sent == [("/stillmotion/steer", {**show.run, "text": "up"}), ("/stillmotion/stop", show.run)]


class Lines(list):
    def isatty(self):
        return True
