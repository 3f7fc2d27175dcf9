"""A loopback server for tests of the client; recipes on the CPU, also where there is a GPU."""

import comfy.model_management
import pytest
import torch
import transport
from fake_comfyui import running


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(transport, "ANSWER_SECONDS", 10)
    with running() as server:
        yield server


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cpu"))
