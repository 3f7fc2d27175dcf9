"""Batches that always finish: a list of jobs on disk, worked off by one server, several, or a Ray cluster.

    python workflows/run.py batch GRAPH.json --set KSampler.steps=20 --over inputs.csv
    python workflows/run.py batch GRAPH.json --over FOLDER --prompt_to Prompt.text
    python workflows/run.py status BATCH
    python workflows/run.py resume BATCH
    python workflows/run.py retry BATCH --failed

GRAPH.json is any graph in ComfyUI's API format. --over is a table whose columns are inputs (NODE.INPUT; NODE is an id,
a title or a class) and, if wanted, `name`, or a folder of pictures. BATCH is the folder of the results; the list lies
beside it in BATCH.batch, with summary.csv and the contact sheets.

Exit codes: 0 every job is done; 1 jobs have failed, or an error; 2 wrong options; 3 jobs still wait (resume them);
130 stopped.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import commands
import errors
import host
import jobgraphs
import joblist
from inprocess import common

SHOWN = 20  # failed jobs named by `status`
FLAGS = ("workers", "retries", "json", "ray", "ray_workers", "ray_gpus", "install_ray")
PLACE = ("server", "workers", "comfyui", "models", "device", "ray", "ray_gpus", "ray_workers")
WAITING = 3  # exit code


# ---- options ----

def add_flags(parser):
    """What commands that work off a list have in common."""
    parser.add_argument("--workers", metavar="URL,URL|FILE", help="several servers, or a file with one `URL "
                        "[token=TOKEN]` a line, which is read again while it runs")
    parser.add_argument("--retries", type=int, metavar="N", help="tries after a job's first failure (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end; the rest goes to stderr")
    parser.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS",
                        help="work on a Ray cluster (without an address: one on this machine)")
    parser.add_argument("--ray_workers", type=int, metavar="N", help="ComfyUIs in it (default: one a GPU, or 1)")
    parser.add_argument("--ray_gpus", type=float, metavar="SHARE", help="GPUs for each (default: 1; 0.5: two on one)")
    parser.add_argument("--install_ray", action="store_true", help="install Ray into an environment of its own")
    commands.add_server_flags(parser)


def problem(options):
    """What is wrong with these options, or None."""
    ways = [f"--{name}" for name in ("server", "workers", "ray") if getattr(options, name)]
    if len(ways) > 1:
        return f"{' and '.join(ways)}: give one of them"
    if options.retries is not None and options.retries < 0:
        return f"--retries is {options.retries}: it must be 0 or more"
    if options.ray_workers is not None and options.ray_workers < 1:
        return f"--ray_workers is {options.ray_workers}: it must be 1 or more"
    if options.ray_gpus is not None and not 0 <= options.ray_gpus <= 64:
        return f"--ray_gpus is {options.ray_gpus}: it must lie between 0 and 64"
    ignored = [name for name in ("comfyui", "models", "device") if options.workers and getattr(options, name)]
    if ignored:
        return f"--workers brings its own ComfyUIs, models and devices: leave out --{' --'.join(ignored)}"
    return None


def parser(name, what):
    p = argparse.ArgumentParser(prog=f"run.py {name}", description=what if name != "batch" else __doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    if name != "batch":
        p.add_argument("batch", type=Path, metavar="BATCH", help="the folder of its results")
    return p


def parse(p, arguments):
    """The options of a command that works off a list."""
    add_flags(p)
    options = p.parse_args(arguments)
    options.steps = options.seed = options.preset = options.checkpoint = None  # what belongs to run.py alone
    wrong = problem(options) or commands.check(options)
    if not wrong and getattr(options, "over", None) and not options.over.exists():
        wrong = f"--over: there is no file or folder {options.over}"
    if wrong:
        p.error(wrong)
    return options


def main(arguments):
    p = parser("batch", "")
    p.add_argument("graph", type=Path, metavar="GRAPH.json")
    p.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="for all jobs")
    p.add_argument("--over", type=Path, metavar="FILE.csv|FOLDER", help="one job for each row or picture")
    p.add_argument("--picture_to", metavar="NODE.INPUT", help="input for the pictures (default: the only LoadImage)")
    p.add_argument("--prompt_to", metavar="NODE.INPUT", help="input for the prompts in same-named .txt files")
    p.add_argument("--output", type=Path, help="folder for the results (default: results/GRAPH)")
    options = parse(p, arguments)
    start(options)
    with commands.ending():
        return make(options)


def resume(arguments):
    p = parser("resume", "Go on with a batch; options that are not given are those of its last command.")
    return go_on(parse(p, arguments))


def retry(arguments):
    p = parser("retry", "Try the failed jobs of a batch again, and go on with the others.")
    p.add_argument("--failed", action="store_true", help="the failed jobs, which is the default")
    return go_on(parse(p, arguments), again=True)


def start(options):
    """Into a Python that can do the work: ComfyUI's, or one with Ray."""
    if options.ray:
        import ray_workers

        with commands.ending():
            ray_workers.enter(options.install_ray)
    commands.start(options, client=bool(options.server or options.workers or options.ray))


