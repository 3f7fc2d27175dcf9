"""A few hundred mutated files of every kind: each one loads, or is promptly rejected with the pack's own message.

Headers, configurations, keys, shapes and dtypes of weights are mutated at random, with a fixed seed.
"""

import json
import re
import signal
import traceback
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from causal_wan_stub import HEADER as WAN_HEADER
from causal_wan_stub import load as load_wan
from causal_wan_stub import marked, named, stored
from causal_wan_stub import tensors as wan_tensors
from dynamicrafter_stub import HEADER as CRAFTER_HEADER
from dynamicrafter_stub import OPEN_CLIP, tiny
from dynamicrafter_stub import tensors as crafter_tensors
from safetensors.torch import load_file, save_file
from stillmotion.nodes.causal_wan import checkpoint as wan
from stillmotion.nodes.causal_wan.lora import add_lora
from stillmotion.nodes.common.files import Checkpoint, read_checkpoint
from stillmotion.nodes.dynamicrafter import checkpoint as dynamicrafter
from stillmotion.nodes.video_unet import checkpoint as video_unet
from stillmotion.nodes.video_unet.config import HEADER as UNET_HEADER
from video_unet_stub import as_checkpoint, make_config, random_network

PACK = Path(dynamicrafter.__file__).parents[2]
SECONDS = 60  # of this process's own time: other processes do not count
SEED = 0
PYTHONS_WORDS = re.compile(r"object has no|not subscriptable|unsupported operand|not iterable|not supported between|"
                           r"takes \d+ positional|must be real number|size mismatch|Traceback|recursion depth")
ODD = [None, True, False, 0, -1, 1, 3, 1.5, 0.0, float("nan"), float("inf"), 1e308, 999, 10 ** 6, 2 ** 80, "", "abc",
       "x" * 999, "${oc.env:HOME}", "../../etc/passwd", "\0", "é\U0001f600", [], [[]], [1], [0], [1, 2, "a"], [None],
       ["x"] * 99, {}, {"a": 1}, {"params": {}}, [10 ** 9] * 3]
KINDS = [torch.bool, torch.int64, torch.int8, torch.uint8, torch.complex64, torch.float64, torch.float8_e4m3fn,
         torch.float8_e5m2, torch.float16]


@pytest.fixture(autouse=True)
def as_in_the_host():
    with torch.inference_mode():
        yield


def refusal(work):
    """The message with which `work` is rejected, None if it succeeds. Any other outcome fails the test."""
    def hangs(*_):
        raise TimeoutError(f"still at work after {SECONDS} seconds")

    before = signal.signal(signal.SIGPROF, hangs) if hasattr(signal, "SIGPROF") else None
    if before is not None:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        work()
    except ValueError as error:
        message, place = str(error), traceback.extract_tb(error.__traceback__)[-1].filename
        assert type(error) is ValueError and PACK in Path(place).parents, traceback.format_exc()
        assert len(message.split()) > 5 and message.endswith(".") and not PYTHONS_WORDS.search(message), message
        assert len(message) < 2500, message
        return message
    finally:
        if before is not None:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
    return None


def edited(value, rng):
    """A copy of a configuration with one entry at any depth replaced, removed, added or renamed."""
    copy = json.loads(json.dumps(value))
    part = copy
    while isinstance(part, dict):
        name = rng.choice([*part] or [""])
        if isinstance(part.get(name), dict) and rng.random() < 0.8:
            part = part[name]
            continue
        edit = rng.randrange(6)
        if edit == 0:
            part.pop(name, None)
        elif edit == 1:
            part[rng.choice(["extra", "target", "format", "layers", ""])] = rng.choice(ODD)
        elif isinstance(part.get(name), list) and part[name] and edit < 4:
            part[name][rng.randrange(len(part[name]))] = rng.choice(ODD)
        else:
            part[name] = rng.choice(ODD)
        return copy


def edited_text(text, rng):
    """JSON with a few characters removed or replaced, or nested too deeply, or not an object at all."""
    if rng.random() < 0.1:
        return rng.choice(["", "[" * 100_000, '{"a":' * 50_000, "null", "1", '"x"', "\ufeff" + text, "9" * 5000])
    letters = list(text)
    for _ in range(rng.randint(1, 3)):
        letters[rng.randrange(len(letters))] = rng.choice(["", '"', "{", "}", "[", ",", "0", "-", "\\u0000", "9" * 11])
    return "".join(letters)


