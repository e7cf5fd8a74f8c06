"""Skipped batches: which they are, when the rule asks for them, and that runs do it exactly."""

import numpy as np
import pytest

from llama_jax.config import SpikeConfig, batch_of
from llama_jax.train.spikes import (
    Detector,
    Spike,
    continues,
    passed,
    read_skipped,
    united,
    window_of,
    write_skipped,
)

RULE = SpikeConfig(deviations=6.0)


def test_the_batch_of_a_step_leaves_the_windows_out():
    windows = ((2, 4), (5, 6))
    kept = [number for number in range(40) if not any(a <= number < b for a, b in windows)]
    assert [batch_of(step, windows) for step in range(30)] == kept[:30]
    assert [batch_of(step, ()) for step in range(3)] == [0, 1, 2]
    assert batch_of(0, ((0, 7),)) == 7


@pytest.mark.parametrize("windows", [((3, 3),), ((4, 3),), ((1, 5), (4, 8)), ((6, 8), (1, 2))])
def test_windows_that_overlap_or_are_out_of_order_are_refused(windows):
    with pytest.raises(ValueError, match=r"skip_batches: .* must be rising"):
        batch_of(0, windows)


def test_windows_are_united():
    assert united([(5, 9), (1, 3), (3, 4), (8, 12)]) == ((1, 4), (5, 12))
    assert united([]) == ()


def test_a_checkpoint_continues_what_has_skipped_the_same():
    def saved(next_batch, *skipped):
        return {"data": {"next_batch": next_batch}, "skipped": skipped}

    assert continues({"data": {"next_batch": 7}}, ())  # of a release that knew no windows
    assert continues(saved(7), ((7, 9),))
    assert not continues(saved(8), ((7, 9),))
    assert not continues(saved(30), ((7, 9),))
    assert continues(saved(30, [7, 9]), ((7, 9), (30, 40)))
    assert not continues(saved(30, [7, 9]), ())
    assert continues(saved(5, [7, 9]), ())
    assert passed([(2, 9)], 4) == ((2, 4),)


def clean(seed, steps=10_000):
    """A loss that falls as a power, with noise that is heavy-tailed and remembers itself."""
    random = np.random.default_rng(seed)
    drawn = 0.03 * random.standard_t(4, size=steps)
    noise = np.zeros(steps)
    for step in range(1, steps):
        noise[step] = 0.6 * noise[step - 1] + drawn[step]
    return 1.8 + 8 * (np.arange(steps) + 10.0) ** -0.35 + noise


def first_spike(losses, rule=RULE, memory=None, start=0):
    detector = Detector(rule, memory)
    for step, loss in enumerate(losses[start:], start + 1):
        try:
            detector.see(step, float(loss))
        except Spike as spike:
            return spike.first_step, step
    return None


def test_nothing_is_skipped_in_ten_thousand_clean_steps():
    assert first_spike(clean(0)) is None


@pytest.mark.parametrize("height", [0.8, 3.0])
def test_a_rise_that_lasts_is_found_and_its_beginning_named(height):
    losses = clean(1)
    losses[5000:5020] += height
    assert first_spike(losses) == (5001, 5005)


def test_a_single_high_loss_is_none():
    losses = clean(2)
    losses[5000:5004] += 3.0  # four, and five are asked for
    assert first_spike(losses) is None


def test_it_is_off_by_default():
    losses = clean(3)
    losses[5000:] += 30.0
    assert first_spike(losses, SpikeConfig()) is None
    assert Detector(SpikeConfig()).memory() == {"losses": [], "above": 0}


def test_a_detector_goes_on_from_its_memory():
    """Also in the middle of a rise: a restart must not change what is skipped."""
    losses = clean(4)
    losses[5000:5020] += 3.0
    for cut in (4999, 5001, 5003):
        one = Detector(RULE)
        for step in range(cut):
            one.see(step + 1, float(losses[step]))
        assert first_spike(losses, memory=one.memory(), start=cut) == (5001, 5005)


def test_the_window_lies_around_the_first_batch_of_the_spike():
    rule = SpikeConfig(skip_before=100, skip_after=200)
    spike = Spike(5001, 5005, 9.0, 2.0)
    assert window_of(spike, rule, ()) == (4900, 5200)
    assert window_of(spike, rule, ((10, 20),)) == (4910, 5210)
    assert window_of(Spike(3, 7, 9.0, 2.0), rule, ()) == (0, 202)


def test_what_was_chosen_is_read_again(tmp_path):
    assert read_skipped(tmp_path) == ()
    write_skipped(tmp_path, ((1, 4), (9, 12)))
    assert read_skipped(tmp_path) == ((1, 4), (9, 12))
