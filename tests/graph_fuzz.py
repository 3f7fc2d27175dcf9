"""Random graphs over a server's own list of nodes, and their allowed outcomes: results, or readable error messages."""
import copy
import json
import re
from pathlib import Path
from random import Random

PACK = Path(__file__).resolve().parents[1]
SHIPPED = [json.loads(path.read_text()) for path in sorted((PACK / "workflows" / "api").glob("*.json"))]
# ComfyUI's nodes, as sources of the types that the pack's nodes take
HELPERS = ("EmptyImage", "LoadImage", "CLIPTextEncode", "CLIPVisionEncode", "VAEDecode", "VAEEncode",
           "EmptyLatentImage", "EmptyHunyuanLatentVideo", "ConditioningCombine", "RepeatImageBatch", "CreateVideo",
           "PrimitiveInt", "PrimitiveFloat", "PrimitiveString", "PrimitiveBoolean", "KSampler")
PRIMITIVES = {"INT": "PrimitiveInt", "FLOAT": "PrimitiveFloat", "STRING": "PrimitiveString"}
TRAINING = "Stillmotion_TrainVideoModel"  # too slow to be drawn often
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
# numbers that determine the run time: always small
SMALL = {"steps": (1, 2), "first_steps": ("1000",), "width": (64, 32, 48), "height": (64, 32, 48), "size": (64, 16),
         "frames": (4, 2, 1), "length": (4, 5, 1), "batch_size": (1, 2), "count": (2,), "amount": (2,),
         "max_samples": (1, 2), "model_channels": (32,), "sample_every": (1,), "block": (1, 2, 4), "fps": (8.0, 0.5),
         "image": ("stillmotion_start.png",)}
TEXTS = ("", " ", "a" * 300, "d/" * 700, "../x", "../../../x", "/nowhere/x", "~/x", "~nosuchuser/x", "a\0b", "\ud800",
         "x/", ".", "..", "a\nb", "%width%/%seed%", "C:\\x", "NaN", "1000, 0, -5", "1000, 750", "0: a\n0: b",
         "3: \u4e2d", "demo", "auto", "none", "con", "clips/fuzz", "*", "a[1]")
STRANGE = (None, True, False, [], {}, {"__value__": ["x"]}, {"__value__": {}}, {"__value__": [["1", 0]]},
           {"samples": 3}, {"samples": {}}, "text", 3, 0.5)
NUMBERS = (-1, 0, 1, 3, 7, 2 ** 31, 2 ** 63, 2 ** 64, 10 ** 30, 0.5, -0.5, 1e308, float("nan"), float("inf"),
           float("-inf"), "7", "x")


