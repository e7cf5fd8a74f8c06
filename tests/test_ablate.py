"""Studies: the budget, the runs, what is measured, and how a study that was stopped goes on."""

import math
import shutil

import jax
import pytest
from corpora import sentences
from faults import MODEL
from rich.console import Console

from llama_jax.ablate import command, measure, parity, records
from llama_jax.ablate.budget import amount, solve
from llama_jax.ablate.command import Job, ablate, best_rate, compute_all, probes_asked
from llama_jax.ablate.grid import training_run, trial_run, variants
from llama_jax.ablate.matrix import markdown
from llama_jax.ablate.parity import CELLS, Cell
from llama_jax.ablate.probes import chance
from llama_jax.ablate.probing import probe
from llama_jax.ablate.records import Account, Curve, SeedResult
from llama_jax.ablate.settings import AblateConfig, BudgetConfig, CostConfig, ProbesConfig
from llama_jax.config import ConfigError, ModelConfig, configs_folder, load_model, parse, read
from llama_jax.model.count import n_parameters

MODEL = MODEL | {"n_layers": 2}
RUN = {
    "evaluate_batches": 100,
    "model": MODEL | {"vocab_size": 300},
    "data": {"sequence_length": 32, "batch_size": 4},
    "steps": 6,
    "optimizer": {"peak_lr": 0.01, "warmup_steps": 1},
    "compute": {"loss_chunks": 2},
    "evaluate_every": 3,
    "log_every": 1,
}
ONE_KEY_HEAD = {"n_kv_heads": 1, "qk_norm": True, "pattern": [{"window": 8}, {}]}
EQUAL = {"equal": "parameters"}


def study(out, **changes) -> AblateConfig:
    values = {
        "out": str(out),
        "run": RUN,
        "variants": {"base": {}, "one_key_head": {"model": ONE_KEY_HEAD}},
        "budget": [EQUAL],
        "seeds": [0],
        "evaluation": {"batches": 100},
        "cost": {"contexts": [16], "rows": 2, "rounds": 1, "memory_gib": None},
    }
    return parse(AblateConfig, values | changes, "study.yaml")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of forty documents."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    documents = ["\n".join(sentences(12, seed)) for seed in range(40)]
    path.write_text("\n\n\n".join(documents))
    return {"paths": [str(path)], "vocab_size": 300, "separator": "\n\n\n"}


@pytest.fixture(scope="module")
def done(tmp_path_factory, text):
    """A study that was run to its end, by the command, with a process for each run."""
    config = study(
        tmp_path_factory.mktemp("study"),
        corpus=text | {"validation_fraction": 0.2},
        probes={
            "difficulties": {"induction": 2},
            **{"steps": 2, "rows": 2, "length": 16, "vocab_size": 32, "test_batches": 1},
        },
        jobs=2,
    )
    assert ablate(config) == 0
    return config


# --- the budget ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv_heads", "paper"), [(1, 1.33), (8, 1.3)])
def test_the_width_of_the_paper_is_solved_in_closed_form(kv_heads, paper):
    """LLaMA 33B's shape (arXiv 2307.09288 gives x 1.33 and x 1.3, at an unpublished one of 30B):
    what queries and outputs keep and keys and values lose goes into three matrices."""
    base = load_model("llama_33b")
    grouped = base.model_copy(update={"n_heads": 64, "n_kv_heads": 64, "d_head": 104})
    variant = grouped.model_copy(update={"n_kv_heads": kv_heads})
    found = solve(variant, grouped, [BudgetConfig(equal="parameters")], 2048)
    saved = 2 * base.d_model * 104 * (64 - kv_heads)
    assert found.model.d_ff == round(base.d_ff + saved / (3 * base.d_model))
    assert found.adjusted == {"d_ff": found.model.d_ff}
    half_a_step = 3 * base.d_model * base.n_layers / 2
    assert abs(found.off["parameters"]) <= half_a_step / n_parameters(grouped)
    assert 1.2 < found.model.d_ff / base.d_ff < paper


TINY = parse(ModelConfig, MODEL, "")


