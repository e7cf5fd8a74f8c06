"""How the next token is chosen: pure functions on logits, every row with settings of its own.

Settings are arrays, not constants of the compiled program: other settings never compile anew, and
rows of one batch may differ in them.

Nothing is sorted. The k-th largest weight, the weight at which the kept mass passes top_p and the
token that a uniform number falls on are each found by a search over the bits of the answer, from
the highest down: 30 passes over the row for a weight, 15 to 17 for a token. On a CPU that takes a
tenth of the time of a sort.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llama_jax.generate.settings import ALTERNATIVES, SamplingConfig

WEIGHT_BITS = 30  # weights are floats in [0, 1], whose bit patterns are integers below 2**30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Settings:
    """Sampling settings of B rows, each field of shape (B,).

    The fields of SamplingConfig of the same names; temperature 0 takes the likeliest token, top_k
    and no_repeat_ngram 0 are off, logprobs -1 asks for none. seed, index (of the request) and
    answer (which of its answers) decide the draws.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    no_repeat_ngram: jax.Array
    logprobs: jax.Array
    seed: jax.Array
    index: jax.Array
    answer: jax.Array

    @staticmethod
    def of(
        configs: Sequence[SamplingConfig], indices: Sequence[int], answers: Sequence[int]
    ) -> "Settings":
        """Settings of rows from their configs.

        Raises:
            ValueError: an index does not fit 32 bits, the width of jax's random keys.
        """
        outside = [n for n in indices if not 0 <= n < 2**32]
        if outside:
            raise ValueError(f"index {outside[0]} is out of range: use 0 to {2**32 - 1}")
        least, hottest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
        # Below the least normal number devices disagree on what is zero.
        heats = [min(c.temperature, hottest) if c.temperature >= least else 0.0 for c in configs]
        largest = 2**31 - 1
        return Settings(
            temperature=jnp.array(heats, jnp.float32),
            top_k=jnp.array([min(c.top_k, largest) for c in configs], jnp.int32),
            top_p=jnp.array([c.top_p for c in configs], jnp.float32),
            min_p=jnp.array([c.min_p for c in configs], jnp.float32),
            repetition_penalty=jnp.array([c.repetition_penalty for c in configs], jnp.float32),
            presence_penalty=jnp.array([c.presence_penalty for c in configs], jnp.float32),
            frequency_penalty=jnp.array([c.frequency_penalty for c in configs], jnp.float32),
            no_repeat_ngram=jnp.array(
                [min(c.no_repeat_ngram, largest) for c in configs], jnp.int32
            ),
            logprobs=jnp.array(
                [-1 if c.logprobs is None else c.logprobs for c in configs], jnp.int32
            ),
            seed=jnp.array([c.seed for c in configs], jnp.uint32),
            index=jnp.array(indices, jnp.uint32),
            answer=jnp.array(answers, jnp.uint32),
        )

    @staticmethod
    def idle(count: int) -> "Settings":
        """Settings of rows without requests: they ask for no work."""
        return Settings.of([SamplingConfig(temperature=0)] * count, [0] * count, [0] * count)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Report:
    """Log-probabilities of tokens, in the model's own distribution, and of the likeliest ones.

    chosen: (...) fp32. ids, values: (..., ALTERNATIVES), likeliest first.
    """

    chosen: jax.Array
    ids: jax.Array
    values: jax.Array

    @staticmethod
    def empty(shape: tuple[int, ...]) -> "Report":
        """Of tokens that nobody has asked about."""
        some = (*shape, ALTERNATIVES)
        return Report(jnp.zeros(shape), jnp.zeros(some, jnp.int32), jnp.zeros(some))

    def put(self, here_BS: jax.Array, new: "Report") -> "Report":
        """These (B, S) with `new` (B) where here_BS is true."""

        def put(old: jax.Array, value: jax.Array) -> jax.Array:
            here = here_BS.reshape(*here_BS.shape, *(1,) * (old.ndim - 2))
            return jnp.where(here, value[:, None], old)

        return jax.tree.map(put, self, new)


def choose(
    logits_BV: jax.Array,
    settings: Settings,
    tokens_BS: jax.Array,
    lengths_B: jax.Array,
    prompts_B: jax.Array,
) -> tuple[jax.Array, Report]:
    """The next token of every row, (B,) int32, and its log-probability where a row asks for it.

    First `allow`, then `sample`: the order of transformers.

    Args:
        logits_BV: of the token after the last.
        tokens_BS: the rows' texts: of each its first lengths_B tokens, of which prompts_B are the
            prompt.
    """

    def reported(token_B: jax.Array) -> Report:
        return report(logits_BV, token_B)

    def unreported(token_B: jax.Array) -> Report:
        return Report.empty(token_B.shape)

    allowed_BV = allow(logits_BV, settings, tokens_BS, lengths_B, prompts_B)
    token_B = sample(allowed_BV, settings, lengths_B)
    return token_B, lax.cond(jnp.any(settings.logprobs >= 0), reported, unreported, token_B)


