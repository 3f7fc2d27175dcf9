"""What can go wrong between a command and its server, and the server's words made fit for a terminal."""

import re
import unicodedata

LONGEST = 4000  # characters of a server's text in a message


class JobError(RuntimeError):
    """The server refused the graph or a node failed; the message is for people."""


class ServerGone(RuntimeError):
    """The server does not answer any more."""


class StrangeServer(ServerGone):
    """It answers, but not as ComfyUI does."""


class BadStatus(StrangeServer):
    """It answers with an HTTP error. status: its number; text: what came with it."""

    def __init__(self, message, status, text):
        super().__init__(message)
        self.status, self.text = status, text


def plain(text):
    """A server's text without what a terminal would obey: escape codes, control characters, changes of direction."""
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", str(text)).replace("\t", " ")
    text = "".join(c for c in text if c == "\n" or not unicodedata.category(c).startswith("C"))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