class Graphs:
    """An endless sequence of API graphs for the server whose /object_info is `info`; deterministic for a seed."""

    def __init__(self, info: dict, seed: int):
        self.info, self.random = info, Random(seed)
        self.ours = sorted(name for name in info if name.startswith("Stillmotion_"))
        self.sources = {}  # kind -> [(class, output slot)]
        for name in (*self.ours, *(name for name in HELPERS if name in info)):
            for slot, kind in enumerate(info[name]["output"]):
                if name != TRAINING:
                    self.sources.setdefault(str(kind), []).append((name, slot))

    def next(self) -> dict:
        self.graph = {}
        if self.random.random() < 0.5:
            self.take_shipped()
        else:
            self.build()
        for _ in range(self.random.choice((0, 1, 1, 1, 2, 3))):
            self.spoil()
        return self.graph

    def take_shipped(self):
        self.graph = copy.deepcopy(self.random.choice(SHIPPED))
        if any(node["class_type"] == TRAINING for node in self.graph.values()) and self.random.random() < 0.8:
            return self.take_shipped()
        for node in self.graph.values():
            kinds = self.kinds(node["class_type"])
            for name, value in node["inputs"].items():
                if name in SMALL and name != "image" and not isinstance(value, list) and kinds.get(name) == "INT":
                    node["inputs"][name] = self.random.choice(SMALL[name])

    def build(self):
        name = self.random.choice(self.ours)
        if name == TRAINING and self.random.random() < 0.7:
            name = "Stillmotion_SaveVideo"
        node = self.add(name, 0)
        if not self.info[name]["output_node"]:
            self.graph["sink"] = {"class_type": "PreviewAny", "inputs": {"source": [node, 0]}}

    def inputs_of(self, name: str) -> dict:
        """(kind, options, whether it is optional) by input; the older list form is also reported as COMBO."""
        found = {}
        for section in ("required", "optional"):
            for key, (kind, *rest) in self.info[name]["input"].get(section, {}).items():
                options = dict(rest[0]) if rest else {}
                if isinstance(kind, list):
                    kind, options = "COMBO", {**options, "options": kind}
                found[key] = kind, options, section == "optional"
        return found

    def kinds(self, name: str) -> dict:
        return {key: kind for key, (kind, _, _) in self.inputs_of(name).items()}

    def add(self, name: str, depth: int) -> str:
        inputs = {}
        for key, (kind, options, optional) in self.inputs_of(name).items():
            if optional and self.random.random() < 0.7:
                continue
            if kind in WIDGETS:
                inputs[key] = self.good(key, kind, options)
            elif kind in self.sources:
                inputs[key] = self.link(kind, depth)
        node = str(len(self.graph) + 1)
        self.graph[node] = {"class_type": name, "inputs": inputs}
        return node

    def good(self, key: str, kind: str, options: dict):
        """A value that the schema allows."""
        if key in SMALL and kind in ("INT", "FLOAT") or key == "image":
            return self.random.choice(SMALL[key])
        if kind == "COMBO":
            return self.random.choice(options["options"] or [""])
        if kind == "STRING" and key == "steps":
            return "1000"
        return options.get("default", "" if kind == "STRING" else 1)

    def link(self, kind: str, depth: int) -> list:
        there = [[node, slot] for node, made in self.graph.items() if node != "sink"
                 for slot, output in enumerate(self.info[made["class_type"]]["output"]) if output == kind]
        if there and (depth > 3 or self.random.random() < 0.6):
            return self.random.choice(there)
        choices = self.sources[kind]
        if depth > 2:  # the one with the fewest inputs
            least = min(self.needs(name) for name, _ in choices)
            choices = [choice for choice in choices if self.needs(choice[0]) == least]
        name, slot = self.random.choice(choices)
        return [self.add(name, depth + 1), slot]

    def needs(self, name: str) -> int:
        return sum(kind not in WIDGETS and not optional for kind, _, optional in self.inputs_of(name).values())

    def spoil(self):
        """Set one input of one of the pack's nodes to a possibly unexpected value."""
        ours = [node for node in self.graph.values() if node["class_type"] in self.ours]
        node = self.random.choice(ours)
        key, (kind, options, _) = self.random.choice(sorted(self.inputs_of(node["class_type"]).items()))
        draw = self.random.random()
        if kind not in WIDGETS:
            others = [[i, slot] for i, other in self.graph.items() if other is not node and i != "sink"
                      for slot in range(len(self.info[other["class_type"]]["output"]))]
            node["inputs"][key] = self.random.choice(others if others and draw < 0.5 else STRANGE)
        elif draw < 0.2:
            node["inputs"][key] = self.random.choice(STRANGE)
        elif draw < 0.4 and kind in PRIMITIVES:  # ComfyUI does not check the range of a linked value
            value = self.random.choice((-1, 0, 7, 2 ** 40) if kind == "INT" else NUMBERS if kind == "FLOAT" else TEXTS)
            self.graph["given"] = {"class_type": PRIMITIVES[kind], "inputs": {"value": value}}
            node["inputs"][key] = ["given", 0]
        elif kind in ("INT", "FLOAT"):
            values = [value for value in NUMBERS if key not in SMALL or not 0 < _number(value) <= options["max"]]
            edges = [options["min"] - 1, options["max"] + 1, options["min"], *SMALL.get(key, ())]
            node["inputs"][key] = self.random.choice([*values, *edges])
        else:
            node["inputs"][key] = self.random.choice(TEXTS)


def _number(value) -> float:
    return float(value) if str(value).replace(".", "").isdigit() else 0.0


def fault(error: dict) -> str | None:
    """Why a node's error (the data of execution_error) is not a usable message, or None if it is."""
    frames = error["traceback"]
    through_us = any("/stillmotion/" in frame for frame in frames)
    if not through_us and not error["node_type"].startswith("Stillmotion_"):
        return None  # raised by ComfyUI itself
    told = "/stillmotion/" in frames[-1] and re.search(r"\braise\b", frames[-1])
    if told and error["exception_type"].split(".")[-1] in ("ValueError", "OSError", "ImportError", "OutOfMemoryError"):
        return None
    return f"{error['node_type']}: {error['exception_type']}: {error['exception_message']}\n{''.join(frames[-3:])}"
