"""Speculative decoding: greedy answers unchanged, sampled ones distributed as without the draft."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llama_jax.config import ModelConfig
from llama_jax.generate.batch import answer
from llama_jax.generate.decode import Reason, Rows
from llama_jax.generate.request import Answer, Request
from llama_jax.generate.sampling import Report, Settings
from llama_jax.generate.settings import SamplingConfig
from llama_jax.generate.speculative import Draft, SpeculativeDecoder, accept, excess, grow
from llama_jax.model.llama import Llama
from llama_jax.model.stack import Params, unstack
from sharding.mesh import make_mesh
from sharding.partition import shardings
from sharding.rules import PRESETS

CONFIG = ModelConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_head=8,
    d_ff=64,
    vocab_size=24,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    tie_embeddings=False,
)
MODEL = Llama(CONFIG)
SMALLER = Llama(CONFIG.model_copy(update={"n_layers": 1, "n_heads": 2, "d_ff": 32}))
ENDS = (4, 11)
PENALISED = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12], [9, 8, 9, 8], [3], [4, 4, 4], [1, 1], [6, 5]]


@functools.cache
def make(model: Llama, seed: int) -> Params:
    """Random parameters whose distributions are far from flat."""
    params = jax.jit(model.init)(jax.random.key(seed))
    return {**params, "head": 3 * params["head"]}


@pytest.fixture(scope="module")
def params() -> Params:
    return make(MODEL, 1)


@pytest.fixture(scope="module")
def near(params: Params) -> Params:
    """Parameters near those of the model: a good draft, but not a perfect one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32) * jnp.std(x), params
    )


def without_rounds(answers: list[list[Answer]]) -> list[list[Answer]]:
    return [[replace(one, rounds=None) for one in group] for group in answers]


# --- greedy --------------------------------------------------------------------------------------

KINDS = [
    {},
    PENALISED,
    {"no_repeat_ngram": 2},
    {"no_repeat_ngram": 1, "max_new_tokens": 9},
    {"max_new_tokens": 1},
    {"max_new_tokens": 2, **PENALISED},
    {"max_new_tokens": 7},
    {"no_repeat_ngram": 3, "max_new_tokens": 8, **PENALISED},
]


def greedy_requests(ends: tuple[int, ...]) -> list[Request]:
    """All prompts with all kinds of settings, each with its own."""
    return [
        Request(prompt, SamplingConfig(temperature=0, **{"max_new_tokens": 10, **kind}), ends, i)
        for i, (prompt, kind) in enumerate(itertools.product(PROMPTS, KINDS))
    ]


