"""Where the time goes: every moment in one bucket, over restarts too."""

import json

import pytest

from llama_jax.train import goodput
from llama_jax.train.goodput import Clock, Ledger, read_ledger


@pytest.fixture
def now(monkeypatch):
    """A clock that the test turns; the one of the machine and the calendar go with it."""
    now = [1000.0]
    for name in ("perf_counter", "monotonic", "time"):
        monkeypatch.setattr(goodput.time, name, lambda: now[0])
    return now


def spend(clock, now, *parts):
    for activity, seconds in parts:
        clock.switch(activity)
        now[0] += seconds


def test_every_moment_counts_once(now):
    clock = Clock("startup")
    for passes, activity in ((2.0, "step"), (5.0, "data"), (1.0, "step")):
        now[0] += passes
        clock.switch(activity)
    now[0] += 4.0
    assert clock.seconds() == {"step": 9.0, "startup": 2.0, "data": 1.0}
    assert list(clock.seconds()) == ["step", "startup", "data"]
    assert clock.changes == 3


def test_a_batch_fetched_while_the_devices_were_busy_is_no_waiting(now):
    clock = Clock("startup")
    clock.switch("data")
    now[0] += 3.0
    clock.settle("ahead")
    now[0] += 1.0
    assert clock.buckets() == {"startup": 0.0, "lost work": 0.0, "step": 3.0, "data wait": 1.0}


def test_a_killed_process_costs_restart_and_lost_work(tmp_path, now):
    """20 steps and a checkpoint at 10; killed 2 s after the last sign of life; 5 s to start."""
    clock = Clock("startup")
    ledger = Ledger(tmp_path, clock)
    spend(clock, now, ("compile", 7.0), ("step", 20.0), ("checkpoint", 1.0))
    clock.step = 20
    ledger.write()
    now[0] += 2.0 + 5.0

    clock = Clock("startup")
    ledger = Ledger(tmp_path, clock)
    clock.step = 10
    spend(clock, now, ("step", 10.0))
    clock.switch("step")
    clock.step = 20
    spend(clock, now, ("step", 4.0), ("end", 1.0))
    ledger.write(ended=True)
    expected = {
        "step": 24.0,
        "lost work": 10.0,
        "compile": 7.0,
        "restart": 7.0,
        "checkpoint": 1.0,
        "end": 1.0,
    }
    assert read_ledger(tmp_path)["seconds"] == expected
    assert sum(expected.values()) == now[0] - 1000.0  # every second of the run, once
    assert (ledger.starts(), read_ledger(tmp_path)["step"]) == (2, 20)


def test_a_pause_on_purpose_belongs_to_no_bucket(tmp_path, now):
    clock = Clock("startup")
    Ledger(tmp_path, clock).write(ended=True)
    now[0] += 86400.0
    assert Ledger(tmp_path, Clock("startup")).seconds() == {}


def test_another_machine_is_measured_by_the_calendar(tmp_path, now):
    Ledger(tmp_path, Clock("startup"))
    path = tmp_path / "goodput.json"
    values = json.loads(path.read_text())
    values["seen"] |= {"boot": "another", "monotonic": 5.0}
    path.write_text(json.dumps(values))
    now[0] += 3.0
    assert Ledger(tmp_path, Clock("startup")).seconds() == {"restart": 3.0}


def test_a_file_cut_off_begins_anew(tmp_path, now):
    (tmp_path / "goodput.json").write_text('{"seconds": {"st')
    assert Ledger(tmp_path, Clock("startup")).starts() == 1


def test_the_line_begins_with_goodput():
    seconds = {"compile": 30.0, "step": 60.0, "restart": 9.99, "end": 0.01}
    assert goodput.goodput(seconds) == "step 60.0%, compile 30.0%, restart 10.0%"
