"""The pictures of a report: black on white, and each variant in one colour throughout."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.ablate.records import Curve, Study
from llama_jax.ablate.statistics import Comparison, Interval, by_position, by_probe, losses

NATS = "loss (nats per token)"
BASE_COLOUR = "#000000"
# Okabe and Ito's, which most colour-blind people tell apart, but for black and yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLES = ("-", "--", ":", "-.")  # for the seventh variant, the colours begin again
MOST_POINTS = 100
LONGEST_NAME = 40


class Style(NamedTuple):
    """How a variant is drawn."""

    label: str
    colour: str
    line: str


def draw(study: Study, comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    """The figures for which there is something to draw, by name, in the order of the report."""
    styles = _styles(study)
    figures = {
        "final_loss": _final_loss(study, styles),
        "differences": _differences(study, comparisons, styles),
        "loss_by_cache": _loss_by_cache(study, styles),
        "decode_speed": _decode_speed(study, styles),
        "curves": _curves(study, styles),
        "loss_by_position": _loss_by_position(study, styles),
        "probes": _probes(study, styles),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def save(figure: Any, folder: Path, name: str) -> str:
    """Writes NAME.png and NAME.svg; returns the SVG."""
    import matplotlib

    # Text as text, and the same marks for the same picture, so that it changes only with its data.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        drawing = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawing, format="svg", metadata=nothing)
    svg = "\n".join(line.rstrip() for line in drawing.getvalue().splitlines()) + "\n"
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=100)
    return svg


def _styles(study: Study) -> dict[str, Style]:
    styles = {study.base: Style(_label(study.base), BASE_COLOUR, "-")}
    others = (variant for variant in study.variants if variant != study.base)
    for number, variant in enumerate(others):
        colour = COLOURS[number % len(COLOURS)]
        line = STYLES[number // len(COLOURS) % len(STYLES)]
        styles[variant] = Style(_label(variant), colour, line)
    return {variant: styles[variant] for variant in study.variants}


def _label(name: str) -> str:
    """A name on one line, short enough for an axis, that is not taken for mathematics."""
    line = "".join(character for character in " ".join(name.split()) if character.isprintable())
    short = line if len(line) <= LONGEST_NAME else f"{line[: LONGEST_NAME - 3]}..."
    return short.replace("$", r"\$")


def _panels(number: int = 1, columns: int = 1, height: float = 4.5) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # two seconds that `--help` need not wait

    rows = -(-number // columns)
    figure = Figure(figsize=(8, height * rows), layout="constrained")
    panels = [figure.add_subplot(rows, columns, place + 1) for place in range(number)]
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, panels


def _legend(
    figure: Any,
    drawn: Mapping[str, Any],
    styles: Mapping[str, Style],
    others: Sequence[tuple[Any, str]] = (),
) -> None:
    """Below all panels: the line of each variant that was drawn, and others with their names."""
    entries = [*((line, styles[variant].label) for variant, line in drawn.items()), *others]
    lines, names = zip(*entries, strict=True)
    columns = 1 if max(map(len, names)) > LONGEST_NAME // 2 else 3
    figure.legend(lines, names, loc="outside lower center", ncols=columns)


# --- losses and differences ------------------------------------------------------------------


def _final_loss(study: Study, styles: Mapping[str, Style]) -> Any:
    found = {variant: losses(study, variant) for variant in study.variants}
    rows = {
        variant: (mean, [run.loss for run in study.runs(variant).values()])
        for variant, mean in found.items()
        if mean is not None
    }
    return _forest(rows, styles, f"validation {NATS}")


def _differences(
    study: Study, comparisons: Mapping[str, Comparison], styles: Mapping[str, Style]
) -> Any:
    base, rows = study.runs(study.base), {}
    for variant, found in comparisons.items():
        runs = study.runs(variant)
        rows[variant] = (
            found.difference,
            [runs[seed].loss - base[seed].loss for seed in runs if seed in base],
        )
    figure = _forest(rows, styles, f"difference in loss to {styles[study.base].label} (nats)")
    if figure:
        figure.axes[0].axvline(0, color=BASE_COLOUR, linewidth=1)
    return figure


def _forest(
    rows: Mapping[str, tuple[Interval, Sequence[float]]], styles: Mapping[str, Style], title: str
) -> Any:
    """One line for each variant: its runs as dots, their mean, its interval."""
    if not rows:
        return None
    figure, (axes,) = _panels(height=1.3 + 0.45 * len(rows))
    for height, (variant, (mean, values)) in enumerate(rows.items()):
        colour = styles[variant].colour
        axes.plot(values, [height] * len(values), "o", color=colour, alpha=0.4, markersize=5)
        if mean.low is not None and mean.high is not None:
            axes.plot([mean.low, mean.high], [height, height], color=colour, linewidth=2)
        axes.plot([mean.mean], [height], "D", color=colour, markersize=7)
    axes.set_yticks(range(len(rows)), [styles[variant].label for variant in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(title)
    return figure


def _loss_by_cache(study: Study, styles: Mapping[str, Style]) -> Any:
    found = {
        account.variant: (account.cache_bytes_per_token, mean)
        for account in study.accounts
        if (mean := losses(study, account.variant)) is not None
    }
    if not found:
        return None
    figure, (axes,) = _panels()
    drawn = {}
    for variant, (size, mean) in found.items():
        colour = styles[variant].colour
        if mean.low is not None and mean.high is not None:
            axes.plot([size, size], [mean.low, mean.high], color=colour, linewidth=2)
        (drawn[variant],) = axes.plot([size], [mean.mean], "D", color=colour, markersize=7)
    axes.set_xlim(left=-0.05 * max(size for size, _ in found.values()) or None)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("cache (bytes per token)")
    axes.set_ylabel(f"validation {NATS}")
    _legend(figure, drawn, styles)
    return figure


def _decode_speed(study: Study, styles: Mapping[str, Style]) -> Any:
    places = sorted({(one.context, one.rows) for two in study.accounts for one in two.speeds})
    if not places:
        return None
    figure, panels = _panels(len(places), min(len(places), 2), 1.3 + 0.45 * len(study.accounts))
    for axes, (context, rows) in zip(panels, places, strict=True):
        speeds = {
            account.variant: speed.decode
            for account in study.accounts
            for speed in account.speeds
            if (speed.context, speed.rows) == (context, rows)
        }
        colours = [styles[variant].colour for variant in speeds]
        axes.barh(range(len(speeds)), list(speeds.values()), color=colours)
        axes.set_yticks(range(len(speeds)), [styles[variant].label for variant in speeds])
        axes.set_ylim(len(speeds) - 0.5, -0.5)
        axes.set_title(f"context {context:,}, {rows:,} row{'s' * (rows > 1)}", fontsize="medium")
        axes.set_xlabel("decoded tokens per second")
    return figure


# --- along the run, along the row, by difficulty ---------------------------------------------


class Band(NamedTuple):
    """A line with its band, each (n,): mean, lowest and highest over the seeds at x."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def training_band(curves: Sequence[Curve]) -> Band | None:
    """Training loss by tokens where all curves have it, as means of up to 100 stretches."""
    return _band(
        [dict(zip(curve.tokens, curve.losses, strict=True)) for curve in curves], MOST_POINTS
    )


