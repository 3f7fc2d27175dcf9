"""Notes to the user about the node that runs: on it in the page, in the log, and in the terminal of a command."""
import logging
import sys


def say_on_node(text: str) -> None:
    """Show a text (if not empty) on the node that runs now, or that expanded into it, and in the log. It may be a node
    of ComfyUI's, so the text says whose it is; web/notes.js removes it when the node runs again."""
    if not text:
        return
    text = f"Stillmotion: {text}"
    logging.warning(text)
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)  # None in scripts
    if server is not None and server.client_id and server.last_node_id:
        server.send_progress_text(text, server.last_node_id, server.client_id)