@pytest.mark.parametrize("kind", ["itself", "near", "smaller"])
def test_greedy_answers_are_those_of_the_model_alone(
    params: Params, near: Params, kind: str
) -> None:
    drafts = {"itself": Draft(MODEL, params, 3), "near": Draft(MODEL, near, 3)}
    draft = drafts.get(kind) or Draft(SMALLER, make(SMALLER, 5), 3)
    requests = greedy_requests(ENDS)
    # Fewer rows than requests: a row is given to the next while others are amid their rounds.
    expected = answer(MODEL, params, requests, batch_size=8)
    found = answer(MODEL, params, requests, batch_size=8, draft=draft)
    assert without_rounds(found) == expected
    assert {one.finish_reason for group in found for one in group} == {"eos", "length"}
    ones = [group[0] for group in found]
    tokens, rounds = sum(len(one.tokens) for one in ones), sum(one.rounds or 0 for one in ones)
    print(f"{kind}: {tokens} tokens in {rounds} rounds")
    for request, one in zip(requests, ones, strict=True):
        drawn = len(one.tokens) + (one.finish_reason == "eos")
        assert one.rounds is not None
        assert -(-drawn // 4) <= one.rounds <= drawn
        if kind == "itself":  # everything is accepted: each round gives k + 1 tokens
            assert one.rounds == -(-drawn // 4), request


def test_the_log_probabilities_are_those_of_the_model(params: Params, near: Params) -> None:
    config = SamplingConfig(temperature=0, max_new_tokens=10, logprobs=3, **PENALISED)
    requests = [Request(prompt, config, ENDS, i) for i, prompt in enumerate(PROMPTS)]
    expected = answer(MODEL, params, requests)
    found = answer(MODEL, params, requests, draft=Draft(MODEL, near, 3))
    for (one,), (other,) in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs is not None
        assert other.logprobs is not None
        for report, plain in zip(one.logprobs, other.logprobs, strict=True):
            assert abs(report.logprob - plain.logprob) < 1e-5
            assert [i for i, _ in report.likeliest] == [i for i, _ in plain.likeliest]


def test_prompts_of_any_length_go_to_both_models(params: Params) -> None:
    """The model as its own draft: all is accepted only if the draft has seen the whole prompt."""
    rng = np.random.default_rng(0)
    # Three answers to each prompt: its context is copied, for both.
    greedy = SamplingConfig(temperature=0, max_new_tokens=8, n=3)
    requests = [Request(rng.integers(0, 24, length).tolist(), greedy) for length in (1, 2, 40, 130)]
    found = answer(MODEL, params, requests, draft=Draft(MODEL, params, 3), batch_size=8)
    assert [[one.rounds for one in group] for group in found] == [[2, 2, 2]] * 4
    assert without_rounds(found) == answer(MODEL, params, requests, batch_size=8)


# --- distributions -------------------------------------------------------------------------------

V, LENGTH = 5, 4  # all 625 texts are enumerated
SMALL = CONFIG.model_copy(update={"vocab_size": V, "n_layers": 1, "d_model": 16, "d_ff": 16})
TINY = Llama(SMALL)
ROWS = 1 << 14

SAMPLED = [
    SamplingConfig(temperature=1, top_p=1),
    SamplingConfig(temperature=0.7, top_k=3, top_p=1),
    SamplingConfig(temperature=1.3, top_p=0.8),
    SamplingConfig(temperature=1, top_p=0.9, min_p=0.1, **PENALISED),
    SamplingConfig(temperature=1, top_p=1, no_repeat_ngram=2),
]


def probabilities(logits: np.ndarray, prompt: list[int], new: list[int], c: SamplingConfig):
    """Of the next token by the settings, one after the other, in float64 and by sorting."""
    logits, text = logits.astype(np.float64), prompt + new
    for token in set(text):
        logits[token] *= c.repetition_penalty if logits[token] < 0 else 1 / c.repetition_penalty
    for token in set(new):
        logits[token] -= c.presence_penalty + c.frequency_penalty * new.count(token)
    n = c.no_repeat_ngram
    grams = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)} if n else set()
    for token in range(V):
        if n and tuple([*text, token][-n:]) in grams:
            logits[token] = -np.inf
    w = np.exp((logits - logits.max()) / c.temperature)
    order = np.argsort(-w)
    w[order[c.top_k or V :]] = 0
    before = np.cumsum(w[order]) - w[order]
    w[order] = np.where((before <= c.top_p * w.sum()) | (c.top_p == 1), w[order], 0)
    w = np.where(w >= c.min_p * w.max(), w, 0)
    return w / w.sum()


@functools.cache
def all_texts(token: int) -> tuple[np.ndarray, np.ndarray]:
    """Every text of LENGTH tokens, and the model's logits along each, behind a prompt of one."""
    texts = np.array(list(itertools.product(range(V), repeat=LENGTH)))
    tokens = np.concatenate([np.full((len(texts), 1), token), texts], axis=1)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return texts, np.asarray(jax.jit(TINY.apply)(make(TINY, 1), tokens, positions).value)


def exact_distribution(token: int, config: SamplingConfig) -> np.ndarray:
    """The probability of each text, by the model alone."""
    texts, logits = all_texts(token)
    total = np.ones(len(texts))
    for row, text in enumerate(texts.tolist()):
        for i, next_token in enumerate(text):
            p_V = probabilities(logits[row, i], [token], text[:i], config)
            total[row] *= p_V[next_token]
    return total


def sampled_texts(
    decoder: SpeculativeDecoder, params: tuple[Params, Params], token: int, config: SamplingConfig
) -> tuple[np.ndarray, float]:
    """ROWS texts of LENGTH tokens behind a prompt of one, as numbers; tokens to a round."""
    state = decoder.start(ROWS, 8, 0, "float32", stacked=True)
    one = jnp.ones(ROWS, jnp.int32)
    settings = jax.tree.map(lambda x: jnp.repeat(x, ROWS), Settings.of([config], [0], [0]))
    rows = Rows(
        tokens=jnp.full((ROWS, 8), token, jnp.int32),
        lengths=one,
        prompts=one,
        limits=one * (1 + LENGTH),
        reasons=one * Reason.RUNNING,
        ends=jnp.zeros((ROWS, 0), jnp.int32),
        settings=replace(settings, index=jnp.arange(ROWS, dtype=jnp.uint32)),
        report=Report.empty((ROWS, 8)),
    )
    state = replace(state, rows=jax.tree.map(jnp.copy, rows))  # donated: no array may be in twice
    state = decoder.advance(params, state, np.int32(100), np.int32(1))
    texts = np.asarray(state.rows.tokens)[:, 1 : 1 + LENGTH]
    assert np.all(np.asarray(state.rows.lengths) == 1 + LENGTH)
    gain = ROWS * LENGTH / np.asarray(state.rounds).sum()
    return texts @ V ** np.arange(LENGTH - 1, -1, -1), float(gain)


