"""Killed at any moment and started again: the end is that of a run that was never disturbed.

The short tests run always; the long ones are the figures of docs/surviving.md.
"""

import os
import random
import signal
import time

import pytest
from faults import Runs, children, codes, goodput, hashes, losses, said, steps_logged, wait_until

from llama_jax.train import checkpoint

SUPERVISED = ("--restarts", "100000")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


# One process --------------------------------------------------------------------------------------

SHORT = {"steps": 200, "checkpoint": {"every": 10, "keep_last": 2}, "evaluate_every": 100}
LONG = {"steps": 6000, "checkpoint": {"every": 5, "keep_last": 2}, "evaluate_every": 1000}


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
    (code,), steps = killed_at_random(runs, "many", kills, LONG)
    print(f"{len(steps)} kills, at the steps {[n for step in steps for n in step]}")
    print(goodput(runs.folder / "many"))
    assert (code, len(steps)) == (0, kills)
    assert_ends_alike(runs, "many", undisturbed(runs, LONG), LONG["steps"])
