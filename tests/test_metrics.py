"""Logs, the live line and peaks."""

import io
import json
import sys
import types

import pytest
from rich.console import Console

from llama_jax.config import CheckpointConfig
from llama_jax.train.metrics import (
    Journal,
    Screen,
    describe,
    duration,
    peak_flops,
    plot_losses,
    read_metrics,
)

CONFIG = CheckpointConfig()


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("cpu", None),
        ("TPU v99", None),
    ],
)
def test_peaks_by_the_names_jax_gives(kind, tera):
    assert peak_flops(kind) == (tera and tera * 1e12)


def test_a_resumed_journal_repeats_no_step(tmp_path):
    with Journal(tmp_path, 0, CONFIG) as journal:
        for step in (9, 10, 20, 30):
            journal.write(step, {"loss": step / 7, "grad_norm": float("nan")})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # as a crash leaves it
    with Journal(tmp_path, 20, CONFIG) as journal:
        journal.write(30, {"loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [9, 10, 20, 30]
    assert lines[1] == {"step": 10, "loss": 10 / 7, "grad_norm": None}
    assert lines[3] == {"step": 30, "loss": 0.5}


def test_a_line_is_readable_at_once(tmp_path):
    with Journal(tmp_path, 0, CONFIG) as journal:
        journal.write(1, {"loss": 2.0})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    calls, logged = [], []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    fake = types.SimpleNamespace(init=lambda **keywords: calls.append(keywords) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        with Journal(tmp_path, step - 1, CONFIG, "llamas") as journal:
            journal.write(step, {"loss": 1.0})
    assert logged == [(1, {"loss": 1.0}), "end", (2, {"loss": 1.0}), "end"]
    assert calls[0] == calls[1]
    assert (calls[0]["project"], calls[0]["resume"]) == ("llamas", "allow")
    assert calls[0]["config"] == CONFIG.model_dump(mode="json")


def test_wandb_absent_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"extra 'track'"):
        Journal(tmp_path, 0, CONFIG, "llamas")


def test_plain_lines_without_a_terminal():
    text = io.StringIO()
    with Screen(0, 100, Console(file=text, force_terminal=False)) as screen:
        screen.step(1, "loss 5", stays=False)
        screen.step(10, "loss 4 [bold]", stays=True)
        screen.say("step 10  validation loss 3")
    assert text.getvalue() == "step 10/100  loss 4 [bold]\nstep 10  validation loss 3\n"


def test_a_live_line_on_a_terminal():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, color_system=None, width=100)
    with Screen(5, 100, console) as screen:
        screen.step(6, "loss 5.0", stays=False)
        screen.say("step 6  validation loss 3")
    assert "6/100 loss 5.0" in text.getvalue()
    assert "step 6  validation loss 3" in text.getvalue()


def test_describe():
    values = {"loss": 5.12345, "learning_rate": 3e-4, "skipped": 0.0}
    assert describe(values, 75) == "loss 5.1235  lr 3.00e-04  1m15s left"
    more = {**values, "tokens_per_second": 12345.6, "mfu": 0.4213, "skipped": 2.0}
    expected = "loss 5.1235  lr 3.00e-04  12,346 tokens/s  MFU 42.1%  skipped 2  2h05m left"
    assert describe(more, 7500) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (185, "3m05s"), (7500, "2h05m"), (273600, "3d04h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_plot_needs_a_loss(tmp_path):
    with Journal(tmp_path, 0, CONFIG) as journal:
        journal.write(1, {"loss": float("nan")})
    assert plot_losses(tmp_path) is None
    with Journal(tmp_path, 1, CONFIG) as journal:
        journal.write(2, {"loss": 3.0})
        journal.write(2, {"validation_loss": 3.5})
    path = plot_losses(tmp_path)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")
