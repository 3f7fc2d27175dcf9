"""The pack compared with recorded runs of the official Self-Forcing and LongLive loops."""

import json
import lzma
import shutil

import parity
import parity_causal_wan
import pytest
from safetensors.torch import load_file, save_file

CASES = parity.TESTS / "cases"


@pytest.fixture
def case_folder(tmp_path):
    """Unpack a case and change some of its settings."""
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
    """The recorded run is sensitive to the loop's settings, so that matching it is meaningful."""
    errors = parity.run_case(case_folder("w_switch", **changes))
    assert errors["latents"] > parity.RUN


@pytest.mark.parametrize("changes, expected", [
    ({"switch": None, "local": None, "sink": None, "ctx": None, "shift": None, "init": None, "global_sink": None}, {}),
    ({"init": 1, "frames": 7}, {"blocks": (1, 3, 3)}),
    ({"init": 4, "frames": 10}, {"blocks": (1, 3, 3, 3)}),
    ({"init": 3}, {"blocks": (3, 3, 3)}),
    ({"init": 1, "block": 1, "frames": 3}, {"blocks": (1, 1, 1)}),
    ({"switch": [2, 3]}, {"switches": (3, 6)}),           # one prompt per block, like the official loop
    ({"switch": [4, 8]}, {"switches": (6,)}),             # no block starts at 8 or later
    ({"local": 6, "sink": 3, "global_sink": False}, {"window": 6, "sink": 3, "global_sink": False}),
], ids=str)
def test_settings_of_a_case(changes, expected):
    case = {"block": 3, "frames": 9, "steps": [1000, 500]}
    plan = parity_causal_wan.make_plan(case | changes)
    usual = {"blocks": (3, 3, 3), "switches": (), "window": -1, "sink": 0, "global_sink": True, "context_noise": 0.0}
    assert {name: getattr(plan, name) for name in usual} == usual | expected
    assert [round(step.timestep) for step in plan.steps] == [1000, 833]


def test_several_given_blocks(case_folder):
    """With two blocks of a recorded run given instead of generated, the third is the same."""
    folder = case_folder("w_t2v_seed", init=5)
    path = folder / "expected.safetensors"
    recorded = load_file(path)
    recorded |= {"initial_latent": recorded["latents"][:, :5], "noise": recorded["noise"][:, 4:],
                 "step_noise": recorded["step_noise"][3:]}
    save_file({name: tensor.clone() for name, tensor in recorded.items()}, path)
    assert parity.run_case(folder)["latents"] < parity.RUN
