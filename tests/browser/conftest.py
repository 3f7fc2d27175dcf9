"""A ComfyUI server with the pack and a real browser page on it; skipped without Chromium."""
import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from client import Client

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
PATIENCE = 300  # s, for a slow machine
READY = """() => window.app?.graph && app.canvas && app.vueAppReady && !document.querySelector('#splash-loader')
           && 'Stillmotion_SaveVideo' in LiteGraph.registered_node_types"""

FORGET = """async () => {
    localStorage.clear();
    sessionStorage.clear();
    const found = await indexedDB.databases();
    await Promise.all(found.map(({name}) => new Promise(done => {
        Object.assign(indexedDB.deleteDatabase(name), {onsuccess: done, onerror: done, onblocked: done});
    })));
}"""

# without these the Templates dialog covers the page for a first-time user
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.32.9"}


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as tool:
        own = tool.chromium.executable_path
        path = next(filter(None, map(shutil.which, BROWSERS)), own if os.path.exists(own) else None)
        if path is None:
            pytest.skip(f"no Chromium found (looked for {', '.join(BROWSERS)})")
        browser = tool.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def server(browser):
    """The server for all browser tests; requested after the browser, so that a skip costs nothing."""
    if os.environ.get("STILLMOTION_SERVER"):
        pytest.skip("needs a server of its own")
    import folder_paths
    from host import Host
    from launch import Server
    with Server(Host(Path(sys.executable), Path(folder_paths.__file__).parent), device="cpu") as server:
        yield server


class Page:
    """ComfyUI's page, with the actions the tests need."""

    def __init__(self, page):
        self.page = page
        self.run_js = page.evaluate
        page.set_default_timeout(1000 * PATIENCE)

    def load(self, workflow: dict):
        """Load a UI workflow onto the canvas, as opening a template does."""
        self.run_js("wf => app.loadGraphData(wf, true, true, 'test')", workflow)

    def drop(self, path: Path, mime: str):
        """Drop a file onto the canvas."""
        data = self.run_js("() => app.graph.clear()") or list(path.read_bytes())
        transfer = self.page.evaluate_handle(
            """([bytes, name, type]) => { const d = new DataTransfer();
               d.items.add(new File([new Uint8Array(bytes)], name, {type})); return d }""", [data, path.name, mime])
        self.page.dispatch_event("#graph-canvas", "drop", {"dataTransfer": transfer})

    def nodes(self) -> list[dict]:
        return self.run_js("""() => app.graph._nodes.map(n => ({id: n.id, type: n.type, errors: !!n.has_errors,
                              known: n.type in LiteGraph.registered_node_types}))""")

    def dialogs(self) -> list[str]:
        return self.run_js("() => [...document.querySelectorAll('[role=dialog]')].map(d => d.innerText)")

    def run(self) -> dict:
        """Queue the graph and wait for it to finish; returns the outputs by node id. Raises on a server error."""
        self.run_js("""async () => {
            window.runEnd = null;
            app.api.addEventListener('execution_success', () => { window.runEnd = {} }, {once: true});
            app.api.addEventListener('execution_error', e => { window.runEnd = {error: e.detail.exception_message} },
                                     {once: true});
            await app.queuePrompt(0, 1);
            if (Object.keys(app.lastNodeErrors ?? {}).length) throw new Error(JSON.stringify(app.lastNodeErrors));
        }""")
        self.page.wait_for_function("() => window.runEnd")
        return self.run_js("() => { if (runEnd.error) throw new Error(runEnd.error); return app.nodeOutputs }")


@pytest.fixture(scope="session")
def context(browser):
    """One for all tests: a new one would fetch and compile the frontend's scripts again, for 8 s a test."""
    context = browser.new_context(viewport={"width": 1600, "height": 900})
    yield context
    context.close()


@contextlib.contextmanager
def opened(server, context, nodes: str):
    """A fresh page with the canvas nodes ("litegraph") or the newer DOM nodes (Nodes 2.0, "vue")."""
    settings = server.base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps({**SETTINGS, "Comfy.VueNodes.Enabled": nodes == "vue"}))
    tab = context.new_page()
    with contextlib.closing(tab):
        tab.set_default_timeout(1000 * PATIENCE)
        tab.goto(f"{server.url}/system_stats")  # without the frontend, whose storage is emptied
        tab.evaluate(FORGET)
        tab.goto(server.url)
        tab.wait_for_function(READY)
        yield Page(tab)


@pytest.fixture
def page(request, server, context):
    """A fresh page; parametrize indirectly with the kind of its nodes, "vue" or "litegraph" (the default)."""
    with opened(server, context, getattr(request, "param", "litegraph")) as page:
        yield page
    end_runs(Client(server.url, server))


@pytest.fixture(scope="module")
def kept_page(request, server, context):
    """A page for all tests of a module that load a graph of their own: opening one takes several seconds."""
    with opened(server, context, request.param) as page:
        yield page
    end_runs(Client(server.url, server))


def end_runs(client: Client):
    """Clear the queue and stop what runs: a failed test must not leave an endless run behind."""
    client.request("/queue", {"clear": True})
    deadline = time.monotonic() + PATIENCE
    while client.json("/queue", kind=dict)["queue_running"]:
        assert time.monotonic() < deadline, "the run does not stop"
        client.request("/interrupt", {})
        time.sleep(0.2)
