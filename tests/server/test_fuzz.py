"""Random graphs: every error is a readable sentence, nothing is written outside the server's folders, no crash."""
import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import client as http
import host
import launch
import pytest
from graph_fuzz import Graphs, fault

pytestmark = pytest.mark.skipif("STILLMOTION_SERVER" in os.environ, reason="needs a server of its own")
SEED = 20261126
PATIENCE = 120  # seconds for one graph, and for a cancel to take effect; a busy machine takes its time
OWN = ("output", "input", "temp", "user", "models", "server.log")  # in ComfyUI's base folder


@pytest.fixture(scope="module")
def fenced(tmp_path_factory):
    """(folder, server): a server whose home, temp files and surroundings are all in that folder."""
    outer = tmp_path_factory.mktemp("fence")
    for name in ("home", "tmp"):
        (outer / name).mkdir()
    before, tempfile.tempdir = tempfile.tempdir, str(outer)
    kept = {name: os.environ.get(name) for name in ("HOME", "TMPDIR")}
    found = host.Host(Path(sys.executable), Path(os.environ["STILLMOTION_COMFYUI"]))
    models = launch.models_folder(found.comfyui)
    try:
        os.environ.update(HOME=str(outer / "home"), TMPDIR=str(outer / "tmp"))
        with launch.Server(found, "cpu", models=[models], threads=1, arguments=["--cache-lru", "60"]) as server:
            tempfile.tempdir = before
            yield outer, server
    finally:
        tempfile.tempdir = before
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def files_outside(outer, server):
    """Files around the server's own folders, in its code and in the pack, with size and mtime."""
    found = {}
    for root in (outer, host.PACK, Path(os.environ["STILLMOTION_COMFYUI"])):
        for folder, folders, names in os.walk(root):
            here = Path(folder)
            own = OWN if here == server.base else ()
            folders[:] = [name for name in folders if name not in ("__pycache__", ".git", ".pytest_cache", *own)]
            found |= {here / name: (here / name).lstat()[6:9:2] for name in names if name not in own}
    return found


def run(client, graph):
    """The data of the error that stopped the graph, or None."""
    body = json.dumps({"prompt": graph, "client_id": client.id}).encode()
    request = urllib.request.Request(client.url + "/prompt", body, {"Content-Type": "application/json"})
    try:  # the client would turn the whole response into a message
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            prompt = json.load(answer)["prompt_id"]
    except urllib.error.HTTPError as error:
        answer = json.loads(error.read())
        raised = [entry for report in (answer.get("node_errors") or {}).values() for entry in report["errors"]
                  if "/stillmotion/" in "".join(entry["extra_info"].get("traceback", ()))
                  # core follows a graph that runs in a circle until the stack is full, wherever that happens to be
                  and entry["extra_info"].get("exception_type") != "RecursionError"]
        return {"node_type": "Stillmotion_", "traceback": ["at validation"], "exception_type": "at validation",
                "exception_message": json.dumps(raised)} if raised else None
    deadline, cancelled = time.monotonic() + PATIENCE, False
    while True:
        entry = client.json(f"/history/{prompt}").get(prompt)
        if entry:
            return next((data for kind, data in entry["status"]["messages"] if kind == "execution_error"), None)
        if time.monotonic() > deadline:
            assert not cancelled, f"a cancel was not heard in {PATIENCE} s"
            client.cancel(prompt)
            deadline, cancelled = time.monotonic() + PATIENCE, True
        time.sleep(0.01)


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_random_graphs_end_in_results_or_sentences(fenced, count):
    outer, server = fenced
    client = http.Client(server.url, server)
    graphs, faults = Graphs(client.json("/object_info"), SEED), []
    before = files_outside(outer, server)
    for number in range(count):
        graph = graphs.next()
        error = run(client, graph)
        if error is not None and (found := fault(error)):
            faults.append(f"graph {number}: {found}{json.dumps(graph)[:3000]}")
    assert server.alive()
    assert files_outside(outer, server) == before
    assert not faults, f"{len(faults)} of {count}:\n" + "\n\n".join(faults[:10])
