"""Run every shipped API graph in other releases of ComfyUI, and print a table.

    python tests/releases.py FOLDER...                       each FOLDER holds a ComfyUI (main.py), with its Python
    python tests/releases.py --private FOLDER...             the private host, too
    python tests/releases.py FOLDER -- --cache-none          with these options of ComfyUI's command line

Nothing is installed into a folder. Exit code 1 when a release does not load all nodes or a graph fails.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS.parent / "workflows" / "runner")]

import host  # noqa: E402

FEW_STEPS = 4
TRAINING_STEPS = 10
TRAINER = "Stillmotion_TrainVideoModel"


def shipped_graphs():
    """{name: API graph}, with few steps: it only has to run, not look good."""
    graphs = {}
    for path in sorted((host.WORKFLOWS / "api").glob("*.json")):
        graphs[path.stem] = json.loads(path.read_text())
        for node in graphs[path.stem].values():
            if isinstance(node["inputs"].get("steps"), int):
                node["inputs"]["steps"] = TRAINING_STEPS if node["class_type"] == TRAINER else FEW_STEPS
    return graphs


def version(comfyui):
    """The version that a ComfyUI folder reports."""
    return re.search(r'"(.+)"', (comfyui / "comfyui_version.py").read_text())[1]


def run_release(found, options):
    """(nodes that are present, {graph: error message, "" if none})."""
    import client
    import launch

    with launch.Server(found, threads=1, arguments=options) as server:
        here = client.Client(server.url, server)
        nodes = [name for name in here.json("/object_info") if name.startswith("Stillmotion_")]
        results = {}
        for name, job in shipped_graphs().items():
            try:
                here.run(job)
                results[name] = ""
            except client.JobError as error:
                results[name] = str(error)
    return len(nodes), results


def main():
    own, options = sys.argv[1:], []
    if "--" in own:
        own, options = own[:own.index("--")], own[own.index("--") + 1:]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="a ComfyUI")
    parser.add_argument("--private", action="store_true", help="also the private host")
    given = parser.parse_args(own)
    host.reexec()
    from nodes import NODES
    try:
        hosts = [host.existing_host(folder) for folder in given.folders]
        if given.private or not hosts:
            hosts.insert(0, host.private_host())
    except host.HostError as error:
        sys.exit(f"error: {error}")

    good, failures = True, []
    print("| ComfyUI | nodes | graphs | seconds |\n|---|---|---|---|", flush=True)
    for found in hosts:
        begin = time.monotonic()
        try:
            nodes, results = run_release(found, options)
        except host.HostError as error:
            nodes, results = 0, {"start": str(error)}
        bad = {name: text for name, text in results.items() if text}
        good = good and nodes == len(NODES) and not bad
        failures += [f"{version(found.comfyui)} {name}: {text}" for name, text in bad.items()]
        print(f"| {version(found.comfyui)} | {nodes} of {len(NODES)} | {len(results) - len(bad)} of {len(results)} | "
              f"{time.monotonic() - begin:.0f} |", flush=True)
    print("\n".join(failures))
    sys.exit(not good)


if __name__ == "__main__":
    main()
