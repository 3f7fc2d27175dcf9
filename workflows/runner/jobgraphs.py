"""The graphs of a batch: what is changed in an API graph for each row of a table or picture of a folder, and the graph
of one job. Standard library only, but for reading pictures.
"""

import copy
import csv
import json
import re
from pathlib import Path

import graph
import host
from errors import JobError, plain
from inprocess import common
from joblist import is_file, sha256_of

UPLOADS = {"LoadImage": "image", "LoadImageMask": "image", "LoadVideo": "file", "LoadAudio": "audio"}
BLOCKS = "resume_folder"  # the input that names a folder of finished blocks
NAME = "name"  # column of a table
short_name = common("saving").short_name


class BadInput(JobError):
    """The job's own input is at fault: another try would fail in the same way."""


# ---- addresses of inputs ----

def read_graph(path):
    """An API graph from a file. Raises HostError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise host.HostError(f"{path} cannot be read as a graph: {error}") from None
    if isinstance(found, dict) and "nodes" in found:
        raise host.HostError(f"{path} is a workflow of ComfyUI's page. Export it with File > Export (API).")
    if not isinstance(found, dict) or not found or not all(
            isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
            for node in found.values()):
        raise host.HostError(f"{path} is no API graph: each entry needs class_type and inputs. Export one with File > "
                             "Export (API).")
    return found


def find_input(job, address):
    """(node id, input) for NODE.INPUT, where NODE is an id, a title or a class that one node alone has.

    Raises HostError, also for an input that is wired to another node.
    """
    for dot in (match.start() for match in re.finditer(r"\.", address)):  # an input's name may hold dots, too
        node, name = address[:dot], address[dot + 1:]
        found = [node] if node in job else [i for i, entry in job.items() if node in (
            (entry.get("_meta") or {}).get("title"), entry["class_type"])]
        if len(found) > 1:
            raise host.HostError(f"{address}: {len(found)} nodes are called {node!r}: use an id ({', '.join(found)}).")
        if found and name:
            if isinstance(job[found[0]]["inputs"].get(name), list):
                raise host.HostError(f"{address}: this input is wired to another node, so it has no value to set.")
            return found[0], name
    names = [f"{i} ({(entry.get('_meta') or {}).get('title') or entry['class_type']})" for i, entry in job.items()]
    raise host.HostError(f"{address!r} names no input of the graph. Give NODE.INPUT with one of the nodes "
                         f"{', '.join(names)}.")


def typed(text, old, where):
    """A value given as text, in the type of the graph's value; raises HostError. With no old value, JSON or text."""
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False, "1": True, "0": False}[text.strip().lower()]
        if isinstance(old, int):
            return int(text)
        if isinstance(old, float):
            return float(text)
    except (ValueError, KeyError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(old)]
        raise host.HostError(f"{where} is {text!r}; it must be {kind}, as in the graph.") from None
    if old is None:
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


class Changes:
    """Turns texts for inputs of a graph into changes; files are hashed once."""

    def __init__(self, job, folder="."):
        self.job, self.folder, self.hashes = job, Path(folder), {}

    def change(self, address, text, where):
        """[node, input, value]; the value of a file to upload is {"file": path, "sha256": ...}. Raises HostError.

        A name given to a loading node is a file if it is there (seen from `folder`); otherwise a file of the server.
        """
        node, name = find_input(self.job, address)
        if UPLOADS.get(self.job[node]["class_type"]) == name and (self.folder / text).is_file():
            return [node, name, self.file(self.folder / text)]
        return [node, name, typed(text, self.job[node]["inputs"].get(name), where)]

    def file(self, path):
        path = str(Path(path).absolute())
        if path not in self.hashes:
            try:
                self.hashes[path] = sha256_of(path)
            except OSError as error:
                raise host.HostError(f"{path} cannot be read: {error}") from None
        return {"file": path, "sha256": self.hashes[path]}


def settings(job, pairs):
    """Set NODE.INPUT=VALUE pairs in the graph; files to upload come back as changes for every job."""
    changes, found = Changes(job), []
    for pair in pairs:
        address, equals, text = pair.partition("=")
        if not equals:
            raise host.HostError(f"--set {pair!r}: give NODE.INPUT=VALUE, for example --set KSampler.steps=20.")
        node, name, value = changes.change(address, text, f"--set {address}")
        if is_file(value):
            found.append([node, name, value])
        else:
            job[node]["inputs"][name] = value
    return found


