"""Choosing tokens: every filter against a plain sort, draws against their probabilities."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llama_jax.generate.sampling import (
    Settings,
    ban_repeats,
    draw,
    keep_top_k,
    keep_top_p,
    likeliest,
    sample,
    uniforms,
    weights,
)
from llama_jax.generate.settings import ALTERNATIVES, SamplingConfig

V = 97
ROWS = 32  # of nearly all tests, which so share two compiled programs
compiled_sample, compiled_weights = jax.jit(sample), jax.jit(weights)


def logits_of(rows: int = ROWS, seed: int = 0) -> jax.Array:
    return 3 * jax.random.normal(jax.random.key(seed), (rows, V))


def settings_of(*configs: SamplingConfig) -> Settings:
    """The configs over and over for ROWS rows, which are numbered."""
    rows = [configs[row % len(configs)] for row in range(ROWS)]
    return Settings.of(rows, range(ROWS), [0] * ROWS)


def reference_weights(logits_V: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """The same filters by sorting, in float64."""
    w = np.exp((logits_V.astype(np.float64) - logits_V.max()) / config.temperature)
    w = reference_top_k(w, config.top_k)
    w = reference_top_p(w, config.top_p)
    return np.where(w >= config.min_p * w.max(), w, 0)


def reference_top_k(w: np.ndarray, k: int) -> np.ndarray:
    order = np.argsort(-w, kind="stable")
    kept = np.zeros_like(w)
    kept[order[: k or len(w)]] = w[order[: k or len(w)]]
    return kept


def reference_top_p(w: np.ndarray, p: float) -> np.ndarray:
    order = np.argsort(-w, kind="stable")
    probabilities = w[order] / w.sum()
    before = np.cumsum(probabilities) - probabilities
    kept = np.zeros_like(w)
    kept[order] = np.where((before <= p) | (p == 1), w[order], 0)
    return kept


CONFIGS = [
    SamplingConfig(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 0.9, 0.0),
        (1.0, 1, 1.0, 0.0),
        (1.0, 5, 1.0, 0.0),
        (2.0, V, 1.0, 0.0),
        (2.0, 10 * V, 1.0, 0.0),
        (1.0, 0, 1e-9, 0.0),
        (1.5, 0, 0.5, 0.0),
        (1.5, 0, 0.999999, 0.0),
        (1.0, 0, 1.0, 0.1),
        (1.0, 0, 1.0, 1.0),
        (3.0, 40, 0.8, 0.05),
        (0.05, 40, 0.8, 0.05),
    ]
]


def test_filters_match_a_sort_row_by_row() -> None:
    logits = logits_of()
    w = np.asarray(compiled_weights(logits, settings_of(*CONFIGS)))
    for row in range(ROWS):
        config = CONFIGS[row % len(CONFIGS)]
        expected = reference_weights(np.asarray(logits[row]), config)
        np.testing.assert_array_equal(w[row] > 0, expected > 0, err_msg=str(config))
        np.testing.assert_allclose(w[row], expected, rtol=1e-5, err_msg=str(config))


# Dyadic and 4 in sum, so that a limit can be met exactly.
TIED = np.array([0.25, 1, 0.5, 0.25, 0, 0.5, 0.25, 0.125, 0.125, 0.5, 0.5], np.float32)


@pytest.mark.parametrize("k", range(len(TIED) + 1))
def test_top_k_keeps_exactly_k_and_of_equals_the_lowest_ids(k: int) -> None:
    kept = keep_top_k(jnp.asarray(TIED[None]), jnp.array([k]))[0]
    np.testing.assert_array_equal(kept, reference_top_k(TIED, k))


# In 32nds: limits on the border between tokens, on both sides of one, and among equals.
@pytest.mark.parametrize("part", [0.01, 7.9, 8, 8.1, 12, 16, 17, 20, 24, 25, 26, 30, 31, 31.9, 32])
def test_top_p_keeps_the_token_that_crosses_and_of_equals_the_lowest_ids(part: float) -> None:
    kept = keep_top_p(jnp.asarray(TIED[None]), jnp.array([part / 32], jnp.float32))[0]
    np.testing.assert_array_equal(kept, reference_top_p(TIED, part / 32))


def test_equal_logits_are_cut_to_size() -> None:
    flat = jnp.zeros((ROWS, V))
    configs = [
        SamplingConfig(temperature=1, top_k=7, top_p=1),
        SamplingConfig(temperature=1, top_p=0.5),  # 48 tokens do not reach it, the 49th does
        SamplingConfig(temperature=1, top_p=1, min_p=1),
    ]
    kept = compiled_weights(flat, settings_of(*configs))[:3] > 0
    assert [np.flatnonzero(row).tolist() for row in kept] == [
        list(range(7)),
        list(range(49)),
        list(range(V)),
    ]


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1], CONFIGS[11]], ids=str)
@pytest.mark.parametrize("vary", ["index", "answer", "position", "seed"])
def test_draws_are_as_frequent_as_their_probabilities(config: SamplingConfig, vary: str) -> None:
    n = 6_000
    logits = jnp.broadcast_to(logits_of(1), (n, V)) / 2
    running, still = jnp.arange(n), jnp.full(n, 7)
    settings = jax.tree.map(lambda x: jnp.repeat(x, n), Settings.of([config], [0], [0]))
    parts = dict.fromkeys(("seed", "index", "answer", "position"), still) | {vary: running}
    position = parts.pop("position")
    settings = replace(settings, **{name: x.astype(jnp.uint32) for name, x in parts.items()})
    drawn = compiled_sample(logits, settings, position)

    w = reference_weights(np.asarray(logits[0]), config)
    counts, expected = np.bincount(drawn, minlength=V), n * w / w.sum()
    assert counts[w == 0].sum() == 0
    rare = expected < 5  # too few for the chi-square approximation: pooled
    if rare.sum() > 1:
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_a_row_draws_alone_what_it_draws_among_others() -> None:
    configs = [*CONFIGS, SamplingConfig(temperature=0)]
    logits, positions = np.asarray(logits_of(seed=3)), np.arange(ROWS) * 5
    together = compiled_sample(logits, settings_of(*configs), positions)
    for row, config in enumerate(configs):
        only = slice(row, row + 1)
        alone = compiled_sample(logits[only], Settings.of([config], [row], [0]), positions[only])
        assert alone.item() == together[row], config


def test_seed_index_answer_and_position_each_change_the_draw() -> None:
    def uniform(seed: int, index: int, answer: int, position: int) -> float:
        settings = Settings.of([SamplingConfig(seed=seed)], [index], [answer])
        return uniforms(settings, jnp.array([position])).item()

    # (seed, index) and (index, seed) are different streams, which adding them up would not give.
    of_four = list(itertools.product((0, 1), repeat=4))
    assert len({uniform(*numbers) for numbers in of_four}) == len(of_four)
    largest = (2**32 - 1, 2**32 - 1, 2**32 - 1, 5)
    assert uniform(*largest) == uniform(*largest)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=0, top_k=50, top_p=0.9, min_p=0.1),
        SamplingConfig(temperature=1e-300, top_p=1),
        SamplingConfig(temperature=1, top_k=1, top_p=1),
        SamplingConfig(temperature=1, top_p=1e-9),
    ],
    ids=str,
)
def test_settings_that_leave_one_token_are_argmax(config: SamplingConfig) -> None:
    logits = logits_of().at[:, 40].set(99.0).at[:, 60].set(99.0)  # of equals the first
    chosen = compiled_sample(logits, settings_of(config), jnp.arange(ROWS))
    assert chosen.tolist() == [40] * ROWS


def test_the_likeliest_token_is_numpy_s_argmax() -> None:
    logits = np.round(np.asarray(logits_of(64)))  # many equals
    np.testing.assert_array_equal(likeliest(jnp.asarray(logits)), np.argmax(logits, axis=-1))
    assert 0 <= likeliest(jnp.full((1, V), jnp.nan)).item() < V


def test_a_tiny_temperature_is_argmax_without_overflow() -> None:
    configs = [SamplingConfig(temperature=t, top_p=1) for t in (1e-37, 1e-30, 1e-6)]
    logits = 1e4 * logits_of()
    chosen = compiled_sample(logits, settings_of(*configs), jnp.arange(ROWS))
    assert chosen.tolist() == jnp.argmax(logits, axis=-1).tolist()


def test_the_hottest_temperature_is_flat() -> None:
    w = compiled_weights(logits_of(), settings_of(SamplingConfig(temperature=1e300, top_p=1)))
    np.testing.assert_allclose(w, 1, rtol=1e-6)


def test_draw_never_leaves_the_kept_tokens() -> None:
    w = np.zeros((2, V), np.float32)
    w[:, [3, 50, 90]] = 1e-3, 1, 1e-3
    # 1 stands for a target that rounding has put at the very end, or past it.
    assert draw(jnp.asarray(w), jnp.array([0.0, 1.0])).tolist() == [3, 90]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = jnp.where(jnp.arange(V) % 2 == 0, -jnp.inf, logits_of())
    settings = settings_of(SamplingConfig(temperature=1e3, top_p=1))
    for position in range(10):
        chosen = compiled_sample(logits, settings, jnp.full(ROWS, position))
        assert all(token % 2 for token in chosen.tolist())


def test_other_settings_do_not_compile_anew() -> None:
    logits, positions = logits_of(), jnp.arange(ROWS)
    program = compiled_sample.lower(logits, settings_of(CONFIGS[0]), positions).compile()
    for config in (*CONFIGS, SamplingConfig(temperature=0)):
        program(logits, settings_of(config), positions)  # raises where it does not fit


@pytest.mark.parametrize("index", [-1, 2**32, 2**63])
def test_random_keys_that_do_not_fit_are_refused(index: int) -> None:
    with pytest.raises(ValueError, match=rf"index {index} is out of range"):
        Settings.of([SamplingConfig()], [index], [0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", v) for v in (-1.0, float("nan"), float("inf"), "hot", None)],
        *[("top_k", v) for v in (-5, 1.5, None)],
        *[("top_p", v) for v in (0, -0.1, 2, float("nan"))],
        *[("min_p", v) for v in (-0.1, 1.1, float("nan"))],
        *[("max_new_tokens", v) for v in (0, -1, 0.5)],
        *[("seed", v) for v in (-1, 0.5, 2**32, 2**63)],
        *[("n", v) for v in (0, -1, 1.5)],
        *[("num_beams", v) for v in (0, 65)],
        *[("logprobs", v) for v in (-1, ALTERNATIVES + 1)],
        *[("repetition_penalty", v) for v in (0, -1.0, float("nan"))],
        *[("presence_penalty", v) for v in (float("nan"), float("inf"))],
        *[("frequency_penalty", v) for v in (float("nan"), float("-inf"))],
        ("no_repeat_ngram", -1),
    ],
)
def test_nonsense_settings_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingConfig(**{field: value})


def test_an_n_gram_longer_than_any_text_bans_nothing_and_takes_no_time() -> None:
    slots = 2048  # a comparison for each of 2**31 - 1 tokens would take hours
    row = jnp.arange(slots) % 2 + 7
    logits, lengths = logits_of(2), jnp.array([slots, slots])
    for n in (slots, slots + 1, slots + 2, 2**31 - 1):
        allowed = ban_repeats(logits, jnp.array([2, n]), jnp.stack([row, row]), lengths)
        assert np.flatnonzero(np.isinf(allowed[0])).tolist() == [7]
        np.testing.assert_array_equal(allowed[1], logits[1])
