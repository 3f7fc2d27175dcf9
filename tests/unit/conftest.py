"""A loopback server for tests of the client."""

import pytest
import transport
from fake_comfyui import running


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(transport, "ANSWER_SECONDS", 10)
    with running() as server:
        yield server
