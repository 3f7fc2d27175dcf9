"""A list of jobs on disk (SQLite) that survives the end of the command, of the servers and of the machine.

A job's id is derived from its content: the graph, what is changed in it, and the bytes of its input files. Submitting
the same content again is the same job. States: waiting, running, done (with files and checksums), failed (with a text).

The list of the results in FOLDER is FOLDER.batch/jobs.sqlite. Standard library only.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
import time
import uuid
from collections import Counter, namedtuple
from pathlib import Path

import host

SUFFIX = ".batch"
BUSY_SECONDS = 30  # for another process, such as `status`, to release the file
LOSSES = 5  # a job whose server was lost this often is failed: it may be what ends the servers
HOLD_SECONDS = 30  # a job that may still run on its server is kept for that server so long
HOLD_BLOCKS_SECONDS = 600  # likewise if its finished blocks lie on that server
STATES = ("waiting", "running", "done", "failed")

# prompt: the job's id at its server, kept while it may be known there. held: until then only `server` may take it.
TABLES = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS templates (id TEXT PRIMARY KEY, content TEXT);
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE, name TEXT, submission INTEGER, template TEXT, changes TEXT,
    blocks INTEGER, state TEXT DEFAULT 'waiting', attempts INTEGER DEFAULT 0, errors INTEGER DEFAULT 0,
    losses INTEGER DEFAULT 0, server TEXT, prompt TEXT, held REAL DEFAULT 0, started REAL, seconds REAL, memory INTEGER,
    error TEXT);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, number);
CREATE INDEX IF NOT EXISTS jobs_by_name ON jobs (name);
CREATE TABLE IF NOT EXISTS files (
    job TEXT, number INTEGER, path TEXT, sha256 TEXT, size INTEGER, PRIMARY KEY (job, number));
CREATE INDEX IF NOT EXISTS files_by_path ON files (path);
"""

