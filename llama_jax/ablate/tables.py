"""The tables of a report: all digits for the files, rounded for the text."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.ablate.document import Table
from llama_jax.ablate.records import Account, Study
from llama_jax.ablate.statistics import (
    Comparison,
    Interval,
    by_position,
    by_probe,
    interval,
    losses,
)
from llama_jax.ablate.verdicts import Verdict, budget_gaps
from llama_jax.plan.hardware import GIB

NOTHING = "-"
BUDGETS = {
    "parameters": "parameters",
    "training_flops": "training FLOPs per token",
    "cache_bytes": "cache bytes per token",
}
Row = dict[str, Any]

# --- for files -------------------------------------------------------------------------------


def to_csv(rows: Sequence[Row]) -> str:
    """Rows under the columns of all of them together; what a row lacks is empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def result_rows(study: Study) -> list[Row]:
    """Every run that is done, in the order of the plan."""
    return [
        {
            "variant": variant,
            "seed": seed,
            "learning_rate": run.learning_rate,
            "loss": run.loss,
            "train_seconds": run.train_seconds,
            "tokens_per_second": run.tokens_per_second,
            **{f"loss_at_{one.first}_to_{one.last}": one.loss for one in run.loss_by_position},
            **{
                f"accuracy: {probe}, {difficulty}": accuracy
                for probe, accuracies in run.probes.items()
                for difficulty, accuracy in accuracies.items()
            },
            **{
                f"accuracy: {probe}, {difficulty}, {place}": accuracy
                for probe, difficulties in run.probe_places.items()
                for difficulty, accuracies in difficulties.items()
                for place, accuracy in accuracies.items()
            },
        }
        for variant in study.variants
        for seed, run in study.runs(variant).items()
    ]


def account_rows(study: Study) -> list[Row]:
    """Every account, in the order of the variants."""
    gaps = budget_gaps(study)
    rows = []
    for account in _accounts(study):
        row = {
            "variant": account.variant,
            "description": account.description,
            "parameters": account.parameters,
            "parameters_without_embeddings": account.parameters_without_embeddings,
            "active_parameters": account.active_parameters,
            "d_ff": account.d_ff,
            "training_flops_per_token": account.training_flops_per_token,
            "cache_bytes_per_token": account.cache_bytes_per_token,
            "cache_bytes_per_row": account.cache_bytes_per_row,
            "budget_gap": gaps.get(account.variant),
        }
        for speed in account.speeds:
            place = f"context_{speed.context}_rows_{speed.rows}"
            row |= {f"prefill_{place}": speed.prefill, f"decode_{place}": speed.decode}
        for room in account.capacities:
            place = f"context_{room.context}_memory_{room.memory_gib:g}_gib"
            row |= {
                f"largest_batch_{place}": room.largest_batch,
                f"compiled_bytes_{place}": room.compiled_bytes,
            }
        rows.append(row)
    return rows


def comparison_rows(
    study: Study, comparisons: Mapping[str, Comparison], found: Sequence[Verdict]
) -> list[Row]:
    """Every variant: its loss over the seeds, and how it compares to the base."""
    kinds = {verdict.variant: verdict.kind for verdict in found}
    rows = []
    for variant in study.variants:
        row: Row = {"variant": variant, "runs": len(study.runs(variant))}
        one = comparisons.get(variant)
        row |= _interval_columns("loss", losses(study, variant))
        row |= _interval_columns("difference", one and one.difference)
        for name in ("p", "corrected", "detectable"):
            row[name] = getattr(one, name, None)
        row |= _interval_columns("evaluation", one and one.evaluation)
        rows.append(row | {"verdict": kinds.get(variant)})
    return rows


def _interval_columns(name: str, found: Interval | None) -> Row:
    columns = (name, f"{name}_low", f"{name}_high", f"{name}_spread", f"{name}_n")
    return dict(zip(columns, found or [None] * len(columns), strict=True))


# --- for the text ----------------------------------------------------------------------------


