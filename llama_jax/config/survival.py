"""Settings that keep a run alive: its processes, loss spikes, profiles."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llama_jax.config.section import Schema


def _window(value: Any) -> Any:
    """As a flag a window is one word: 4000-4300 is [4000, 4300]."""
    return value.split("-") if isinstance(value, str) else value


BatchWindow = Annotated[tuple[int, int], BeforeValidator(_window)]
"""Numbers of batches, [first, after the last]; batch 0 is the first of the run."""


class DistributedConfig(Schema):
    """How the processes of a run find and watch each other; one machine needs none of it."""

    cluster: Literal["auto", "none", "slurm", "ompi", "k8s", "gcetpu", "gketpu", "mpi4py"] = "auto"
    """Who tells the processes of each other: auto asks Slurm, Open MPI, Kubernetes and Cloud TPU
    (in jax's way), and takes a machine without any for the only one; none: one process."""
    coordinator: str | None = None
    """Where nobody tells: host:port of process 0. Needs processes and process."""
    processes: int | None = Field(default=None, gt=0)
    """Number of processes."""
    process: int | None = Field(default=None, ge=0)
    """Number of this process, from 0."""
    watch_port: int | None = Field(default=None, gt=0, lt=2**16)
    """Port on which process 0 hears from the others; by default the one after the coordinator's."""
    start_seconds: int = Field(default=300, gt=0)
    """How long the processes wait for each other at the start: for the slowest host to begin, or to
    begin again."""
    silence_seconds: int = Field(default=30, gt=2)
    """A process not heard of for this long is taken for lost, and the others end."""
    hang_seconds: int = Field(default=45, gt=0)
    """A step without progress for this long, and for ten times the usual step, is taken for hung
    (runs of several processes, or with restarts)."""

    @model_validator(mode="after")
    def _settings_are_complete(self) -> Self:
        given = {name: getattr(self, name) for name in ("coordinator", "processes", "process")}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < 3:
            raise ValueError(
                f"{' and '.join(sorted(given.keys() - set(missing)))} needs {' and '.join(missing)}"
                " too: give all three, or none where a cluster can be asked"
            )
        if not missing and self.cluster not in ("auto", "none"):
            raise ValueError(f"give either cluster ({self.cluster}) or coordinator, not both")
        if (self.process or 0) >= (self.processes or 1):
            raise ValueError(
                f"process ({self.process}) must be below processes ({self.processes}): they count "
                "from 0"
            )
        if self.coordinator is not None:
            host, colon, port = self.coordinator.rpartition(":")
            if not host or not colon or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise ValueError(f"coordinator ({self.coordinator}) must be host:port")
        return self


class SpikeConfig(Schema):
    """A rise of the loss that lasts: go back to a checkpoint before it, and skip its batches.

    PaLM (arXiv 2204.02311, section 5.1) went back about 100 steps and skipped 200 to 500 batches.
    """

    deviations: float | None = Field(default=None, gt=0)
    """How many deviations above the running median the loss must lie; none: never skip by rule."""
    steps: int = Field(default=5, gt=0)
    """For how many steps in a row."""
    history: int = Field(default=128, ge=16)
    """Losses the median and the deviation are taken of."""
    skip_before: int = Field(default=100, ge=0)
    """Batches skipped before the first of the spike."""
    skip_after: int = Field(default=100, gt=0)
    """Batches skipped from the first of the spike on."""
    most: int = Field(default=10, gt=0)
    """Spikes after which the run ends with an error instead."""


class ProfileConfig(Schema):
    """Which steps are recorded with jax's profiler, into <out>/profile."""

    first_step: int | None = Field(default=None, gt=0)
    """First step recorded; none: only on SIGUSR1."""
    steps: int = Field(default=3, gt=0)
    """Steps recorded at a time."""


def batch_of(step: int, skipped: Sequence[tuple[int, int]]) -> int:
    """The number of the batch that the step after `step` steps reads: those skipped do not count.

    Raises:
        ValueError: a window is empty, or two overlap or are out of order.
    """
    batch, end = step, 0
    for first, after in skipped:
        if first < end or after <= first:
            raise ValueError(
                f"skip_batches: [{first}, {after}] must be rising, and begin after the window "
                "before it has ended"
            )
        if batch >= first:
            batch += after - first
        end = after
    return batch
