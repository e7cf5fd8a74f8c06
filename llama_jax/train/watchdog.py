"""Watches the processes of a run: when one dies or hangs, the others say which, and end.

Without this a survivor waits in a collective for ever, or is aborted by jaxlib without a name. The
processes hold a TCP connection to process 0, over which each tells once a second what its main
thread does. A process that dies closes its connection, which is seen at once; one that is stopped
falls silent; one that hangs goes on talking, but its main thread makes no progress.

The connections are made before jax starts, so that a process lost at the very beginning has a name
too. They carry a few bytes and no secrets; run them, as all of jax's traffic, in a network of your
own.
"""

import contextlib
import faulthandler
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from llama_jax.config import ConfigError, DistributedConfig
from llama_jax.train.goodput import Clock
from llama_jax.train.supervisor import LIFELINE
from sharding.distributed import Process

TICK_SECONDS = 1.0
LATE_START_SECONDS = 15.0  # by which process 0 may have started after another one
FAILED_GRACE_SECONDS = 5.0  # for the others to meet the same error, and to tell it themselves
# Here the processes wait for disks and compilers, which no step tells how long they may take.
SLOW = {"startup": 3600.0, "compile": 3600.0, "checkpoint": 3600.0, "end": 3600.0}
USUAL_STEPS, FIRST_STEP_SECONDS = 10, 600.0  # a step may take as long as ten usual ones


@dataclass
class Peer:
    """What is known of another process, or of this one.

    silent: seconds for which nothing was heard of it.
    stuck: seconds for which its main thread has made no progress.
    usual: seconds of its average step.
    """

    index: int
    host: str = "?"
    step: int = 0
    changes: int = 0
    activity: str = "startup"
    silent: float = 0.0
    stuck: float = 0.0
    usual: float = 0.0
    left: bool = False

    def __str__(self) -> str:
        return f"process {self.index} on {self.host}"


@dataclass
class Line:
    """One connection, and what has arrived over it so far."""

    socket: socket.socket
    peer: int | None = None
    buffer: bytes = b""

    def send(self, **values: Any) -> None:
        """Sends a message; one that cannot be delivered is not worth an error."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(values).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived whole; None when the other side has closed."""
        try:
            data = self.socket.recv(1 << 16)
        except (BlockingIOError, TimeoutError):
            return []
        except OSError:
            return None
        if not data:
            return None
        *whole, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(text) for text in whole]


