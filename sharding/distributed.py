"""Several processes, one program: how they find each other, start jax together, and agree.

Everything here is the same on every host: Slurm, Open MPI, Kubernetes and Cloud TPU are asked in
jax's own way, or the three numbers are given.
"""

import atexit
import itertools
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import clusters, distributed  # no public name for: what was detected, barriers

# What is exchanged -> how often before. Threads may exchange different things at the same time.
_TIMES: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


class Process(NamedTuple):
    """One of the processes of a run.

    number, processes: its number, from 0, and how many there are.
    coordinator: host:port of process 0.
    local_devices: the devices of this host that are its own; None: all of them.
    """

    number: int
    processes: int
    coordinator: str
    local_devices: tuple[int, ...] | None = None

    @property
    def host(self) -> str:
        """Host of process 0."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Port of process 0 for jax."""
        return int(self.coordinator.rpartition(":")[2])


def find(
    cluster: str = "auto",
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    seconds: int = 60,
) -> Process | None:
    """Which process this is; None where it is the only one. Contacts no other process.

    Args:
        cluster: jax's name of what started the processes, "auto" for whatever is there, or "none".
        coordinator: host:port of process 0, with count and index: nothing else is asked.
        count: number of processes.
        index: of this process.
        seconds: how long the name of the coordinator's host may take to become known.

    Raises:
        ValueError: the cluster named did not start this process.
    """
    if coordinator is not None and count is not None and index is not None:
        return Process(index, count, coordinator)
    if cluster == "none":
        return None
    try:
        method = None if cluster == "auto" else cluster
        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        found = detect(None, None, None, None, method, seconds)
    except (KeyError, OSError, RuntimeError) as error:
        raise ValueError(
            f"the processes of this run could not be told apart ({type(error).__name__}: {error}); "
            "give distributed.coordinator, .processes and .process, or distributed.cluster: none"
        ) from error
    address, n_processes, number, local_devices = found
    if address is None or n_processes is None or number is None:
        if cluster != "auto":
            raise ValueError(f"distributed.cluster is {cluster}, which did not start this process")
        return None
    return Process(number, n_processes, address, tuple(local_devices) if local_devices else None)


def start(process: Process, seconds: int) -> None:
    """Joins the processes into one jax program; before this nothing may have used a device.

    Args:
        process: from `find`.
        seconds: how long to wait for the others. After it jaxlib aborts this process.
    """
    # Processes on CPUs need a way to talk; devices of other kinds have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        process.coordinator,
        process.processes,
        process.number,
        process.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=seconds,
        # jaxlib aborts a process whose peers are silent without saying which. This is the second
        # line: whoever knows more has ended the process long before.
        heartbeat_timeout_seconds=100,
        shutdown_timeout_seconds=30,
    )


def stop() -> None:
    """Leaves together with the others; does nothing where `start` was not called."""
    jax.distributed.shutdown()


def leave_alone(code: int) -> None:
    """Makes the end of this process wait for no other: it has failed, and they may not come.

    Otherwise jaxlib would wait for them when Python ends, and then abort (SIGABRT) instead.
    """

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(end)


def exchange(what: str, text: str, seconds: float) -> list[str]:
    """The texts of all processes, in their order; every process calls this at the same place.

    Also a barrier: nobody returns before everybody has come.

    Args:
        what: named in the error.
        text: this process's.
        seconds: how long to wait for the others.

    Raises:
        TimeoutError: naming the processes that have not come.
    """
    if jax.process_count() == 1:
        return [text]
    client: Any = distributed.global_state.client
    key = f"llama_jax/{what}/{next(_TIMES[what])}"
    client.key_value_set(f"{key}/{jax.process_index()}", text)
    try:
        client.wait_at_barrier(key, int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        here = {int(name.rpartition("/")[2]) for name, _ in client.key_value_dir_get(key)}
        missing = sorted(set(range(jax.process_count())) - here)
        raise TimeoutError(
            f"{what}: process {', '.join(map(str, missing)) or '?'} of {jax.process_count()} has "
            f"not come within {seconds:.0f} s"
        ) from error
    texts = {int(k.rpartition("/")[2]): value for k, value in client.key_value_dir_get(key)}
    return [texts[index] for index in range(jax.process_count())]


def barrier(what: str, seconds: float) -> None:
    """Waits until every process is here.

    Raises:
        TimeoutError: naming the processes that have not come.
    """
    exchange(what, "", seconds)


def local_rows(array: jax.ShapeDtypeStruct) -> np.ndarray:
    """The rows (first dimension) of a sharded array that this process's devices hold, rising."""
    places = array.sharding.addressable_devices_indices_map(array.shape).values()
    rows = [np.arange(array.shape[0])[index[0]] for index in places]
    return np.unique(np.concatenate(rows))


def from_local_rows(array: jax.ShapeDtypeStruct, rows: np.ndarray, values: np.ndarray) -> jax.Array:
    """The global array of which each process gives the rows its own devices hold.

    Args:
        array: shape, type and sharding of the whole.
        rows: from `local_rows`.
        values: (len(rows), ...), this process's part.
    """
    place = {int(row): number for number, row in enumerate(rows)}

    def part(index: Any) -> np.ndarray:
        wanted = range(*index[0].indices(array.shape[0]))
        first = place[wanted[0]]  # rows are rising, so neighbours are neighbours here too
        return values[(slice(first, first + len(wanted)), *index[1:])]

    return jax.make_array_from_callback(array.shape, array.sharding, part)