def p_value(drawn: np.ndarray, expected: np.ndarray) -> float:
    """Of the draws under the expected distribution, by chi-square; 0 if the impossible is drawn."""
    counts, expected = np.bincount(drawn, minlength=len(expected)), len(drawn) * expected
    if counts[expected == 0].sum():
        return 0.0
    rare = expected < 5  # too few for the approximation: pooled
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    return float(stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue)


@pytest.mark.parametrize("config", SAMPLED, ids=range(len(SAMPLED)))
def test_sampled_texts_are_distributed_as_by_the_model_alone(config: SamplingConfig) -> None:
    own = make(TINY, 1)
    drafts = jax.tree.map(lambda x, y: 0.8 * x + 0.2 * y, own, make(TINY, 2))
    decoder = SpeculativeDecoder(TINY, TINY, V, 2)
    drawn, gain = sampled_texts(decoder, (own, drafts), 3, config)
    found = p_value(drawn, exact_distribution(3, config))
    print(f"p = {found:.3f}, {gain:.2f} tokens to a round")
    assert found > 1e-3
    assert (
        1.4 < gain < 1.95
    )  # at most 2, since a text is of 4; some proposals are accepted, some are not


def random_distributions(seed: int, *shape: int) -> np.ndarray:
    p = np.exp(2 * np.random.default_rng(seed).standard_normal(shape))
    p[..., 0] = 0  # the model never says it, the draft does
    return (p / p.sum(axis=-1, keepdims=True)).astype(np.float32)


def emitted(p: np.ndarray, q: np.ndarray, accept: Callable, excess: Callable) -> np.ndarray:
    """The first token of many rounds with these distributions (V,) at every place."""
    n, k, rng = 200_000, 2, np.random.default_rng(0)
    proposed = rng.choice(len(q), size=(n, k), p=q.astype(np.float64) / q.sum(dtype=np.float64))
    p_BTV = jnp.broadcast_to(p, (n, k + 1, len(p)))
    q_BkV = jnp.broadcast_to(q, (n, k, len(q)))
    passed = np.asarray(accept(p_BTV[:, :k], q_BkV, proposed, rng.random((n, k), np.float32)))
    count = np.cumprod(passed, axis=1).sum(axis=1)
    w = np.asarray(excess(p_BTV, q_BkV, jnp.asarray(count))).astype(np.float64).cumsum(axis=1)
    drawn = (rng.random((n, 1)) * w[:, -1:] >= w).sum(axis=1)
    return np.where(count > 0, proposed[:, 0], drawn)


def test_the_rule_of_acceptance_is_exact_and_the_test_sees_wrong_ones() -> None:
    p, q = random_distributions(0, 8), np.roll(random_distributions(1, 8), 3)

    def p_value_of(accept: Callable, excess: Callable) -> float:
        return p_value(emitted(p, q, accept, excess), p / p.sum(dtype=np.float64))

    assert p_value_of(accept, excess) > 1e-3
    wrong: Iterator[tuple[Callable, Callable]] = iter(
        [
            (lambda p, q, x, u: u < 1, excess),  # everything passes
            (lambda p, q, x, u: u < 0.5, excess),
            (lambda p, q, x, u: accept(q, p, x, u), excess),  # the other way round
            (accept, lambda p, q, count: p[:, 0]),  # replaced by draws from p
            (accept, lambda p, q, count: jnp.maximum(q[:, 0] - p[:, 0], 0)),
        ]
    )
    for rules in wrong:
        assert p_value_of(*rules) < 1e-9


