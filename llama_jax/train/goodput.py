"""Where the time of a run goes, over all its restarts: every second in one named bucket.

    startup      before the first step: reading and checking a checkpoint, laying out the devices
    compile      XLA
    data wait    the devices were idle because the next batch was not there
    step         training steps that counted
    validation   measuring the validation loss
    checkpoint   what of a save training had to wait for
    restart      from the last sign of life of a process that died to the start of the next
    lost work    steps, and what belongs to them, done again because a process died or went back
    end          the last plot and report

Goodput is the share of `step`. The pause after a run was stopped on purpose is in no bucket.
"""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

GOODPUT = "goodput.json"

# What the main thread does -> bucket. Fetching a batch and reporting hide behind a step under way.
BUCKETS = {"data": "data wait", "ahead": "step", "report": "step"}
REPEATABLE = {"step", "data", "ahead", "report", "validation", "checkpoint"}
SIGN_OF_LIFE_SECONDS = 1.0  # at least, between two writes of the file


class Clock:
    """Wall time of a process by what its main thread was doing; every moment counts once.

    activity: what it does now.
    changes: how often that changed, by which a watchdog sees that it goes on.
    step: steps done; those up to `done_before` have been done once before.
    """

    def __init__(self, activity: str):
        self.activity = activity
        self.changes = 0
        self.step = 0
        self.done_before = 0
        self._seconds: Counter[str] = Counter()
        self._again: Counter[str] = Counter()  # the part of them that was done before
        self._since = time.perf_counter()

    def switch(self, activity: str) -> None:
        """From now on the time belongs to another activity."""
        self.settle(self.activity)
        self.activity = activity
        self.changes += 1

    def settle(self, activity: str) -> None:
        """The time since the last switch belongs to this activity."""
        now = time.perf_counter()
        self._seconds[activity] += now - self._since  # type: ignore[assignment]
        if activity in REPEATABLE and self.step < self.done_before:
            self._again[activity] += now - self._since  # type: ignore[assignment]
        self._since = now

    def seconds(self) -> dict[str, float]:
        """Activity -> time so far, the largest first."""
        self.settle(self.activity)
        return dict(self._seconds.most_common())

    def buckets(self) -> dict[str, float]:
        """Bucket -> time so far."""
        found: Counter[str] = Counter()
        for activity, seconds in self.seconds().items():
            again = self._again[activity]
            found[BUCKETS.get(activity, activity)] += seconds - again  # type: ignore[assignment]
            found["lost work"] += again
        return dict(found)


class Ledger:
    """goodput.json of a run: the buckets of all its processes so far, kept by one at a time.

    Opening it books the time since a process that died was last heard of as `restart`, and tells
    the clock which steps that process had done already.
    """

    def __init__(self, folder: Path, clock: Clock):
        self._path, self._clock = folder / GOODPUT, clock
        before = read_ledger(folder)
        self._before: Counter[str] = Counter(before["seconds"])
        if not before["ended"]:
            self._before["restart"] += _since(before["seen"])  # type: ignore[assignment]
        self._starts = before["starts"] + 1
        self._highest = clock.done_before = before["step"]
        self._written, self._cost = 0.0, 0.0
        self.write()

    def seconds(self) -> dict[str, float]:
        """Bucket -> time of the whole run, the largest first."""
        total = self._before + Counter(self._clock.buckets())
        return dict(total.most_common())

    def starts(self) -> int:
        """Processes that have trained this run so far, this one among them."""
        return self._starts

    def sign_of_life(self) -> None:
        """Writes the file if the last time is a while ago; never more than 1 % of the time."""
        now = time.perf_counter()
        if now - self._written > max(SIGN_OF_LIFE_SECONDS, 100 * self._cost):
            self.write()
            self._cost = time.perf_counter() - now

    def write(self, ended: bool = False) -> None:
        """Writes the file; `ended` when the run is done or was stopped on purpose."""
        self._highest = max(self._highest, self._clock.step)
        values = {
            "seconds": self.seconds(),
            "starts": self._starts,
            "step": self._highest,
            "ended": ended,
            "seen": _now(),
        }
        partial = self._path.with_suffix(".tmp")
        partial.write_text(json.dumps(values), encoding="utf-8")
        os.replace(partial, self._path)
        self._written = time.perf_counter()


def read_ledger(folder: Path) -> dict[str, Any]:
    """The content of a run's goodput.json; that of a new run where there is none."""
    try:
        return json.loads((folder / GOODPUT).read_bytes())
    except (OSError, ValueError):
        return {"seconds": {}, "starts": 0, "step": 0, "ended": True, "seen": {}}


def _now() -> dict[str, Any]:
    """This moment, in a way that another process can measure the time since.

    The monotonic clock of a machine goes on from process to process and knows no changed dates,
    but begins anew with each boot.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = None
    return {"boot": boot, "monotonic": time.monotonic(), "wall": time.time()}


def _since(seen: dict[str, Any]) -> float:
    """Seconds since a moment of `_now`; by the calendar where the machine was another."""
    now = _now()
    same = now["boot"] is not None and now["boot"] == seen.get("boot")
    clock = "monotonic" if same else "wall"
    return max(0.0, now[clock] - seen.get(clock, now[clock]))


def goodput(seconds: dict[str, float]) -> str:
    """One line: the share of each bucket, goodput first."""
    total = sum(seconds.values()) or 1.0
    rest = [
        f"{name} {part / total:.1%}"
        for name, part in seconds.items()
        if name != "step" and part > total / 1000
    ]
    return ", ".join([f"step {seconds.get('step', 0.0) / total:.1%}", *rest])
