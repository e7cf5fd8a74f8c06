"""What a study leaves behind: plain records, and the same as JSON.

Losses are in nats per token. A loss that is not finite is that of a run that diverged; JSON says
"nan" or "inf" for it.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import PlainSerializer, TypeAdapter

from llama_jax.data.shards import write_atomic

# JSON has no number for it; read back, the text is that number again.
Loss = Annotated[
    float,
    PlainSerializer(lambda loss: loss if math.isfinite(loss) else str(loss), when_used="json"),
]
BudgetKind = Literal["parameters", "training_flops", "cache_bytes"]

Record = TypeVar("Record")


@dataclass(frozen=True)
class Curve:
    """The losses along a run.

    steps, tokens, losses: after each logged step, the tokens seen by then, and the training loss.
    validation_steps, validation_losses: where validation was done.
    """

    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    losses: tuple[Loss, ...]
    validation_steps: tuple[int, ...] = ()
    validation_losses: tuple[Loss, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.steps) == len(self.tokens) == len(self.losses):
            raise ValueError("a curve needs as many steps as tokens and losses")
        if len(self.validation_steps) != len(self.validation_losses):
            raise ValueError("a curve needs as many validation steps as validation losses")


class Stretch(NamedTuple):
    """Mean loss of the positions first..last (counted from 0, both included) of a row."""

    first: int
    last: int
    loss: Loss


@dataclass(frozen=True)
class SeedResult:
    """One training run.

    seed: of the first parameters and of the order of the data; runs of one seed are compared.
    loss: over all validation batches, after the last step.
    batch_losses: of each validation batch, the same batches in the same order in every run.
    loss_by_position: may reach beyond the length that was trained on.
    train_seconds: of training steps; start, compilation and evaluation left out.
    tokens_per_second: of training, the median along the run.
    probes: {probe: {difficulty: accuracy, 0..1}}.
    probe_places: {probe: {difficulty: {place: accuracy}}}, as `PROBES` names the places of answers.
    """

    variant: str
    seed: int
    learning_rate: float
    loss: Loss
    batch_losses: tuple[Loss, ...]
    curve: Curve
    loss_by_position: tuple[Stretch, ...]
    train_seconds: float
    tokens_per_second: float
    probes: dict[str, dict[str, float]]
    probe_places: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        """Whether the last loss is no number that can be compared."""
        return not math.isfinite(self.loss)


@dataclass(frozen=True)
class Speed:
    """Tokens per second of all rows together.

    context: tokens of a row that were prefilled, and that were in the cache while decoding.
    rows: sequences at a time.
    """

    context: int
    rows: int
    prefill: float
    decode: float


@dataclass(frozen=True)
class Capacity:
    """How many rows of `context` tokens decode within `memory_gib`, as compiled.

    compiled_bytes: what the compiled program takes with that many rows.
    """

    context: int
    memory_gib: float
    largest_batch: int
    compiled_bytes: int


@dataclass(frozen=True)
class Account:
    """What a variant costs.

    description: the settings that differ from the base, as text.
    active_parameters: those that one token passes; fewer than all in a mixture of experts.
    d_ff: as the budget was met with.
    training_flops_per_token: forward and backward, at the sequence length of the study.
    cache_bytes_per_token: of a row of the study's length, by its tokens (windows, once full, and
        states take no more).
    cache_bytes_per_row: that do not grow with the row, of a recurrent state.
    speeds, capacities: by context; empty where not asked for.
    """

    variant: str
    description: str
    parameters: int
    parameters_without_embeddings: int
    active_parameters: int
    d_ff: int
    training_flops_per_token: int
    cache_bytes_per_token: int
    cache_bytes_per_row: int = 0
    speeds: tuple[Speed, ...] = ()
    capacities: tuple[Capacity, ...] = ()


@dataclass(frozen=True)
class Study:
    """Variants against a base, at an equal budget; some runs may still be missing.

    question: what is asked, as text; a blank line begins a paragraph.
    budget: of what every variant is to have as much as the base; empty: of nothing.
    budget_tolerance: largest relative difference to the base's budget that counts as equal.
    variants, seeds: planned, the base among them.
    tokens: of training in each run; sequence_length: of its rows.
    command: that goes on with it, beside the report.
    chances: the accuracy of guessing, {probe: {difficulty: accuracy}}.
    learning_rates: tried before, {variant: {learning rate: loss}}.
    """

    name: str
    title: str
    question: str
    budget: tuple[BudgetKind, ...]
    budget_tolerance: float
    base: str
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    corpus: str
    tokens: int
    sequence_length: int
    device: str
    versions: dict[str, str]
    command: str
    accounts: tuple[Account, ...] = ()
    results: tuple[SeedResult, ...] = ()
    chances: dict[str, dict[str, float]] = field(default_factory=dict)
    learning_rates: dict[str, dict[float, Loss]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.base not in self.variants:
            raise ValueError(f"the base {self.base!r} is not among the variants")
        runs = [(result.variant, result.seed) for result in self.results]
        accounts = [account.variant for account in self.accounts]
        for what, names in (
            ("variant", self.variants),
            ("seed", self.seeds),
            ("run", runs),
            ("account", accounts),
        ):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ValueError(f"{what} {twice[0]!r} is there twice")
        for variant in [*accounts, *(name for name, _ in runs)]:
            if variant not in self.variants:
                raise ValueError(f"{variant!r} is not among the variants of the study")
        for name, seed in runs:
            if seed not in self.seeds:
                raise ValueError(f"seed {seed} of {name!r} is not among the seeds of the study")

    def account(self, variant: str) -> Account | None:
        """The account of a variant, where there is one yet."""
        return next((one for one in self.accounts if one.variant == variant), None)

    def runs(self, variant: str) -> dict[int, SeedResult]:
        """The runs of a variant that are done, by seed, in the order of `seeds`."""
        done = {one.seed: one for one in self.results if one.variant == variant}
        return {seed: done[seed] for seed in self.seeds if seed in done}

    def missing(self) -> list[tuple[str, int]]:
        """Variant and seed of every run that is planned and not done."""
        done = {(one.variant, one.seed) for one in self.results}
        planned = [(variant, seed) for variant in self.variants for seed in self.seeds]
        return [run for run in planned if run not in done]


def write(path: Path, record: Any) -> None:
    """Writes a record as JSON; the file is absent, the old one, or whole, whatever happens."""
    write_atomic(path, TypeAdapter(type(record)).dump_json(record) + b"\n")


def read(path: Path, kind: type[Record]) -> Record:
    """Reads a record that `write` wrote.

    Raises:
        ValueError: the file does not hold such a record.
    """
    return TypeAdapter(kind).validate_json(path.read_bytes())
