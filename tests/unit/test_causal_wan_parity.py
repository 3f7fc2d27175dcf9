"""Recorded runs of the official Self-Forcing and LongLive loop against the pack."""

import json
import lzma
import shutil

import parity
import pytest

CASES = parity.TESTS / "cases"


@pytest.fixture
def case_folder(tmp_path):
    """Unpack a case, with some of its settings changed."""
    def unpack(name, **changes):
        folder = tmp_path / name
        shutil.copytree(CASES / name, folder)
        packed = folder / "model.safetensors.xz"
        (folder / "model.safetensors").write_bytes(lzma.decompress(packed.read_bytes()))
        case = json.loads((folder / "case.json").read_text())
        (folder / "case.json").write_text(json.dumps(case | changes))
        return folder

    return unpack


@pytest.mark.parametrize("name", ["w_switch", "w_t2v_seed"])
def test_recorded_run(case_folder, name):
    errors = parity.run_case(case_folder(name))
    assert errors.keys() == {"denoising_timesteps", "sigmas", "first_flow", "latents"}
    assert {name: error for name, error in errors.items() if not error <= parity.tolerance(name)} == {}


@pytest.mark.parametrize("changes", [
    {"local": -1}, {"local": 9}, {"sink": 0}, {"sink": 2}, {"global_sink": False}, {"switch": [6]}, {"ctx": 100},
    {"shift": 8.0}], ids=str)
def test_other_settings_are_noticed(case_folder, changes):
    """The recorded run tells the loop's settings apart, so that meeting it means something."""
    errors = parity.run_case(case_folder("w_switch", **changes))
    assert errors["latents"] > parity.RUN
