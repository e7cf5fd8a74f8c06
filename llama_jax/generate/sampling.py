"""How the next token is chosen: pure functions on logits, every row with settings of its own.

Settings are arrays, not constants of the compiled program: other settings never compile anew, and
rows of one batch may differ in them.

Nothing is sorted. The k-th largest weight, the weight at which the kept mass passes top_p and the
token that a uniform number falls on are each found by a search over the bits of the answer, from
the highest down: 30 passes over the row for a weight, 15 to 17 for a token. On a CPU that takes a
tenth of the time of a sort.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llama_jax.config import SamplingConfig

WEIGHT_BITS = 30  # weights are floats in [0, 1], whose bit patterns are integers below 2**30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Settings:
    """Sampling settings of B rows, each field of shape (B,).

    temperature (0: the likeliest token), top_k (0: all), top_p and min_p are as in SamplingConfig.
    seed, and index (which answer to that seed the row is), decide the row's draws.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    index: jax.Array

    @staticmethod
    def of(configs: Sequence[SamplingConfig], indices: Sequence[int]) -> "Settings":
        """Settings of rows from their configs.

        Raises:
            ValueError: a seed or an index does not fit 32 bits, the width of jax's random keys.
        """
        seeds = [c.seed for c in configs]
        for name, numbers in (("seed", seeds), ("index", indices)):
            outside = [n for n in numbers if not 0 <= n < 2**32]
            if outside:
                raise ValueError(f"{name} {outside[0]} is out of range: use 0 to {2**32 - 1}")
        least, hottest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
        # Below the least normal number devices disagree on what is zero.
        heats = [min(c.temperature, hottest) if c.temperature >= least else 0.0 for c in configs]
        return Settings(
            temperature=jnp.array(heats, jnp.float32),
            top_k=jnp.array([min(c.top_k, 2**31 - 1) for c in configs], jnp.int32),
            top_p=jnp.array([c.top_p for c in configs], jnp.float32),
            min_p=jnp.array([c.min_p for c in configs], jnp.float32),
            seed=jnp.array(seeds, jnp.uint32),
            index=jnp.array(indices, jnp.uint32),
        )


def sample(logits_BV: jax.Array, settings: Settings, positions_B: jax.Array) -> jax.Array:
    """The tokens that come at `positions_B`: (B,) int32.

    A row's choice depends on its logits, settings and position alone, not on the rows beside it.
    Work that no row asks for is skipped.
    """
    likeliest_B = likeliest(logits_BV)
    samples_B = settings.temperature > 0

    def drawn() -> jax.Array:
        return draw(weights(logits_BV, settings), uniforms(settings, positions_B))

    drawn_B = lax.cond(jnp.any(samples_B), drawn, lambda: likeliest_B)
    return jnp.where(samples_B, drawn_B, likeliest_B)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """argmax along the vocabulary, (B,) int32; of equals the lowest id, a valid id even for NaN.

    As two reductions, because XLA's argmax takes three times as long on a CPU.
    """
    V = logits_BV.shape[1]
    peak_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    ids = jnp.arange(V, dtype=jnp.int32)
    return jnp.min(jnp.where(logits_BV == peak_B1, ids, V - 1), axis=-1)


def weights(logits_BV: jax.Array, settings: Settings) -> jax.Array:
    """Weights (B, V) of the tokens, in (0, 1] and relative to the likeliest; 0 for those cut.

    Temperature first, then top-k, then top-p of what top-k left, then min-p.
    """
    heat_B = jnp.where(settings.temperature > 0, settings.temperature, 1.0)
    peak_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    # The peak is subtracted before dividing: a tiny temperature would overflow otherwise.
    w = jnp.exp((logits_BV.astype(jnp.float32) - peak_B1) / heat_B[:, None])
    w = lax.cond(jnp.any(settings.top_k > 0), keep_top_k, lambda w, _: w, w, settings.top_k)
    w = lax.cond(jnp.any(settings.top_p < 1), keep_top_p, lambda w, _: w, w, settings.top_p)
    return jnp.where(w >= settings.min_p[:, None], w, 0.0)


