"""What `ablate` reads: a base run, variants of it, the budget that they share, what is measured."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llama_jax.config import ConfigError, Frozen, Schema, parse

Name = Annotated[str, Field(pattern=r"^[\w.+-]+$")]


class VariantConfig(Schema):
    """One variant: what it has otherwise than the base run."""

    model: Frozen = Frozen()
    """Fields of the architecture."""
    run: Frozen = Frozen()
    """Fields of the run: data.sequence_length, say, as sections."""
    adjust: str | None = None
    """Field of the architecture that meets the budget, if not the budget's own."""


class BudgetConfig(Schema):
    """What every variant has as much of as the base, and the field that is adjusted for it."""

    equal: Literal["parameters", "training_flops", "cache_bytes"]
    """All parameters; training FLOPs of a token; cache bytes of a row of the training length, by
    its tokens."""
    adjust: str = "d_ff"
    """Field of the architecture, attention_settings.NAME among them, that is solved for."""
    step: int = Field(default=1, gt=0)
    """The field is made a multiple of this."""


class CorpusConfig(Schema):
    """Text to learn from, where there are no prepared shards."""

    paths: tuple[str, ...] = ()
    """Files, folders or globs; empty: the sources of Python's own library."""
    vocab_size: int = Field(default=4096, gt=259)
    """Pieces of the tokenizer that is trained on it."""
    separator: str = ""
    """Plain text: what stands between two documents of a file; empty: a file is one document."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the documents kept for validation."""


class TuningConfig(Schema):
    """Learning rates that are tried for every variant, each in a short run of its own."""

    rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=2)
    """Peak learning rates; that of the lowest validation loss is taken."""
    steps: int = Field(gt=0)
    """Steps of a trial, with a whole schedule."""
    seed: int = Field(default=1000, ge=0)
    """Of the trials; not among the seeds of the study."""


class EvaluationConfig(Schema):
    """How trained models are compared."""

    batches: int = Field(default=16, gt=0)
    """Validation batches of the final loss, the same for all."""
    longest: int | None = Field(default=None, gt=0)
    """Tokens of the rows whose loss is told by position; none: four times the training length."""


class CostConfig(Schema):
    """What is measured of speed and memory, with the variants' own sizes."""

    contexts: tuple[Annotated[int, Field(gt=1)], ...] = (256, 2048)
    """Tokens of a row that speed is measured with, and that the largest batch is told for."""
    rows: int = Field(default=4, gt=0)
    """Rows at a time."""
    rounds: int = Field(default=5, gt=0)
    """Turns of all variants; the median counts."""
    memory_gib: float | None = Field(default=16, gt=0)
    """Memory for the largest batch that decodes, by compiled memory; none: not asked."""


class ProbesConfig(Schema):
    """Generated tasks that each variant learns from nothing, besides the corpus."""

    difficulties: Frozen
    """Probe -> difficulty, or several (`ablate --list` names the probes)."""
    steps: int = Field(default=1000, gt=0)
    """Optimizer steps of each."""
    rows: int = Field(default=32, gt=0)
    """Rows of a batch."""
    length: int = Field(default=128, gt=1)
    """Tokens of a row."""
    vocab_size: int = Field(default=256, gt=8)
    """Ids; the model's vocabulary is made this large."""
    peak_lr: float = Field(default=1e-3, gt=0)
    """Highest learning rate."""
    test_batches: int = Field(default=8, gt=0)
    """Batches that accuracy is measured on."""


class AblateConfig(Schema):
    """Compare variants of a model at an equal budget."""

    out: str = "runs/ablation"
    """Folder of everything; the same command goes on, and writes the report anew."""
    title: str = "Ablation"
    """Heading of the report."""
    question: str = ""
    """What is asked."""
    run: Frozen = Frozen()
    """The base run: settings of `train`, without out and seed; with a corpus, without tokenizer and
    data.sources."""
    corpus: CorpusConfig | None = None
    """Text to make tokenizer and shards of; none: the run names its own."""
    variants: Frozen = Frozen()
    """Name -> model, run, adjust: what it has otherwise than the base run."""
    base: str | None = None
    """The variant that others are compared with, whose budget they keep; none: the first."""
    budget: tuple[BudgetConfig, ...] = ()
    """Met one after the other; empty: variants are as they are."""
    tolerance: float = Field(default=0.01, gt=0)
    """Difference of a budget, as a part of the base's, that counts as equal."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Each trains every variant once: same seed, same data in the same order."""
    tuning: TuningConfig | None = None
    """Learning rates to try for each variant; none: that of the run for all."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How they are compared."""
    cost: CostConfig = CostConfig()
    """What is measured of speed and memory."""
    probes: ProbesConfig | None = None
    """Generated tasks besides."""
    jobs: int = Field(default=1, ge=1)
    """Runs at a time, each a process; speed is measured when they are over."""
    devices: tuple[str, ...] = ()
    """Accelerators of each of the runs at a time, by number: 0 1 2 3 are four runs with one each,
    0,1 2,3 two with two. Empty: every run has all that there are."""
    only: str | None = None
    """Compute one run, VARIANT/SEED, and nothing else: to share a study among machines."""
    plan: bool = False
    """Print the budget and what it will take, and stop."""
    parity: bool = False
    """Compare every variant of configs/variants.yaml with its definition, and print the table."""
    list: bool = False
    """Describe attentions, variants, probes and studies."""

    @model_validator(mode="after")
    def _study_is_complete(self) -> Self:
        if self.parity or self.list:
            return self
        if not self.variants or not self.run:
            raise ValueError(
                "a study needs run and variants: name one of configs/ablations with --config"
            )
        if self.devices and self.jobs not in (1, len(self.devices)):
            raise ValueError(f"jobs ({self.jobs}) must be as many as devices ({len(self.devices)})")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice")
        if self.tuning and self.tuning.seed in self.seeds:
            raise ValueError(f"tuning.seed ({self.tuning.seed}) is one of the study's seeds")
        try:
            names = self.parsed
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if self.base is not None and self.base not in names:
            raise ValueError(f"base is '{self.base}': variants are {', '.join(names)}")
        return self

    @property
    def parsed(self) -> dict[str, VariantConfig]:
        """The variants by name. Raises ConfigError naming what is wrong."""
        return {
            name: parse(VariantConfig, _plain(value), f"variants.{name}")
            for name, value in self.variants.items()
        }

    @property
    def base_name(self) -> str:
        """The variant that others are compared with."""
        return self.base or next(iter(self.variants))


def _plain(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Frozen):
        raise ConfigError(f"expected model, run or adjust, not {value!r:.80}")
    return value.plain()
