"""Killed at any moment and started again: the end is that of a run that was never disturbed.

The short tests run always; the long ones are the figures of docs/surviving.md.
"""

import os
import random
import signal
import time

import pytest
from faults import (
    Runs,
    children,
    codes,
    free_port,
    goodput,
    hashes,
    losses,
    said,
    steps_logged,
    wait_until,
)

from llama_jax.train import checkpoint

SUPERVISED = ("--restarts", "100000")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("runs"))
    yield runs
    runs.end()


# One process --------------------------------------------------------------------------------------

SHORT = {"steps": 200, "checkpoint": {"every": 10, "keep_last": 2}, "evaluate_every": 100}
LONG = {"checkpoint": {"every": 5, "keep_last": 2}, "evaluate_every": 1000}


def killed_at_random(runs, name, kills, settings):
    """A supervised run whose child is killed until it has been `kills` times, then left to end.

    The moments are spread over start, steps and saves: after a random time of a child's life.
    """
    draw = random.Random(0)
    run = runs.start(runs.settings(name, **settings), *SUPERVISED)
    steps = []
    while len(steps) < kills:
        assert run.poll() is None, said(run)
        (child,) = wait_until(lambda: children(run))
        before = checkpoint.steps(runs.folder / name / "checkpoints")[-1:]
        if draw.random() < 0.3:  # at the start
            time.sleep(draw.uniform(0.0, 4.0))
        else:  # in a step or a save, once this child has come to a new checkpoint
            saved = lambda: checkpoint.steps(runs.folder / name / "checkpoints")[-1:]  # noqa: E731
            wait_until(lambda: saved() != before or child not in children(run))  # noqa: B023
            time.sleep(draw.uniform(0.0, 0.2))
        if child in children(run):
            os.kill(child, signal.SIGKILL)
            steps.append(steps_logged(runs.folder / name)[-1:])
            wait_until(lambda: child not in children(run))  # noqa: B023
    return codes([run], 600), steps


def assert_ends_alike(runs, one, other, steps):
    assert hashes(runs.folder / one, steps) == hashes(runs.folder / other, steps)
    assert losses(runs.folder / one) == losses(runs.folder / other)


def undisturbed(runs, settings):
    """The same run without a fault."""
    name = f"undisturbed{settings['steps']}"
    assert codes([runs.start(runs.settings(name, **settings))], 600) == [0]
    return name


def test_a_few_kills_under_the_supervisor_change_no_bit(runs):
    (code,), steps = killed_at_random(runs, "few", 3, SHORT)
    assert (code, len(steps)) == (0, 3)
    assert_ends_alike(runs, "few", undisturbed(runs, SHORT), SHORT["steps"])
    book = goodput(runs.folder / "few")
    assert (book["ended"], book["step"]) == (True, SHORT["steps"])
    assert book["starts"] >= 2  # one killed at its very start has not signed in
    assert book["seconds"]["restart"] > 0


@pytest.mark.slow
def test_two_hundred_kills_under_the_supervisor_change_no_bit(runs):
    kills = int(os.environ.get("LLAMA_JAX_KILLS", "200"))
    settings = {"steps": 25 * kills, **LONG}  # enough for all kills to strike before the end
    (code,), steps = killed_at_random(runs, "many", kills, settings)
    print(f"{len(steps)} kills, at the steps {[n for step in steps for n in step]}")
    print(goodput(runs.folder / "many"))
    assert (code, len(steps)) == (0, kills)
    assert_ends_alike(runs, "many", undisturbed(runs, settings), settings["steps"])


# Several processes --------------------------------------------------------------------------------


SIXTY = {"steps": 60, "checkpoint": {"every": 10}, "evaluate_every": 20}


@pytest.fixture(scope="module")
def alone(runs):
    """The losses of a run of one process."""
    assert codes([runs.start(runs.settings("alone", **SIXTY))]) == [0]
    return losses(runs.folder / "alone")


def assert_close(actual, expected):
    assert actual[0].keys() == expected[0].keys() == set(range(1, 61))
    for step, values in expected[0].items():
        assert actual[0][step] == pytest.approx(values, rel=1e-5)
    assert actual[1] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize(
    "counts", [(2, 1), pytest.param((4, 2, 1), marks=pytest.mark.slow)], ids=str
)
def test_several_processes_are_one_and_fewer_can_go_on(runs, alone, counts):
    """All stop after the same step at a signal to one; fewer go on, and one does the rest."""
    *several, one = counts
    name = f"group{several[0]}"
    path, out = runs.settings(name, **SIXTY), runs.folder / name
    stopped = 0
    for count in several:
        group = runs.start_several(path, count)
        wait_until(lambda: len(steps_logged(out)) > stopped + 5)  # noqa: B023
        group[-1].terminate()
        assert codes(group) == [75] * count, "\n".join(map(said, group))
        before, (*_, stopped) = stopped, checkpoint.steps(out / "checkpoints")
        assert before + 5 < stopped < 60
        assert f"after step {stopped}; the same command goes on" in said(group[0])
        listed = (out / "checkpoints" / str(stopped) / "manifest.json").read_text()
        assert all(f"ocdbt.process_{index}" in listed for index in range(count))

    assert one == 1
    assert codes([runs.start(path, name="later")]) == [0]
    assert_close(losses(out), alone)


