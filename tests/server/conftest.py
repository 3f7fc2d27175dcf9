"""One ComfyUI server with the pack, shared by all tests over HTTP."""

import os

import client as http
import host
import launch
import pytest

FOREIGN = os.environ.get("STILLMOTION_SERVER")  # set by tests/run.py --server


@pytest.fixture(scope="session")
def server():
    """A server started by the tests, whose folders they may use."""
    if FOREIGN:
        pytest.skip("needs a server of its own")
    with launch.Server(host.find_host()) as running:
        yield running


@pytest.fixture
def client(request):
    if FOREIGN:
        return http.Client(FOREIGN)
    server = request.getfixturevalue("server")
    return http.Client(server.url, server)