@pytest.mark.parametrize(
    ("changes", "budgets", "adjust"),
    [
        ({"n_kv_heads": 1}, [{"equal": "parameters"}], None),
        ({"n_kv_heads": 1}, [{"equal": "training_flops"}], None),
        ({"feed_forward": "relu2"}, [{"equal": "parameters", "step": 4}], None),
        ({"experts": {"count": 4, "per_token": 2}}, [{"equal": "training_flops"}], None),
        (
            {"attention": "latent", "n_kv_heads": TINY.n_heads}
            | {"attention_settings": {"kv_rank": 2, "rope_width": 2}},
            [
                {"equal": "cache_bytes", "adjust": "attention_settings.kv_rank"},
                {"equal": "parameters"},
            ],
            None,
        ),
        ({"attention": "gated_delta"}, [{"equal": "parameters", "adjust": "n_layers"}], "d_ff"),
        ({"pattern": [{"window": 4}, {"n_kv_heads": 1}]}, [{"equal": "parameters"}], None),
    ],
)
def test_no_neighbour_is_nearer_to_the_budget(changes, budgets, adjust):
    variant = parse(ModelConfig, MODEL | changes, "")
    asked = [BudgetConfig(**budget) for budget in budgets]
    found = solve(variant, TINY, asked, 32, adjust)
    for budget in asked:
        wanted = amount(budget.equal, TINY, 32)
        off = abs(amount(budget.equal, found.model, 32) - wanted)
        assert found.off[budget.equal] == amount(budget.equal, found.model, 32) / wanted - 1
        name = adjust or budget.adjust
        for step in (-budget.step, budget.step):
            other = nudged(found.model, name, step)
            assert off <= abs(amount(budget.equal, other, 32) - wanted)
    assert found.model.d_ff % asked[-1].step == 0


def nudged(model: ModelConfig, name: str, step: int) -> ModelConfig:
    section, _, inner = name.partition(".")
    values = model.model_dump(mode="json")
    if inner:
        values[section][inner] += step
    else:
        values[section] += step
    return parse(ModelConfig, values, "")


def test_a_budget_that_cannot_be_met_is_refused():
    wide = TINY.model_copy(update={"n_kv_heads": 1})
    for adjust, message in (
        ("d_f", "no such field"),
        ("attention_settings.kv_rank", "does not give it"),
        ("norm_eps", "does not change parameters"),
    ):
        with pytest.raises(ConfigError, match=message):
            solve(wide, TINY, [BudgetConfig(equal="parameters", adjust=adjust)], 32)
    huge = TINY.model_copy(update={"d_model": 40 * TINY.d_model})
    with pytest.raises(ConfigError, match=r"no d_ff near -\d+ makes parameters"):
        solve(huge, TINY, [BudgetConfig(equal="parameters")], 32)


# --- what is written -------------------------------------------------------------------------