def test_proposals_pass_as_often_as_theory_says() -> None:
    """Leviathan et al., theorem 3.5: the sum of min(p, q)."""
    p, q, n = random_distributions(2, 8), random_distributions(3, 8), 100_000
    rng = np.random.default_rng(0)
    proposed = rng.choice(8, size=(n, 1), p=q.astype(np.float64) / q.sum(dtype=np.float64))
    at_B1V = [jnp.broadcast_to(x, (n, 1, 8)) for x in (p, q)]
    passed = np.asarray(accept(*at_B1V, proposed, rng.random((n, 1), np.float32)))
    expected = np.minimum(p, q).sum()
    assert abs(passed.mean() - expected) < 4 * (expected * (1 - expected) / n) ** 0.5


def test_behind_accepted_proposals_comes_what_the_model_says_there() -> None:
    p, q = random_distributions(4, 3, 4, 8), random_distributions(5, 3, 3, 8)
    w = np.asarray(excess(jnp.asarray(p), jnp.asarray(q), jnp.array([0, 2, 3])))
    np.testing.assert_array_equal(w[0], np.maximum(p[0, 0] - q[0, 0], 0))
    np.testing.assert_array_equal(w[1], np.maximum(p[1, 2] - q[1, 2], 0))
    np.testing.assert_array_equal(w[2], p[2, 3])
    # Where p and q are one, rounding alone can have rejected.
    np.testing.assert_array_equal(
        excess(p, p[:, :3], jnp.array([0, 1, 2])), p[[0, 1, 2], [0, 1, 2]]
    )


def grown_by_one_after_another(
    length: int, limit: int, new: list[int], count: int, finite: list[bool], ends: set[int]
) -> tuple[int, int]:
    """Length and reason of a running row."""
    for token, is_finite in zip(new[: count + 1], finite, strict=False):
        if not is_finite:
            return length, Reason.NOT_FINITE
        if token in ends:
            return length, Reason.EOS
        length += 1
        if length == limit:
            return length, Reason.LENGTH
    return length, Reason.RUNNING


def test_rows_grow_by_their_new_tokens_as_by_one_after_another() -> None:
    n, T, rng = 4000, 4, np.random.default_rng(0)
    lengths, room = rng.integers(1, 5, n), rng.integers(1, 7, n)
    new, count = rng.integers(0, 8, (n, T)), rng.integers(0, T, n)
    finite, running = rng.random((n, T)) > 0.15, rng.random(n) > 0.1
    rows = replace(
        Rows.free(n, 16, 2),
        lengths=jnp.asarray(lengths),
        limits=jnp.asarray(lengths + room),
        reasons=jnp.where(running, Reason.RUNNING, Reason.EOS),
        ends=jnp.tile(jnp.array([6, -1]), (n, 1)),
    )
    found = grow(rows, jnp.asarray(new), jnp.asarray(count), jnp.asarray(finite))
    reasons = set()
    new_lengths, new_reasons = np.asarray(found.lengths), np.asarray(found.reasons)
    for i in range(n):
        expected = grown_by_one_after_another(
            lengths[i], lengths[i] + room[i], new[i].tolist(), count[i], finite[i].tolist(), {6}
        )
        if not running[i]:
            expected = lengths[i], Reason.EOS
        assert (new_lengths[i], new_reasons[i]) == expected, i
        reasons.add(expected[1])
    assert reasons == {Reason.RUNNING, Reason.EOS, Reason.LENGTH, Reason.NOT_FINITE}


# --- rows ----------------------------------------------------------------------------------------

WARM = SamplingConfig(temperature=1, top_p=0.95, max_new_tokens=10, seed=5)


@pytest.mark.optimized
def test_a_row_alone_draws_what_it_draws_among_others(params: Params, near: Params) -> None:
    draft = Draft(MODEL, near, 3)
    kinds = [
        WARM,
        SamplingConfig(temperature=0, max_new_tokens=6),
        WARM,
        WARM.model_copy(update={"temperature": 2.0, "top_k": 7, "n": 2, **PENALISED}),
    ]
    requests = [Request(prompt, kinds[i % 4], ENDS, i) for i, prompt in enumerate(PROMPTS)]
    together = answer(MODEL, params, requests, draft=draft, batch_size=8)
    assert answer(MODEL, params, requests[::-1], draft=draft, batch_size=8) == together[::-1]
    for i in (0, 1, 3):
        (alone,) = answer(MODEL, params, [requests[i]], draft=draft, batch_size=1)
        assert alone == together[i]
    first, second = together[3]
    assert first.tokens != second.tokens


