"""Batches that are skipped: on request, or by a rule after a rise of the loss that lasts.

Step s reads batch `batch_of(s, windows)`, a pure function, so skipping is as exact and as resumable
as training. A window that begins before the newest checkpoint makes the run go back to an earlier
one. What the rule has decided is kept in skipped.json of the run, beside the settings that asked.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import SpikeConfig, batch_of
from llama_jax.data.shards import to_json, write_atomic

SKIPPED = "skipped.json"
# The standard deviation of a normal distribution, in its median absolute deviations.
MAD_TO_DEVIATION = 1.4826

Window = tuple[int, int]


class Spike(Exception):
    """The loss has stayed high; the run is to go on from a checkpoint before `first_step`."""

    def __init__(self, first_step: int, last_step: int, loss: float, median: float):
        super().__init__(
            f"the loss was far above its median of {median:.4f} from step {first_step} to "
            f"{last_step} ({loss:.4f})"
        )
        self.first_step = first_step


class Detector:
    """Sees the loss of each step in turn; what it knows is `memory`, a part of every checkpoint.

    Args:
        config: the rule; without `deviations` nothing is remembered and nothing found.
        memory: of an earlier detector.
    """

    def __init__(self, config: SpikeConfig, memory: Mapping[str, Any] | None = None):
        self._config = config
        memory = memory or {}
        self._losses: deque[float] = deque(memory.get("losses", ()), maxlen=config.history)
        self._above: int = memory.get("above", 0)

    def memory(self) -> dict[str, Any]:
        """The losses that count as usual, and how many in a row were above them."""
        return {"losses": list(self._losses), "above": self._above}

    def see(self, step: int, loss: float) -> None:
        """Takes the loss of a step.

        Raises:
            Spike: this was the last of `steps` in a row above the limit.
        """
        if self._config.deviations is None or not math.isfinite(loss):
            return
        if len(self._losses) == self._config.history:
            median = statistics.median(self._losses)
            spread = statistics.median(abs(x - median) for x in self._losses)
            if loss > median + self._config.deviations * MAD_TO_DEVIATION * spread:
                self._above += 1
                if self._above >= self._config.steps:
                    raise Spike(step - self._above + 1, step, loss, median)
                return  # a high loss is not usual, or a long spike would hide itself
        self._above = 0
        self._losses.append(loss)


def window_of(spike: Spike, config: SpikeConfig, windows: Sequence[Window]) -> Window:
    """The batches to skip for a spike: some before its first, some from it on."""
    batch = batch_of(spike.first_step - 1, windows)  # step s has read batch s - 1
    return max(0, batch - config.skip_before), batch + config.skip_after


def united(windows: Iterable[Window]) -> tuple[Window, ...]:
    """Windows in order, those that overlap or touch as one."""
    found: list[Window] = []
    for first, after in sorted(windows):
        if found and first <= found[-1][1]:
            first, after = found[-1][0], max(found.pop()[1], after)
        found.append((first, after))
    return tuple(found)


def passed(windows: Iterable[Window], batch: int) -> tuple[Window, ...]:
    """The part of the windows that lies before a batch."""
    return tuple((first, min(after, batch)) for first, after in windows if first < batch)


def continues(progress: Mapping[str, Any], windows: Sequence[Window]) -> bool:
    """Whether a run that skips these windows may go on from a checkpoint: it has skipped just the
    same of them up to its next batch."""
    batch = progress["data"]["next_batch"]
    skipped = united(tuple(window) for window in progress.get("skipped", ()))
    return passed(skipped, batch) == passed(windows, batch)


def read_skipped(folder: Path) -> tuple[Window, ...]:
    """The windows the rule has chosen so far in a run."""
    try:
        return tuple((w[0], w[1]) for w in json.loads((folder / SKIPPED).read_bytes()))
    except FileNotFoundError:
        return ()


def write_skipped(folder: Path, windows: Sequence[Window]) -> None:
    """Keeps the windows for every later start; on the disk when this returns."""
    write_atomic(folder / SKIPPED, to_json(windows))
