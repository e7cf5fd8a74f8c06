"""Processes that work on a stream of items, and give the results in the order of the items."""

import contextlib
import multiprocessing
import multiprocessing.util
import signal
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """work(item) for each item, in order, computed in `workers` processes.

    `work`, items and results must be picklable. Item i goes to process i modulo `workers`, each
    holding one at a time: memory is bounded, and the parent never waits for a process that waits
    for it. When the parent dies, in whatever way, the others see it and end.

    Raises RuntimeError when a process dies, and what `work` raises.
    """
    connections: list[Connection] = []
    processes: list[SpawnProcess] = []
    sent = 0
    try:
        for item in items:
            if sent < workers:
                connection, process = _start(work)
                connections.append(connection)
                processes.append(process)
            else:
                connection = connections[sent % workers]
                yield _result(connection)
            _send(connection, item)
            sent += 1
        for i in range(max(0, sent - workers), sent):
            yield _result(connections[i % workers])
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()


_LOST = (
    "a worker process died: perhaps for lack of memory (use fewer workers), or because the main "
    "script starts work without `if __name__ == '__main__':`"
)


def _start(work: Callable[[Any], Any]) -> tuple[Connection, SpawnProcess]:
    spawn = multiprocessing.get_context("spawn")  # forking breaks a parent that has run jax
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, work), daemon=True)
    process.start()
    there.close()  # so that the death of either side ends the other's recv
    # At exit Python joins its children: they must have been let go before.
    multiprocessing.util.Finalize(process, here.close, exitpriority=10)
    return here, process


def _send(connection: Connection, item: Any) -> None:
    try:
        connection.send(item)
    except OSError as error:
        raise RuntimeError(_LOST) from error


def _result(connection: Connection) -> Any:
    try:
        result, error = connection.recv()
    except (EOFError, OSError) as lost:
        raise RuntimeError(_LOST) from lost
    if error is not None:
        raise error
    return result


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    """The life of a worker: item in, (result, error) out, until the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # are for the parent, which may go on a while
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        while True:
            item = connection.recv()
            try:
                answer: tuple[Any, Exception | None] = (work(item), None)
            except Exception as error:
                answer = (None, error)
            connection.send(answer)
