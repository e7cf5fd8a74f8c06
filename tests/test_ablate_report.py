"""The report: what it says, that its numbers agree, and that no name breaks it."""

import csv
import dataclasses
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from markdown_it import MarkdownIt
from studies import CHANCES, LENGTH, account, result, study

from llama_jax.ablate.document import Bullets, Code, Heading, Paragraph, Table, to_html, to_markdown
from llama_jax.ablate.plots import draw, training_band, validation_band
from llama_jax.ablate.records import Curve, SeedResult, Study, read, write
from llama_jax.ablate.report import write_report
from llama_jax.ablate.statistics import compare, interval

LOSSES = {
    "mha": {0: 1.501, 1: 1.532, 2: 1.487},
    "gqa": {0: 1.5133, 1: 1.5422, 2: 1.5011},
    "mla": {0: 1.4718, 1: 1.5051, 2: 1.4602},
}
HOSTILE = [
    "<script>alert(1)</script>",
    'a | b, "c"\nd & e &amp; $x_1$ $y$',
    r"_z_ *w* `v` [l](http://x) \| ~~s~~ ![i](j.png)",
    "1. # -x",
]


class Page(HTMLParser):
    """The tags of a page, and its texts: of cells, and of what else holds text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.attributes = [], [], []
        self.texts, self.rows = [], []
        self.feed(text)
        assert not self.open, "tags that are not closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("h1", "h2", "p", "li", "pre", "caption", "code"):
            self.texts.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open and self.open[-1] in ("h1", "h2", "p", "li", "pre", "caption", "code"):
            self.texts[-1] += data


def rendered(markdown):
    """Markdown as another program reads it."""
    return Page(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))


def on_one_line(text):
    return " ".join(text.split())


def table(page, heading):
    """The rows below a table's row of headings that has such a cell."""
    start = next(i for i, row in enumerate(page.rows) if heading in row)
    width, head = len(page.rows[start]), page.rows[start]
    rows = []
    for row in page.rows[start + 1 :]:
        if len(row) != width or row[0] in ("variant", "positions", "probe"):
            break
        rows.append(dict(zip(enumerate(head), row, strict=True)))
    return [[*row.values()] for row in rows]


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same(text, value):
    """Whether a printed number is a number to the digits printed."""
    plain = text.replace(",", "").removesuffix("%")
    scale = 100 if text.endswith("%") else 1
    digits = len(plain.partition(".")[2])
    return float(plain) == pytest.approx(round(scale * float(value), digits), abs=1e-12)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder of a whole report."""
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    assert write_report(study(LOSSES), folder) == folder / "report.md"
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Folder of a report in which every text is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    losses = {name: {0: 1.5, 1: 1.6 + 0.01 * place} for place, name in enumerate(HOSTILE)}
    text = " ".join(HOSTILE)
    one = study(
        losses,
        title=text,
        question=text,
        corpus=text,
        device=text,
        versions={text: text},
        command=f"```\n{text}",
        accounts=tuple(account(name, description=text) for name in HOSTILE),
    )
    runs = [dataclasses.replace(run, probes={text: {text: 0.5}}) for run in one.results]
    write_report(dataclasses.replace(one, results=tuple(runs)), folder)
    return folder


# --- records ---------------------------------------------------------------------------------


def test_a_study_survives_its_file(tmp_path):
    path = tmp_path / "study.json"
    one = study(LOSSES | {HOSTILE[1]: {0: 1.23456789012345678}})
    write(path, one)
    assert read(path, Study) == one
    assert [file.name for file in tmp_path.iterdir()] == ["study.json"]


def test_a_run_that_diverged_survives_its_file(tmp_path):
    run = result("mha", 0, math.nan, batch_losses=(math.inf, 1.0))
    write(tmp_path / "run.json", run)
    assert repr(read(tmp_path / "run.json", SeedResult)) == repr(run)
    assert "NaN" not in (tmp_path / "run.json").read_text(), "no JSON"


@pytest.mark.parametrize("content", ["", "{}", '{"variant": "mha"}', "[1, 2"])
def test_a_file_that_holds_no_record(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match="SeedResult"):
        read(tmp_path / "run.json", SeedResult)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "gqa"}, "the base 'gqa' is not among the variants"),
        ({"variants": ("mha", "mha")}, "variant 'mha' is there twice"),
        ({"seeds": (0, 0)}, "seed 0 is there twice"),
        ({"results": (result("mha", 0, 1.0),) * 2}, r"run \('mha', 0\) is there twice"),
        ({"accounts": (account("mha"),) * 2}, "account 'mha' is there twice"),
        ({"accounts": (account("gqa"),)}, "'gqa' is not among the variants"),
        ({"results": (result("gqa", 0, 1.0),)}, "'gqa' is not among the variants"),
        ({"results": (result("mha", 7, 1.0),)}, "seed 7 of 'mha' is not among the seeds"),
    ],
)
def test_a_study_that_contradicts_itself(changes, message):
    with pytest.raises(ValueError, match=message):
        study({"mha": {0: 1.0}}, **changes)


def test_a_curve_needs_a_loss_for_each_step():
    with pytest.raises(ValueError, match="as many steps as"):
        Curve((1, 2), (10, 20), (1.0,))
    with pytest.raises(ValueError, match="as many validation steps"):
        Curve((1,), (10,), (1.0,), (1,), ())


# --- text ------------------------------------------------------------------------------------


def test_the_report_has_its_order(written):
    found = re.findall(r"^## (.*)", (written / "report.md").read_text(), re.MULTILINE)
    assert found == [
        "The question",
        "The verdict",
        "Final losses",
        "What each variant costs",
        "Along the runs",
        "Along the row, and beyond the trained length",
        "Probes",
        "How it was run",
        "What it does not show",
    ]


def test_the_report_says_what_was_found_and_how(written):
    text = (written / "report.md").read_text()
    assert "## The question\n\nWhich costs least?\n\nThe base shares none.\n\n## " in text
    assert "* mla has a lower loss than mha: -0.0276 nats per token, 95 % interval" in text
    assert "* All this holds for models of about 15,191,712 parameters" in text
    assert "```\nllama-jax ablate kv.yaml\n```" in text
    assert "* Training: 8,192,000 tokens a run, in rows of 256." in text
    assert "Evaluation noise only" in text
    assert "not finished" not in text


def test_markdown_and_html_say_the_same(written):
    page = Page((written / "report.html").read_text())
    text = rendered((written / "report.md").read_text())
    assert page.rows == text.rows
    assert len(page.rows) > 20
    missing = {*filter(None, map(on_one_line, page.texts))} - {*map(on_one_line, text.texts)}
    assert not missing


def test_losses_are_those_of_the_file(written):
    rows = table(rendered((written / "report.md").read_text()), "detectable")
    numbers = read_csv(written / "comparisons.csv")
    assert len(rows) == len(numbers) == len(LOSSES)
    for row, exact in zip(rows, numbers, strict=True):
        assert row[0].removesuffix(" (base)") == exact["variant"]
        assert row[1] == f"{exact['runs']} of 3"
        assert same(row[2], exact["loss"])
        low, high = row[3].split(" to ")
        assert same(low, exact["loss_low"])
        assert same(high, exact["loss_high"])
        if exact["variant"] == "mha":
            assert row[4:] == ["-"] * 4
            continue
        low, high = row[5].split(" to ")
        pairs = {"difference": row[4], "difference_low": low, "difference_high": high}
        pairs |= {"detectable": row[7], "corrected": row[6]}
        assert all(same(text, exact[name]) for name, text in pairs.items()), pairs
        assert row[4][0] in "+-"


def test_evaluation_noise_is_that_of_the_file(written):
    rows = table(rendered((written / "report.md").read_text()), "batches")
    numbers = [row for row in read_csv(written / "comparisons.csv") if row["evaluation"]]
    assert len(rows) == len(numbers) == 2
    for row, exact in zip(rows, numbers, strict=True):
        assert (row[0], row[1]) == (exact["variant"], exact["evaluation_n"])
        texts = row[2], *row[3].split(" to ")
        for text, name in zip(texts, ("", "_low", "_high"), strict=True):
            assert same(text, exact[f"evaluation{name}"])


def test_costs_are_those_of_the_file(written):
    page = rendered((written / "report.md").read_text())
    sizes, speeds = table(page, "differs in"), table(page, "training tokens/s")
    exact = read_csv(written / "accounts.csv")
    runs = read_csv(written / "results.csv")
    assert len(sizes) == len(speeds) == len(exact) == len(LOSSES)
    for size, speed, row in zip(sizes, speeds, exact, strict=True):
        assert (size[0], size[1], speed[0]) == (row["variant"], row["description"], row["variant"])
        columns = ["parameters", "parameters_without_embeddings", "active_parameters", "d_ff"]
        columns += ["training_flops_per_token", "cache_bytes_per_token", "cache_bytes_per_row"]
        for text, name in zip(size[2:], [*columns, "budget_gap"], strict=True):
            assert same(text, row[name]), name
        trained = [float(run["tokens_per_second"]) for run in runs if run["variant"] == speed[0]]
        measured = [row[f"{kind}_context_{c}_rows_8"] for c in (256, 2048) for kind in KINDS]
        room = "context_256_memory_16_gib"
        gib = float(row[f"compiled_bytes_{room}"]) / 2**30
        values = [np.mean(trained), *measured, row[f"largest_batch_{room}"], gib]
        for text, value in zip(speed[1:], values, strict=True):
            assert same(text, value), text
    assert sizes[0][2] == "15,191,712"
    assert speeds[0][5] == "54.3"


KINDS = ("prefill", "decode")


def test_losses_by_position_and_probes_are_those_of_the_file(written):
    page = rendered((written / "report.md").read_text())
    runs = read_csv(written / "results.csv")
    assert [(run["variant"], run["seed"]) for run in runs] == [
        (name, str(seed)) for name in LOSSES for seed in LOSSES[name]
    ]

    assert float(runs[0]["train_seconds"]) == 61.5

    def mean(variant, column):
        return np.mean([float(run[column]) for run in runs if run["variant"] == variant])

    positions = table(page, "positions")
    assert [row[0] for row in positions] == ["0 to 127", "128 to 255", "256 to 383 (beyond)"]
    for row in positions:
        column = "loss_at_" + row[0].removesuffix(" (beyond)").replace(" ", "_")
        assert all(same(text, mean(v, column)) for v, text in zip(LOSSES, row[1:], strict=True))
    probes = table(page, "difficulty")
    assert [row[:2] for row in probes] == [["copy", "8"], ["copy", "16"]]
    for row in probes:
        column = f"accuracy: {row[0]}, {row[1]}"
        assert same(row[2], CHANCES[row[0]][row[1]])
        assert all(same(text, mean(v, column)) for v, text in zip(LOSSES, row[3:], strict=True))


def test_learning_rates_are_listed(written):
    rows = table(rendered((written / "report.md").read_text()), "loss when tried")
    assert rows[:3] == [
        ["mha", "", "0.0003", "1.6000"],
        ["mha", "yes", "0.001", "1.5000"],
        ["mha", "", "0.003", "1.5500"],
    ]


# --- hostile names ---------------------------------------------------------------------------


def test_no_name_reaches_the_page_as_more_than_text(hostile):
    page = Page((hostile / "report.html").read_text())
    assert not {"script", "img", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    first = {on_one_line(row[0]) for row in page.rows}
    assert {on_one_line(name) for name in HOSTILE[1:]} <= first


def test_no_name_reaches_the_markdown_as_more_than_text(hostile):
    text = (hostile / "report.md").read_text()
    page = rendered(text)
    assert not {"script", "a", "s", "em", "strong"} & set(page.tags)
    pictures = [value for name, value in page.attributes if name == "src"]
    assert all((hostile / name).is_file() for name in pictures)
    first = {row[0] for row in page.rows}
    assert {on_one_line(name) for name in HOSTILE[1:]} <= first
    plain = on_one_line(" ".join(HOSTILE))
    assert plain in page.texts, "the question"
    assert f"Corpus: {plain}" in page.texts
    assert any(one.startswith("```\n<script>") for one in page.texts), "the command"
    assert not re.search(r"(?<!\\)\$", text.split("```")[0]), "GitHub's mathematics"


def test_names_come_back_from_the_files(hostile):
    for name in ("accounts.csv", "comparisons.csv"):
        assert [row["variant"] for row in read_csv(hostile / name)] == HOSTILE
    assert [row["variant"] for row in read_csv(hostile / "results.csv")][::2] == HOSTILE


def test_names_in_pictures_are_text(hostile):
    for path in hostile.glob("*.svg"):
        tags = {node.tag.rpartition("}")[2] for node in ElementTree.parse(path).iter()}
        assert "script" not in tags
    texts = [
        "".join(node.itertext()).strip()
        for node in ElementTree.parse(hostile / "final_loss.svg").iter()
        if node.tag.endswith("}text")
    ]
    assert 'a | b, "c" d & e &amp; $x_1$ $y$' in texts
    assert HOSTILE[0] in texts


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("d_ff, 2 * 3 & more", r"d_ff, 2 \* 3 & more"),
        ("a\n\nb", "a b"),
        ("# a", r"\# a"),
        ("- a", r"\- a"),
        ("---", r"\---"),
        ("-0.5 and -x", "-0.5 and -x"),
        ("12. a", r"12\. a"),
        ("1.5 a", "1.5 a"),
        ("> a", "&gt; a"),
        ("&lt;", "&amp;lt;"),
    ],
)
def test_markdown_is_escaped_where_it_means_something(text, markdown):
    assert to_markdown("t", [Paragraph(text)]) == f"# t\n\n{markdown}\n"
    page = rendered(to_markdown("t", [Paragraph(text), Bullets([text])]))
    assert page.texts == ["t", on_one_line(text), on_one_line(text)]
    assert page.tags == ["h1", "p", "ul", "li"]


def test_blocks_in_both_languages():
    blocks = [
        Heading("h"),
        Paragraph("n", notice=True),
        Code("a ``` b\n  c"),
        Table(["x", "y"], [["1|2", "-3"]], "cap"),
    ]
    assert to_markdown("t", blocks) == (
        "# t\n\n## h\n\n> n\n\n````\na ``` b\n  c\n````\n\ncap\n\n"
        "| x | y |\n| :-- | --: |\n| 1\\|2 | -3 |\n"
    )
    body = to_html("t", blocks, {}).partition("<body>")[2]
    assert '<p class="notice">n</p>\n<pre>a ``` b\n  c</pre>' in body
    assert '<caption>cap</caption>\n<tr><th class="text">x</th><th>y</th></tr>' in body
    assert '<tr><td class="text">1|2</td><td>-3</td></tr>' in body


# --- pictures --------------------------------------------------------------------------------

NAMES = {
    *("final_loss", "differences", "loss_by_cache", "decode_speed"),
    *("curves", "loss_by_position", "probes"),
}


def test_pictures_are_small_and_whole(written):
    assert {path.stem for path in written.glob("*.png")} == NAMES
    assert {path.stem for path in written.glob("*.svg")} == NAMES
    assert all(path.stat().st_size < 150_000 for path in written.glob("*.png"))
    for name in NAMES:
        assert f"]({name}.png)" in (written / "report.md").read_text()


def test_the_page_stands_alone_in_light_and_dark(written):
    text = (written / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == len(NAMES)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    outside = set(re.findall(r"https?://[^\"]+", text))
    assert outside == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    drawings = text.partition("<body>")[2]
    assert not re.search("#000000|#ffffff", drawings), "black on white is for files"
    assert "currentColor" in drawings
    assert "prefers-color-scheme: dark" in text


def test_the_same_study_is_the_same_report(written, tmp_path):
    write_report(study(LOSSES), tmp_path)
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name
    assert matplotlib.rcParams["svg.fonttype"] == "path", "the style of others was changed"


def test_differences_are_drawn_with_their_intervals():
    one = study(LOSSES)
    found = compare(one)
    axes = draw(one, found)["differences"].axes[0]
    lines = [line.get_xdata() for line in axes.lines]
    for place, variant in enumerate(("gqa", "mla")):
        dots, bar, mean = lines[3 * place : 3 * place + 3]
        expected = [LOSSES[variant][seed] - LOSSES["mha"][seed] for seed in (0, 1, 2)]
        np.testing.assert_allclose(dots, expected)
        np.testing.assert_allclose(bar, found[variant].difference[1:3])
        np.testing.assert_allclose(mean, [interval(expected).mean])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["gqa", "mla"]


def test_the_trained_length_is_marked():
    one = study(LOSSES)
    figure = draw(one, compare(one))["loss_by_position"]
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert [line.get_xdata() for line in dashed] == [[LENGTH, LENGTH]]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["mha", "gqa", "mla", "trained length"]


def test_names_that_matplotlib_would_hide_are_in_the_legend():
    names = ["mha", "_gqa", "$x$", "x" * 60]
    one = study({name: {0: 1.0, 1: 1.1} for name in names})
    figure = draw(one, compare(one))["curves"]
    found = [text.get_text() for text in figure.legends[0].get_texts()]
    assert found == ["mha", "_gqa", r"\$x\$", "x" * 37 + "..."]


def test_speeds_are_bars():
    one = study(LOSSES)
    axes = draw(one, compare(one))["decode_speed"].axes
    widths = [[bar.get_width() for bar in panel.patches] for panel in axes]
    assert widths == [[1_234.5] * 3, [54.321] * 3]


def test_a_band_is_over_the_steps_that_all_seeds_have():
    curves = [
        Curve((1, 2, 4), (10, 20, 40), (5.0, 4.0, 3.0), (2, 4), (6.0, 4.0)),
        Curve((2, 3, 4), (20, 30, 40), (2.0, 9.0, math.inf), (4,), (5.0,)),
    ]
    band = training_band(curves)
    np.testing.assert_allclose(band, [[20, 40], [3, math.nan], [2, math.nan], [4, math.nan]])
    band = validation_band(curves)
    np.testing.assert_allclose(band, [[40], [4.5], [4], [5]])
    assert training_band([]) is None
    assert training_band([curves[0], Curve((5,), (50,), (1.0,))]) is None


def test_long_curves_are_drawn_as_means():
    steps = range(1, 1001)
    losses = tuple(float(step) for step in steps)
    band = training_band([Curve(tuple(steps), tuple(steps), losses)])
    assert band.mean.shape == (100,)
    np.testing.assert_allclose(band.x, band.mean)
    np.testing.assert_allclose(band.mean[:2], [5.5, 15.5])


# --- studies that are not finished -----------------------------------------------------------


def test_a_half_finished_study_says_so_first(tmp_path):
    losses = {"mha": {0: 1.5, 1: 1.6, 2: 1.55}, "gqa": {0: 1.52}, "mla": {}}
    accounts = account("mha"), account("gqa", speeds=(), capacities=())
    write_report(study(losses, accounts=accounts), tmp_path)
    text = (tmp_path / "report.md").read_text()
    top = text.partition("## ")[0]
    assert "> This study is not finished: 4 of 9 runs are done." in top
    assert "Missing: gqa, seed 1, 2; mla, seed 0, 1, 2." in top
    assert "> What it costs is not known yet for mla." in top
    assert "gqa against mha: +0.0200 nats per token with one seed, which shows no spread" in text
    assert "mla is not compared yet" in text
    rows = table(rendered(text), "detectable")
    assert (
        rows[1]
        == ["gqa", "1 of 3", "1.5200", "none: one seed", "+0.0200", "none: one value"] + ["-"] * 2
    )
    assert rows[2] == ["mla", "0 of 3", *["-"] * 6]
    assert table(rendered(text), "training tokens/s")[1] == ["gqa", "15,000", *["-"] * 6]
    assert Page((tmp_path / "report.html").read_text()).rows == rendered(text).rows


def test_a_study_that_has_only_begun(tmp_path):
    write_report(study({"mha": {}, "gqa": {}}, accounts=(), learning_rates={}), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "0 of 2 runs are done" in text
    assert "No curve has been recorded." in text
    assert "## Probes" not in text
    assert not list(tmp_path.glob("*.png"))


def test_a_study_of_its_base_alone(tmp_path):
    write_report(study({"mha": {0: 1.5, 1: 1.6}}), tmp_path)
    assert "There is no variant but the base." in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "differences.png").exists()


def test_a_run_that_diverged_is_no_number(tmp_path):
    losses = {"mha": LOSSES["mha"], "gqa": {0: 1.5, 1: math.nan, 2: 1.6}}
    write_report(study(losses), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "gqa is not compared: 1 of 3 runs of gqa diverged." in text
    rows = table(rendered(text), "detectable")
    assert rows[1] == ["gqa", "3 of 3", "1 diverged", *["-"] * 5]
    assert table(rendered(text), "positions")[0] == ["0 to 127", "2.5067", "-"]
    assert "nan" not in text
