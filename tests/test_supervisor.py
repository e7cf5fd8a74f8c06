"""The parent process: what it starts again, what it leaves, and the signals it passes on."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

HEAD = """
import os, signal, sys, time
from pathlib import Path
from llama_jax.train import supervisor
supervisor.PAUSES = (0.05,)
out = Path(sys.argv[1])
(out / "checkpoints").mkdir()

def starts():
    count = len(list(out.glob("start.*")))
    (out / f"start.{count}").touch()
    return count

def save(step):
    (out / "checkpoints" / str(step)).mkdir()
"""


def supervised(tmp_path, body, restarts=3, silence=600.0, wait=True):
    """Runs a program whose `run()` is the child; gives its exit code, starts and words."""
    program = (
        textwrap.dedent(HEAD)
        + textwrap.dedent(body)
        + f"\nsys.exit(supervisor.supervise(run, {restarts}, out, {silence}))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return process
    _, words = process.communicate(timeout=120)
    return process.returncode, len(list(tmp_path.glob("start.*"))), words


@pytest.mark.parametrize("code", [0, 2, 75, 130])
def test_what_the_child_has_decided_is_final(tmp_path, code):
    body = f"def run():\n    starts()\n    return {code}"
    assert supervised(tmp_path, body)[:2] == (code, 1)


def test_a_crash_is_followed_by_a_restart(tmp_path):
    body = """
        def run():
            count = starts()
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return 1 if count == 1 else 0
        """
    code, starts, words = supervised(tmp_path, body)
    assert (code, starts) == (0, 3)
    assert "training died of SIGKILL; restart 1 of 3" in words
    assert "training failed with code 1; restart 2 of 3" in words


def test_the_number_of_restarts_is_a_limit(tmp_path):
    code, starts, words = supervised(tmp_path, "def run():\n    save(starts())\n    return 1")
    assert (code, starts) == (1, 4)
    assert "has been restarted 3 times, which is the limit" in words


def test_crashes_without_a_checkpoint_come_to_an_end(tmp_path):
    """Those with one do not: each was worth its start."""
    body = """
        def run():
            count = starts()
            if count < 12:
                save(count)
            os.kill(os.getpid(), signal.SIGABRT)
        """
    code, starts, words = supervised(tmp_path, body, restarts=1000)
    assert (code, starts) == (128 + signal.SIGABRT, 12 + 8)
    assert "died of SIGABRT, for the 8th time without a new checkpoint" in words


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_ends_the_supervision(tmp_path, number):
    body = """
        def run():
            stop = []
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.append(1))
            starts()
            while not stop:
                time.sleep(0.01)
            return 75
        """
    process = supervised(tmp_path, body, wait=False)
    while not list(tmp_path.glob("start.*")):
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert len(list(tmp_path.glob("start.*"))) == 1


def test_a_child_that_a_signal_has_killed_is_not_started_again(tmp_path):
    """As by the second of two: that was a wish too."""
    body = """
        def run():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            starts()
            time.sleep(100)
        """
    process = supervised(tmp_path, body, wait=False)
    while not list(tmp_path.glob("start.*")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert len(list(tmp_path.glob("start.*"))) == 1


def test_a_signal_between_two_starts_ends_the_supervision(tmp_path):
    body = """
        supervisor.PAUSES = (60.0,)
        def run():
            starts()
            return 1
        """
    process = supervised(tmp_path, body, wait=False)
    assert "restart 1 of 3 in 60 s" in process.stderr.readline()
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_a_child_that_falls_silent_is_killed_and_started_again(tmp_path):
    """As one that was stopped, or hangs where no Python runs."""
    body = """
        def run():
            os.write(int(os.environ[supervisor.LIFELINE]), b".")
            if starts() == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            return 0
        """
    code, starts, words = supervised(tmp_path, body, silence=2.0)
    assert (code, starts) == (0, 2)
    assert "has not been heard of for" in words
    assert "died of SIGKILL; restart 1 of 3" in words


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is told on Linux alone")
def test_the_child_stops_when_its_parent_is_killed(tmp_path):
    body = """
        def run():
            signal.signal(signal.SIGTERM, lambda *_: (out / "asked").touch() or os._exit(0))
            (out / "start.0").touch()
            time.sleep(100)
        """
    process = supervised(tmp_path, body, wait=False)
    while not list(tmp_path.glob("start.*")):
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    end = time.monotonic() + 30
    while not (tmp_path / "asked").exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_needs_no_jax():
    program = "import llama_jax.train.supervisor, sys; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n"