def loss_table(study: Study, comparisons: Mapping[str, Comparison]) -> Table:
    """Final losses, and the differences to the base."""
    family = len(study.variants) - 1
    rows = []
    for variant in study.variants:
        runs, one = study.runs(variant), comparisons.get(variant)
        mean, lost = losses(study, variant), sum(run.diverged for run in runs.values())
        own = _with_bounds(mean, "") if mean else [f"{lost} diverged" if lost else NOTHING, NOTHING]
        versus = _with_bounds(one.difference, "+") if one else [NOTHING] * 2
        rows.append(
            [
                f"{variant} (base)" if variant == study.base else variant,
                f"{len(runs)} of {len(study.seeds)}",
                *own,
                *versus,
                NOTHING if one is None or one.corrected is None else _p(one.corrected),
                _number(one.detectable if one else None, ".4f"),
            ]
        )
    head = [
        *("variant", "seeds", "loss", "95 % interval"),
        *("difference to the base", "95 % interval"),
        f"p, corrected for {family}" if family > 1 else "p",
        "detectable",
    ]
    caption = (
        "Validation loss in nats per token: mean over the seeds with Student's t interval, and the "
        "difference to the base, paired by seed. Detectable is the smallest true difference that "
        "as many seeds with that spread show four times out of five"
        + (f", at 5 % / {family}." if family > 1 else ".")
    )
    return Table(head, rows, caption)


def evaluation_table(comparisons: Mapping[str, Comparison]) -> Table | None:
    """How sharply the validation batches measure the differences."""
    rows = [
        [variant, f"{one.evaluation.n:,}", *_with_bounds(one.evaluation, "+")]
        for variant, one in comparisons.items()
        if one.evaluation
    ]
    if not rows:
        return None
    caption = (
        "Evaluation noise only: the same differences, paired by validation batch, each batch "
        "averaged over the seeds. The interval tells how sharply the validation text measures "
        "these very runs. It leaves out what other seeds would give, and is no evidence that a "
        "variant differs."
    )
    head = ["variant", "batches", "difference to the base", "95 % interval over batches"]
    return Table(head, rows, caption)


def size_table(study: Study) -> Table | None:
    """Parameters, FLOPs and bytes of each variant."""
    accounts = _accounts(study)
    if not accounts:
        return None
    gaps = budget_gaps(study)
    rows = [
        [
            account.variant,
            account.description or NOTHING,
            f"{account.parameters:,}",
            f"{account.parameters_without_embeddings:,}",
            f"{account.active_parameters:,}",
            f"{account.d_ff:,}",
            f"{account.training_flops_per_token:,}",
            f"{account.cache_bytes_per_token:,}",
            f"{account.cache_bytes_per_row:,}",
            _number(gaps.get(account.variant), "+.2%"),
        ]
        for account in accounts
    ]
    equal = " and ".join(BUDGETS[kind] for kind in study.budget)
    caption = "Budget: none is kept."
    if equal:
        widest = f"; the widest gap is {max(map(abs, gaps.values())):.2%}" if gaps else ""
        caption = f"Budget: {equal} within {study.budget_tolerance:.2%} of the base's{widest}."
    head = [
        *("variant", "differs in", "parameters", "without embeddings", "active", "d_ff"),
        *("training FLOPs per token", "cache bytes per token", "cache bytes per row", "budget gap"),
    ]
    return Table(head, rows, caption, text_columns=2)


