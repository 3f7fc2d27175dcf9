"""Training in several processes, and accelerate, which is needed for that and for mixed precision."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stillmotion.nodes.training.parallel import make_processes

TWO = Path(__file__).parents[1] / "two_processes.py"


def test_accelerate_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert make_processes("no").count == 1
    with pytest.raises(ImportError, match="pip install accelerate"):
        make_processes("bf16")
    with pytest.raises(ValueError, match="choose one of no, bf16, fp16"):
        make_processes("fp8")
    with pytest.raises(ValueError, match="needs a GPU"):
        make_processes("fp16")


def test_a_launcher_that_starts_fewer_processes_than_asked_is_named(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert make_processes("no").count == 1 and not caplog.text
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert make_processes("no").count == 1
    assert "asked for several processes, but started only this one: it finds no GPU. Give it --multi_gpu" in caplog.text


@pytest.mark.slow
def test_accelerate_leaves_what_the_warning_looks_for(tmp_path):
    """A plain `accelerate launch --num_processes 2` without a GPU starts one process."""
    pytest.importorskip("accelerate")
    out = tmp_path / "one.pt"
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", str(TWO),
                           str(out), "1"], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0 and "asked for several processes, but started only this one" in done.stderr


def launch(tmp_path, name, *launcher, accumulation):
    """The weights after three steps of tests/two_processes.py."""
    out = tmp_path / f"{name}.pt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *launcher, str(TWO), str(out), str(accumulation)], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_two_processes_make_the_steps_of_one(tmp_path):
    pytest.importorskip("accelerate")
    alone = launch(tmp_path, "alone", accumulation=4)
    two = {
        "torchrun": ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()),
        "accelerate": ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                       "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()),
    }
    for name, launcher in two.items():
        found = launch(tmp_path, name, *launcher, accumulation=2)
        assert found["count"] == 2
        for key, value in alone.items():
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7, msg=f"{name}: {key}")
