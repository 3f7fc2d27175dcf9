"""What can go wrong between a command and its server, and the server's words made fit for a terminal."""

import io
import re
import unicodedata
import urllib.error

LONGEST = 4000  # characters of a server's text in a message


class JobError(RuntimeError):
    """The server refused the graph or a node failed; the message is for people."""


class ServerGone(RuntimeError):
    """The server does not answer any more."""


class StrangeServer(ServerGone):
    """It answers, but not as ComfyUI does."""


class BadStatus(StrangeServer, urllib.error.HTTPError):
    """It answers with an HTTP error. code: its number; text, and `read()`: what came with it."""

    def __init__(self, message, code, text):
        urllib.error.HTTPError.__init__(self, "", code, message, None, io.BytesIO(text.encode()))
        self.text = text

    def __str__(self):
        return self.msg


def plain(text):
    """A server's text without what a terminal would obey: escape codes, control characters, changes of direction."""
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", str(text)).replace("\t", " ")
    text = "".join(c for c in text if c == "\n" or not unicodedata.category(c).startswith("C"))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