def validation_band(curves: Sequence[Curve]) -> Band | None:
    """Validation loss by tokens where all curves have it."""
    by_tokens = []
    for curve in curves:
        steps, tokens = [0, *curve.steps], [0, *curve.tokens]
        places = np.interp(curve.validation_steps, steps, tokens).tolist()
        by_tokens.append(dict(zip(places, curve.validation_losses, strict=True)))
    return _band(by_tokens, None)


def _band(curves: Sequence[Mapping[float, float]], most: int | None) -> Band | None:
    common = sorted(set.intersection(*map(set, curves))) if curves else []
    if not common:
        return None
    values = np.array([[curve[place] for place in common] for curve in curves])  # (seeds, n)
    values[~np.isfinite(values)] = np.nan
    parts = np.array_split(np.arange(len(common)), min(len(common), most or len(common)))
    thin = np.array([values[:, part].mean(axis=1) for part in parts])  # (parts, seeds)
    x = np.array([np.mean(np.array(common)[part]) for part in parts])
    return Band(x, thin.mean(axis=1), thin.min(axis=1), thin.max(axis=1))


def _plot(axes: Any, band: Band, style: Style, marker: str) -> Any:
    axes.fill_between(band.x, band.low, band.high, color=style.colour, alpha=0.15, linewidth=0)
    (line,) = axes.plot(
        band.x, band.mean, style.line, color=style.colour, marker=marker, markersize=4
    )
    return line