def allow(
    logits_BV: jax.Array,
    settings: Settings,
    tokens_BS: jax.Array,
    lengths_B: jax.Array,
    prompts_B: jax.Array,
) -> jax.Array:
    """Logits after what their rows' texts change in them: `penalise`, then `ban_repeats`.

    Args as for `choose`. Work that no row asks for is skipped.
    """

    def penalised(logits_BV: jax.Array) -> jax.Array:
        return penalise(logits_BV, settings, tokens_BS, lengths_B, prompts_B)

    def unrepeated(logits_BV: jax.Array) -> jax.Array:
        return ban_repeats(logits_BV, settings.no_repeat_ngram, tokens_BS, lengths_B)

    def same(logits_BV: jax.Array) -> jax.Array:
        return logits_BV

    changes = (
        (settings.repetition_penalty != 1)
        | (settings.presence_penalty != 0)
        | (settings.frequency_penalty != 0)
    )
    logits_BV = lax.cond(jnp.any(changes), penalised, same, logits_BV)
    return lax.cond(jnp.any(settings.no_repeat_ngram > 0), unrepeated, same, logits_BV)


def penalise(
    logits_BV: jax.Array,
    settings: Settings,
    tokens_BS: jax.Array,
    lengths_B: jax.Array,
    prompts_B: jax.Array,
) -> jax.Array:
    """Logits with the penalties for tokens that have come before.

    The repetition penalty divides positive and multiplies negative logits of every token of the
    text, prompt included (CTRL, arXiv 1909.05858, section 4.1, as transformers computes it). Of
    tokens of the answer, frequency_penalty times their count and, once, presence_penalty are
    subtracted (the OpenAI API's definition).
    """
    V = logits_BV.shape[1]
    places_S = jnp.arange(tokens_BS.shape[1])
    in_text_BS = places_S < lengths_B[:, None]
    in_answer_BS = in_text_BS & (places_S >= prompts_B[:, None])
    seen_BV = _count(tokens_BS, in_text_BS, V) > 0
    counts_BV = _count(tokens_BS, in_answer_BS, V)
    factor_B1 = settings.repetition_penalty[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / factor_B1, logits_BV * factor_B1)
    logits_BV = jnp.where(seen_BV, repeated_BV, logits_BV)
    logits_BV -= settings.frequency_penalty[:, None] * counts_BV
    return logits_BV - settings.presence_penalty[:, None] * (counts_BV > 0)


def ban_repeats(
    logits_BV: jax.Array, n_B: jax.Array, tokens_BS: jax.Array, lengths_B: jax.Array
) -> jax.Array:
    """Logits with -inf for tokens that would end an n-gram the text already has; n = 0: none."""
    V = logits_BV.shape[1]
    places_S = jnp.arange(tokens_BS.shape[1])

    def compare(j: jax.Array, repeats_BS: jax.Array) -> jax.Array:
        """Whether also the j-th token before a place is the j-th last of the text."""
        last_B1 = jnp.take_along_axis(tokens_BS, lengths_B[:, None] - 1 - j, axis=1, mode="clip")
        before_BS = jnp.roll(tokens_BS, j + 1, axis=1)
        same_BS = (before_BS == last_B1) & (places_S > j)
        return repeats_BS & (same_BS | (j >= n_B - 1)[:, None])

    in_text_BS = (places_S < lengths_B[:, None]) & (n_B > 0)[:, None]
    # No text has an n-gram longer than itself: after S comparisons none is left.
    comparisons = jnp.minimum(jnp.max(n_B) - 1, tokens_BS.shape[1])
    repeats_BS = lax.fori_loop(0, comparisons, compare, in_text_BS)
    return jnp.where(_count(tokens_BS, repeats_BS, V) > 0, -jnp.inf, logits_BV)


def report(logits_BV: jax.Array, token_B: jax.Array) -> Report:
    """Log-probabilities of these tokens and of the likeliest ones."""
    log_z_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    chosen_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1) - log_z_B1
    values, ids = lax.top_k(logits_BV, min(ALTERNATIVES, logits_BV.shape[1]))
    missing = ((0, 0), (0, ALTERNATIVES - values.shape[1]))
    values = jnp.pad(values - log_z_B1, missing, constant_values=-jnp.inf)
    return Report(chosen_B1[:, 0], jnp.pad(ids, missing), values)


def _count(tokens_BS: jax.Array, counted_BS: jax.Array, vocab: int) -> jax.Array:
    """How often each id is among a row's counted tokens, (B, V) int32."""

    def row(tokens_S: jax.Array, counted_S: jax.Array) -> jax.Array:
        return jnp.zeros(vocab, jnp.int32).at[tokens_S].add(counted_S.astype(jnp.int32))

    return jax.vmap(row)(tokens_BS, counted_BS)


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


def distribution(logits_BV: jax.Array, settings: Settings) -> jax.Array:
    """The probabilities (B, V) with which `sample` takes each token; for a greedy row 0 and 1."""
    one_BV = jax.nn.one_hot(likeliest(logits_BV), logits_BV.shape[1])
    samples_B = settings.temperature > 0

    def normalised() -> jax.Array:
        w_BV = weights(logits_BV, settings)
        return w_BV / jnp.sum(w_BV, axis=-1, keepdims=True)

    drawn_BV = lax.cond(jnp.any(samples_B), normalised, lambda: one_BV)
    return jnp.where(samples_B[:, None], drawn_BV, one_BV)


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


def uniforms(settings: Settings, positions_B: jax.Array, stream: int = 0) -> jax.Array:
    """The random numbers in [0, 1) of the rows at these positions, (B,) fp32.

    stream: tells apart several draws at one position.
    """

    def uniform(seed: jax.Array, *numbers: jax.Array) -> jax.Array:
        key = functools.reduce(jax.random.fold_in, numbers, jax.random.key(seed))
        return jax.random.uniform(jax.random.fold_in(key, stream) if stream else key)

    return jax.vmap(uniform)(settings.seed, settings.index, settings.answer, positions_B)


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
