"""What a study may be said to show, and what a reader must know besides."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from llama_jax.ablate.records import Account, BudgetKind, Study
from llama_jax.ablate.statistics import SIGNIFICANCE, Comparison

FEWEST_SEEDS = 3  # with two, an interval reaches 13 standard errors to each side


class Verdict(NamedTuple):
    """What was found of a variant: lower, higher, none (shown), small, diverged or missing."""

    variant: str
    kind: str
    text: str


def verdicts(study: Study, comparisons: Mapping[str, Comparison]) -> list[Verdict]:
    """One sentence or two on every variant but the base, in the order of the study."""
    others = [variant for variant in study.variants if variant != study.base]
    return [_verdict(study, variant, comparisons.get(variant), len(others)) for variant in others]


def _verdict(study: Study, variant: str, found: Comparison | None, family: int) -> Verdict:
    if found is None:
        return _without_comparison(study, variant)
    difference, base = found.difference, study.base
    if found.corrected is None or difference.low is None or difference.high is None:
        return Verdict(
            variant,
            "small",
            f"{variant} against {base}: {difference.mean:+.4f} nats per token with one seed, which "
            "shows no spread. Nothing can be concluded.",
        )
    if difference.mean == difference.spread == 0:
        return Verdict(
            variant,
            "none",
            f"No difference shown between {variant} and {base}: every loss is the same to the last "
            "digit, so that what was to differ may have had no effect.",
        )
    correction = f" after Holm's correction for {family} comparisons" if family > 1 else ""
    how = (
        f"{difference.mean:+.4f} nats per token, 95 % interval {difference.low:+.4f} to "
        f"{difference.high:+.4f}, {difference.n} seeds, {p_text(found.corrected)}{correction}"
    )
    small = (
        f" The study is too small for more: {difference.n} seeds say little about their spread."
        if difference.n < FEWEST_SEEDS
        else ""
    )
    if found.corrected < SIGNIFICANCE:
        kind = "lower" if difference.mean < 0 else "higher"
        return Verdict(variant, kind, f"{variant} has a {kind} loss than {base}: {how}.{small}")
    hidden = ""
    if difference.low > 0 or difference.high < 0:
        hidden = (
            " The interval, taken alone, leaves out 0; corrected for the number of comparisons, "
            "that may be chance."
        )
    return Verdict(
        variant,
        "none",
        f"No difference shown between {variant} and {base}: {how}. That does not say that they are "
        f"equal: a true difference below {found.detectable:.4f} is more likely than one in five "
        f"to go unseen in a study like this.{hidden}{small}",
    )


def _without_comparison(study: Study, variant: str) -> Verdict:
    for name in (variant, study.base):
        runs = study.runs(name).values()
        lost = sum(run.diverged for run in runs)
        if lost:
            return Verdict(
                variant,
                "diverged",
                f"{variant} is not compared: {lost} of {len(runs)} runs of {name} diverged.",
            )
    return Verdict(
        variant,
        "missing",
        f"{variant} is not compared yet: there is no seed that both it and {study.base} finished.",
    )


def p_text(p: float) -> str:
    """p = 0.012, or p < 0.001."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def budget_of(account: Account, kind: BudgetKind) -> int:
    """What of a variant is to be equal to the base's."""
    return {
        "parameters": account.parameters,
        "training_flops": account.training_flops_per_token,
        "cache_bytes": account.cache_bytes_per_token,
    }[kind]


def budget_gaps(study: Study) -> dict[str, float]:
    """Relative difference of each variant's budget to the base's, where both are known; of several
    budgets the widest."""
    base = study.account(study.base)
    if base is None or not study.budget:
        return {}

    def gap(account: Account, kind: BudgetKind) -> float:
        own, target = budget_of(account, kind), budget_of(base, kind)
        return 0.0 if own == target else own / target - 1 if target else math.inf

    return {
        account.variant: max((gap(account, kind) for kind in study.budget), key=abs)
        for account in study.accounts
    }


def over_budget(study: Study) -> dict[str, float]:
    """The gaps that are wider than the study's tolerance."""
    gaps = budget_gaps(study)
    return {name: gap for name, gap in gaps.items() if abs(gap) > study.budget_tolerance}


def untuned(study: Study) -> list[str]:
    """Variants for which fewer than two learning rates were tried."""
    return [name for name in study.variants if len(study.learning_rates.get(name, {})) < 2]


def at_the_edge(study: Study) -> dict[str, float]:
    """Variants whose best learning rate is the lowest or the highest that was tried."""
    best = {}
    for name, tried in study.learning_rates.items():
        finite = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
        if len(tried) > 1 and finite:
            best[name] = min(finite, key=lambda rate: finite[rate])
    return {
        name: rate
        for name, rate in best.items()
        if rate in (min(study.learning_rates[name]), max(study.learning_rates[name]))
    }


def caveats(study: Study) -> list[str]:
    """What a reader must know besides, most of it from the records: one sentence each."""
    found = []
    if len(study.seeds) < FEWEST_SEEDS:
        many = "one seed, which shows no spread" if len(study.seeds) == 1 else "two seeds"
        found.append(f"The study is too small: it has {many}. Run three or more.")
    beyond = over_budget(study)
    if beyond:
        gaps = ", ".join(f"{name} {gap:+.2%}" for name, gap in beyond.items())
        found.append(
            f"The budgets differ by more than the tolerance of {study.budget_tolerance:.2%}: "
            f"{gaps} of the base's. What they cost may explain what they reach."
        )
    fixed = untuned(study)
    if fixed:
        found.append(
            f"The learning rate was not tuned for {', '.join(fixed)}: one that suits another "
            "variant may suit these less."
        )
    edge = at_the_edge(study)
    if edge:
        rates = ", ".join(f"{name} {rate:g}" for name, rate in edge.items())
        found.append(
            f"The learning rate that did best is the lowest or the highest of those tried ({rates})"
            ": one beyond it may do better still."
        )
    sizes = [account.parameters for account in study.accounts]
    size = f"models of about {max(sizes):,} parameters" if sizes else "models of this size"
    found.append(
        f"All this holds for {size}, trained on {study.tokens:,} tokens of this corpus in rows of "
        f"{study.sequence_length:,}. Larger models, longer training or other text may differ."
    )
    return found