def keep_top_k(w_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    """Weights with all but the k largest zeroed; k = 0 keeps all. Of equals the lowest ids stay."""
    V = w_BV.shape[1]
    k_B = jnp.where(k_B > 0, jnp.minimum(k_B, V), V)

    def at_least_k(bits_B: jax.Array) -> jax.Array:
        return jnp.sum(w_BV >= _weight(bits_B), axis=-1) >= k_B

    least_B1 = _weight(_largest(at_least_k, WEIGHT_BITS, k_B))
    return _keep(w_BV, least_B1, k_B - jnp.sum(w_BV > least_B1, axis=-1))


def keep_top_p(w_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Weights with all but the nucleus zeroed (Holtzman et al., arXiv 1904.09751, section 3.1).

    Walking down from the largest, a token is kept as long as the mass before it is at most p of the
    whole: the token that crosses p stays. p = 1 keeps all. Of equals the lowest ids stay.
    """
    V = w_BV.shape[1]
    # p = 1 has no limit: two sums of one row may differ in their last bits, which would cut tails.
    limit_B = jnp.where(p_B < 1, p_B * jnp.sum(w_BV, axis=-1), jnp.inf)

    def passes_limit(bits_B: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(w_BV >= _weight(bits_B), w_BV, 0.0), axis=-1) > limit_B

    least_B1 = _weight(_largest(passes_limit, WEIGHT_BITS, limit_B))
    above_B = jnp.sum(jnp.where(w_BV > least_B1, w_BV, 0.0), axis=-1)
    equals_B = jnp.clip(jnp.floor((limit_B - above_B) / least_B1[:, 0]) + 1, 1, V)
    return _keep(w_BV, least_B1, equals_B)


def draw(w_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """One token for each row, (B,) int32, with probability proportional to its weight.

    The row's mass is laid out in order of ids; the token on which uniform x mass falls is drawn. A
    token of weight 0 never is.
    """
    V = w_BV.shape[1]
    ids = jnp.arange(V, dtype=jnp.int32)
    target_B = uniform_B * jnp.sum(w_BV, axis=-1)

    def begins_before(token_B: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(ids < token_B[:, None], w_BV, 0.0), axis=-1) <= target_B

    token_B = _largest(begins_before, V.bit_length(), target_B)
    # The same difference of sums could put the target past the end.
    return jnp.minimum(token_B, jnp.max(jnp.where(w_BV > 0, ids, 0), axis=-1))


def uniforms(settings: Settings, positions_B: jax.Array) -> jax.Array:
    """The random numbers in [0, 1) of the rows at these positions, (B,) fp32."""

    def uniform(seed: jax.Array, index: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.uniform(jax.random.fold_in(key, position))

    return jax.vmap(uniform)(settings.seed, settings.index, positions_B)


def _keep(w_BV: jax.Array, least_B1: jax.Array, equals_B: jax.Array) -> jax.Array:
    """The weights above `least`, and the first `equals` of those equal to it; 0 elsewhere."""
    equal = w_BV == least_B1

    def first() -> jax.Array:
        return equal & (jnp.cumsum(equal, axis=-1) <= equals_B[:, None])

    crowded = jnp.any(jnp.sum(equal, axis=-1) > equals_B)
    return jnp.where((w_BV > least_B1) | lax.cond(crowded, first, lambda: equal), w_BV, 0.0)


def _weight(bits_B: jax.Array) -> jax.Array:
    """(B, 1): the fp32 numbers with these bit patterns, which for positive ones rise together.

    Nothing below the least normal number: zeros need no cutting, and are not counted as equals.
    """
    numbers_B = lax.bitcast_convert_type(bits_B, jnp.float32)
    return jnp.maximum(numbers_B, jnp.finfo(jnp.float32).tiny)[:, None]


def _largest(holds: Callable[[jax.Array], jax.Array], bits: int, like_B: jax.Array) -> jax.Array:
    """For each row the largest integer below 2**bits at which `holds` is true, (B,) int32.

    `holds` maps (B,) integers to (B,) bools; it must be true up to some integer and false beyond.
    Where it is true nowhere, 0.
    """

    def decide_bit(i: jax.Array, found_B: jax.Array) -> jax.Array:
        candidate_B = found_B | (1 << (bits - 1 - i))
        return jnp.where(holds(candidate_B), candidate_B, found_B)

    return lax.fori_loop(0, bits, decide_bit, jnp.zeros_like(like_B, jnp.int32))
