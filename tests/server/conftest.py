"""One ComfyUI server for all tests over HTTP, with the pack in it."""

import os
import sys
from pathlib import Path

import client as http
import host
import launch
import pytest


@pytest.fixture(scope="session")
def server():
    found = host.Host(Path(sys.executable), Path(os.environ["STILLMOTION_COMFYUI"]))
    with launch.Server(found) as running:
        yield running


@pytest.fixture
def client(server):
    return http.Client(server.url, server)
