"""Records some steps with jax's profiler, asked for by the configuration or by SIGUSR1.

The files lie in <out>/profile and are read by TensorBoard with the profile plug-in (XProf), or by
`jax.profiler.ProfileData`.
"""

import signal
import threading
from pathlib import Path
from typing import Any, Self

import jax

from llama_jax.config import ProfileConfig

PROFILE = "profile"


class Profiler:
    """Begins and ends recordings between steps.

    Args:
        folder: of the run.
        config: which steps.
    """

    def __init__(self, folder: Path, config: ProfileConfig):
        self._folder, self._config = folder / PROFILE, config
        self._asked = False
        self._until: int | None = None  # records until so many steps are done
        self._before: Any = None

    def before_step(self, step: int, state: Any) -> str | None:
        """Called before step number `step` is begun; says what was done, if anything.

        Args:
            step: steps done so far, and one.
            state: what the last step gives: a recording begins and ends when it is there.
        """
        said = None
        if self._until is not None and step > self._until:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            said = f"recorded the steps until {self._until} in {self._folder}"
            self._until = None
        if self._until is None and (self._asked or step == self._config.first_step):
            self._asked = False
            jax.block_until_ready(state)
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._until = step + self._config.steps - 1
        return said

    def _ask(self, *_: object) -> None:
        self._asked = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others get no signals
            self._before = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._until is not None:
            jax.profiler.stop_trace()
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)
