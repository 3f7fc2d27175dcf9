"""Errors between a command and its server, and sanitizing the server's text for a terminal."""

import io
import re
import unicodedata
import urllib.error

LONGEST = 4000  # characters of server text in a message


class JobError(RuntimeError):
    """The server rejected the graph or a node failed; the message is meant for users."""


class JobLost(JobError):
    """The server does not know the job any more."""


class ServerGone(RuntimeError):
    """The server no longer responds."""


class StrangeServer(ServerGone):
    """The server responds, but not like ComfyUI."""


class BadStatus(StrangeServer, urllib.error.HTTPError):
    """The server responds with an HTTP error. code: the status; text and `read()`: the body."""

    def __init__(self, message, code, text):
        urllib.error.HTTPError.__init__(self, "", code, message, None, io.BytesIO(text.encode()))
        self.text = text

    def __str__(self):
        return self.msg


def plain(text):
    """Strip what a terminal would act on from server text: escape codes, control characters, bidi overrides."""
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", str(text)).replace("\t", " ")
    text = "".join(c for c in text if c == "\n" or not unicodedata.category(c).startswith("C"))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