def speed_table(study: Study) -> Table | None:
    """Measured speeds, and the largest batches."""
    accounts = _accounts(study)
    if not accounts:
        return None
    places = sorted({(one.context, one.rows) for two in accounts for one in two.speeds})
    rooms = sorted({(one.context, one.memory_gib) for two in accounts for one in two.capacities})
    head = ["variant", "training tokens/s"]
    for context, rows in places:
        place = f"context {context:,}, {rows:,} row{'s' * (rows > 1)}"
        head += [f"prefill tokens/s, {place}", f"decode tokens/s, {place}"]
    for context, memory in rooms:
        place = f"context {context:,}, {memory:g} GiB"
        head += [f"largest batch, {place}", f"compiled GiB, {place}"]
    table = []
    for account in accounts:
        speeds = {(one.context, one.rows): one for one in account.speeds}
        room = {(one.context, one.memory_gib): one for one in account.capacities}
        runs = [run.tokens_per_second for run in study.runs(account.variant).values()]
        row = [account.variant, _speed(_mean(runs))]
        for speed in map(speeds.get, places):
            row += [_speed(speed.prefill), _speed(speed.decode)] if speed else [NOTHING] * 2
        for most in map(room.get, rooms):
            row += (
                [f"{most.largest_batch:,}", f"{most.compiled_bytes / GIB:,.2f}"]
                if most
                else [NOTHING] * 2
            )
        table.append(row)
    caption = f"Speeds are tokens per second of all rows together, on {study.device}." + (
        " The largest batch is that of one decoding step, as compiled for that memory."
        if rooms
        else ""
    )
    return Table(head, table, caption)


def position_table(study: Study) -> Table | None:
    """Loss along the row."""
    found = {variant: by_position(study, variant) for variant in study.variants}
    stretches = sorted({stretch for one in found.values() for stretch in one})
    if not stretches:
        return None
    shown = [variant for variant in study.variants if found[variant]]
    rows = [
        [
            f"{first:,} to {last:,}" + (" (beyond)" if last >= study.sequence_length else ""),
            *(_number(_mean(found[variant].get((first, last), [])), ",.4f") for variant in shown),
        ]
        for first, last in stretches
    ]
    caption = (
        "Mean validation loss by position (nats per token, mean over the seeds). Rows had "
        f"{study.sequence_length:,} tokens in training."
    )
    return Table(["positions", *shown], rows, caption)


def probe_table(study: Study) -> Table | None:
    """Accuracies of the probes."""
    found = {variant: by_probe(study, variant) for variant in study.variants}
    places = list(dict.fromkeys(place for one in found.values() for place in one))
    if not places:
        return None
    shown = [variant for variant in study.variants if found[variant]]
    rows = [
        [
            *place,
            _number(study.chances.get(place[0], {}).get(place[1]), ".1%"),
            *(_number(_mean(found[variant].get(place, [])), ".1%") for variant in shown),
        ]
        for place in sorted(places, key=lambda place: [one[0] for one in places].index(place[0]))
    ]
    caption = "Accuracy, mean over the seeds; chance is that of guessing among the row's tokens."
    return Table(["probe", "difficulty", "chance", *shown], rows, caption, text_columns=2)


def rate_table(study: Study) -> Table | None:
    """Learning rates that were tried and used."""
    rows = []
    for variant in study.variants:
        used = {run.learning_rate for run in study.runs(variant).values()}
        tried = study.learning_rates.get(variant, {})
        for rate in sorted(used | set(tried)):
            loss = tried.get(rate)
            rows.append(
                [
                    variant,
                    "yes" if rate in used else "",
                    f"{rate:g}",
                    NOTHING if loss is None else _number(_mean([loss]), ",.4f", "diverged"),
                ]
            )
    if not rows:
        return None
    head = ["variant", "used", "learning rate", "loss when tried"]
    return Table(head, rows, "Learning rates.", text_columns=2)


# --- numbers as text -------------------------------------------------------------------------


def _accounts(study: Study) -> list[Account]:
    found = [study.account(variant) for variant in study.variants]
    return [account for account in found if account is not None]


def _mean(values: Sequence[float]) -> float | None:
    """None for no values, and where one is not finite."""
    return interval(values).mean if values and all(map(math.isfinite, values)) else None


def _number(value: float | None, form: str, without: str = NOTHING) -> str:
    return without if value is None else f"{value:{form}}"


def _with_bounds(found: Interval, sign: str) -> list[str]:
    """A mean, and its interval or that there is none."""
    form = f"{sign},.4f"
    if found.low is None or found.high is None:
        return [f"{found.mean:{form}}", "none: one value" if sign else "none: one seed"]
    return [f"{found.mean:{form}}", f"{found.low:{form}} to {found.high:{form}}"]


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _speed(value: float | None) -> str:
    """Three digits at least, and thousands apart."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
