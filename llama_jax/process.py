"""What a command sets for its whole process, before jax starts."""

import ctypes
import os
import platform
from importlib.util import find_spec

# Of <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Makes the C library keep large blocks that are freed, for the next training step.

    On a CPU, XLA asks for all of a step's temporary memory anew each time, and for a buffer at each
    product. glibc would give these back to the system at once, which has to clear every page again:
    a tenth to a third of a training step. The price is that the process stays as large as its
    largest step.

    To be called before the first thread starts, since each would get an arena of its own, which
    cannot hold large blocks.

    Returns:
        False, and nothing is done, where jax may use an accelerator or the library is not glibc.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not _accelerator_is_installed()
    if not on_cpu or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    settings = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}  # -1: never
    return all(library.mallopt(name, value) for name, value in settings.items())


def _accelerator_is_installed() -> bool:
    return any(find_spec(name) for name in ("libtpu", "jax_plugins"))