@dataclass
class Watchdog:
    """The watching thread of one process. `leave` ends it; else it may end the process.

    Args:
        settings: time limits.
        clock: tells what the main thread does.
        process: which process this is; None for the only one, of which only a hang can be seen.
    """

    settings: DistributedConfig
    clock: Clock
    process: Process | None = None
    peers: dict[int, Peer] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._index = self.process.number if self.process else 0
        self._host = socket.gethostname()
        self._selector = selectors.DefaultSelector()
        self._mutex = threading.Lock()
        self._closing = threading.Event()
        self._changes, self._stuck = -1, 0.0
        self._awake = 0.0  # seconds this process was running, as far as the watchdog saw
        self._before_steps = 0, 0.0  # step and time when it was last seen before its first step
        self._pending: tuple[float, str, int] | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    # Meeting ------------------------------------------------------------------------------------

    def meet(self) -> Self:
        """Waits until every process of the run is connected, then begins to watch.

        Raises:
            ConfigError: the port is taken.
            TimeoutError: naming the processes that have not come.
        """
        if self.process and self.process.processes > 1:
            deadline = time.monotonic() + self.settings.start_seconds
            port = self.settings.watch_port or watch_port(self.process.port)
            if self._index == 0:
                self._gather(port, self.process.processes, deadline)
            else:
                self._join(self.process.host, port, deadline)
        self._thread.start()
        return self

    def _gather(self, port: int, count: int, deadline: float) -> None:
        """Process 0: a connection from everybody, each of whom may come several times."""
        try:
            listener = socket.create_server(("", port), backlog=count)
        except OSError as error:
            raise ConfigError(
                f"process 0 cannot listen on port {port} ({error.strerror}); give another "
                "distributed.watch_port, the same to every process"
            ) from error
        here: dict[int, Line] = {}
        with listener:
            listener.settimeout(0.2)
            while len(here) < count - 1:
                for index in [i for i, line in here.items() if is_closed(line.socket)]:
                    here.pop(index).socket.close()
                try:
                    line = Line(listener.accept()[0])
                    (hello,) = read_one(line, time.monotonic() + 5.0)
                    line.peer = hello["process"]
                    here[hello["process"]] = line
                    self.peers[hello["process"]] = Peer(hello["process"], hello["host"])
                except (TimeoutError, ValueError, KeyError, OSError):
                    pass  # nobody yet, or somebody else
                if time.monotonic() > deadline:
                    missing = sorted(set(range(1, count)) - here.keys())
                    raise TimeoutError(
                        f"process {', '.join(map(str, missing))} of {count} has not come within "
                        f"{self.settings.start_seconds} s (distributed.start_seconds)"
                    )
        self.lines = list(here.values())
        self._tell(go=True)

    def _join(self, host: str, port: int, deadline: float) -> None:
        """Another process: a connection to process 0, tried again until all are there."""
        while True:
            try:
                line = Line(socket.create_connection((host, port), timeout=5.0), 0)
                line.send(process=self._index, host=self._host)
                # Process 0 knows who is missing: it is left to give up first.
                (welcome,) = read_one(line, deadline + LATE_START_SECONDS)
                self.peers[0] = Peer(0, welcome["host"])
                self.lines = [line]
                return
            except (TimeoutError, ValueError, KeyError, OSError) as error:
                # Not there yet; or there, and ended, as in a restart of all processes.
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"process 0 at {host}:{port} has not gathered all processes within "
                        f"{self.settings.start_seconds} s (distributed.start_seconds; {error})"
                    ) from error
                time.sleep(0.2)

    # Watching -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        for line in self.lines:
            line.socket.setblocking(False)
            self._selector.register(line.socket, selectors.EVENT_READ, line)
        last = time.monotonic()
        while not self._closing.is_set():
            self._listen(TICK_SECONDS)
            now = time.monotonic()
            # A machine that slept, or froze all of us, has no news of the others either.
            elapsed, last = min(now - last, 2 * TICK_SECONDS), now
            self._awake += elapsed
            self._look_at_myself(elapsed)
            if not self._closing.is_set():
                self._judge(elapsed)

    def _listen(self, seconds: float) -> None:
        """Takes what arrives within a tick, and tells the others what this process does."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._closing.is_set():
            for key, _ in self._selector.select(left) if self.lines else self._rest(left):
                self._take(key.data)

    def _rest(self, seconds: float) -> Iterator[Any]:
        self._closing.wait(seconds)
        return iter(())

    def _take(self, line: Line) -> None:
        messages = line.receive()
        if messages is None:
            self._selector.unregister(line.socket)
            self.lines.remove(line)
            assert line.peer is not None
            peer = self.peers[line.peer]
            if not peer.left:
                self._end(f"{peer} has died (it was at step {peer.step}, {peer.activity})")
            return
        for message in messages:
            self._understand(line, message)

    def _understand(self, line: Line, message: dict[str, Any]) -> None:
        if "verdict" in message:
            self._end(message["verdict"], message["code"], message["guilty"])
            return
        assert line.peer is not None
        peer = self.peers[line.peer]
        peer.silent = 0.0
        if "left" in message:
            peer.left = True
            if message["left"]:
                text = f"{peer} has failed: {message['left']}"
                self._pending = self._awake + FAILED_GRACE_SECONDS, text, message["code"]
        elif "step" in message:
            for name in ("step", "changes", "activity", "stuck", "usual"):
                setattr(peer, name, message[name])

    def _look_at_myself(self, elapsed: float) -> None:
        step, changes, activity = self.clock.step, self.clock.changes, self.clock.activity
        self._stuck = self._stuck + elapsed if changes == self._changes else 0.0
        self._changes = changes
        if activity in ("startup", "compile"):
            self._before_steps = step, self._awake
        done = step - self._before_steps[0]
        usual = (self._awake - self._before_steps[1]) / done if done > 0 else 0.0
        me = Peer(self._index, self._host, step, changes, activity, 0.0, self._stuck, usual)
        self.peers[self._index] = me
        if LIFELINE in os.environ:
            with contextlib.suppress(OSError):
                os.write(int(os.environ[LIFELINE]), b".")
        self._tell(step=step, changes=changes, activity=activity, stuck=self._stuck, usual=usual)

    def _judge(self, elapsed: float) -> None:
        """Ends all processes if one of them is silent, has failed, or hangs."""
        for peer in self.peers.values():
            if peer.index == self._index or peer.left:
                continue
            peer.silent += elapsed
            if peer.silent > self.settings.silence_seconds:
                self._end(f"{peer} has not been heard of for {peer.silent:.0f} s")
        if self._pending and self._awake > self._pending[0]:
            self._end(*self._pending[1:])
        if self._index == 0 and (found := hung(list(self.peers.values()), self.settings)):
            self._end(found[0], guilty=found[1])

    def _end(self, verdict: str, code: int = 1, guilty: tuple[int, ...] = ()) -> None:
        """Says why, and ends this process at once: its main thread may never wake up again."""
        if self._closing.is_set():
            return
        self._tell(verdict=verdict, code=code, guilty=guilty)
        show_cursor = "\x1b[?25h" if sys.stdout.isatty() else ""
        me = f" (process {self._index} on {self._host} ends too)" if len(self.peers) > 1 else ""
        os.write(2, f"\n{show_cursor}error: {verdict}{me}\n".encode())
        if self._index in guilty:
            faulthandler.dump_traceback(all_threads=True)
        os._exit(code)

    def _tell(self, **values: Any) -> None:
        with self._mutex:
            for line in list(self.lines):
                line.send(host=self._host, **values)

    # Leaving ------------------------------------------------------------------------------------

    def wait_for_verdict(self) -> None:
        """After an error that a lost process may have caused: gives its name time to become known.
        Returns if no process is missed."""
        if self.lines:
            time.sleep(self.settings.silence_seconds + 3 * TICK_SECONDS)

    def leave(self, failure: str = "", code: int = 0) -> None:
        """Ends the watch: this process is done, or has failed for a reason of its own."""
        self._closing.set()
        self._tell(left=failure, code=code)
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        if failure and self._index == 0:  # with its end jaxlib aborts the others without a word
            end = time.monotonic() + FAILED_GRACE_SECONDS + 3 * TICK_SECONDS
            while time.monotonic() < end and any(x.receive() is not None for x in self.lines):
                time.sleep(0.1)
        for line in self.lines:
            line.socket.close()
        self._selector.close()


def watch_port(port: int) -> int:
    """The port after that of jax, or far below it where a scheduler's jobs use one after another.

    jax gives each Slurm and Open MPI job one of the last 4,096 ports, by its number.
    """
    return port + 1 if port < 2**16 - 2**12 else port - 2**12


def hung(peers: list[Peer], settings: DistributedConfig) -> tuple[str, tuple[int, ...]] | None:
    """Which process holds up the others, in words and by number; None where all is well.

    All of them do the same things in the same order, so it is the one that has done the fewest; of
    several that are level, the one that is not waiting for the devices.
    """
    slowest = max(peer.usual for peer in peers)
    # Before the first step is done none is usual.
    limit = max(settings.hang_seconds, USUAL_STEPS * slowest or FIRST_STEP_SECONDS)
    here = [peer for peer in peers if not peer.left]
    behind = [peer for peer in here if peer.changes == min(p.changes for p in here)]
    busy = [peer for peer in behind if peer.activity != "step"] or behind
    if not all(peer.stuck > SLOW.get(peer.activity, limit) for peer in busy):
        return None
    since = f"no progress for {busy[0].stuck:.0f} s after step {busy[0].step}"
    guilty = tuple(peer.index for peer in busy)
    if len(busy) == len(here) > 1:
        return f"{since}: all processes wait in '{busy[0].activity}'", guilty
    return ", ".join(f"{peer} hangs in '{peer.activity}'" for peer in busy) + f": {since}", guilty


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side has gone, where all it said has been read; does not wait."""
    before = connection.gettimeout()
    connection.settimeout(0)  # with another one Python waits for it first, whatever the flags
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(before)


def read_one(line: Line, deadline: float) -> list[dict[str, Any]]:
    """The first message of a connection.

    Raises:
        OSError: it was closed, or nothing came until the deadline.
    """
    while True:
        line.socket.settimeout(max(0.1, deadline - time.monotonic()))
        messages = line.receive()
        if messages:
            return messages
        if messages is None or time.monotonic() > deadline:
            raise ConnectionError("closed, or silent")