def moments(runs, name):
    """Moment -> waits until the run is there."""
    out = runs.folder / name
    draw = random.Random(name)

    def in_a_step():
        """After a new checkpoint: supervisors give up a run that never comes to one."""
        before = checkpoint.steps(out / "checkpoints")[-1:]
        wait_until(lambda: checkpoint.steps(out / "checkpoints")[-1:] > before, 240)
        time.sleep(draw.uniform(0.0, 0.1))

    def in_a_save():
        """Not at what a killed save has left, which the next start removes."""
        saving = lambda: list((out / "checkpoints").glob("*.tmp"))  # noqa: E731
        wait_until(lambda: not saving(), 240)
        wait_until(saving, 240)

    return {
        "init": lambda: time.sleep(draw.uniform(0.5, 4.0)),
        "step": in_a_step,
        "save": in_a_save,
    }


def kill_in_a_run_of(runs, name, count, faults, settings, number=signal.SIGKILL):
    """A run of several supervised processes, of whose children one after the other is killed.

    faults: (victim, moment) of each. Returns for each the seconds until all others had ended, and
    whether each of them named the victim; one killed before it had met the others is only waited
    for, and they go on with its successor.
    """
    flags = (*SUPERVISED, "--distributed.silence_seconds", "20")
    processes = runs.start_several(runs.settings(name, **settings), count, *flags)
    ends = []
    for victim, moment in faults:
        alive, heard = [], []
        while not alive:
            moments(runs, name)[moment]()
            alive = [pid for process in processes for pid in children(process)]
            heard = [len(said(process)) for process in processes]
            if len(alive) < count:  # one is between two starts
                alive = []
        os.kill(alive[victim], number)
        start = time.monotonic()
        others = [i for i in range(count) if i != victim]
        gone = lambda i: alive[i] not in children(processes[i])  # noqa: B023, E731
        before = steps_logged(runs.folder / name)
        went_on = lambda: moment == "init" and steps_logged(runs.folder / name) > before  # noqa: B023, E731
        wait_until(lambda: all(gone(i) for i in others) or went_on(), 240)  # noqa: B023
        seconds = time.monotonic() - start
        wait_until(lambda: gone(victim), 240)  # noqa: B023
        if all(gone(i) for i in others):
            named = [f"process {victim}" in said(processes[i])[heard[i] :] for i in others]
            ends.append((victim, moment, round(seconds, 1), all(named)))
        else:
            ends.append((victim, moment, 0.0, True))
    return codes(processes, 600), ends


def test_a_killed_process_is_named_and_all_go_on(runs, alone):
    ended, ends = kill_in_a_run_of(runs, "two", 2, [(1, "step")], SIXTY)
    assert ended == [0, 0]
    (_, _, seconds, named), *_ = ends
    assert named
    assert seconds < 60
    assert_close(losses(runs.folder / "two"), alone)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_workers_and_coordinator_are_killed_at_every_stage(runs, count):
    settings = {"steps": 1000, "checkpoint": {"every": 10}, "evaluate_every": 200}
    rounds = int(os.environ.get("LLAMA_JAX_ROUNDS", "2"))
    faults = [(who, moment) for moment in ("init", "step", "save") for who in (0, count - 1)]
    faults = rounds * faults
    ended, ends = kill_in_a_run_of(runs, f"kills{count}", count, faults, settings)
    print(count, *ends, sep="\n")
    assert ended == [0] * count
    assert all(named and seconds < 60 for _, _, seconds, named in ends)
    calm = runs.start_several(runs.settings(f"calm{count}", **settings), count)
    assert codes(calm, 600) == [0] * count
    last = settings["steps"]
    kills = runs.folder / f"kills{count}"
    assert hashes(kills, last) == hashes(runs.folder / f"calm{count}", last)
    assert losses(kills) == losses(runs.folder / f"calm{count}")


@pytest.mark.slow
def test_a_stopped_process_is_named_and_replaced(runs):
    """SIGSTOP: it falls silent, and only its own supervisor can end it."""
    settings = {"steps": 300, "checkpoint": {"every": 10}, "evaluate_every": 100}
    faults = [(1, "step"), (0, "step")]
    ended, ends = kill_in_a_run_of(runs, "frozen", 2, faults, settings, signal.SIGSTOP)
    print(ends)
    assert ended == [0, 0]
    assert all(named and seconds < 60 for _, _, seconds, named in ends)


HANGS = """
import sys, time
from llama_jax import cli
from llama_jax.data.loader import Loader

original = Loader.batches

def batches(self, start, stop=None):
    for step, batch in enumerate(original(self, start, stop), start):
        if step == 20 and "1" == sys.argv[sys.argv.index("--distributed.process") + 1]:
            time.sleep(1000)
        yield batch

Loader.batches = batches
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_a_process_that_hangs_is_named(runs):
    program = ["-c", HANGS, "train"]
    path = runs.settings("hang", steps=100)
    pair = runs.start_several(path, 2, "--distributed.hang_seconds", "6", program=program)
    assert codes(pair, 200) == [1, 1]
    for process in pair:
        assert "process 1 on" in said(process)
        assert "hangs in 'data': no progress for" in said(process)
    assert "Loader" in said(pair[1]) or "batches" in said(pair[1])  # where it hangs


def test_processes_with_other_settings_are_refused(runs):
    path = runs.settings("unlike")
    port = ("--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.processes", "2")
    pair = [
        runs.start(
            path, *port, "--distributed.process", str(index), "--seed", str(index), name=str(index)
        )
        for index in range(2)
    ]
    assert codes(pair) == [2, 2], "\n".join(map(said, pair))
    for process in pair:
        assert "process 1 was started with other settings than process 0" in said(process)


def test_a_process_that_does_not_come_is_named(runs):
    path = runs.settings("late", distributed={"start_seconds": 20})
    port = ("--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.processes", "3")
    pair = [
        runs.start(path, *port, "--distributed.process", str(index), name=str(index))
        for index in (2, 0)  # also when another one has waited for longer than process 0
    ]
    assert 0 not in codes(pair)
    assert "process 1 of 3 has not come within 20 s" in said(pair[1])
