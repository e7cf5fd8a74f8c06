"""A small parent process that runs the training as its child, and starts it again after a crash.

It imports no jax and holds no data: what may fail is the child, not the one that watches it. On
several hosts each has its own; since the children end together (`watchdog`), they also start
together.
"""

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

# The child's own decisions: done, bad configuration, stopped on purpose, Ctrl-C at a bad moment.
FINAL = (0, 2, 75, 130)
PREEMPTED = 75
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)  # seconds before a restart, by crashes in a row
MOST_WITHOUT_PROGRESS = 8
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
LIFELINE = "LLAMA_JAX_LIFELINE"  # tells the child where to write that it is alive
TICK_SECONDS = 0.5


def supervise(run: Callable[[], int], restarts: int, out: Path, silence_seconds: float) -> int:
    """Runs `run` in a child until it decides to end; returns its exit code.

    A child that crashes is started again, at most `restarts` times, and no more once it has crashed
    eight times in a row without completing a checkpoint. One that falls silent is killed first.
    SIGTERM, Ctrl-C and SIGUSR1 are passed on.

    Args:
        run: the training; its result is the exit code of the child.
        restarts: starts after the first.
        out: folder of the run.
        silence_seconds: after which a child that no longer says that it is alive counts as dead.
    """
    with _Child(run, silence_seconds) as child:
        return _supervise(child, restarts, out / "checkpoints")


def _supervise(child: "_Child", restarts: int, checkpoints: Path) -> int:
    without_progress = 0
    for start in range(restarts + 1):
        before = _saved(checkpoints)
        code = child.run()
        if code in FINAL or child.stopped:
            return code if code >= 0 else 128 - code
        without_progress = 0 if _saved(checkpoints) != before else without_progress + 1
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"
        if start == restarts:
            _say(f"training {how}; it has been restarted {restarts} times, which is the limit")
            break
        if without_progress >= MOST_WITHOUT_PROGRESS:
            _say(
                f"training {how}, for the {without_progress}th time without a new checkpoint: "
                "a restart would not help"
            )
            break
        pause = PAUSES[min(without_progress, len(PAUSES) - 1)]
        _say(f"training {how}; restart {start + 1} of {restarts} in {pause:.0f} s")
        if child.sleep(pause):
            return PREEMPTED
    return code if code >= 0 else 128 - code


class _Child:
    """The process that trains, and the signals on their way to it."""

    def __init__(self, run: Callable[[], int], silence_seconds: float):
        self._run, self._silence = run, silence_seconds
        self._pid: int | None = None
        self._before: dict[int, Any] = {}
        self.stopped = False

    def __enter__(self) -> Self:
        self._before = {n: signal.signal(n, self._pass_on) for n in _PASSED_ON}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self) -> int:
        """Starts it and waits for its end; a negative code is the signal that killed it."""
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        lifeline, end_of_child = os.pipe()
        # A signal that comes now waits until there is somebody to have it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
        self._pid = os.fork()
        if self._pid == 0:
            self.__exit__()
            os.close(lifeline)
            os.environ[LIFELINE] = str(end_of_child)
            # A group of its own: the terminal's Ctrl-C reaches the parent alone, which passes it on
            os.setpgid(0, 0)
            _die_with(parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        if self._pid == 0:
            raise SystemExit(self._run())  # unwinds the stack that the child has from its parent
        os.close(end_of_child)
        status = self._wait(self._pid, lifeline)
        self._pid = None
        os.close(lifeline)
        return os.waitstatus_to_exitcode(status)

    def _wait(self, pid: int, lifeline: int) -> int:
        """Waits for the end of the child, and brings it about if it falls silent."""
        silent: float | None = None  # seconds; None before it has spoken for the first time
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return status
            if select.select([lifeline], [], [], TICK_SECONDS)[0]:
                if os.read(lifeline, 4096):
                    silent = 0.0
                else:
                    time.sleep(0.01)  # it has closed its end, and is about to die
            elif silent is not None:
                silent += TICK_SECONDS
                if silent > self._silence:
                    _say(f"training has not been heard of for {silent:.0f} s; killing it")
                    os.kill(pid, signal.SIGKILL)
                    silent = None

    def sleep(self, seconds: float) -> bool:
        """Waits; True when a signal to stop has come meanwhile."""
        end = time.monotonic() + seconds
        while not self.stopped and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        return self.stopped

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = self.stopped or number != signal.SIGUSR1
        if self._pid:
            os.kill(self._pid, number)


_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def _die_with(parent: int) -> None:
    """Makes the system stop this process when its parent is gone, in whatever way (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # gone already
            os.kill(os.getpid(), signal.SIGTERM)


def _saved(checkpoints: Path) -> int:
    """The newest complete checkpoint: it has a bare number; -1 where there is none."""
    numbers = [int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal()]
    return max(numbers, default=-1)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
