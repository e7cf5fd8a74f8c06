"""How a run is asked to stop, and how several processes agree to do it after the same step."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SECOND_SIGNAL_SECONDS = 0.5


class StopRequest:
    """Turns the first SIGTERM or Ctrl-C into a wish, which the loop reads between steps.

    The second one ends the process, as it would without us.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others get no signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and time.monotonic() - self._at > SECOND_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.requested:  # a scheduler signals this process, and so does the supervisor
            return
        self.requested, self._at = signal.Signals(number).name, time.monotonic()
        # Not print: the signal may have come while something else was being printed.
        os.write(2, b"\nfinishing this step and saving; the same signal again ends at once\n")


def wishes(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """One number for each device, which its process sets: 1 to stop, 0 to go on.

    The step gives the largest of all, so every process learns of a wish from the same step.
    """
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=place)


def both_wishes(mesh: Mesh) -> dict[bool, jax.Array]:
    """Whether to stop -> that wish on all devices of this process."""
    shape = wishes(mesh)

    def everywhere(value: int) -> jax.Array:
        values = np.full(shape.shape, value, np.int32)
        return jax.make_array_from_callback(shape.shape, shape.sharding, lambda i: values[i])

    return {False: everywhere(0), True: everywhere(1)}
