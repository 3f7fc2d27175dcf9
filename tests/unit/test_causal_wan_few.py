"""The recipe of the causal Wan demo in few steps: its stages run, resume and leave files that load."""

import pytest
import torch
from stillmotion.nodes.causal_wan import checkpoint as loader
from stillmotion.nodes.common.files import read_checkpoint
from stillmotion.nodes.training.recipes import causal_wan, causal_wan_clips, causal_wan_few

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def test_the_stages_run_and_the_files_load(tmp_path, monkeypatch):
    def drawn(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    caption = torch.arange(1, 7).view(1, 2, 3).expand(6, 2, 3)
    frames, window = causal_wan_clips.FRAMES, causal_wan_clips.WINDOW
    found = {"latents": drawn(6, 4, frames, 8, 8), "tokens": drawn(6, 17, 48), "caption": caption,
             "turn": torch.tensor([0, 0, *causal_wan_clips.TURNS]), "grey": drawn(1, 4, 1, 8, 8),
             "text": drawn(7, 77, 32), "short_latents": drawn(6, 4, window, 8, 8), "short_tokens": drawn(6, 17, 48),
             "short_turn": torch.zeros(6), "short_caption": caption, "grey_tokens": drawn(1, 17, 48)}
    monkeypatch.setattr(causal_wan_few, "encode_clips", lambda folder, parts: found)
    before = causal_wan_few.causal_demo().state_dict()
    causal_wan_few.make_few_demo(tmp_path, tmp_path / "few.safetensors", size=1, stages=(1, 1, 2))
    student = loader.load(read_checkpoint(tmp_path / "few.safetensors"), weight_dtype="fp32").model.diffusion_model
    teacher = loader.load(read_checkpoint(tmp_path / "causal_wan_teacher.safetensors"), causal=False)
    assert teacher.model.wan_params == causal_wan.PARAMS
    assert not torch.equal(student.head.head.weight, before["head.head.weight"])
    with pytest.raises(ValueError, match="is causal, by its header"):
        loader.load(read_checkpoint(tmp_path / "few.safetensors"), causal=False)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "causal_wan_few_1.pt", "causal_wan_few_2.pt", "causal_wan_teacher.pt"]