def table_rows(job, path, fixed=()):
    """(name or "", changes) for each row of a CSV file; a column is NODE.INPUT, or `name` for the result's name.

    An empty cell leaves the graph's value. Raises HostError with the row's number.
    """
    changes = Changes(job, path.parent)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [column for column in reader.fieldnames or () if column != NAME]
            if not columns:
                raise host.HostError(f"{path} has no columns: its first row names inputs, such as KSampler.seed.")
            for column in columns:
                find_input(job, column)
            for row in reader:
                if None in row or None in row.values():
                    raise host.HostError(f"{path}, line {reader.line_num}: it has not as many cells as the first row.")
                made = [changes.change(column, row[column], f"{path}, line {reader.line_num}: {column}")
                        for column in columns if row[column] != ""]
                yield short_name(row.get(NAME) or ""), [*fixed, *made]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise host.HostError(f"{path} cannot be read as a table (CSV, UTF-8): {error}") from None


def folder_rows(job, folder, picture_to=None, prompt_to=None, fixed=()):
    """((name, changes) for each picture of a folder, files left out). Raises HostError.

    picture_to: the input for the picture, by default that of the only LoadImage. prompt_to: the input for the text of
    the .txt file of the same name; then pictures without one are left out.
    """
    pictures, changes = common("pictures"), Changes(job)
    if not picture_to:
        loaders = [i for i, node in job.items() if node["class_type"] == "LoadImage"]
        if len(loaders) != 1:
            raise host.HostError(f"the graph has {len(loaders)} nodes LoadImage: name the one for the pictures with "
                                 "--picture_to NODE.INPUT.")
        picture_to = f"{loaders[0]}.image"
    node, name = find_input(job, picture_to)
    text_node, text_name = find_input(job, prompt_to) if prompt_to else (None, None)
    try:
        if prompt_to:
            found, left_out = pictures.picture_prompts(folder)
        else:
            paths, left_out = pictures.list_folder(folder)
            found = [(path, None) for path in sorted(paths, key=pictures.in_order)
                     if path.is_file() and path.suffix.lower() in pictures.PICTURES]
            used = {picture for picture, _ in found}
            left_out += [pictures.LeftOut(path.name, "no picture; for prompts in .txt files, give --prompt_to"
                         if path.suffix.lower() == ".txt" else "no picture") for path in paths if path not in used]
    except (OSError, ValueError) as error:
        raise host.HostError(f"the folder cannot be read: {error}") from None
    if not found:
        raise host.HostError(f"{folder} holds no picture" + (" with a same-named .txt" if prompt_to else "")
                             + f". Pictures end in {', '.join(pictures.PICTURES)}.")

    def rows():
        for path, prompt in found:
            text = [[text_node, text_name, prompt]] if prompt_to else []
            yield short_name(path.stem), [*fixed, [node, name, changes.file(path)], *text]

    return rows(), left_out


def has_blocks(job):
    """Whether the graph keeps finished blocks of a long video, so that an interrupted job can go on."""
    return any(node["inputs"].get(BLOCKS) for node in job.values())


# ---- the graph of one job ----

def read_input(value):
    """(bytes, name to upload) of an input file. Raises BadInput if it is not what it was when the list was made."""
    from pipeline import file_of

    path, pictures = Path(value["file"]), common("pictures")
    try:
        if sha256_of(path) != value["sha256"]:
            raise BadInput(f"{path} was changed after the list was made. Give the command again to list it anew.")
        data, name = file_of(path) if path.suffix.lower() in pictures.PICTURES else (path.read_bytes(), path.name)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error}") from None
    except JobError as error:
        raise BadInput(str(error)) from None
    return data, value["sha256"][:24] + Path(name).suffix.lower()  # the same at every server: it is in the result


def build(template, job, schemas, upload, checkpoint=None):
    """(API graph, workflow of the page or None) of a job. upload(value): the server's name for an input file."""
    made, workflow = copy.deepcopy(template["graph"]), copy.deepcopy(template.get("workflow"))
    changes = [*template.get("settings", ()), *job.changes]
    if checkpoint:
        changes.append([template["loader"], "checkpoint", checkpoint])
    for node, name, value in changes:
        value = upload(value) if is_file(value) else value
        if workflow:
            try:
                graph.set_inputs(made, workflow, schemas, node, **{name: value})
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                raise BadInput(f"the server's nodes are not those of this command ({plain(error)}): put the same "
                               "version of the pack at both ends.") from None
        else:
            made[node]["inputs"][name] = value
    for node in made.values():  # the blocks of two jobs must not meet
        if node["inputs"].get(BLOCKS):
            node["inputs"][BLOCKS] = f"{node['inputs'][BLOCKS]}/{job.id[:13]}"
    return made, workflow