def given(value):
    return value is not None and value is not False  # 0 is a value


# ---- the commands ----

def make(options):
    job = jobgraphs.read_graph(options.graph)
    fixed = jobgraphs.settings(job, options.set)
    output = options.output or Path("results") / options.graph.stem
    left_out = ()
    if options.over is None:
        rows = [(jobgraphs.short_name(options.graph.stem), fixed)]
    elif options.over.is_dir():
        rows, left_out = jobgraphs.folder_rows(job, options.over, options.picture_to, options.prompt_to, fixed)
    else:
        rows = jobgraphs.table_rows(job, options.over, fixed)
    if left_out:
        print(f"{options.over}: {common('pictures').summary(left_out)}", file=sys.stderr, flush=True)
    return submit(options, output, {"graph": job, "blocks": jobgraphs.has_blocks(job)}, rows)


def presets_jobs(preset, checkpoint, settings, todo):
    """(template, rows) of the `animate` graph for [(picture, prompt, path of the result without suffix)]."""
    import pipeline

    job, workflow = pipeline.read_graphs()
    loader, picture, text = pipeline.inputs_of(job)
    shared = [[node, name, value] for node, values in pipeline.animate_settings(job, preset, **settings).items()
              for name, value in values.items() if value is not None]
    template = {"graph": job, "workflow": workflow, "settings": shared, "loader": loader, "preset": preset,
                "checkpoint": Path(checkpoint).name if checkpoint else None}
    changes = jobgraphs.Changes(job)
    rows = ((target.name, [[picture, "image", changes.file(image)], [text, "text", prompt]])
            for image, prompt, target in todo)
    return template, rows


def submit(options, output, template, rows):
    """Make or extend the list of the results in this folder and work it off; returns the exit code."""
    commands.make_folder(output)
    jobs = joblist.JobList(output, create=True)
    with held(jobs):
        say(options, jobs.recover())
        begin = time.monotonic()
        counts = jobs.submit(template, rows)
        told = ", ".join(f"{counts[kind]} {what}" for kind, what in (
            ("new", "new"), ("known", "already listed"), ("same", "the same as another row")) if counts[kind])
        print(f"{jobs.output}: {told or 'no'} jobs, listed in {time.monotonic() - begin:.1f} s", file=stream(options),
              flush=True)
        return run(options, jobs)


def inherit(options):
    """Fill in what is not given as in the batch's last command; another place to work also has other folders."""
    jobs = joblist.JobList(options.batch)
    kept = jobs.setting("options") or {}
    jobs.close()
    moved = options.server or options.workers or options.ray
    for name, value in kept.items():
        if not given(getattr(options, name)) and not (moved and name in PLACE):
            setattr(options, name, Path(value) if name == "models" else value)


def go_on(options, again=False):
    with commands.ending():
        inherit(options)
    start(options)
    with commands.ending():
        jobs = joblist.JobList(options.batch)
        with held(jobs):
            say(options, jobs.recover())
            if again:
                print(f"{jobs.retry_failed()} failed jobs wait again", file=stream(options), flush=True)
            return run(options, jobs)