Job = namedtuple("Job", "id name template changes blocks attempts prompt again")  # again: `prompt` may be known already
Made = namedtuple("Made", "path sha256 size")


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def content_id(*parts):
    """A UUID in the canonical lower-case form, the only one that newer servers accept, made from these texts."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()
    return str(uuid.UUID(bytes=digest[:16], version=5))


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_of(batch):
    """The folder of the list, for its own path or that of its results."""
    path = Path(os.path.abspath(batch))
    return path if path.name.endswith(SUFFIX) else path.with_name(path.name + SUFFIX)


class JobList:
    """The list in this folder; used from several threads. Raises HostError if there is none and `create` is not set."""

    def __init__(self, folder, create=False):
        self.folder = folder_of(folder)
        self.output = self.folder.with_name(self.folder.name.removesuffix(SUFFIX))
        path = self.folder / "jobs.sqlite"
        if not create and not path.is_file():
            raise host.HostError(f"there is no batch {self.output}: {path} is missing. Name the folder of the results, "
                                 "or make a batch with `run.py batch` or --prompt_dir.")
        self.lock = threading.RLock()
        try:
            if create:
                self.folder.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self.db.row_factory = sqlite3.Row
            if create:
                self.db.execute("PRAGMA journal_mode = WAL")  # a third of the time, and `status` never waits
                self.db.executescript(TABLES)
        except (OSError, sqlite3.Error) as error:
            raise host.HostError(f"cannot open the list {path}: {error}") from None
        self.id = self.setting("id", lambda: str(uuid.uuid4()) if create else None)

    @contextlib.contextmanager
    def transaction(self):
        """All changes of the with block reach the disk together, or none does."""
        with self.lock:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")

    def ask(self, query, *values):
        with self.lock:
            return self.db.execute(query, values).fetchall()

    def setting(self, name, default=lambda: None):
        """A stored value; `default()` is stored if there is none."""
        found = self.ask("SELECT value FROM settings WHERE name = ?", name)
        if not found and (value := default()) is not None:
            self.set(name, value)
            return value
        return json.loads(found[0]["value"]) if found else None

    def set(self, name, value):
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, json.dumps(value)))

    def close(self):
        with self.lock:
            self.db.close()

    # ---- filling ----

    def submit(self, template, rows):
        """Add jobs; a failed one waits again. Returns Counter(new, known, same).

        template: what the jobs share (JSON). rows: (name of the result or "", changes), read one by one; changes are
        [node, input, value], a value {"file": path, "sha256": ...} is an input file. Without a name, which is part of
        the content, the row's number is taken. A name taken by another row gets a number. An unfinished job of an
        earlier submission whose name is taken by new content is dropped.
        """
        counts, text = Counter(), canonical(template)
        template_id = content_id(text)
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO templates VALUES (?, ?)", (template_id, text))
            submission = (db.execute("SELECT max(submission) FROM jobs").fetchone()[0] or 0) + 1
            for number, (name, changes) in enumerate(rows, 1):
                job = content_id(template_id, canonical(without_paths(changes)), name)
                known = db.execute("SELECT submission, state FROM jobs WHERE id = ?", (job,)).fetchone()
                if known:
                    counts["same" if known["submission"] == submission else "known"] += 1
                    db.execute("UPDATE jobs SET submission = ?, changes = ? WHERE id = ?",
                               (submission, canonical(changes), job))
                    if known["state"] == "failed":
                        self._wait_again(db, job)
                    continue
                counts["new"] += 1
                if name:
                    name = free_name(db, name, submission)
                    db.execute("DELETE FROM jobs WHERE name = ? AND state != 'done'", (name,))
                else:
                    name = free_name(db, f"{number:05}")
                db.execute("INSERT INTO jobs (id, name, submission, template, changes, blocks) VALUES (?,?,?,?,?,?)",
                           (job, name, submission, template_id, canonical(changes), bool(template.get("blocks"))))
        return counts

    def _wait_again(self, db, job):
        db.execute("UPDATE jobs SET state = 'waiting', errors = 0, losses = 0, prompt = NULL, held = 0, error = NULL "
                   "WHERE id = ?", (job,))

    def retry_failed(self):
        """Let failed jobs wait again; returns how many."""
        failed = self.ask("SELECT id FROM jobs WHERE state = 'failed'")
        with self.transaction() as db:
            for row in failed:
                self._wait_again(db, row["id"])
        return len(failed)

    def recover(self):
        """After a runner's end: judge every job by its files. Returns the names of done jobs whose files are gone.

        A job that was running is done if all its files are there; otherwise it waits, first for its own server, where
        it may have gone on. A done job whose files are missing or have changed waits again.
        """
        missing, held = [], time.time() + HOLD_SECONDS
        for row in self.ask("SELECT id, name, state FROM jobs WHERE state IN ('running', 'done')"):
            files = self.files(row["id"])
            whole = bool(files) and all(self.intact(made) for made in files)
            if whole and row["state"] == "running":
                self.done(row["id"], files)
            elif not whole:
                with self.transaction() as db:
                    db.execute("UPDATE jobs SET state = 'waiting', held = ?, prompt = iif(state = 'done', NULL, prompt)"
                               " WHERE id = ?", (0 if row["state"] == "done" else held, row["id"]))
                missing += [row["name"]] * (row["state"] == "done")
        return missing

    def intact(self, made):
        path = self.output / made.path
        try:
            return path.stat().st_size == made.size and sha256_of(path) == made.sha256
        except OSError:
            return False

    # ---- running ----

    def claim(self, server, workers=()):
        """The next job for this server, or None. workers: all servers in use; a job kept for another is left to it."""
        now, names = time.time(), json.dumps(list(workers))
        free = "(held <= ? OR server NOT IN (SELECT value FROM json_each(?)))"
        choices = (("server = ? AND prompt IS NOT NULL", (server,)),
                   (f"(server IS NULL OR server != ?) AND {free}", (server, now, names)),
                   ("server = ?", (server,)))  # last: it has failed here, so another server may do better
        with self.transaction() as db:
            for condition, values in choices:
                row = db.execute(f"SELECT * FROM jobs WHERE state = 'waiting' AND {condition} ORDER BY number LIMIT 1",
                                 values).fetchone()
                if row:
                    break
            else:
                return None
            if row["prompt"] and row["server"] == server:
                attempts, prompt, again = row["attempts"], row["prompt"], True
            else:
                attempts, again = row["attempts"] + 1, False
                prompt = content_id(self.id, row["id"], str(attempts))
            db.execute("UPDATE jobs SET state = 'running', server = ?, attempts = ?, prompt = ?, started = ?, error = "
                       "NULL WHERE id = ?", (server, attempts, prompt, now, row["id"]))
        return self._job(row, attempts, prompt, again)

    def renew(self, job):
        """The job with an id that its server has not seen, for one that is not known there any more."""
        attempts = job.attempts + 1
        prompt = content_id(self.id, job.id, str(attempts))
        with self.transaction() as db:
            db.execute("UPDATE jobs SET attempts = ?, prompt = ? WHERE id = ?", (attempts, prompt, job.id))
        return job._replace(attempts=attempts, prompt=prompt, again=False)

    def _job(self, row, attempts, prompt, again):
        return Job(row["id"], row["name"], row["template"], json.loads(row["changes"]), bool(row["blocks"]), attempts,
                   prompt, again)

    def belongs(self, job, server):
        """Whether the job, once started at this server, may go on there."""
        row = self.ask("SELECT server, prompt FROM jobs WHERE id = ?", job.id)
        return bool(row) and tuple(row[0]) == (server, job.prompt)

    def template(self, template):
        return json.loads(self.ask("SELECT content FROM templates WHERE id = ?", template)[0]["content"])

    def release(self, job):
        """The command stops: the job, cancelled at its server, waits again."""
        with self.transaction() as db:
            db.execute("UPDATE jobs SET state = 'waiting', prompt = NULL, held = 0 WHERE id = ?", (job.id,))

    def lost(self, job, text):
        """The server is gone. The job waits again, for a time only for that server if its blocks lie there."""
        held = time.time() + HOLD_BLOCKS_SECONDS if job.blocks else 0
        with self.transaction() as db:
            losses, = db.execute("SELECT losses + 1 FROM jobs WHERE id = ?", (job.id,)).fetchone()
            text = f"its server was lost {losses} times, the last time: {text}" if losses >= LOSSES else text
            db.execute("UPDATE jobs SET state = ?, losses = ?, held = ?, error = ? WHERE id = ?",
                       ("failed" if losses >= LOSSES else "waiting", losses, held, text, job.id))

    def failed(self, job, text, retries=0):
        """The job failed; it waits again unless it has failed more than `retries` times. Returns the new state."""
        with self.transaction() as db:
            errors, = db.execute("SELECT errors + 1 FROM jobs WHERE id = ?", (job.id,)).fetchone()
            state = "failed" if errors > retries else "waiting"
            db.execute("UPDATE jobs SET state = ?, errors = ?, prompt = NULL, held = 0, error = ? WHERE id = ?",
                       (state, errors, text, job.id))
        return state

    def intend(self, job, files):
        """Record the files of a job before they get their names, so that `recover` knows them."""
        with self.transaction() as db:
            self._write_files(db, job, files)

    def done(self, job, files, seconds=None, memory=None):
        """All files of the job (an id) are in place; a job whose file was replaced by one of them leaves the list."""
        with self.transaction() as db:
            for made in files:
                db.execute("DELETE FROM jobs WHERE id IN (SELECT job FROM files WHERE path = ? AND job != ?)",
                           (str(made.path), job))
                db.execute("DELETE FROM files WHERE path = ? AND job != ?", (str(made.path), job))
            self._write_files(db, job, files)
            db.execute("UPDATE jobs SET state = 'done', prompt = NULL, held = 0, error = NULL, seconds = ?, memory = ? "
                       "WHERE id = ?", (seconds, memory, job))

    def _write_files(self, db, job, files):
        db.execute("DELETE FROM files WHERE job = ?", (job,))
        db.executemany("INSERT INTO files VALUES (?, ?, ?, ?, ?)",
                       [(job, i, str(made.path), made.sha256, made.size) for i, made in enumerate(files)])

    # ---- looking ----

    def files(self, job):
        """[Made] of a job's id: paths relative to the output folder."""
        found = self.ask("SELECT path, sha256, size FROM files WHERE job = ? ORDER BY number", job)
        return [Made(*row) for row in found]

    def counts(self):
        """{state: number of jobs}"""
        found = dict(self.ask("SELECT state, count(*) FROM jobs GROUP BY state"))
        return {state: found.get(state, 0) for state in STATES}

    def rows(self, *states):
        """The jobs in these states, one by one."""
        last = -1
        marks = ",".join("?" * len(states))
        while page := self.ask(f"SELECT * FROM jobs WHERE state IN ({marks}) AND number > ? ORDER BY number LIMIT 500",
                               *states, last):
            yield from page
            last = page[-1]["number"]


def without_paths(changes):
    """The changes with input files named by their bytes alone."""
    return [[node, name, {"sha256": value["sha256"]} if is_file(value) else value] for node, name, value in changes]


def is_file(value):
    return isinstance(value, dict) and "sha256" in value


def free_name(db, name, submission=None):
    """`name`, or with the next number if another job (of this submission) has it."""
    number, wanted = 1, name
    while db.execute("SELECT 1 FROM jobs WHERE name = ? AND submission = ifnull(?, submission)",
                     (name, submission)).fetchone():
        number += 1
        name = f"{wanted}-{number}"
    return name
