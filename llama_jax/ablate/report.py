"""The report of a study: one text as Markdown and HTML, tables as CSV, pictures as files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama_jax.ablate.document import (
    Block,
    Bullets,
    Code,
    Heading,
    Paragraph,
    Picture,
    Table,
    to_html,
    to_markdown,
)
from llama_jax.ablate.plots import draw, save
from llama_jax.ablate.records import Study
from llama_jax.ablate.statistics import Comparison, compare
from llama_jax.ablate.tables import (
    account_rows,
    comparison_rows,
    evaluation_table,
    loss_table,
    position_table,
    probe_table,
    rate_table,
    result_rows,
    size_table,
    speed_table,
    to_csv,
)
from llama_jax.ablate.verdicts import Verdict, caveats, verdicts
from llama_jax.data.shards import write_atomic

CAPTIONS = {
    "final_loss": "Validation loss after the last step: each seed (dots), their mean (diamond) and "
    "its 95 % interval (line).",
    "differences": "Difference to the base within each seed (dots), the mean (diamond) and its "
    "95 % interval (line), not corrected for the number of comparisons. Left of 0 is a lower loss.",
    "loss_by_cache": "Validation loss by what a token leaves in the cache, with 95 % intervals.",
    "decode_speed": "Tokens decoded per second.",
    "curves": "Loss along the runs: mean of the seeds, with a band from the lowest to the highest. "
    "Training losses are means over stretches of steps. The view is that of the last three "
    "quarters; before them, losses are far higher.",
    "loss_by_position": "Validation loss by the position in the row, mean of the seeds, with a "
    "band from the lowest to the highest; the dashed line is the length trained on.",
    "probes": "Accuracy of the probes, mean of the seeds, with a band from the lowest to the "
    "highest.",
}


def write_report(study: Study, folder: Path) -> Path:
    """Writes report.md, report.html, CSV files and pictures of a study, finished or not.

    results.csv has a row for each run, accounts.csv and comparisons.csv one for each variant; they
    hold the numbers of the report with all their digits. Each picture is there as SVG and as PNG.

    Returns:
        The path of report.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    comparisons = compare(study)
    found = verdicts(study, comparisons)
    pictures = {
        name: save(figure, folder, name) for name, figure in draw(study, comparisons).items()
    }
    blocks = contents(study, comparisons, found, list(pictures))
    tables = {
        "results.csv": result_rows(study),
        "accounts.csv": account_rows(study),
        "comparisons.csv": comparison_rows(study, comparisons, found),
    }
    for name, rows in tables.items():
        write_atomic(folder / name, to_csv(rows).encode())
    write_atomic(folder / "report.html", to_html(study.title, blocks, pictures).encode())
    path = folder / "report.md"
    write_atomic(path, to_markdown(study.title, blocks).encode())
    return path


def contents(
    study: Study,
    comparisons: Mapping[str, Comparison],
    found: Sequence[Verdict],
    pictures: Sequence[str],
) -> list[Block]:
    """The whole report, from the question to what it does not show."""

    def drawn(*names: str) -> list[Block]:
        return [Picture(name, CAPTIONS[name]) for name in names if name in pictures]

    return [
        *_unfinished(study),
        Heading("The question"),
        *(Paragraph(part) for part in re.split(r"\n\s*\n", study.question) if part.strip()),
        Heading("The verdict"),
        Bullets([verdict.text for verdict in found] or ["There is no variant but the base."]),
        Paragraph("Besides:"),
        Bullets(caveats(study)),
        Heading("Final losses"),
        *_tables(loss_table(study, comparisons), evaluation_table(comparisons)),
        *drawn("final_loss", "differences"),
        Heading("What each variant costs"),
        *_tables(size_table(study), speed_table(study)),
        *drawn("loss_by_cache", "decode_speed"),
        Heading("Along the runs"),
        *(drawn("curves") or [Paragraph("No curve has been recorded.")]),
        *_section("Along the row, and beyond the trained length", position_table(study)),
        *drawn("loss_by_position"),
        *_section("Probes", probe_table(study)),
        *drawn("probes"),
        Heading("How it was run"),
        *_how(study),
        Heading("What it does not show"),
        Bullets(_limits(study)),
    ]


def _section(title: str, table: Table | None) -> list[Block]:
    return [Heading(title), table] if table else []


def _tables(*tables: Table | None) -> list[Block]:
    return [table for table in tables if table]


def _unfinished(study: Study) -> list[Block]:
    missing = study.missing()
    found: list[Block] = []
    if missing:
        names = {
            variant: ", ".join(str(seed) for other, seed in missing if other == variant)
            for variant, _ in missing
        }
        planned = len(study.variants) * len(study.seeds)
        text = "; ".join(f"{variant}, seed {seeds}" for variant, seeds in names.items())
        found.append(
            Paragraph(
                f"This study is not finished: {planned - len(missing)} of {planned} runs are done. "
                f"Missing: {text}. Losses are means over the runs that are done, differences over "
                "the seeds that the base has done too. Whoever stops early because of what is seen "
                "here finds differences more often than the intervals and p-values say.",
                notice=True,
            )
        )
    without = [variant for variant in study.variants if study.account(variant) is None]
    if without:
        found.append(
            Paragraph(f"What it costs is not known yet for {', '.join(without)}.", notice=True)
        )
    return found


def _how(study: Study) -> list[Block]:
    versions = ", ".join(f"{name} {version}" for name, version in study.versions.items())
    facts: list[Block] = [
        Bullets(
            [
                f"Corpus: {study.corpus}",
                f"Training: {study.tokens:,} tokens a run, in rows of {study.sequence_length:,}.",
                f"Seeds: {', '.join(map(str, study.seeds))}. A seed sets the first parameters and "
                "the order of the data; every variant sees the same tokens in the same order, and "
                "the same validation batches.",
                f"Device: {study.device}",
                f"Versions: {versions}",
            ]
        ),
        Paragraph("Its settings are in study.yaml, beside this report:"),
        Code(study.command),
    ]
    return [*facts, *_tables(rate_table(study))]


def _limits(study: Study) -> list[str]:
    limits = [
        "Intervals are over seeds: other first parameters and another order of the same text. "
        "They leave out what another text or another split would change.",
        "No difference shown is not equality. A difference shown may still be too small to matter.",
        "A lower loss need not mean better work on a task.",
    ]
    if any(account.speeds for account in study.accounts):
        limits.append(
            "Speeds are of this code on this device, where a variant with a kernel of its own has "
            "an advantage that is not the idea's; they have no intervals."
        )
    return limits
