"""Intervals, paired differences and verdicts, against scipy.stats and by hand."""

import math

import numpy as np
import pytest
from scipy import stats
from studies import account, result, study

from llama_jax.ablate.records import Stretch
from llama_jax.ablate.statistics import (
    by_position,
    compare,
    detectable,
    holm,
    interval,
    losses,
    p_value,
)
from llama_jax.ablate.verdicts import budget_gaps, caveats, verdicts

BASE = {0: 3.10, 1: 3.42, 2: 2.95, 3: 3.60}
NOISE = {0: 0.002, 1: -0.001, 2: 0.003, 3: -0.002}


def shifted(shift, noise=1.0, seeds=BASE):
    return {seed: BASE[seed] + shift + noise * NOISE[seed] for seed in seeds}


def verdict(one):
    """Kind and text of what is said of the only variant beside the base."""
    (found,) = verdicts(one, compare(one))
    return found.kind, found.text


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_an_interval_is_that_of_students_t(n):
    values = np.random.default_rng(n).normal(2.0, 0.3, n)
    found = interval(values)
    expected = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-12)
    np.testing.assert_allclose((found.mean, found.spread), (values.mean(), values.std(ddof=1)))
    assert found.n == n


def test_an_interval_by_hand():
    """Mean 2, spread 1; the quantile of t with two degrees of freedom is in closed form."""
    p = 0.975
    t = (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    found = interval([1.0, 2.0, 3.0])
    np.testing.assert_allclose(found, (2, 2 - t / math.sqrt(3), 2 + t / math.sqrt(3), 1, 3))


def test_one_value_has_no_interval_and_none_no_mean():
    assert interval([1.5]) == (1.5, None, None, None, 1)
    with pytest.raises(ValueError, match="no values"):
        interval([])


@pytest.mark.parametrize("n", [2, 3, 7])
def test_paired_differences_are_those_of_the_paired_t_test(n):
    random = np.random.default_rng(n)
    base = random.normal(3, 0.3, n)
    other = base + random.normal(0.02, 0.01, n)
    one = study({"base": dict(enumerate(base)), "other": dict(enumerate(other))})
    found = compare(one)["other"]
    expected = stats.ttest_rel(other, base)
    bounds = expected.confidence_interval(0.95)
    np.testing.assert_allclose(found.p, expected.pvalue, rtol=1e-8)
    np.testing.assert_allclose(found.difference[1:3], (bounds.low, bounds.high), rtol=1e-8)
    assert found.corrected == found.p, "one comparison needs no correction"


def test_a_constant_shift_shows_through_seeds_that_differ_far_more():
    one = study({"base": BASE, "other": shifted(0.02)})
    found = compare(one)["other"]
    assert found.p < 0.01
    assert stats.ttest_ind(list(BASE.values()), list(shifted(0.02).values())).pvalue > 0.9
    assert found.difference.low > 0.01
    assert losses(one, "other").spread > 10 * found.difference.spread


def test_runs_are_paired_by_seed_not_by_place():
    """The same runs in another order, one of a seed that the base lacks."""
    other = shifted(0.02)
    backwards = {seed: other[seed] for seed in reversed(other)} | {9: 99.0}
    found = compare(study({"base": BASE, "other": backwards}))["other"]
    assert found.difference == compare(study({"base": BASE, "other": other}))["other"].difference


def test_equal_runs_differ_by_nothing():
    found = compare(study({"base": BASE, "other": BASE}))["other"]
    assert found.difference == (0, 0, 0, 0, 4)
    assert (found.p, found.detectable) == (1, 0)


def test_differences_without_spread_are_certain():
    assert p_value(interval([0.5, 0.5])) == 0
    assert p_value(interval([0.5])) is None


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.6, 0.2, 0.7], [1, 0.6, 1]),
        ([0.02], [0.02]),
        ([0.02, None, None], [0.06, None, None]),
        ([0.0, 0.0], [0, 0]),
        ([], []),
    ],
)
def test_holms_correction_by_hand(p_values, corrected):
    assert holm(p_values) == pytest.approx(corrected)


def test_comparisons_are_corrected_for_all_that_are_planned():
    """Two variants have runs, a third has none yet."""
    one = study(
        {"base": BASE, "a": shifted(0.02), "b": shifted(0.002, 5), "c": {}},
    )
    found = compare(one)
    assert list(found) == ["a", "b"]
    assert found["a"].p < found["b"].p
    assert found["a"].corrected == pytest.approx(3 * found["a"].p)
    assert found["b"].corrected == pytest.approx(min(1, 2 * found["b"].p))
    spread = found["a"].difference.spread
    assert found["a"].detectable == detectable(spread, 4, 3) > detectable(spread, 4)


