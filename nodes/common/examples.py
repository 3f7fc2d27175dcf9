"""The templates' example files, copied to ComfyUI's input folder because Load Image reads only from there."""
import logging
import shutil
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "workflows" / "examples"
OFFERED = ".stillmotion_examples"  # in the input folder: names of the files already copied there once


def offer_examples(folder) -> None:
    """Copy each file or folder into `folder` once: those that the user has since changed or deleted are left alone."""
    record = Path(folder, OFFERED)
    try:
        offered = record.read_text().splitlines() if record.exists() else []
        for example in sorted(EXAMPLES.glob("stillmotion_*")):
            if example.name not in offered:
                if not Path(folder, example.name).exists():
                    copy = shutil.copytree if example.is_dir() else shutil.copyfile
                    copy(example, Path(folder, example.name))
                with record.open("a") as lines:
                    lines.write(f"{example.name}\n")
    except OSError as error:  # a shared server's input folder may be read-only; everything else works without it
        logging.warning("Stillmotion: the example files could not be copied to %s: %s", folder, error)
