"""Attention and its variants: each is a class of one file, and a line of the table.

docs/add_a_variant.md says how to add one.
"""

from collections.abc import Mapping

from llama_jax.config import ConfigError, ModelConfig
from llama_jax.model.attention.differential import DifferentialAttention
from llama_jax.model.attention.gated import GatedAttention
from llama_jax.model.attention.gated_delta import GatedDelta
from llama_jax.model.attention.grouped_query import GroupedQueryAttention
from llama_jax.model.attention.interface import Attention, read_settings
from llama_jax.model.attention.latent import LatentAttention
from llama_jax.model.attention.scores import SCORES
from sharding.rules import PRESETS, Rules

ATTENTION: dict[str, type[Attention]] = {
    "grouped_query": GroupedQueryAttention,
    "gated": GatedAttention,
    "differential": DifferentialAttention,
    "latent": LatentAttention,
    "gated_delta": GatedDelta,
}

# Fields of ModelConfig that a variant reads only if it says so.
OPTIONAL = (
    *("position", "rotary_fraction", "rope_scaling", "window", "chunk", "keep_first", "sinks"),
    *("score_cap", "qk_norm", "keys_are_values", "shares_kv"),
)


def check(config: ModelConfig) -> None:
    """Refuses a model whose attention is not in the table, or does not read what it is given.

    Raises:
        ConfigError: naming the field and the remedy.
    """
    for place in config.places:
        name = place.attention
        if name not in ATTENTION:
            raise ConfigError(f"no attention is called '{name}': known are {', '.join(ATTENTION)}")
        variant = ATTENTION[name]
        read_settings(place, variant.Settings)
        variant.check(place)
        for field in OPTIONAL:
            if field not in variant.settings and place.differs(field):
                raise ConfigError(f"attention {name} has no {field}: remove model.{field}")


def check_order(config: ModelConfig, devices: int) -> None:
    """Refuses to split the tokens of a row over devices where some layer reads them in order.

    Raises:
        ValueError: naming the attention and the remedy.
    """
    for place in config.places:
        if devices > 1 and ATTENTION[place.attention].recurrent:
            raise ValueError(
                f"attention {place.attention} reads a row's tokens in order: use mesh.context 1"
            )


def rules_for(config: ModelConfig, preset: str, sizes: Mapping[str, int]) -> Rules:
    """The rules of a preset, for a model on a mesh.

    Key heads that the devices of `tensor` cannot share, those of multi-query attention say, are
    whole on each of them, and so is their cache (arXiv 2211.05102, section 3.3).

    Args:
        config: the model.
        preset: a name of PRESETS.
        sizes: mesh axis -> devices along it.
    """
    rules = PRESETS[preset]
    devices = rules.parts("act_kv_heads", sizes)
    if any(place.n_kv_heads % devices for place in config.places):
        return rules.replace(kv_heads=None, act_kv_heads=None)
    return rules


def wanted(config: ModelConfig) -> frozenset[str]:
    """Fields of ModelConfig with which a kernel has to reckon in some layer."""
    found: set[str] = set()
    for place in config.places:
        if not ATTENTION[place.attention].fused:
            found.add("attention")
        if place.position == "alibi":
            found.add("position")
        found |= {field for field in SCORES if place.differs(field)}
    return frozenset(found)