def _curves(study: Study, styles: Mapping[str, Style]) -> Any:
    kinds = {"training": (training_band, ""), "validation": (validation_band, "o")}
    curves = {
        variant: [run.curve for run in study.runs(variant).values()] for variant in study.variants
    }
    found = {
        kind: {variant: one for variant in curves if (one := band(curves[variant])) is not None}
        for kind, (band, _) in kinds.items()
    }
    shown = [kind for kind in kinds if found[kind]]
    if not shown:
        return None
    from matplotlib.ticker import EngFormatter

    figure, panels = _panels(len(shown), len(shown))
    drawn: dict[str, Any] = {}
    for axes, kind in zip(panels, shown, strict=True):
        for variant, band in found[kind].items():
            line = _plot(axes, band, styles[variant], kinds[kind][1])
            drawn.setdefault(variant, line)
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.set_xlabel("tokens")
        axes.set_ylabel(f"{kind} {NATS}")
        _look_past_the_start(axes, list(found[kind].values()))
    _legend(figure, drawn, styles)
    return figure


def _look_past_the_start(axes: Any, bands: Sequence[Band]) -> None:
    """Limits the view to what comes after a quarter of the tokens; the first losses are huge."""
    end = max(band.x[-1] for band in bands)
    late = np.concatenate([side[band.x >= end / 4] for band in bands for side in band[2:]])
    late = late[np.isfinite(late)]
    if late.size and late.min() < late.max():
        margin = 0.05 * (late.max() - late.min())
        axes.set_ylim(late.min() - margin, late.max() + margin)


def _loss_by_position(study: Study, styles: Mapping[str, Style]) -> Any:
    found = {variant: by_position(study, variant) for variant in study.variants}
    if not any(found.values()):
        return None
    figure, (axes,) = _panels()
    drawn = {}
    for variant, stretches in found.items():
        if stretches:
            middles = [(first + last) / 2 for first, last in stretches]
            drawn[variant] = _plot(axes, _spans(middles, stretches.values()), styles[variant], "o")
    trained = axes.axvline(study.sequence_length, color="#808080", linestyle="--", linewidth=1)
    axes.set_xlabel("position in the row")
    axes.set_ylabel(f"validation {NATS}")
    _legend(figure, drawn, styles, [(trained, "trained length")])
    return figure


def _spans(x: Sequence[float], values: Any) -> Band:
    """Mean and range of the values at each x, over as many seeds as there are."""
    lists = [[value if np.isfinite(value) else np.nan for value in at] for at in values]
    columns = [np.array([reduce(at) for at in lists]) for reduce in (np.mean, np.min, np.max)]
    return Band(np.array(x), *columns)


def _probes(study: Study, styles: Mapping[str, Style]) -> Any:
    found = {variant: by_probe(study, variant) for variant in study.variants}
    places: dict[str, dict[str, int]] = {}
    for accuracies in found.values():
        for probe, difficulty in accuracies:
            known = places.setdefault(probe, {})
            known.setdefault(difficulty, len(known))
    if not places:
        return None
    figure, panels = _panels(len(places), min(len(places), 2), 3.6)
    drawn: dict[str, Any] = {}
    for axes, (probe, order) in zip(panels, places.items(), strict=True):
        for variant, accuracies in found.items():
            own = {order[name]: values for (at, name), values in accuracies.items() if at == probe}
            if own:
                band = _spans(sorted(own), [own[place] for place in sorted(own)])
                drawn.setdefault(variant, _plot(axes, band, styles[variant], "o"))
        axes.set_xticks(range(len(order)), [_label(name) for name in order])
        axes.set_ylim(-0.02, 1.02)
        axes.set_title(_label(probe), fontsize="medium")
        axes.set_ylabel("accuracy")
    _legend(figure, drawn, styles)
    return figure
