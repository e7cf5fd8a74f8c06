"""What a study measures: intervals over seeds, and paired differences to the base.

Runs of one seed share their first parameters and the order of their data, so that variants are
compared by the differences within each seed; what the seeds have in common cancels. Everything is
in nats per token.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import nctdtrinc, stdtr, stdtrit

from llama_jax.ablate.records import SeedResult, Study

CONFIDENCE = 0.95
SIGNIFICANCE = 1 - CONFIDENCE
POWER = 0.8


class Interval(NamedTuple):
    """A mean with its interval by Student's t.

    spread: standard deviation of the values; None, as the bounds are, where there is one value.
    """

    mean: float
    low: float | None
    high: float | None
    spread: float | None
    n: int


class Comparison(NamedTuple):
    """A variant against the base, over the seeds that both have.

    difference: loss of the variant less that of the base; below 0 the variant predicts better.
    p: two-sided, of the paired t-test; corrected: by Holm for all comparisons of the study.
    detectable: smallest true difference that a study like this shows with a probability of 80 %.
    evaluation: the mean difference with an interval over validation batches, each averaged over
        the seeds. It tells how sharply the batches measure these very runs, not what other seeds
        would give.
    """

    variant: str
    difference: Interval
    p: float | None
    corrected: float | None
    detectable: float | None
    evaluation: Interval | None


def interval(values: Iterable[float]) -> Interval:
    """Mean and 95 % interval of independent values.

    Raises:
        ValueError: there are no values.
    """
    data = np.asarray(list(values), dtype=np.float64)
    if not data.size:
        raise ValueError("the mean of no values")
    mean = float(data.mean())
    if data.size == 1:
        return Interval(mean, None, None, None, 1)
    spread = float(data.std(ddof=1))
    half = float(stdtrit(data.size - 1, 1 - SIGNIFICANCE / 2)) * spread / math.sqrt(data.size)
    return Interval(mean, mean - half, mean + half, spread, data.size)


def p_value(difference: Interval) -> float | None:
    """Two-sided p-value of a mean being 0; None for a single value."""
    if difference.spread is None:
        return None
    if difference.spread == 0:
        return 1.0 if difference.mean == 0 else 0.0
    t = difference.mean / (difference.spread / math.sqrt(difference.n))
    return float(2 * stdtr(difference.n - 1, -abs(t)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values corrected for being several, in the same order (Holm 1979).

    A comparison that could not be made yet (None) counts as one all the same, so that no verdict
    is lost when it comes in.
    """
    order = sorted(
        (index for index, p in enumerate(p_values) if p is not None),
        key=lambda index: p_values[index] or 0.0,
    )
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * (p_values[index] or 0.0)))
        corrected[index] = highest
    return corrected


def detectable(spread: float | None, n: int, comparisons: int = 1) -> float | None:
    """Smallest true difference that a paired t-test shows with a probability of 80 %.

    Args:
        spread: standard deviation of the differences between seeds; None gives None.
        n: seeds.
        comparisons: the test is at 5 % divided by them, as the first of Holm's is.
    """
    if spread is None or n < 2:
        return None
    bound = stdtrit(n - 1, 1 - SIGNIFICANCE / comparisons / 2)
    return float(nctdtrinc(n - 1, 1 - POWER, bound)) * spread / math.sqrt(n)


def losses(study: Study, variant: str) -> Interval | None:
    """Final loss over the seeds; None without runs, and where one of them diverged."""
    runs = study.runs(variant).values()
    if not runs or any(run.diverged for run in runs):
        return None
    return interval(run.loss for run in runs)


def compare(study: Study) -> dict[str, Comparison]:
    """The comparisons to the base that can be made, by variant.

    A variant of which a run diverged is left out: the seeds that survived are no fair sample.
    """
    base = study.runs(study.base)
    others = [variant for variant in study.variants if variant != study.base]
    pairs = {}
    for variant in others:
        runs = study.runs(variant)
        shared = [(base[seed], runs[seed]) for seed in base if seed in runs]
        is_fair = not any(run.diverged for run in (*base.values(), *runs.values()))
        if shared and is_fair:
            pairs[variant] = shared
    found = {
        variant: interval(other.loss - one.loss for one, other in shared)
        for variant, shared in pairs.items()
    }
    p_values = [p_value(found[variant]) if variant in found else None for variant in others]
    corrected = dict(zip(others, holm(p_values), strict=True))
    return {
        variant: Comparison(
            variant,
            difference,
            p_value(difference),
            corrected[variant],
            detectable(difference.spread, difference.n, len(others)),
            _over_batches(pairs[variant]),
        )
        for variant, difference in found.items()
    }


def _over_batches(pairs: Sequence[tuple[SeedResult, SeedResult]]) -> Interval | None:
    """Mean difference with an interval over batches; None where they are not the same batches."""
    if len({len(run.batch_losses) for pair in pairs for run in pair}) != 1:
        return None
    differences = [np.subtract(other.batch_losses, one.batch_losses) for one, other in pairs]
    by_batch = np.mean(differences, axis=0)
    return interval(by_batch) if by_batch.size and np.isfinite(by_batch).all() else None


def by_position(study: Study, variant: str) -> dict[tuple[int, int], list[float]]:
    """Losses of a variant's runs for each (first, last) position, in the order of positions."""
    found: dict[tuple[int, int], list[float]] = {}
    for run in study.runs(variant).values():
        for first, last, loss in run.loss_by_position:
            found.setdefault((first, last), []).append(loss)
    return dict(sorted(found.items()))


def by_probe(study: Study, variant: str) -> dict[tuple[str, str], list[float]]:
    """Accuracies of a variant's runs for each probe and difficulty, in the order of the runs."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in study.runs(variant).values():
        for probe, accuracies in run.probes.items():
            for difficulty, accuracy in accuracies.items():
                found.setdefault((probe, difficulty), []).append(accuracy)
    return found
