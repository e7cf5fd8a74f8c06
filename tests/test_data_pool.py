"""The process pool: order, errors, death. Small imports: each process repeats them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_jax.data.pool import ordered_map


def _slow_square(number):
    time.sleep(0.002 * (number % 3))
    return number * number


def _fail_at_seven(number):
    if number == 7:
        raise ValueError("seven")
    return number


def _die(number):
    os._exit(3)


@pytest.mark.parametrize("count", [0, 1, 2, 11])
def test_pool_keeps_the_order(count):
    assert list(ordered_map(_slow_square, range(count), 2)) == [n * n for n in range(count)]


def test_pool_passes_large_items_without_a_deadlock():
    items = [bytes(1) * 2_000_000] * 6
    assert [len(x) for x in ordered_map(bytes, items, 2)] == [2_000_000] * 6


def test_pool_passes_errors_on():
    with pytest.raises(ValueError, match="seven"):
        list(ordered_map(_fail_at_seven, range(20), 2))


def test_pool_says_that_a_worker_died():
    with pytest.raises(RuntimeError, match="a worker process died"):
        list(ordered_map(_die, range(4), 2))


def test_signals_for_the_whole_group_reach_only_the_parent():
    results = ordered_map(abs, range(-40, 0), 2)
    first = [next(results) for _ in range(4)]
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
    assert [*first, *results] == list(range(40, 0, -1))


def test_workers_of_a_pool_that_is_let_go_end_by_themselves():
    results = ordered_map(abs, range(10**9), 2)
    assert next(results) == 0
    workers = multiprocessing.active_children()
    results.close()
    assert [worker.exitcode for worker in workers] == [0, 0]  # killed ones have -9


FORGOTTEN = """
from llama_jax.data.pool import ordered_map
if __name__ == "__main__":
    results = ordered_map(abs, range(10**9), 2)
    keep = [next(results) for _ in range(3)]
"""


def test_a_forgotten_pool_does_not_keep_the_program_from_ending(tmp_path):
    script = tmp_path / "forgets.py"
    script.write_text(FORGOTTEN, encoding="utf-8")
    subprocess.run([sys.executable, str(script)], check=True, timeout=60)


ORPHANS = """
import multiprocessing, time
from llama_jax.data.pool import ordered_map
if __name__ == "__main__":
    results = ordered_map(abs, range(10**9), 2)
    next(results)
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    time.sleep(60)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(ORPHANS, encoding="utf-8")
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(map(_is_running, children)):
        time.sleep(0.05)
    assert not any(map(_is_running, children))


def _is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split(")")[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