@pytest.mark.parametrize(("n", "comparisons"), [(2, 1), (3, 1), (3, 4), (5, 2), (20, 1)])
def test_what_is_detectable_has_a_power_of_four_fifths(n, comparisons):
    size = detectable(0.7, n, comparisons)
    bound = stats.t.ppf(1 - 0.05 / comparisons / 2, n - 1)
    shift = size * math.sqrt(n) / 0.7
    assert 1 - stats.nct.cdf(bound, n - 1, shift) == pytest.approx(0.8, abs=1e-4)


def test_what_is_detectable_is_detected_four_times_out_of_five():
    random = np.random.default_rng(0)
    runs = random.normal(detectable(0.7, 4), 0.7, (40_000, 4))
    detected = stats.ttest_1samp(runs, 0, axis=1).pvalue < 0.05
    assert detected.mean() == pytest.approx(0.8, abs=0.01)  # five standard errors


def test_one_seed_detects_nothing():
    assert detectable(None, 1) is None


def test_evaluation_noise_is_over_batches_averaged_over_seeds():
    one = study({"base": BASE, "other!": shifted(0.02)})
    batches = {
        name: np.array([run.batch_losses for run in one.runs(name).values()])
        for name in one.variants
    }
    found = compare(one)["other!"].evaluation
    averaged = (batches["other!"] - batches["base"]).mean(axis=0)
    expected = stats.ttest_1samp(averaged, 0).confidence_interval(0.95)
    assert found.n == averaged.size > 1
    np.testing.assert_allclose(found[1:3], (expected.low, expected.high), rtol=1e-8)


@pytest.mark.parametrize(
    ("base", "other"),
    [((), ()), ((1.0, 2.0, 3.0), (1.0, 2.0)), ((1.0, 2.0), (1.0, math.nan))],
)
def test_no_evaluation_noise_without_the_same_batches(base, other):
    batches = {"base": base, "other": other}
    results = [
        result(name, seed, 3.0, batch_losses=batches[name]) for name in batches for seed in (0, 1)
    ]
    one = study({"base": {0: 3.0, 1: 3.0}, "other": {}}, results=tuple(results))
    assert compare(one)["other"].evaluation is None


def test_losses_by_position_are_in_the_order_of_positions():
    """Runs of which one went further than the other, and came to it first."""
    long = Stretch(8, 15, 2.0), Stretch(0, 7, 3.0), Stretch(16, 31, 1.0)
    runs = (
        result("base", 0, 1.0, loss_by_position=long),
        result("base", 1, 1.0, loss_by_position=(Stretch(0, 7, 5.0),)),
    )
    found = by_position(study({"base": {0: 1.0, 1: 1.0}}, results=runs), "base")
    assert list(found.items()) == [((0, 7), [3.0, 5.0]), ((8, 15), [2.0]), ((16, 31), [1.0])]


# --- verdicts --------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "kind"), [(-0.02, "lower"), (0.02, "higher")])
def test_a_difference_that_is_shown(shift, kind):
    found, text = verdict(study({"base": BASE, "other": shifted(shift)}))
    mean = shift + sum(NOISE.values()) / 4
    assert found == kind
    assert text.startswith(f"other has a {kind} loss than base: {mean:+.4f} nats per token, 95 %")
    assert "4 seeds, p < 0.001" in text
    assert "Holm" not in text
    assert "too small" not in text


def test_a_difference_that_is_not_shown_says_what_could_have_been():
    one = study({"base": BASE, "other": shifted(0.001, 5)})
    kind, text = verdict(one)
    assert kind == "none"
    assert text.startswith("No difference shown between other and base: +0.0035 nats per token")
    assert f"a true difference below {compare(one)['other'].detectable:.4f}" in text
    assert "leaves out 0" not in text


def test_an_interval_without_zero_is_no_verdict_when_there_were_many():
    """The same runs, once as the only variant and once as one of five."""
    other = shifted(0.008, 2)
    assert verdict(study({"base": BASE, "other": other}))[0] == "higher"
    others = {f"v{number}": shifted(0, 10) for number in range(4)}
    one = study({"base": BASE, "other": other, **others})
    first = verdicts(one, compare(one))[0]
    assert compare(one)["other"].difference.low > 0
    assert first.kind == "none"
    assert "after Holm's correction for 5 comparisons" in first.text
    assert "The interval, taken alone, leaves out 0" in first.text


def test_equal_losses_look_like_a_setting_without_effect():
    kind, text = verdict(study({"base": BASE, "other": BASE}))
    assert kind == "none"
    assert text.endswith("so that what was to differ may have had no effect.")


