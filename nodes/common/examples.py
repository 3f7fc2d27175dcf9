"""The templates' small example files, in ComfyUI's input folder: Load Image and Load Video take from there only."""
import logging
import shutil
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "workflows" / "examples"


def offer_examples(folder) -> None:
    """Copy those that are not there yet into `folder`; one that cannot be copied is named in the log."""
    for example in EXAMPLES.glob("stillmotion_*"):
        try:
            if not Path(folder, example.name).exists():
                shutil.copyfile(example, Path(folder, example.name))
        except OSError as error:  # a shared server's input folder may be read-only; all else works without
            logging.warning("Stillmotion: the example %s could not be put into %s: %s", example.name, folder, error)
