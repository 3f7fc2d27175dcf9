"""Out-of-memory errors with advice from the node that knows the sizes involved."""
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management


@contextmanager
def memory_advice(task: str, remedy: str) -> Iterator[None]:
    """Re-raise allocation errors as core's, with `task` (what the memory was for) and `remedy` in the message."""
    out_of_memory = comfy.model_management.OOM_EXCEPTION
    try:
        yield
    except RuntimeError as error:  # the CPU allocator has no dedicated error class
        if not isinstance(error, out_of_memory) and "allocate memory" not in str(error):
            raise
        raise out_of_memory(f"Out of memory {task}. {remedy} ({error})") from error
