"""An equal budget, solved for: the width that gives a variant as much as the base has.

As Llama 2's authors did, who made the feed-forward layers of MQA and GQA wider until all three had
as many parameters (arXiv 2307.09288, appendix A.2.1).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from llama_jax.ablate.settings import BudgetConfig
from llama_jax.config import ConfigError, ModelConfig, parse
from llama_jax.model.count import cache_bytes_per_row, flops_per_token, n_parameters

NEAR = 3  # steps on either side of the straight line's answer that are tried


class Solved(NamedTuple):
    """A variant that keeps the budget.

    adjusted: field -> the value that it was given, where the variant did not keep the budget.
    off: kind of budget -> how far it is from the base's, in parts of that.
    """

    model: ModelConfig
    adjusted: dict[str, int]
    off: dict[str, float]


def amount(kind: str, model: ModelConfig, length: int) -> int:
    """How much a model has of a budget: parameters, training FLOPs of a token, or cache bytes of a
    row of this length, per token (bf16)."""
    match kind:
        case "parameters":
            return n_parameters(model)
        case "training_flops":
            return flops_per_token(model, length)
        case _:
            return cache_bytes_per_row(model, length) // length


def solve(
    model: ModelConfig,
    base: ModelConfig,
    budgets: Sequence[BudgetConfig],
    length: int,
    adjust: str | None = None,
) -> Solved:
    """The variant with as much of each budget as the base, one budget after the other.

    Args:
        model: the variant as it is written.
        base: whose budget it is.
        budgets: what is equal, and by which field.
        length: tokens of a row, for FLOPs and cache.
        adjust: the field, if not the budgets' own.

    Raises:
        ConfigError: the field does not exist, or does not change the budget.
    """
    adjusted = {}
    for budget in budgets:
        name = adjust or budget.adjust
        wanted = amount(budget.equal, base, length)
        if amount(budget.equal, model, length) != wanted:
            model = _nearest(model, name, budget, wanted, length)
            adjusted[name] = int(_get(model, name))
    off: dict[str, float] = {
        budget.equal: amount(budget.equal, model, length) / amount(budget.equal, base, length) - 1
        for budget in budgets
    }
    return Solved(model, adjusted, off)


def _nearest(
    model: ModelConfig, name: str, budget: BudgetConfig, wanted: int, length: int
) -> ModelConfig:
    """The model whose field brings it nearest. Budgets grow in a straight line with a width."""
    now, step = int(_get(model, name)), budget.step
    here = amount(budget.equal, model, length)
    further = None
    for other in (2 * now, now + step, 3 * now, 4 * now):  # heads must divide each other
        further = _with(model, name, other)
        if further is not None:
            slope = (amount(budget.equal, further, length) - here) / (other - now)
            break
    if further is None or slope <= 0:
        raise ConfigError(
            f"{name} ({now}) does not change {budget.equal}, or cannot be larger: give another "
            "field in adjust"
        )
    middle = round((now + (wanted - here) / slope) / step)
    tried = [
        candidate
        for n in range(middle - NEAR, middle + NEAR + 1)
        if n > 0 and (candidate := _with(model, name, n * step)) is not None
    ]
    if not tried:
        raise ConfigError(
            f"no {name} near {middle * step} makes {budget.equal} {wanted:,}: the variant has "
            f"{here:,} with {now}; give another field in adjust"
        )
    return min(tried, key=lambda m: abs(amount(budget.equal, m, length) - wanted))


def _get(model: ModelConfig, name: str) -> Any:
    """A field, or one of attention_settings."""
    section, _, inner = name.partition(".")
    if section not in ModelConfig.model_fields:
        raise ConfigError(f"budget.adjust is {name}: the architecture has no such field")
    value = getattr(model, section)
    if inner and inner not in value:
        raise ConfigError(f"budget.adjust is {name}: the variant does not give it")
    return value[inner] if inner else value


def _with(model: ModelConfig, name: str, value: int) -> ModelConfig | None:
    """The model with another value, if it can have that."""
    section, _, inner = name.partition(".")
    changed: Any = {**getattr(model, section).plain(), inner: value} if inner else value
    try:
        return parse(ModelConfig, {**model.model_dump(mode="json"), section: changed}, "")
    except ConfigError:
        return None
