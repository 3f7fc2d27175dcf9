"""Requests to one server. aiohttp runs in its own thread, so that Ctrl-C interrupts a waiting call at once."""

import asyncio
import concurrent.futures
import contextlib
import io
import json
import threading
import urllib.parse

import aiohttp
from errors import BadStatus, ServerGone, StrangeServer, plain

CONNECT_SECONDS = 10
ANSWER_SECONDS = 120
SILENT_SECONDS = 60  # within a file
LARGEST_ANSWER = 256 << 20  # bytes; the history contains complete workflows
LARGEST_ERROR = 64 << 10
LARGEST_MESSAGE = 64 << 20  # of the websocket: a preview picture
CHUNK = 1 << 16
NODE_TEXT, TEXT_KIND = "progress_text", 3  # ComfyUI's name and number of a text that a node shows
AWAY = (502, 503, 504)  # a proxy's status while the server behind it is down
_thread, _starting = {}, threading.Lock()


class Broken(ServerGone):
    """The connection was refused, or broke before the response was complete; a retry may help."""


def wait_for(coroutine):
    """The coroutine's result. Anything that ends the wait early, including Ctrl-C, cancels it."""
    with _starting:
        if not _thread:
            _thread["loop"] = asyncio.new_event_loop()
            threading.Thread(target=_thread["loop"].run_forever, name="aiohttp", daemon=True).start()
    future = asyncio.run_coroutine_threadsafe(coroutine, _thread["loop"])
    try:
        while not concurrent.futures.wait([future], 0.2).done:
            pass  # Windows handles Ctrl-C only between short waits
        return future.result()
    except BaseException:
        future.cancel()
        raise


def split_address(address):
    """(address without credentials, aiohttp.BasicAuth or None). Raises ServerGone for an invalid address."""
    try:
        parts = urllib.parse.urlsplit(address if "://" in address else f"http://{address}")
        port = f":{parts.port}" if parts.port else ""
        good = (parts.scheme in ("http", "https") and parts.hostname
                and "@" not in parts.path + parts.query + parts.fragment)
    except ValueError:
        good = False
    if not good:  # the address may hold a password, so it is not shown
        raise ServerGone("the address of the server is not a valid URL. Give it as http://127.0.0.1:8188, with a "
                         "password as http://NAME:PASSWORD@HOST (in these, write @ : / ? # as %40 %3A %2F %3F %23).")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    auth = None
    if parts.username is not None:
        name, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
        if ":" in name:
            raise ServerGone("the name in the server's address holds a colon, which HTTP does not allow.")
        auth = aiohttp.BasicAuth(name, password, "utf-8")
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}", auth