@contextlib.contextmanager
def held(jobs):
    """Only one process works on a list. Raises HostError while another one does."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(common("saving").holding(jobs.folder, "the batch"))
        except (ValueError, OSError) as error:
            raise host.HostError(str(error)) from None
        yield


def stream(options):
    return sys.stderr if options.json else sys.stdout


def say(options, missing):
    if missing:
        names = ", ".join(missing[:SHOWN]) + (" ..." if len(missing) > SHOWN else "")
        print(f"{len(missing)} results are gone or were changed, and are made again: {names}", file=stream(options))


def run(options, jobs):
    """Work off the list; returns the exit code."""
    import batch_progress
    import worker_pool

    options.retries = 2 if options.retries is None else options.retries
    remember(options, jobs)
    screen = batch_progress.BatchProgress(jobs.counts, stream(options))
    pool = worker_pool.WorkerPool(jobs, options.retries, options.overwrite, screen.tell, screen.progress)
    end = None
    try:
        if pool.left():
            pool.work(staff(options, jobs, pool))
    except host.HostError as error:
        end = str(error)
    except KeyboardInterrupt:
        screen.close()
        print(f"stopped; go on with: run.py resume {jobs.output}", file=sys.stderr)
        report(options, jobs, sheets=False)
        return 130
    finally:
        screen.close()
    return report(options, jobs, end)


def remember(options, jobs):
    """Keep the options for `resume`, without passwords."""
    kept = {name: getattr(options, name) for name in (*PLACE, "checkpoint", "preset", "retries", "overwrite")}
    for name in ("models", "comfyui", "workers", "checkpoint", "server"):
        if kept[name] and Path(kept[name]).exists():
            kept[name] = os.path.abspath(kept[name])
        elif kept[name] and name in ("server", "workers"):
            kept[name] = re.sub(r"(^|,|//)[^/@,]*@", r"\1", kept[name])
    jobs.set("options", {name: value for name, value in kept.items() if given(value)})


def staff(options, jobs, pool):
    """Give the pool its servers; returns what looks for others about every second."""
    import workers

    blocks = jobs.ask("SELECT 1 FROM jobs WHERE blocks LIMIT 1")
    folder = jobs.folder / "server" if blocks else None
    if options.ray:
        import ray_workers

        for worker in ray_workers.start(options, jobs.template, folder):
            pool.join(worker)
    elif options.workers or options.server:
        return workers.WorkerList(options.workers or options.server,
                                  lambda address: workers.RemoteWorker(address, jobs.template), pool).look
    else:
        pool.join(workers.PrivateWorker(options, jobs.template, folder=folder))
    return lambda: None


# ---- what came of it ----

def report(options, jobs, end=None, sheets=True):
    """Write the summary and the contact sheets, and tell; returns the exit code. end: why it ended early."""
    import report as reports

    paths = [reports.write_summary(jobs)]
    if sheets and find_spec("av"):
        paths += reports.write_sheets(jobs)
    elif sheets:
        print("no contact sheet: this Python lacks the package av", file=sys.stderr)
    found = overview(jobs) | {"summary": str(paths[0]), "sheets": [str(path) for path in paths[1:]]}
    if end:
        print(f"error: {end}", file=sys.stderr)
    if options.json:
        print(json.dumps(found | ({"error": end} if end else {})))
    else:
        print(f"{found['done']} of {found['jobs']} jobs are done. {', '.join(map(str, paths))}")
    code = exit_code(found)
    if code == 1:
        print(f"error: {found['failed']} of {found['jobs']} videos failed. Try them again with: run.py retry "
              f"{jobs.output} --failed", file=sys.stderr)
    elif code == WAITING:
        print(f"error: {found['waiting'] + found['running']} jobs still wait. Go on with: run.py resume {jobs.output}",
              file=sys.stderr)
    return 1 if end and code != WAITING else code


def overview(jobs):
    """The state of a batch as a JSON object."""
    now = time.time()
    return {
        "batch": str(jobs.output), "jobs": sum(jobs.counts().values()), **jobs.counts(),
        "seconds": round(jobs.ask("SELECT total(seconds) FROM jobs")[0][0], 1),
        "running_now": [{"name": row["name"], "server": row["server"], "seconds": round(now - row["started"], 1)}
                        for row in jobs.rows("running")],
        "failures": [{"name": row["name"], "server": row["server"], "attempts": row["attempts"], "error": row["error"]}
                     for row in jobs.rows("failed")],
    }


def exit_code(found):
    if found["waiting"] or found["running"]:
        return WAITING
    return 1 if found["failed"] else 0


def status(arguments):
    p = parser("status", "How far a batch is.")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    options = p.parse_args(arguments)
    with commands.ending():
        found = overview(joblist.JobList(options.batch))
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join(told(found)))
    return exit_code(found)


def told(found):
    yield f"{found['batch']}: " + ", ".join(f"{found[state]} {state}" for state in joblist.STATES)
    for job in found["running_now"]:
        yield f"  {job['name']} at {job['server']} for {job['seconds']:.0f} s"
    for job in found["failures"][:SHOWN]:
        yield f"  {job['name']} failed after {job['attempts']} tries: {errors.plain(job['error'])}"
    if len(found["failures"]) > SHOWN:
        yield f"  and {len(found['failures']) - SHOWN} more; summary.csv in {found['batch']}{joblist.SUFFIX} has all"