def edited_weights(found, rng):
    """The tensors with one to three of them removed, renamed, reshaped, cast, or added."""
    found = dict(found)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*found])
        value = found[key]
        edit = rng.randrange(8)
        if edit == 0:
            found.pop(key)
        elif edit == 1:
            found[re.sub(r"\d+", lambda _: str(rng.choice([0, 1, 7, 999999, "9" * 30])), key, count=1)] = found.pop(key)
        elif edit == 2:
            found[rng.choice(["x", "", ".", "..", "blocks.999999.x", "a" * 300, "model.", "scaled_fp8", "betas",
                              "scale_arr", f"{key}_scale", f"{key}.", "lora_A.weight", "img_emb.x", "v_pred",
                              UNET_HEADER, f"{key.rpartition('.')[0]}.comfy_quant",
                              f"{key.rpartition('.')[0]}.alpha"])] = value
        elif edit < 5:
            shape = rng.choice([(), (0,), (1,), tuple(value.shape[::-1]), (*value.shape, 1), tuple(value.shape[1:]),
                                (2, *value.shape[1:]), (0, *value.shape[1:]), (65537,), (1000, 0, 3)])
            found[key] = torch.zeros(shape, dtype=value.dtype)
        elif edit < 7:
            found[key] = value.to(rng.choice(KINDS))
        else:
            found[key] = torch.full(value.shape, rng.choice([float("nan"), float("inf"), 0, 1e30])).to(value.dtype)
    return found


def crafter_header(rng):
    header = CRAFTER_HEADER | {"stillmotion.config": json.dumps(tiny(rng.choice(["256", "512"])))}
    name = rng.choice([*header])
    header[name] = (json.dumps(edited(json.loads(header[name]), rng)) if rng.random() < 0.8
                    else edited_text(header[name], rng))
    return header


def unet_file(seed=1):
    config = make_config()
    return as_checkpoint(random_network(config.params, seed), config)


def test_headers_of_dynamicrafter():
    rng, weights = Random(SEED + 1), crafter_tensors("512")
    found = [refusal(lambda: dynamicrafter.load(Checkpoint("a.safetensors", dict(weights), crafter_header(rng))))
             for _ in range(60)]
    assert 15 < sum(message is not None for message in found)


def test_headers_of_the_video_unet():
    rng, file = Random(SEED + 2), unet_file()
    whole = file.metadata[UNET_HEADER]
    found = []
    for _ in range(100):
        text = json.dumps(edited(json.loads(whole), rng)) if rng.random() < 0.8 else edited_text(whole, rng)
        edit = Checkpoint("a.safetensors", dict(file.tensors), {UNET_HEADER: text})
        found.append(refusal(lambda: video_unet.load(edit)))
    assert 60 < sum(message is not None for message in found)


def test_headers_of_causal_wan():
    rng, found = Random(SEED + 3), []
    quantised, _ = marked(*stored()[:2])
    layers = {"format_version": "1.0", "layers": {"blocks.0.ffn.0": {"format": "float8_e4m3fn"}}}
    for _ in range(100):
        name, whole = rng.choice([("config", WAN_HEADER["config"]), ("_quantization_metadata", json.dumps(layers))])
        text = json.dumps(edited(json.loads(whole), rng)) if rng.random() < 0.7 else edited_text(whole, rng)
        weights = wan_tensors() if name == "config" else quantised
        found.append(refusal(lambda: load_wan(weights, WAN_HEADER | {name: text})))
    assert 30 < sum(message is not None for message in found)


def test_yaml_and_open_clip_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/secret-home")
    rng, weights, found = Random(SEED + 4), crafter_tensors("512"), []
    for _ in range(60):
        text, towers = yaml.safe_dump(tiny()), json.dumps(OPEN_CLIP)
        which = rng.randrange(4)
        if which == 0:
            text = yaml.safe_dump(edited(tiny(), rng))
        elif which == 1:
            text = rng.choice([edited_text(text, rng), "a: " + "[" * 5000, "&a [*a]", "- 1", "x", "? [1]\n: 2",
                               "a: 2020-01-01", "!!python/object:os.system {}", "a: ${", "a: b: c", "\t",
                               "a: 1\na: 2", "%", "\x00"])
        else:
            towers = json.dumps(edited(OPEN_CLIP, rng)) if which == 2 else edited_text(towers, rng)
        (tmp_path / "m.yaml").write_text(text, encoding="utf-8")
        (tmp_path / "open_clip_config.json").write_text(towers, encoding="utf-8")
        found.append(refusal(lambda: dynamicrafter.load(Checkpoint("a.ckpt", dict(weights), {}),
                                                        yaml_path=tmp_path / "m.yaml")))
    assert 30 < sum(message is not None for message in found)
    assert not any("secret-home" in message for message in found if message)


