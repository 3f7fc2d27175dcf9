"""The templates' small example files, in ComfyUI's input folder: Load Image and Load Video take from there only."""
import logging
import shutil
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "workflows" / "examples"
OFFERED = ".stillmotion_examples"  # in the input folder: names of those that were put there once


def offer_examples(folder) -> None:
    """Copy each into `folder` once: one that the user has changed or deleted since stays so.

    One that cannot be copied is named in the log.
    """
    record = Path(folder, OFFERED)
    offered = record.read_text().splitlines() if record.is_file() else []
    for example in sorted(EXAMPLES.glob("stillmotion_*")):
        if example.name in offered:
            continue
        try:
            if not Path(folder, example.name).exists():
                shutil.copyfile(example, Path(folder, example.name))
            with record.open("a") as lines:
                lines.write(f"{example.name}\n")
        except OSError as error:  # a shared server's input folder may be read-only; all else works without
            logging.warning("Stillmotion: the example %s could not be put into %s: %s", example.name, folder, error)