class Connection:
    """Sends requests to one server; redirects are not followed."""

    def __init__(self, address, token=None):
        self.url, self.auth = split_address(address)
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        if token and self.auth:
            raise ServerGone(f"{self.url} has both a password and a token: give one of them.")
        host = urllib.parse.urlsplit(self.url).hostname
        self.at_home = host in ("127.0.0.1", "localhost", "::1")  # never use a proxy

    def session(self, **more):
        return aiohttp.ClientSession(auth=self.auth, headers=self.headers, trust_env=not self.at_home,
                                     auto_decompress=False, **more,
                                     timeout=aiohttp.ClientTimeout(None, sock_connect=CONNECT_SECONDS))

    def ask(self, path, body=None, headers=None, seconds=ANSWER_SECONDS, file=None):
        """The body of the response as an open file: a GET, or a POST if there is a body.

        file: write the body to it instead; `seconds` then applies only to the start. Raises Broken, ServerGone,
        BadStatus; StrangeServer if the response is too long, or a file's length is unknown; OSError from `file`.
        """
        try:
            return wait_for(self._ask(path, body, headers or {}, seconds, file))
        except TimeoutError:
            raise ServerGone(f"no answer from {self.url} within {seconds} s. Is ComfyUI busy, or is it another "
                             "program?") from None
        except aiohttp.ClientConnectionError as error:
            raise Broken(f"no answer from {self.url}: {plain(error)}. Is ComfyUI still running there?") from None
        except aiohttp.ClientPayloadError:
            raise Broken(f"the connection to {self.url} broke off in the middle of an answer.") from None
        except (aiohttp.ClientError, ValueError) as error:  # ValueError: invalid addresses and headers
            raise StrangeServer(f"{self.url} does not answer as a ComfyUI does: {plain(error)[:300]}") from None

    async def _ask(self, path, body, headers, seconds, file):
        headers = {"Accept-Encoding": "identity", **headers}
        async with asyncio.timeout(seconds) as limit, self.session() as session, session.request(
                "GET" if body is None else "POST", self.url + path, data=body, headers=headers,
                allow_redirects=False) as answer:
            if answer.status != 200:
                raise self._error(path, answer, await read(answer, io.BytesIO(), LARGEST_ERROR, cut=True))
            if file is None:
                return await read(answer, io.BytesIO(), LARGEST_ANSWER)
            length = answer.content_length
            if length is None and "chunked" not in answer.headers.get("Transfer-Encoding", ""):
                raise StrangeServer(f"{self.url} does not say how long a file is, so it may be cut off.")
            limit.reschedule(None)
            return await read(answer, file, length if length is not None else LARGEST_ANSWER)

    def _error(self, path, answer, body):
        text = plain(body.read().decode(errors="replace"))
        place = f"{self.url}{path.partition('?')[0]}"
        if 300 <= answer.status < 400:
            to = plain(answer.headers.get("Location", "nowhere"))[:300]
            words = f"{place} sends us to {to}, which is not followed. If that is your ComfyUI, give its address."
        elif answer.status in (401, 407):
            words = f"{self.url} wants a name and a password. Give them in the address: http://NAME:PASSWORD@HOST."
        else:
            words = f"{place} answers with the error {answer.status}: {text[:300] or plain(answer.reason or '')}"
        return Broken(words) if answer.status in AWAY else BadStatus(words, answer.status, text)


async def read(answer, file, most, cut=False):
    """Write at most `most` bytes of the response to a file (`cut` drops the rest); returns the file, rewound."""
    size = 0
    while chunk := await asyncio.wait_for(answer.content.read(CHUNK), SILENT_SECONDS):
        size += len(chunk)
        if size > most:
            if cut:
                break
            raise StrangeServer(f"the answer of {answer.url.origin()} has no end: more than {most} bytes.")
        file.write(chunk)
    file.seek(0)
    return file


class Events:
    """A websocket with the JSON messages for one client id. Raises Broken if it cannot connect or closes."""

    def __init__(self, connection, client_id):
        self.connection = connection
        self.session = wait_for(self._open(client_id))

    async def _open(self, client_id):
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(refuse_redirect)
        session = self.connection.session(trace_configs=[trace])
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                self.socket = await session.ws_connect(f"{self.connection.url}/ws?clientId={client_id}",
                                                       max_msg_size=LARGEST_MESSAGE)
        except BaseException as error:
            await session.close()
            if isinstance(error, (aiohttp.ClientError, OSError, ValueError)):
                raise Broken(f"no websocket at {self.connection.url}") from None
            raise
        return session

    def next(self, seconds):
        """The next message that is a JSON object or a node's text; None after `seconds`, and for others (previews)."""
        try:
            message = wait_for(self.socket.receive(seconds))
        except TimeoutError:
            return None
        except aiohttp.ClientError as error:
            raise Broken(str(error)) from None
        if message.type is aiohttp.WSMsgType.TEXT:
            try:
                found = json.loads(message.data)
            except (ValueError, RecursionError):
                return None
            return found if isinstance(found, dict) else None
        if message.type is not aiohttp.WSMsgType.BINARY:  # anything else means that it closed
            raise Broken("the websocket was closed")
        return text_of(message.data)

    def close(self):
        wait_for(self._close())

    async def _close(self):
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(1):  # for the other end to close as well
                await self.socket.close()
        await self.session.close()


def text_of(data):
    """A binary message as {"type": NODE_TEXT, "data": {"node", "text"}}; None for previews and for damaged ones.
    Its parts: kind and length of the node's id (4 bytes each), the id, the text."""
    if len(data) < 8 or int.from_bytes(data[:4]) != TEXT_KIND:
        return None
    end = 8 + int.from_bytes(data[4:8])
    node, text = (part.decode(errors="replace") for part in (data[8:end], data[end:]))
    return {"type": NODE_TEXT, "data": {"node": node, "text": text}}


async def refuse_redirect(*_):
    raise aiohttp.ClientConnectionError("redirected")
