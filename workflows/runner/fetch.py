"""Download a known model into ComfyUI's models folder; nothing is downloaded unless you ask for it by name.

    python workflows/run.py fetch                      the known models
    python workflows/run.py fetch dynamicrafter_512    one of them; give the command again to go on after a break

A file gets its name only when it is whole: its size, and its SHA-256 where it is known, are checked first. Files that
are there already are left alone. STILLMOTION_MODEL_HOST or --host names a mirror. Standard library only.
"""

import argparse
import hashlib
import http.client
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import namedtuple
from pathlib import Path

import commands
import host
import launch
from inprocess import common
from known_models import KNOWN

MODEL_HOST = "https://huggingface.co"
CHUNK = 1 << 20
SILENT_SECONDS = 60
TRIES = 5  # in a row without a new byte
PAUSE_SECONDS = 2
REDIRECTS = 5
HOME = ("127.0.0.1", "localhost", "::1")

Remote = namedtuple("Remote", "url size sha256 tag")  # sha256 may be None, tag empty


class NoFile(host.HostError):
    """The host does not give this file; another try would fail in the same way."""


class Broken(Exception):
    """The connection failed; another try may help."""


def main(arguments):
    p = argparse.ArgumentParser(prog="run.py fetch", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", nargs="?", metavar="NAME", help="default: list the names")
    p.add_argument("--models", type=Path, metavar="FOLDER", help="a models folder (default: that of the ComfyUI)")
    p.add_argument("--comfyui", metavar="PATH", help="the ComfyUI in this folder (default: as for run.py)")
    p.add_argument("--host", default=os.environ.get("STILLMOTION_MODEL_HOST") or MODEL_HOST, metavar="URL",
                   help=f"address of the model host or a mirror (default: {MODEL_HOST})")
    options = p.parse_args(arguments)
    if not options.name:
        print("\n".join(table()))
        return
    if options.name not in KNOWN:
        p.error(f"{options.name!r} is no known model: choose one of {', '.join(KNOWN)}")
    with commands.ending():
        models = models_folder(options.models, options.comfyui)
        for file in KNOWN[options.name][1]:
            url = f"{options.host.rstrip('/')}/{file.repository}/resolve/main/{file.path}"
            target = models / file.folder / file.name
            print(f"{fetch(url, target, file)}: {target}", flush=True)


def table():
    for name, (what, files) in KNOWN.items():
        sizes = [file.gigabytes for file in files]
        size = f", {sum(sizes):.1f} GB" if all(sizes) else ""
        yield f"{name:32} {what}{size}"


def models_folder(models=None, comfyui=None):
    """Where the models of the ComfyUI that the commands use are; no private one is set up for this."""
    if models:
        return models
    if comfyui or os.environ.get("STILLMOTION_COMFYUI"):
        folder = Path(comfyui or os.environ["STILLMOTION_COMFYUI"]).expanduser().absolute()
        if not (folder / "main.py").is_file():
            raise host.HostError(f"{folder} is not a ComfyUI folder (no main.py in it): name the folder that holds "
                                 "main.py.")
        return launch.models_folder(folder)
    if host.PACK.parent.name == "custom_nodes" and (host.PACK.parents[1] / "main.py").is_file():
        return host.PACK.parents[1] / "models"
    return host.cache_folder() / "models"


def fetch(url, target, known):
    """Download a file to `target`, whole or not at all; returns what was done. `known`: its known_models.File.

    Bytes that have arrived are kept in a hidden folder beside it, and the next call goes on from there. Raises
    HostError.
    """
    if target.exists():
        if known.sha256 and digest(target) != known.sha256:
            raise host.HostError(f"{target} is there already, and is not the published file: its SHA-256 differs. Move "
                                 "it away and give the command again.")
        return "there already"
    saving = common("saving")
    part = target.parent / f".{target.name}.fetch"
    try:
        with saving.holding(part, "the download folder"):
            content = download(url, part, known)
            if target.exists():
                raise host.HostError(f"{target} was made meanwhile; it stays as it is.")
            os.replace(content, target)
        shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise host.HostError(f"cannot save {target}: {error}. What has arrived is kept; free some space or choose "
                             "another --models, and give the command again.") from None
    except ValueError as error:
        raise host.HostError(str(error)) from None
    return "saved"


def download(url, part, known):
    """The path of the complete, checked file in the folder `part`."""
    begin, tries, content, remote = time.monotonic(), TRIES, None, None
    while True:
        before = content.stat().st_size if content and content.exists() else 0
        try:
            remote = locate(url)
            if known.sha256 and remote.sha256 and known.sha256 != remote.sha256:
                raise NoFile(f"{url} holds another file than the known one: its SHA-256 is {remote.sha256}, expected "
                             f"{known.sha256}. Nothing was downloaded.")
            content = part / name_of(remote)
            for other in part.glob("*.bytes"):
                if other != content:
                    other.unlink()  # of a version that is not there any more
            check_space(part, content, remote)
            receive(remote, content, begin)
            break
        except Broken as error:
            gained = content is not None and content.exists() and content.stat().st_size > before
            tries = TRIES if gained else tries - 1
            if not tries:
                raise host.HostError(f"{error}. What has arrived is kept: give the command again to go on.") from None
            print(f"\n{error}; once more in {PAUSE_SECONDS} s", file=sys.stderr, flush=True)
            time.sleep(PAUSE_SECONDS)
    wanted = known.sha256 or remote.sha256
    if wanted:
        print("checking", file=sys.stderr, flush=True)
        found = digest(content)
        if found != wanted:
            content.unlink()
            raise host.HostError(f"{url}: what arrived has the SHA-256 {found}, expected {wanted}. It was deleted; "
                                 "give the command again.")
    return content


def locate(url):
    """Follow redirects to the file itself, and collect what the host says of it on the way."""
    size = sha256 = None
    for _ in range(REDIRECTS + 1):
        with ask(url, {"Range": "bytes=0-0"}) as answer:
            headers = answer.headers
            size = number(headers.get("X-Linked-Size")) or size
            linked = (headers.get("X-Linked-Etag") or "").removeprefix("W/").strip('"').lower()
            sha256 = linked if re.fullmatch("[0-9a-f]{64}", linked) else sha256
            if answer.status not in (301, 302, 303, 307, 308):
                break
            url = follow(url, headers.get("Location") or "")
    else:
        raise NoFile(f"{url}: more than {REDIRECTS} redirects.")
    if answer.status not in (200, 206):
        raise refusal(url, answer.status)
    if (headers.get("Content-Type") or "").startswith("text/html"):
        raise NoFile(f"{url} is a web page, not a model: the host wants a login, or the address is wrong.")
    ranged = re.fullmatch(r"bytes 0-0/(\d+)", headers.get("Content-Range") or "")
    length = int(ranged[1]) if ranged else number(headers.get("Content-Length")) if answer.status == 200 else None
    if size and length and size != length:
        raise NoFile(f"{url}: the host says that the file has {size} bytes, and then sends {length}. Nothing was "
                     "downloaded. Try later, or another --host.")
    if not size and not length:
        raise NoFile(f"{url}: the host does not say how large the file is, so nobody could tell whether it is whole.")
    return Remote(url, size or length, sha256, (headers.get("ETag") or "").removeprefix("W/"))


def follow(url, location):
    """The next address; raises NoFile for one that a download must not be sent to."""
    target = urllib.parse.urljoin(url, location)
    old, new = urllib.parse.urlsplit(url), urllib.parse.urlsplit(target)
    if not location or new.scheme not in ("http", "https") or not new.hostname:
        raise NoFile(f"{url} redirects to {location[:200] or 'nowhere'}, which is no web address.")
    if old.scheme == "https" and new.scheme != "https":
        raise NoFile(f"{url} redirects to {target[:200]}, which is not encrypted. It is not followed.")
    if new.hostname in HOME and old.hostname not in HOME:
        raise NoFile(f"{url} redirects to this machine ({new.hostname}). It is not followed.")
    return target


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def ask(url, headers):
    """The answer to a GET, whatever its status; raises Broken, NoFile."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise NoFile(f"{url} is no web address: give --host as https://HOST.")
    proxies = [urllib.request.ProxyHandler({})] if parts.hostname in HOME else []
    opener = urllib.request.build_opener(NoRedirect, *proxies)
    headers = {"User-Agent": "stillmotion", "Accept-Encoding": "identity", **headers}
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=SILENT_SECONDS)
    except urllib.error.HTTPError as error:
        return error
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"no answer from {parts.hostname}: {getattr(error, 'reason', error)}") from None


def refusal(url, status):
    if status in (429, 500, 502, 503, 504):
        return Broken(f"{url} answers with the error {status}")
    why = {401: "it wants a login", 403: "it refuses access", 404: "there is no such file"}.get(status, "an error")
    return NoFile(f"{url} answers with {status}: {why}. Download the file with a browser, or give another --host.")


def number(text):
    return int(text) if text and text.isdecimal() else None


def name_of(remote):
    """A name for the partial file that differs for another version of the file."""
    version = repr((remote.size, remote.sha256 or remote.tag))
    return f"{hashlib.sha256(version.encode()).hexdigest()[:16]}.bytes"


def check_space(folder, content, remote):
    held = content.stat().st_size if content.exists() else 0
    free = shutil.disk_usage(folder).free
    if remote.size - held > free:
        raise host.HostError(f"{folder} has {free / 1e9:.1f} GB free, and {(remote.size - held) / 1e9:.1f} GB are to "
                             "come. Free some space, or choose another --models.")


def receive(remote, content, begin):
    """Fetch the missing bytes of the file; raises Broken if the connection ends too early."""
    held = content.stat().st_size if content.exists() else 0
    if held == remote.size:
        return
    with ask(remote.url, {"Range": f"bytes={held}-"} if held else {}) as answer:
        if answer.status not in (200, 206):
            raise refusal(remote.url, answer.status)
        if answer.status == 200:
            held = 0  # this host does not go on in the middle
        elif not (answer.headers.get("Content-Range") or "").startswith(f"bytes {held}-"):
            raise NoFile(f"{remote.url} sends another part of the file than asked for. Use another --host.")
        with open(content, "ab" if held else "wb") as file:
            while chunk := read(answer, remote.url):
                held += len(chunk)
                if held > remote.size:
                    file.truncate(0)
                    raise NoFile(f"{remote.url} sends more than the {remote.size} bytes that it announced. Nothing was "
                                 "kept.")
                file.write(chunk)
                show(held, remote.size, begin)
    if held < remote.size:
        raise Broken(f"the connection broke off after {held} of {remote.size} bytes")


def read(answer, url):
    try:
        return answer.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"the connection to {urllib.parse.urlsplit(url).hostname} broke off ({error})") from None


def show(held, size, begin):
    if sys.stderr.isatty():
        end = "\n" if held == size else ""
        print(f"\r  {held / 1e9:.2f} of {size / 1e9:.2f} GB, {time.monotonic() - begin:.0f} s ", end=end,
              file=sys.stderr, flush=True)


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