@pytest.mark.parametrize("family, count", [("dynamicrafter", 60), ("video_unet", 80), ("t2v", 80), ("i2v", 80),
                                           ("quantised", 120)])
def test_weights(family, count):
    rng, file = Random(f"{SEED}{family}"), unet_file()
    header = CRAFTER_HEADER | {"stillmotion.config": json.dumps(tiny())}
    crafter, (quantised, _) = crafter_tensors("512"), marked(*stored()[:2])
    load = {
        "dynamicrafter": lambda: dynamicrafter.load(Checkpoint("a.safetensors", edited_weights(crafter, rng), header)),
        "video_unet": lambda: video_unet.load(Checkpoint("a.pt", edited_weights(file.tensors, rng), file.metadata)),
        "t2v": lambda: load_wan(edited_weights(wan_tensors(), rng)),
        "i2v": lambda: load_wan(edited_weights(wan_tensors("i2v"), rng)),
        "quantised": lambda: load_wan(edited_weights(quantised, rng)),
    }[family]
    assert sum(refusal(load) is not None for _ in range(count)) > count // 2


def test_loras():
    rng, base = Random(SEED + 6), load_wan(wan_tensors(), weight_dtype="fp32")
    wholes = [named(""), named("base_model.model."),
              named("lora_unet_", "lora_down.weight", "lora_up.weight", (".", "_")),
              named("diffusion_model.") | {"diffusion_model.blocks.0.ffn.0.alpha": torch.ones(())}]
    found = [refusal(lambda: add_lora(base, Checkpoint("a.pt", edited_weights(rng.choice(wholes), rng), {})))
             for _ in range(150)]
    assert 50 < sum(message is not None for message in found)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bytes_of_files(tmp_path):
    """Truncated, duplicated or overwritten bytes, mostly at the start, where headers and pickles are."""
    rng, found = Random(SEED + 7), []
    small = {"patch_embedding.weight": torch.ones(4, 4, 1, 2, 2), "head.modulation": torch.ones(1, 2, 4)}
    save_file(small, tmp_path / "a.safetensors", metadata=WAN_HEADER)
    torch.save({"generator": small, "step": 3}, tmp_path / "new.pt")
    torch.save({"model": small}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    wholes = [path.read_bytes() for path in tmp_path.iterdir()]
    path = tmp_path / "edited.pt"
    for _ in range(300):
        content = bytearray(rng.choice(wholes))
        for _ in range(rng.randint(1, 4)):
            at = int(len(content) * rng.random() ** 3)
            content[at:at + rng.choice([0, 1, 1, 1, 8])] = rng.choice(
                [b"", b"\0", b"\xff", b"}", rng.randbytes(1), b"9" * 8])
        path.write_bytes(content)
        found.append(refusal(lambda: wan.load(read_checkpoint(path))))
    assert 250 < sum(message is not None for message in found)
    assert load_file(tmp_path / "a.safetensors").keys() == small.keys()


PICKLES = [1, "x", [], {}, {"state_dict": []}, {"state_dict": {}}, {"model": {"model": {"model": {}}}},
           {1: torch.ones(2)}, {"module": {1: torch.ones(2)}}, {None: torch.ones(2)}, {(1, 2): torch.ones(2)},
           {"a": [torch.ones(2)]},
           {"a": torch.ones(2).to_sparse()}, {"a": torch.ones(2, 2).expand(2, 2)}, {"": torch.ones(2)},
           {"patch_embedding.weight": torch.empty(3, device="meta")}, torch.ones(2),
           {"generator": {"x": torch.ones(2)}}, {"generator": 1, "generator_ema": [1]},
           {"state_dict": {"module": torch.ones(2)}},
           {"optimizer": {"state": {}}}]


@pytest.mark.parametrize("content", PICKLES, ids=range(len(PICKLES)))
def test_pickles_that_hold_something_else(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    for family in (wan, dynamicrafter, video_unet):
        assert refusal(lambda: family.load(read_checkpoint(tmp_path / "a.pt")))