def test_watchers_see_every_token_once_and_may_end_an_answer(params: Params, near: Params) -> None:
    requests = [Request(prompt, WARM, ENDS, i) for i, prompt in enumerate(PROMPTS)]
    whole = answer(MODEL, params, requests, draft=Draft(MODEL, near, 3))
    longest = max(range(8), key=lambda i: len(whole[i][0].tokens))
    seen: dict[int, list[int]] = {i: [] for i in range(8)}

    def watch(number: int, _answer: int, tokens: list[int], _is_last: bool) -> int | None:
        before = len(seen[number])
        seen[number] += tokens
        return 5 - before if number == longest and len(seen[number]) >= 5 else None

    found = answer(MODEL, params, requests, draft=Draft(MODEL, near, 3), watch=watch)
    assert found[longest][0].tokens == whole[longest][0].tokens[:5]
    assert found[longest][0].finish_reason == "stop"
    for i in set(range(8)) - {longest}:
        assert found[i] == whole[i]
        assert seen[i] == whole[i][0].tokens


def test_settings_do_not_compile_anew(params: Params, near: Params) -> None:
    draft = Draft(MODEL, near, 3)
    requests = [Request(prompt, WARM, ENDS, i) for i, prompt in enumerate(PROMPTS)]
    answer(MODEL, params, requests, draft=draft)
    functions = [
        getattr(SpeculativeDecoder, name)
        for name in ("start", "prefill", "admit", "copy_context", "advance")
    ]
    before = [function._cache_size() for function in functions]
    for kind in KINDS:
        config = SamplingConfig(seed=9, min_p=0.1, logprobs=2, **{"max_new_tokens": 9, **kind})
        answer(MODEL, params, [replace(r, sampling=config) for r in requests], draft=draft)
    assert [function._cache_size() for function in functions] == before


def test_ids_beyond_the_tokenizer_s_are_never_drawn(params: Params, near: Params) -> None:
    hot = SamplingConfig(temperature=5, top_p=1, max_new_tokens=10)
    requests = [Request(prompt, hot, (), i) for i, prompt in enumerate([[1], [20]] * 4)]
    found = answer(MODEL, params, requests, draft=Draft(MODEL, near, 3), n_ids=7)
    assert {token for group in found for token in group[0].tokens} == set(range(7))


def test_a_mesh_draws_the_same(params: Params, near: Params) -> None:
    requests = [Request(prompt, WARM, ENDS, i) for i, prompt in enumerate(PROMPTS[:5])]
    plain = answer(MODEL, params, requests, draft=Draft(MODEL, near, 3))
    mesh = make_mesh(
        {"data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 2}, jax.devices()[:4]
    )
    model = Llama(CONFIG, rules=PRESETS["decode"])
    placement = shardings(model.shapes(), model.axes(), mesh, PRESETS["decode"])
    with jax.set_mesh(mesh):
        own, drafts = (jax.jit(unstack)(jax.device_put(one, placement)) for one in (params, near))
        assert answer(model, own, requests, draft=Draft(model, drafts, 3)) == plain


# --- errors --------------------------------------------------------------------------------------


def test_a_damaged_draft_changes_no_greedy_answer(params: Params) -> None:
    damaged = {**params, "final_norm": params["final_norm"] * jnp.nan}
    config = SamplingConfig(temperature=0, max_new_tokens=10)
    requests = [Request(prompt, config, ENDS, i) for i, prompt in enumerate(PROMPTS)]
    found = answer(MODEL, params, requests, draft=Draft(MODEL, damaged, 3))
    assert without_rounds(found) == answer(MODEL, params, requests)


def test_logits_that_are_not_finite_are_an_error_that_names_the_prompt(params: Params) -> None:
    poisoned = {**params, "embed": params["embed"].at[20].set(jnp.nan)}
    config = SamplingConfig(temperature=0, max_new_tokens=1)
    requests = [Request(prompt, config, ENDS) for prompt in [*PROMPTS[:6], [20, 2], [1]]]
    with pytest.raises(FloatingPointError, match="prompt 6: the logits after 2 tokens"):
        answer(MODEL, poisoned, requests, draft=Draft(MODEL, params, 3))


def test_vocabularies_of_two_sizes_and_no_proposals_are_refused(params: Params) -> None:
    other = Llama(CONFIG.model_copy(update={"vocab_size": 32}))
    requests = [Request([1], WARM)]
    with pytest.raises(
        ValueError, match="the draft has a vocabulary of 32 ids, the model one of 24"
    ):
        answer(MODEL, params, requests, draft=Draft(other, params))
    with pytest.raises(ValueError, match="proposes 0 tokens: give at least 1"):
        answer(MODEL, params, requests, draft=Draft(MODEL, params, 0))
