"""From a study to its runs: every variant at the budget, every seed, every trial."""

from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.ablate.budget import Solved, solve
from llama_jax.ablate.settings import AblateConfig
from llama_jax.config import ConfigError, ModelConfig, TrainConfig, parse

RUNS, TRIALS, CORPUS = "runs", "trials", "corpus"
TOKENIZER = "tokenizer/tokenizer.model"
OURS = ("out", "seed", "model")  # of the run's settings, what the study decides


class Variant(NamedTuple):
    """A variant of the study, ready to be trained.

    model: the architecture at the budget.
    values: settings of the run, with out and seed missing.
    changes: what it has otherwise than the base, as text.
    """

    name: str
    model: ModelConfig
    solved: Solved
    values: dict[str, Any]
    changes: str


def variants(config: AblateConfig) -> dict[str, Variant]:
    """Every variant by name, the budget met.

    Raises:
        ConfigError: a variant cannot be, or cannot meet the budget.
    """
    given, base_run = config.parsed, config.run.plain()
    for name in OURS[:2]:
        if name in base_run:
            raise ConfigError(f"run.{name} is decided by the study: remove it")
    if config.corpus is not None:
        base_run["tokenizer"] = str(Path(config.out) / TOKENIZER)
        base_run["data"] = {**base_run.get("data", {}), "sources": [str(Path(config.out) / CORPUS)]}
    written = ModelConfig.spelled_out(base_run.get("model"))
    if not isinstance(written, dict):
        raise ConfigError("run.model is missing: a name of configs/models, or the fields")
    models = {
        name: parse(ModelConfig, _merged(written, one.model.plain()), f"variants.{name}.model")
        for name, one in given.items()
    }
    base = models[config.base_name]
    found = {}
    for name, one in given.items():
        values = _merged(base_run, one.run.plain())
        length = parse_run(config, name, models[name], values, 0).data.sequence_length
        try:
            solved = solve(models[name], base, config.budget, length, one.adjust)
        except ConfigError as error:
            raise ConfigError(f"variants.{name}: {error}") from error
        found[name] = Variant(name, solved.model, solved, values, _described(one, solved))
    return found


def parse_run(
    config: AblateConfig, name: str, model: ModelConfig, values: dict[str, Any], seed: int
) -> TrainConfig:
    """The training run of a variant and a seed."""
    out = Path(config.out) / RUNS / name / str(seed)
    whole = {**values, "model": model.model_dump(mode="json"), "seed": seed, "out": str(out)}
    return parse(TrainConfig, whole, f"variants.{name}")


def training_run(
    config: AblateConfig, variant: Variant, seed: int, rate: float | None = None
) -> TrainConfig:
    """One run of the study; rate: instead of the peak learning rate that the run says."""
    values = variant.values if rate is None else _with_rate(variant.values, rate)
    return parse_run(config, variant.name, variant.model, values, seed)


def trial_run(config: AblateConfig, variant: Variant, rate: float) -> TrainConfig:
    """A short run with a learning rate that is tried."""
    assert config.tuning
    values = {**_with_rate(variant.values, rate), "steps": config.tuning.steps}
    run = parse_run(config, variant.name, variant.model, values, config.tuning.seed)
    out = Path(config.out) / TRIALS / variant.name / f"{rate:g}"
    return run.model_copy(update={"out": str(out)})


def _with_rate(values: dict[str, Any], rate: float) -> dict[str, Any]:
    return _merged(values, {"optimizer": {"peak_lr": rate}})


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The values with others laid over them, section by section."""
    merged = dict(values)
    for key, value in changes.items():
        inner = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if inner else value
    return merged


def _described(one: Any, solved: Solved) -> str:
    """`n_kv_heads 1; d_ff 512`: the changes, then what the budget made of them."""
    changes = [*_words(one.model.plain()), *_words(one.run.plain())]
    adjusted = [f"{name} {value:,}" for name, value in solved.adjusted.items()]
    return (
        "; ".join(part for part in (", ".join(changes), ", ".join(adjusted)) if part) or "as it is"
    )


def _words(values: dict[str, Any], prefix: str = "") -> list[str]:
    words = []
    for key, value in values.items():
        if isinstance(value, dict):
            words += _words(value, f"{prefix}{key}.")
        else:
            words.append(f"{prefix}{key} {value}")
    return words