def test_a_variant_is_the_base_run_with_its_changes(tmp_path):
    config = study(
        tmp_path,
        corpus={},
        variants={
            "base": {},
            "short": {"run": {"data": {"sequence_length": 16}}, "model": {"window": 4}},
        },
        tuning={"rates": [0.1, 0.2], "steps": 3},
        seeds=[4, 5],
    )
    found = variants(config)
    base, short = (training_run(config, found[name], 5) for name in ("base", "short"))
    assert (base.data.sequence_length, short.data.sequence_length) == (32, 16)
    assert base.data.batch_size == short.data.batch_size == 4
    assert (base.model.window, short.model.window) == (None, 4)
    assert base.seed == short.seed == 5
    assert base.out != short.out
    assert found["short"].changes == "window 4, data.sequence_length 16"
    trial = trial_run(config, found["short"], 0.2)
    assert (trial.optimizer.peak_lr, trial.steps, trial.seed) == (0.2, 3, 1000)
    assert trial.data == short.data
    assert "trials" in trial.out
    for path in (base.tokenizer, base.data.sources[0].path):
        assert path.startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"a": {"modle": {}}}}, "variants.a: modle: unknown key"),
        ({"variants": {"a": 3}}, "expected model, run or adjust, not 3"),
        ({"variants": {}}, "needs run and variants"),
        ({"base": "c"}, "base is 'c': variants are base, one_key_head"),
        ({"seeds": [1, 1]}, "a seed stands twice"),
        ({"jobs": 3, "devices": ["0", "1"]}, r"jobs \(3\) must be as many as devices \(2\)"),
        ({"tuning": {"rates": [1, 2], "steps": 3, "seed": 0}}, "one of the study's seeds"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        study(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"a": {"model": {"windw": 3}}}}, r"variants.a.model: windw: unknown key"),
        ({"variants": {"a": {"run": {"stps": 3}}}}, r"variants.a: stps: unknown key"),
        ({"run": RUN | {"seed": 3}}, "run.seed is decided by the study"),
        ({"run": {k: v for k, v in RUN.items() if k != "model"}}, "run.model is missing"),
        ({"budget": [{"equal": "parameters", "adjust": "x"}]}, "variants.one_key_head: budget"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        variants(study(tmp_path, corpus={}, **changes))


@pytest.mark.parametrize(
    "path", sorted((configs_folder() / "ablations").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_ready_study_meets_its_budget(path):
    config = read(AblateConfig, path)
    assert config.title != AblateConfig.model_fields["title"].default
    assert config.question
    found = variants(config)
    for variant in found.values():
        assert all(abs(off) < config.tolerance for off in variant.solved.off.values())
    assert probes_asked(config) is not None
    equal = {budget.equal for budget in config.budget}
    if "parameters" in equal:
        counts = [n_parameters(variant.model) for variant in found.values()]
        assert max(counts) < 1.001 * min(counts)
    tokens = {
        (run.steps * run.data.batch_size * run.data.sequence_length)
        for variant in found.values()
        for run in [training_run(config, variant, 0)]
    }
    assert len(tokens) == 1


# --- a study ---------------------------------------------------------------------------------


def results(config: AblateConfig) -> dict[str, SeedResult]:
    root = command.Path(config.out) / command.RUNS
    paths = root.glob("*/*/result.json")
    return {str(path.relative_to(root).parent): records.read(path, SeedResult) for path in paths}


def test_a_study_trains_every_variant_and_reports(done):
    found = results(done)
    assert set(found) == {"base/0", "one_key_head/0"}
    for one in found.values():
        assert one.curve.steps == (1, 2, 3, 4, 5, 6)
        assert one.curve.tokens[-1] == 6 * 4 * 32
        assert one.curve.validation_steps == (3, 6)
        assert one.learning_rate == 0.01
        assert len(one.batch_losses) > 2
        assert 0 < one.loss < math.log(300) + 1
        assert 0 <= one.probes["induction"]["2"] <= 1
        assert one.train_seconds > 0
        of_place = one.probe_places["induction"]["2"]
        assert min(of_place.values()) <= one.probes["induction"]["2"] <= max(of_place.values())
        assert [s.first for s in one.loss_by_position] == [0, 16, 32, 64]
    out = command.Path(done.out)
    text = (out / "report.md").read_text()
    assert "one_key_head" in text
    assert "one seed, which shows no spread" in text
    guess = chance("induction", 16, 32, 2)
    assert f"| induction | 2 | {guess:.1%} |" in text
    accounts = records.read(out / command.ACCOUNTS, tuple[Account, ...])
    assert [account.variant for account in accounts] == ["base", "one_key_head"]
    assert accounts[1].cache_bytes_per_token < accounts[0].cache_bytes_per_token
    for account in accounts:
        assert account.speeds[0].decode > 0
        assert account.capacities == ()


def test_the_final_loss_is_that_of_training(done):
    """Both see all of the validation data."""
    for one in results(done).values():
        assert one.loss == pytest.approx(one.curve.validation_losses[-1], rel=1e-4)


def test_losses_by_position_are_the_final_loss_where_rows_are_as_long(done):
    run = training_run(done, variants(done)["base"], 0)
    asked = done.evaluation.model_copy(update={"longest": 32})
    found = measure.losses(run, 32, asked)
    assert [(s.first, s.last) for s in found.by_position] == [(0, 15), (16, 31)]
    low, high = (s.loss for s in found.by_position)
    assert min(low, high) < found.loss < max(low, high)


def test_a_study_that_is_over_computes_nothing_again(done, monkeypatch):
    monkeypatch.setattr(command, "_start", lambda *_: pytest.fail("a run was started"))
    monkeypatch.setattr(measure, "speeds", lambda *_: pytest.fail("speed was measured"))
    report = command.Path(done.out) / "report.md"
    before = report.read_text()
    report.unlink()
    assert ablate(done) == 0
    assert report.read_text() == before


def test_a_folder_of_another_study_is_refused(done):
    other = parse(AblateConfig, done.model_dump(mode="json") | {"seeds": [0, 1], "jobs": 1}, "")
    command._check_unchanged(other, command.Path(done.out) / command.STUDY)  # more seeds may come
    for changes in ({"run": RUN | {"steps": 7}}, {"budget": []}):
        other = parse(AblateConfig, done.model_dump(mode="json") | changes, "")
        with pytest.raises(ConfigError, match=f"another `{next(iter(changes))}`"):
            ablate(other)


@pytest.mark.optimized  # as the processes of the study compile
def test_a_run_by_itself_is_the_run_of_the_study(done):
    """--only computes it, bit for bit, from the checkpoint that is there or from nothing."""
    folder = command.Path(done.out) / command.RUNS / "base" / "0"
    before = results(done)["base/0"]
    (folder / command.RESULT).unlink()
    only = parse(AblateConfig, done.model_dump(mode="json") | {"only": "base/0"}, "")
    assert ablate(only) == 0
    after = results(done)["base/0"]
    assert after.batch_losses == before.batch_losses
    assert after.curve.losses == before.curve.losses
    wrong = parse(AblateConfig, done.model_dump(mode="json") | {"only": "base/7"}, "")
    with pytest.raises(ConfigError, match=r"the runs are base/0, one_key_head/0"):
        ablate(wrong)


def test_a_study_that_was_stopped_reports_what_there_is(done, tmp_path, monkeypatch):
    """Its runs are those of the finished one, but for one that was never done."""
    part = tmp_path / "study"
    shutil.copytree(done.out, part)
    for name in (command.ACCOUNTS, "report.md", "report.html"):
        (part / name).unlink()
    (part / command.RUNS / "one_key_head" / "0" / command.RESULT).unlink()
    monkeypatch.setattr(command, "CHILD", "import sys; sys.exit(75)")
    stopped = parse(AblateConfig, done.model_dump(mode="json") | {"out": str(part)}, "")
    assert ablate(stopped) == 75
    text = (part / "report.md").read_text()
    assert "This study is not finished: 1 of 2 runs are done" in text
    assert not (part / command.ACCOUNTS).exists()


def test_a_run_that_fails_names_its_log(done, monkeypatch, capsys):
    monkeypatch.setattr(command, "CHILD", "import sys; print('no luck'); sys.exit(3)")
    missing = [Job("base", 9)]
    assert compute_all(done, missing, Console()) == 1
    log = command.Path(done.out) / command.RUNS / "base" / "9" / command.LOG
    assert log.read_text() == "no luck\n"
    assert "base/9 failed" in capsys.readouterr().out
    monkeypatch.setattr(command, "CHILD", "import sys; sys.exit(75)")
    assert compute_all(done, missing, Console()) == 75


def test_runs_at_a_time_have_devices_of_their_own(done, monkeypatch):
    said = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES']); sys.exit(0)"
    monkeypatch.setattr(command, "CHILD", said)
    two = done.model_copy(update={"devices": ("0,1", "2,3"), "jobs": 1})
    jobs = [Job("base", seed) for seed in (10, 11, 12, 13)]
    assert compute_all(two, jobs, Console(quiet=True)) == 0
    root = command.Path(done.out) / command.RUNS / "base"
    found = [(root / str(job.seed) / command.LOG).read_text().strip() for job in jobs]
    assert found[:2] == ["0,1", "2,3"]
    assert set(found[2:]) <= {"0,1", "2,3"}


def test_the_matrix_as_a_document_marks_what_is_too_far_off():
    good = {cell: Cell(1e-6, 2e-5) for cell in CELLS}
    text = markdown({"fine": good, "wrong": good | {"decode": Cell(1e-3, 2e-5)}})
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 4
    assert "**" not in rows[2]
    assert "| **1.0e-03**, allowed 2.0e-05 |" in rows[3]
    assert all(row.count("|") == len(CELLS) + 2 for row in rows)


def test_the_matrix_keeps_the_programs_of_one_variant_at_a_time(monkeypatch):
    """A process may have only so many, and all of them together are more."""
    monkeypatch.setattr(parity, "CELLS", {"cell": lambda case: Cell(0.0, 1.0)})
    done = []
    monkeypatch.setattr(jax, "clear_caches", lambda: done.append("forgotten"))
    done += [name for name, *_ in parity.matrix(["window", "alibi"])]
    assert done.count("forgotten") == 2


def test_the_best_rate_is_that_of_the_lowest_loss(tmp_path):
    config = study(tmp_path, tuning={"rates": [0.1, 0.2, 0.4], "steps": 3})
    with pytest.raises(ConfigError, match=r"trial base/lr0\.1 is missing"):
        best_rate(config, "base")
    for rate, loss in ((0.1, 3.0), (0.2, 2.0), (0.4, math.nan)):
        folder = tmp_path / command.TRIALS / "base" / f"{rate:g}"
        folder.mkdir(parents=True)
        curve = Curve((), (), ())
        result = SeedResult("base", 1000, rate, loss, (), curve, (), 1.0, 1.0, {})
        records.write(folder / command.RESULT, result)
    assert best_rate(config, "base") == 0.2
    assert best_rate(study(tmp_path), "base") is None


def test_the_plan_trains_nothing(tmp_path, capsys):
    config = study(tmp_path / "new", corpus={}, plan=True)
    assert ablate(config) == 0
    shown = capsys.readouterr().out
    assert "one_key_head" in shown
    assert "2 runs of 6 steps" in shown
    assert not (tmp_path / "new").exists()


def test_the_list_names_what_there_is(capsys):
    assert ablate(parse(AblateConfig, {"list": True}, "")) == 0
    shown = capsys.readouterr().out
    for word in ("gated_delta", "kv_rank", "windows_in_turn", "recall", "attention_heads"):
        assert word in shown


# --- probes and costs ------------------------------------------------------------------------


def test_a_probe_can_be_learnt_and_attention_is_needed_for_it():
    """Copying needs to look back: a window of one token cannot."""
    config = parse(ModelConfig, MODEL | {"vocab_size": 300, "n_layers": 2}, "")
    asked = ProbesConfig(
        difficulties={"induction": 4},
        **{"steps": 300, "rows": 32, "length": 16, "vocab_size": 16, "peak_lr": 0.01},
        test_batches=4,
    )
    learnt, _ = probe(config, "induction", 4, 0, asked)
    blind, _ = probe(config.model_copy(update={"window": 1}), "induction", 4, 0, asked)
    assert learnt > 2 * blind


def test_an_unknown_probe_is_refused(tmp_path):
    for difficulties, message in (({"recal": 3}, "no probe is called"), ({"recall": "x"}, "whole")):
        with pytest.raises(ConfigError, match=message):
            probes_asked(study(tmp_path, probes={"difficulties": difficulties}))


def test_the_largest_batch_is_the_largest_power_of_two_that_fits():
    found = measure.capacity(TINY, 64, 0.02)
    rows = found.largest_batch
    assert rows == 2 ** int(math.log2(rows))
    assert found.compiled_bytes == measure.compiled_bytes(TINY, rows, 64) <= 0.02 * 2**30
    assert measure.compiled_bytes(TINY, 2 * rows, 64) > 0.02 * 2**30
    assert measure.capacity(TINY, 64, 1e-9).largest_batch == 0
    fewer_heads = TINY.model_copy(update={"n_kv_heads": 1})
    assert measure.capacity(fewer_heads, 64, 0.02).largest_batch >= rows


def test_speeds_of_every_variant_and_context():
    small = TINY.model_copy(update={"n_layers": 1})
    models = {"a": small, "b": small.model_copy(update={"n_kv_heads": 1})}
    found = measure.speeds(models, CostConfig(contexts=(8, 16), rows=1, rounds=2))
    assert {name: [s.context for s in speeds] for name, speeds in found.items()} == {
        "a": [8, 16],
        "b": [8, 16],
    }
    assert all(s.prefill > 0 and s.decode > 0 for speeds in found.values() for s in speeds)
