"""A long-running server: memory stays flat and no temp files remain, whatever is interrupted."""
import copy
import json
import os
import sys
import time
from pathlib import Path
from random import Random

import client as http
import host
import launch
import pytest
from stillmotion.nodes.common.examples import OFFERED

pytestmark = pytest.mark.skipif("STILLMOTION_SERVER" in os.environ, reason="needs a server of its own")
PROMPTS, WARM = 100, 10
GRAPHS = ("animate", "video_unet_text_to_video", "causal_text_to_video", "causal_resume", "clipping", "ksampler")


def resident(process):
    """Resident memory of the process in bytes."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def shortened(name, random):
    made = json.loads((host.WORKFLOWS / "api" / f"{name}.json").read_text())
    for node in made.values():
        if isinstance(node["inputs"].get("steps"), int):
            node["inputs"]["steps"] = 4
        for key in ("seed", "noise_seed"):
            if key in node["inputs"]:
                node["inputs"][key] = random.randrange(1000)
        if "resume_folder" in node["inputs"]:
            node["inputs"]["resume_folder"] = f"runs/{random.randrange(10 ** 6)}" if name == "causal_resume" else ""
        if node["class_type"] == "Stillmotion_SaveVideo":
            node["inputs"]["format"] = random.choice(("mp4", "gif", "png frames"))
    return made


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_stays_flat_over_a_hundred_prompts_with_interrupts():
    random, sizes, ended = Random(11), [], []
    found = host.Host(Path(sys.executable), Path(os.environ["STILLMOTION_COMFYUI"]))
    with launch.Server(found, "cpu", threads=1) as server:
        client = http.Client(server.url, server)
        for number in range(PROMPTS):
            # the first ones run to the end: all models and code paths are used before memory is measured
            name = GRAPHS[number % len(GRAPHS)] if number < WARM else random.choice(GRAPHS)
            prompt = client.queue(copy.deepcopy(shortened(name, random)))
            if number >= WARM and random.random() < 0.4:
                time.sleep(random.uniform(0, 2))
                client.cancel(prompt)
            while client.json("/queue")["queue_running"] or client.json("/queue")["queue_pending"]:
                time.sleep(0.02)
            entry = client.json(f"/history/{prompt}").get(prompt)
            ended.append(entry["status"]["status_str"] if entry else "cancelled")
            sizes.append(resident(server.process))
        left = [str(path.relative_to(server.base)) for root in ("output", "temp", "input")
                for path in (server.base / root).rglob(".*") if path.name != OFFERED]
    print({state: ended.count(state) for state in set(ended)}, [size >> 20 for size in sizes[::10]])
    assert left == [] and ended[:WARM] == ["success"] * WARM
    first, last = sizes[WARM:WARM + 15], sizes[-15:]
    assert sum(last) / sum(first) < 1.05