def test_one_seed_allows_no_conclusion():
    kind, text = verdict(study({"base": {0: 3.0}, "other": {0: 2.0}}))
    assert kind == "small"
    assert "-1.0000 nats per token with one seed, which shows no spread. Nothing can" in text
    assert "lower" not in text


def test_two_seeds_are_called_too_few():
    kind, text = verdict(study({"base": {0: 3.0, 1: 3.5}, "other": {0: 2.0, 1: 2.501}}))
    assert kind == "lower"
    assert "The study is too small for more: 2 seeds" in text


@pytest.mark.parametrize(("lost", "count"), [("base", "1 of 4"), ("other", "1 of 3")])
def test_what_diverged_is_not_compared(lost, count):
    runs = {"base": dict(BASE), "other": shifted(-0.02, seeds=(0, 1, 2))}
    runs[lost][2] = math.nan
    one = study(runs)
    kind, text = verdict(one)
    assert kind == "diverged"
    assert text == f"other is not compared: {count} runs of {lost} diverged."
    assert losses(one, lost) is None


def test_a_variant_without_a_shared_seed_is_not_compared_yet():
    kind, text = verdict(study({"base": {0: 3.0}, "other": {1: 2.0}}))
    assert kind == "missing"
    assert "no seed that both it and base finished" in text


# --- what else a reader must know ------------------------------------------------------------


def caveat(text, **changes):
    """The caveat with such a text, of a study that has no other; None where there is none."""
    losses = changes.pop("losses", {"base": BASE, "other": shifted(0.02)})
    found = [line for line in caveats(study(losses, **changes)) if text in line]
    assert len(found) < 2
    return found[0] if found else None


def test_a_sound_study_has_one_caveat_its_size():
    (line,) = caveats(study({"base": BASE, "other": shifted(0.02)}))
    assert "about 15,191,712 parameters, trained on 8,192,000 tokens of this corpus" in line
    assert "rows of 256" in line


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_few_seeds(seeds):
    runs = {seed: BASE[seed] for seed in range(seeds)}
    found = caveat("too small", losses={"base": runs, "other": runs})
    words = {1: "one seed, which shows no spread", 2: "two seeds", 3: None}[seeds]
    assert (found is None) if words is None else (words in found)


@pytest.mark.parametrize(
    ("budget", "field"),
    [
        ("parameters", "parameters"),
        ("training_flops", "training_flops_per_token"),
        ("cache_bytes", "cache_bytes_per_token"),
    ],
)
def test_budgets_that_differ(budget, field):
    accounts = account("base", **{field: 1000}), account("other", **{field: 980})
    assert budget_gaps(study({"base": {}, "other": {}}, budget=(budget,), accounts=accounts)) == {
        "base": 0,
        "other": pytest.approx(-0.02),
    }
    changes = {"budget": (budget,), "accounts": accounts}
    assert caveat("budgets differ", budget_tolerance=0.03, **changes) is None
    found = caveat("budgets differ", budget_tolerance=0.01, **changes)
    assert "more than the tolerance of 1.00%: other -2.00% of the base's" in found


def test_a_budget_of_nothing():
    """A base without a cache: equal is equal, and anything else infinitely more."""
    sizes = {"a": 0, "b": 0, "c": 8}
    accounts = [account(name, cache_bytes_per_token=size) for name, size in sizes.items()]
    one = study({"a": {}, "b": {}, "c": {}}, budget=("cache_bytes",), accounts=tuple(accounts))
    assert budget_gaps(one) == {"a": 0, "b": 0, "c": math.inf}
    assert budget_gaps(study({"a": {}}, accounts=())) == {}


def test_learning_rates_that_were_not_tuned():
    tuned = {3e-4: 1.6, 1e-3: 1.5, 3e-3: 1.55}
    assert caveat("not tuned", learning_rates={"base": tuned, "other": tuned}) is None
    found = caveat("not tuned", learning_rates={"base": tuned, "other": {1e-3: 1.5}})
    assert "not tuned for other:" in found
    assert "not tuned for base, other:" in caveat("not tuned", learning_rates={})


def test_a_best_learning_rate_at_the_edge():
    """A rate at which the run diverged still bounds the others."""
    inside, low = {3e-4: math.nan, 1e-3: 1.5, 3e-3: 1.6}, {3e-4: 1.4, 1e-3: 1.5}
    assert caveat("highest", learning_rates={"base": inside, "other": inside}) is None
    found = caveat("highest", learning_rates={"base": inside, "other": low})
    assert "(other 0.0003)" in found
