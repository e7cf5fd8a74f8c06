"""Who holds up the others, and what the processes hear of each other."""

import socket

import jax
import pytest

from llama_jax.config import DistributedConfig
from llama_jax.train.checkpoint import CheckpointError
from llama_jax.train.goodput import Clock
from llama_jax.train.processes import may_be_anothers
from llama_jax.train.watchdog import Peer, Watchdog, hung, is_closed, watch_port

SETTINGS = DistributedConfig(hang_seconds=45)


def peer(index, changes=100, activity="step", stuck=0.0, usual=1.0, **more):
    return Peer(index, "host", 50, changes, activity, 0.0, stuck, usual, **more)


def test_all_is_well_while_there_is_progress():
    assert hung([peer(0), peer(1, changes=99)], SETTINGS) is None
    assert hung([peer(0, stuck=44.0), peer(1, stuck=44.0)], SETTINGS) is None


def test_the_one_that_has_done_the_least_is_named():
    """The others wait for it in a collective, and are as long without progress."""
    peers = [peer(0, stuck=50.0), peer(1, changes=98, activity="data", stuck=50.0), peer(2)]
    text, guilty = hung(peers, SETTINGS)
    assert text == "process 1 on host hangs in 'data': no progress for 50 s after step 50"
    assert guilty == (1,)


def test_a_device_that_hangs_is_told_by_its_process_being_behind():
    """All of them wait for their devices, and one for a step that the others have done."""
    peers = [peer(0, stuck=50.0), peer(1, changes=98, stuck=50.0), peer(2, stuck=50.0)]
    assert hung(peers, SETTINGS)[1] == (1,)


def test_of_those_that_are_level_it_is_not_the_one_that_waits_for_devices():
    peers = [peer(0, stuck=50.0), peer(1, stuck=50.0, activity="report")]
    assert hung(peers, SETTINGS)[1] == (1,)


def test_where_all_wait_for_devices_all_are_named():
    text, guilty = hung([peer(0, stuck=50.0), peer(1, stuck=50.0)], SETTINGS)
    assert text == "no progress for 50 s after step 50: all processes wait in 'step'"
    assert guilty == (0, 1)


def test_a_lone_process_can_hang_too():
    assert hung([peer(0, stuck=50.0)], SETTINGS)[0].startswith("process 0 on host hangs in 'step'")


@pytest.mark.parametrize(("usual", "limit"), [(1.0, 45.0), (30.0, 300.0), (0.0, 600.0)])
def test_long_steps_have_longer(usual, limit):
    """Ten usual steps; before the first is done, ten minutes."""
    assert hung([peer(0, stuck=limit - 1, usual=usual)], SETTINGS) is None
    assert hung([peer(0, stuck=limit + 1, usual=usual)], SETTINGS) is not None


@pytest.mark.parametrize("activity", ["startup", "compile", "checkpoint"])
def test_waiting_for_a_slow_disk_or_compiler_is_no_hang(activity):
    """Nor is waiting for the process that does."""
    peers = [peer(0, stuck=900.0), peer(1, changes=98, activity=activity, stuck=900.0)]
    assert hung(peers, SETTINGS) is None
    peers[1].stuck = 3601.0
    assert hung(peers, SETTINGS)[1] == (1,)


def test_one_that_has_left_does_not_count():
    peers = [peer(0), peer(1, changes=5, stuck=900.0, left=True)]
    assert hung(peers, SETTINGS) is None


def test_the_port_is_beside_that_of_jax():
    assert watch_port(8476) == 8477
    assert watch_port(61440) == 57344  # those of a scheduler's jobs follow each other
    assert watch_port(65535) == 61439


def test_a_connection_is_closed_when_the_other_side_has_gone():
    """Whatever its time-out, and at once: with three processes one waits while another is asked."""
    here, there = socket.socketpair()
    with here:
        here.settimeout(60.0)
        assert not is_closed(here)
        there.sendall(b"words")
        assert not is_closed(here)
        there.close()
        assert not is_closed(here)  # what it said is still to be read
        assert here.recv(5) == b"words"
        assert is_closed(here)
        assert here.gettimeout() == 60.0


def test_steps_between_two_looks_are_steps_too():
    """A run whose first twenty steps nobody saw hangs after ten usual steps, not after minutes."""
    clock = Clock("compile")
    watchdog = Watchdog(SETTINGS, clock)
    watchdog._look_at_myself(1.0)
    watchdog._awake = 1.0
    clock.step = 20
    clock.switch("data")
    watchdog._look_at_myself(1.0)
    assert watchdog.peers[0].usual == 1.0 / 20


@pytest.mark.parametrize(
    ("cause", "anothers"),
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"), True),
        (TimeoutError("completing a checkpoint: process 1 of 2 has not come within 60 s"), True),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_a_failed_save_may_be_the_fault_of_a_lost_process(cause, anothers):
    """Then the process waits to hear who it was, instead of blaming the disk."""

    def save():
        try:
            raise cause
        except Exception as error:
            raise CheckpointError("could not be written") from error

    assert may_be_anothers(cause) == anothers
    with pytest.raises(CheckpointError) as found:
        save()
    assert may_be_anothers(found.value) == anothers
