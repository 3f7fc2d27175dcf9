"""What to do about an error of the allocator, said by the node that knows its sizes."""
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management


@contextmanager
def memory_advice(task: str, remedy: str) -> Iterator[None]:
    """Raise core's out-of-memory error with `task` (what the memory was for) and `remedy` in its message."""
    out_of_memory = comfy.model_management.OOM_EXCEPTION
    try:
        yield
    except RuntimeError as error:  # on a CPU the allocator's error has no class of its own
        if not isinstance(error, out_of_memory) and "allocate memory" not in str(error):
            raise
        raise out_of_memory(f"Out of memory {task}. {remedy} ({error})") from error
