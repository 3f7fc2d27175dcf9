"""The pack compared with recorded runs of the official implementation, from prompt and picture to decoded video."""

import lzma
import shutil

import parity
import pytest

CASES = parity.TESTS / "cases"


@pytest.fixture(params=["dc_v512", "dc_eps256"])
def case(request, tmp_path):
    """A case folder with its checkpoint unpacked (the tower that the model does not use is omitted)."""
    folder = tmp_path / request.param
    shutil.copytree(CASES / request.param, folder)
    packed = folder / "model.safetensors.xz"
    (folder / "model.safetensors").write_bytes(lzma.decompress(packed.read_bytes()))
    return folder


def test_recorded_run(case):
    errors = parity.run_case(case)
    assert {"tokens", "unet_out_t999", "eta0_video", "eta1_latent"} <= errors.keys()
    assert {name: error for name, error in errors.items() if not error <= parity.tolerance(name)} == {}


def test_another_prompt_is_noticed(case):
    text = (case / "case.json").read_text()
    (case / "case.json").write_text(text.replace('"prompt": "', '"prompt": "blue '))
    errors = parity.run_case(case)
    wrong = [name for name, error in errors.items() if not error <= parity.tolerance(name)]
    assert {"tokens", "text_emb", "unet_out_t500", "eta0_latent", "eta1_video"} <= set(wrong)
    assert errors["image_emb"] <= parity.PART
