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


def wishes(mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """What goes with a batch: one number for each device, set by its process: 1 to stop, else 0.

    The step gives the sum, so every process learns of a wish from the same step. It is fp32, as the
    sums of the loss are, so that XLA makes one message of all. Nothing where there is one process,
    which asks nobody.
    """
    if jax.process_count() == 1:
        return {}
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return {"stop": jax.ShapeDtypeStruct((mesh.size,), jnp.float32, sharding=place)}


def both_wishes(mesh: Mesh) -> dict[bool, dict[str, jax.Array]]:
    """Whether to stop -> that wish, for the devices of this process."""

    def everywhere(shape: jax.ShapeDtypeStruct, value: int) -> jax.Array:
        values = np.full(shape.shape, value, np.float32)
        return jax.make_array_from_callback(shape.shape, shape.sharding, lambda i: values[i])

    return {
        stop: {name: everywhere(shape, int(stop)) for name, shape in wishes(mesh).items()}
        for stop in (False, True)
    }
