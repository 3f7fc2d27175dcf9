"""Runs while they sample: what the page and scripts are told of them, and what they may send.

POST /stillmotion/steer {"prompt_id", "node_id", "text"}: a new prompt, from the next block on
POST /stillmotion/stop {"prompt_id", "node_id"}: end the video with the current block
POST /stillmotion/watch {"client_id", "form"}: send this client its runs' blocks, as pictures ("frames") or as "mp4"

A run until stopped ends by itself when the connection of a client that takes "mp4" (a command) has been gone for
ALONE_SECONDS: nobody would stop it. Pages may be closed and opened again.

Bodies are JSON. Answers hold "message", or "error" with the status 400, 403, 404, 409 or 415. Watching clients receive
the event "stillmotion.live" with "kind": begin, block, prompt, end.
"""

import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web
from comfy_execution.utils import get_executing_context

from ..common.video import encode_mp4, frames_uint8
from .live import BlockPreview, frame_sheet
from .mailbox import Mailbox, Mailboxes, Refused
from .run import Run
from .steering import Steering

# ComfyUI has imported its server; in scripts without one the import would take seconds
PromptServer = getattr(sys.modules.get("server"), "PromptServer", None)

EVENT = "stillmotion.live"
FORMS = ("frames", "mp4")
MOST_WATCHERS = 1000
ALONE_SECONDS = 60

mailboxes = Mailboxes()
watchers: dict[str, str] = {}  # client id -> form


class LiveRun:
    """One run as its client sees it. `steering` is for the sampler, `preview` counts the steps."""

    def __init__(self, run: Run, fps: float, place: tuple[str, str] | None, mailbox: Mailbox):
        self.place, self.fps, self.frames = place, fps, 0
        self.block = 0 if run.given else 1  # 0: the given frames
        self.preview = BlockPreview(run.steps)
        self.server = PromptServer and PromptServer.instance
        self.client = self.server and self.server.client_id
        self.form = watchers.get(self.client)
        self.alone_since: float | None = None
        self.steering = Steering(mailbox, run.prompts, run.given, run.cut, run.encode,
                                 lambda **told: self.tell("prompt", **told))

    def tell(self, kind: str, **values) -> None:
        """Send the client an event, if it watches."""
        if self.form and self.place:
            where = dict(zip(("prompt_id", "node_id"), self.place))
            self.server.send_sync(EVENT, {"kind": kind, **where, **values}, self.client)

    def show(self, frames_THWC) -> None:
        """Show the next frames: to a watching client for its player, to others as ComfyUI's preview."""
        if not self.form:
            self.preview.show(frames_THWC)
            return
        if self.form == "mp4":
            data, layout = encode_mp4(frames_uint8(frames_THWC), self.fps), {}
        else:
            data, layout = frame_sheet(frames_THWC)
        self.tell("block", block=self.block, frame=self.frames, count=len(frames_THWC), **layout,
                  data=b64encode(data).decode())
        self.frames += len(frames_THWC)
        self.block += 1
        self.stop_if_alone()

    def stop_if_alone(self) -> None:
        """End a run until stopped whose command was killed, or cannot be reached any more."""
        mailbox = self.steering.mailbox
        if self.form != "mp4" or mailbox.blocks is not None or self.client in self.server.sockets:
            self.alone_since = None
            return
        self.alone_since = self.alone_since or time.monotonic()
        if time.monotonic() - self.alone_since >= ALONE_SECONDS:
            mailbox.stop()


@contextmanager
def live(run: Run, fps: float, folder) -> Iterator[LiveRun]:
    """Opens a run for messages and tells its client of it. folder: its stored blocks, or None."""
    context = get_executing_context()
    place = (context.prompt_id, context.node_id) if context else None
    blocks = None if run.plan.further else len(run.plan.blocks) - run.given
    stored = max(0, 1 + max(folder.found, default=-1) - run.given) if folder else 0
    mailbox = Mailbox(stored + 1, blocks, run.encode is not None)
    shown = LiveRun(run, fps, place, mailbox)
    with mailboxes.opened(place, mailbox):
        shown.tell("begin", fps=fps, blocks=blocks, steers=mailbox.prompts)
        try:
            yield shown
        finally:
            shown.tell("end", frames=shown.frames)


def used_prompts(steering: Steering) -> str:
    """The prompts that were sent, for the summary."""
    lines = [f"{frame}: {text}" for frame, text in steering.sent]
    return "\n".join(["\nSent while it ran, as lines for Prompt Timeline:", *lines]) if lines else ""


async def message_of(request: web.Request, *names: str) -> list[str]:
    """The named entries of a request's JSON body. Raises Refused.

    Only JSON is read: a page of another origin cannot send that without asking first, and ComfyUI does not permit it
    (unless started with --enable-cors-header). Newer releases refuse such requests before they come here.
    """
    if request.headers.get("Sec-Fetch-Site") == "cross-site":
        raise Refused(403, "Requests from other web sites are not accepted.")
    if request.content_type != "application/json":
        raise Refused(415, "Send JSON, with the header Content-Type: application/json.")
    try:
        found = await request.json()
    except (ValueError, RecursionError):
        found = None
    example = ", ".join(f'"{name}": "..."' for name in names)
    if not isinstance(found, dict):
        raise Refused(400, f"The body is not a JSON object: send {{{example}}}.")
    missing = [name for name in names if not isinstance(found.get(name), str) or not found[name]]
    if missing:
        raise Refused(400, f"{' and '.join(missing)} must be text and not empty: send {{{example}}}.")
    return [found[name] for name in names]


def answering(handler):
    """A route for a handler that returns a JSON object or raises Refused."""
    async def answer(request: web.Request) -> web.Response:
        try:
            return web.json_response(await handler(request))
        except Refused as refused:
            return web.json_response({"error": str(refused)}, status=refused.status)

    return answer


async def steer(request: web.Request) -> dict:
    prompt_id, node_id, text = await message_of(request, "prompt_id", "node_id", "text")
    return mailboxes.find((prompt_id, node_id)).send(text)


async def stop(request: web.Request) -> dict:
    prompt_id, node_id = await message_of(request, "prompt_id", "node_id")
    return mailboxes.find((prompt_id, node_id)).stop()


async def watch(request: web.Request) -> dict:
    client_id, form = await message_of(request, "client_id", "form")
    if form not in FORMS:
        raise Refused(400, f"form is {form!r}: allowed are {' and '.join(FORMS)}.")
    watchers.pop(client_id, None)
    watchers[client_id] = form
    while len(watchers) > MOST_WATCHERS:
        del watchers[next(iter(watchers))]
    return {"message": "The blocks of this client's runs are sent to it."}


if PromptServer:
    for path, handler in (("steer", steer), ("stop", stop), ("watch", watch)):
        PromptServer.instance.routes.post(f"/stillmotion/{path}")(answering(handler))
