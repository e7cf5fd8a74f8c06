"""The engine: every setting against a plain reference, rows that come and go, few programs."""

import importlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import load_folder

from llama_jax.config import ModelConfig
from llama_jax.generate import batch, request
from llama_jax.generate.batch import Engine, answer
from llama_jax.generate.decode import Decoder
from llama_jax.generate.request import Answer, Request
from llama_jax.generate.sampling import Settings, uniforms
from llama_jax.generate.settings import SamplingConfig
from llama_jax.model.llama import Llama
from llama_jax.model.stack import Params

V, SLOTS = 48, 24
CONFIG = ModelConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_head=8,
    d_ff=64,
    vocab_size=V,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    tie_embeddings=False,
)
MODEL = Llama(CONFIG)
PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12], [9, 8, 9, 8], [40, 3], [4, 4, 4], [1], [30] * 5]


@pytest.fixture(scope="module")
def params() -> Params:
    made = jax.jit(MODEL.init)(jax.random.key(1))
    return {**made, "head": 3 * made["head"]}


# --- the reference -------------------------------------------------------------------------------


class Reference:
    """One answer at a time, token by token: the whole text through the model, then plain numpy."""

    def __init__(self, model: Llama, params: Params, length: int = SLOTS):
        positions = jnp.arange(length)[None]
        self._length = length
        self._forward = jax.jit(lambda tokens: model.apply(params, tokens, positions).value[0])

    def logits(self, text: list[int]) -> np.ndarray:
        """(V,) float64, of the token after the text. Attention is causal: padding may follow."""
        padded = np.array([text + [0] * (self._length - len(text))])
        return np.asarray(self._forward(padded))[len(text) - 1].astype(np.float64)

    def answer(self, asked: Request, number: int = 0) -> Answer:
        """The answer with this number to the request."""
        config, prompt = asked.sampling, list(asked.tokens)
        text = list(prompt)
        while len(text) < len(prompt) + config.max_new_tokens:
            logits = change(self.logits(text), text, len(prompt), config)
            token = pick(logits, config, uniform(asked, number, len(text)))
            if token in asked.ends:
                return Answer(text[len(prompt) :], "eos")
            text.append(token)
        return Answer(text[len(prompt) :], "length")


def change(logits: np.ndarray, text: list[int], prompt: int, c: SamplingConfig) -> np.ndarray:
    """Penalties, then n-grams that may not come again."""
    for token in set(text):
        logits[token] *= c.repetition_penalty if logits[token] < 0 else 1 / c.repetition_penalty
    new = text[prompt:]
    for token in set(new):
        logits[token] -= c.presence_penalty + c.frequency_penalty * new.count(token)
    n = c.no_repeat_ngram
    grams = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)} if n else set()
    for token in range(len(logits)):
        if n and tuple([*text, token][-n:]) in grams:
            logits[token] = -np.inf
    return logits


def pick(logits: np.ndarray, c: SamplingConfig, uniform: float) -> int:
    """Temperature, top-k, top-p, min-p by sorting; the token on which uniform falls, by ids."""
    if c.temperature == 0:
        return int(np.argmax(logits))
    w = np.exp((logits - logits.max()) / c.temperature)
    order = np.argsort(-w, kind="stable")
    w[order[c.top_k or len(w) :]] = 0
    before = np.cumsum(w[order]) - w[order]
    w[order] = np.where((before <= c.top_p * w.sum()) | (c.top_p == 1), w[order], 0)
    w = np.where(w >= c.min_p * w.max(), w, 0)
    return int(np.searchsorted(np.cumsum(w), uniform * w.sum(), side="right"))


def uniform(asked: Request, number: int, position: int) -> float:
    """Draws are those of sampling.uniforms, whose own tests say what they depend on."""
    return float(compiled_uniforms(settings_of(asked, number), np.array([position]))[0])


compiled_uniforms = jax.jit(uniforms)


def settings_of(asked: Request, number: int) -> Settings:
    return Settings.of([asked.sampling], [asked.index], [number])


# --- settings ------------------------------------------------------------------------------------

WARM = {"temperature": 1.0, "top_p": 1.0}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 1.7, "top_p": 1},
    "top_k": {**WARM, "top_k": 4},
    "top_p": {"temperature": 1.2, "top_p": 0.7},
    "min_p": {**WARM, "min_p": 0.2},
    "all three": {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "repetition_penalty": {"temperature": 0, "repetition_penalty": 1.5},
    "repetition_penalty below 1": {**WARM, "repetition_penalty": 0.7},
    "presence_penalty": {"temperature": 0, "presence_penalty": 1.5},
    "frequency_penalty": {**WARM, "frequency_penalty": 0.8},
    "negative penalties": {**WARM, "presence_penalty": -1.0, "frequency_penalty": -0.5},
    "no_repeat_ngram 1": {"temperature": 0, "no_repeat_ngram": 1},
    "no_repeat_ngram 2": {"temperature": 0, "no_repeat_ngram": 2},
    "no_repeat_ngram 3": {**WARM, "top_k": 2, "no_repeat_ngram": 3},
    "seed": {**WARM, "seed": 2**32 - 1},
    "max_new_tokens": {**WARM, "max_new_tokens": 3},
    "n": {**WARM, "n": 3},
    "everything": {
        "temperature": 0.9,
        "top_k": 30,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "no_repeat_ngram": 2,
        "seed": 7,
        "n": 2,
    },
}


def mixed_requests(ends: tuple[int, ...] = (6, 20)) -> list[Request]:
    """Every kind of settings, with several prompts, some of them with ends."""
    prompts = (PROMPTS[i % 8] for i in itertools.count())
    pairs = [(kind, next(prompts)) for _ in range(4) for kind in KINDS.values()]
    return [
        Request(prompt, SamplingConfig(**{"max_new_tokens": 12, **kind}), ends[: i % 3], i)
        for i, (kind, prompt) in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def mixed(params: Params) -> list[list[Answer]]:
    """The answers to mixed_requests by the reference."""
    reference = Reference(MODEL, params)
    return [
        [reference.answer(asked, number) for number in range(asked.sampling.n)]
        for asked in mixed_requests()
    ]


@pytest.mark.optimized
def test_settings_of_every_kind_in_one_batch_are_those_of_the_reference(
    params: Params, mixed: list[list[Answer]]
) -> None:
    requests = mixed_requests()
    found = answer(MODEL, params, requests, batch_size=64)
    for asked, group, expected in zip(requests, found, mixed, strict=True):
        assert group == expected, asked
    assert len(requests) > 64  # rows are given away again
    assert {one.finish_reason for group in found for one in group} == {"eos", "length"}


@pytest.mark.optimized
def test_every_kind_of_settings_changes_answers(params: Params, mixed: list[list[Answer]]) -> None:
    """Or the test above would not see it."""
    reference = Reference(MODEL, params)
    unchanged = set(KINDS) - {"greedy"}
    for name, asked, group in zip(itertools.cycle(KINDS), mixed_requests(), mixed, strict=False):
        base = KINDS["greedy"] if asked.sampling.temperature == 0 else WARM
        without = SamplingConfig(**{"max_new_tokens": 12, **base})
        if [reference.answer(replace(asked, sampling=without))] != group:
            unchanged.discard(name)
    assert not unchanged


@pytest.mark.optimized
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_request_alone_is_answered_as_among_64_others(
    params: Params, mixed: list[list[Answer]], batch_size: int
) -> None:
    requests = mixed_requests()[: len(KINDS)]
    found = answer(MODEL, params, requests, batch_size=batch_size)
    assert found == mixed[: len(KINDS)]


@pytest.mark.optimized
def test_rows_given_out_together_give_the_same(params: Params, mixed: list[list[Answer]]) -> None:
    requests = mixed_requests()
    engine = Engine(MODEL, params, requests, V, None, 64, "float32", continuous=False)
    found = {(job.request, job.answer): one for job, one in engine.run()}
    assert found == {(i, k): one for i, group in enumerate(mixed) for k, one in enumerate(group)}


# --- several answers -----------------------------------------------------------------------------


class Counting(Decoder):
    """A decoder that counts its calls on the host."""

    def __init__(self, decoder: Decoder):
        object.__setattr__(self, "inner", decoder)
        object.__setattr__(self, "calls", [])

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if name in ("inner", "calls"):
            return own[name]
        function = getattr(own["inner"], name)

        def counted(*args: Any) -> Any:
            own["calls"].append(name)
            return function(*args)

        return counted


def run_counted(
    params: Params, requests: list[Request], **more: Any
) -> tuple[dict[tuple[int, int], Answer], list[str]]:
    sizes = {"max_length": None, "batch_size": 8, "cache_dtype": "float32", **more}
    watch = sizes.pop("watch", None)
    engine = Engine(MODEL, params, requests, V, **sizes)
    counting = Counting(engine.decoder)
    engine.decoder = counting
    found = {(job.request, job.answer): one for job, one in engine.run(watch)}
    return found, counting.calls


def test_several_answers_to_a_prompt_are_drawn_apart_and_its_context_is_computed_once(
    params: Params,
) -> None:
    config = SamplingConfig(**WARM, max_new_tokens=12, n=6, seed=3)
    asked = Request([1, 2, 3], config, (6,), index=4)
    reference = Reference(MODEL, params)
    found, calls = run_counted(params, [asked])
    assert [found[0, k] for k in range(6)] == [reference.answer(asked, k) for k in range(6)]
    assert len({tuple(one.tokens) for one in found.values()}) == 6
    assert (calls.count("prefill"), calls.count("copy_context")) == (1, 5)
    # More answers than rows: a row that has ended still holds the context.
    fewer, calls = run_counted(params, [asked], batch_size=2)
    assert fewer == found
    assert (calls.count("prefill"), calls.count("copy_context")) == (1, 1)


def test_equal_requests_draw_by_their_index_and_the_seed_decides(params: Params) -> None:
    def texts(seed: int, indices: range) -> list[list[int]]:
        config = SamplingConfig(**WARM, max_new_tokens=12, seed=seed)
        requests = [Request([1], config, (), index) for index in indices]
        return [one.tokens for (one,) in answer(MODEL, params, requests)]

    first = texts(0, range(8))
    assert len(set(map(tuple, first))) == 8
    assert texts(0, range(8)) == first
    assert texts(0, range(2, 10))[:6] == first[2:]
    assert texts(1, range(8)) != first


# --- rows that come and go -----------------------------------------------------------------------


def test_a_free_row_is_given_to_the_next_request_while_others_go_on(params: Params) -> None:
    def asked(index: int, most: int) -> Request:
        return Request([1], SamplingConfig(temperature=0, max_new_tokens=most), (), index)

    # One long answer, and fifteen short ones that take turns in the other row.
    requests = [asked(0, 60), *(asked(i, 4) for i in range(1, 16))]
    _, calls = run_counted(params, requests, batch_size=2)
    # Each short one ends a call; the long one ends with the last of them.
    assert calls.count("advance") == 15
    _, static = run_counted(params, requests, batch_size=2, continuous=False)
    assert static.count("advance") == 8


def test_answers_come_as_they_end(params: Params) -> None:
    lengths = [12, 2, 7, 3]
    requests = [
        Request([1], SamplingConfig(temperature=0, max_new_tokens=most), (), i)
        for i, most in enumerate(lengths)
    ]
    done: list[int] = []
    answer(MODEL, params, requests, batch_size=2, on_done=lambda i, _: done.append(i))
    assert done == [1, 2, 0, 3]


def stop_first_at(count: int, names: set[tuple[int, int]]) -> Any:
    """A watcher that ends these answers at `count` tokens."""
    seen: dict[tuple[int, int], int] = {}

    def watch(number: int, k: int, tokens: list[int], _is_last: bool) -> int | None:
        before = seen.get((number, k), 0)
        seen[number, k] = before + len(tokens)
        return count - before if (number, k) in names and seen[number, k] >= count else None

    return watch


@pytest.mark.parametrize("continuous", [True, False])
def test_a_stopped_row_is_given_away_and_its_context_is_kept(
    params: Params, continuous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "WATCHED_STEPS", 2)
    config = SamplingConfig(**WARM, max_new_tokens=12, n=4)
    requests = [Request([7, 8, 9, 10], config), Request([3, 2, 1], config, (), 1)]
    whole, _ = run_counted(params, requests)
    stopped = {(0, 0), (1, 0)}
    found, calls = run_counted(
        params, requests, batch_size=2, watch=stop_first_at(3, stopped), continuous=continuous
    )
    for name, one in found.items():
        cut = Answer(whole[name].tokens[:3], "stop")
        assert one == (cut if name in stopped else whole[name]), name
    assert calls.count("prefill") == 2


def test_a_stopped_answer_has_its_log_probabilities(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "WATCHED_STEPS", 2)
    config = SamplingConfig(temperature=0, max_new_tokens=12, logprobs=2)
    requests = [Request(prompt, config) for prompt in PROMPTS]
    whole = answer(MODEL, params, requests)
    found = answer(MODEL, params, requests, watch=stop_first_at(3, {(2, 0)}))
    assert found[2] == [whole[2][0].cut(3)]
    assert found[:2] + found[3:] == whole[:2] + whole[3:]


# --- log-probabilities ---------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_model_before_all_settings(params: Params) -> None:
    reference = Reference(MODEL, params)
    for i, kind in enumerate(({}, KINDS["everything"], KINDS["top_k"])):
        config = SamplingConfig(**{"max_new_tokens": 12, **kind, "n": 1, "logprobs": i + 1})
        asked = Request(PROMPTS[i], config, (6,))
        ((one,),) = answer(MODEL, params, [asked])
        assert one == replace(reference.answer(asked), logprobs=one.logprobs)
        assert one.logprobs is not None
        assert len(one.logprobs) == len(one.tokens) > 3
        for place, (token, report) in enumerate(zip(one.tokens, one.logprobs, strict=True)):
            logits = reference.logits([*PROMPTS[i], *one.tokens[:place]])
            own = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            assert abs(report.logprob - own[token]) < 1e-5
            assert [j for j, _ in report.likeliest] == np.argsort(-own)[: i + 1].tolist()
            np.testing.assert_allclose(
                [p for _, p in report.likeliest], np.sort(own)[::-1][: i + 1], atol=1e-5
            )


def test_only_who_asks_gets_log_probabilities(params: Params) -> None:
    silent = SamplingConfig(temperature=0, max_new_tokens=4)
    chosen = SamplingConfig(temperature=0, max_new_tokens=4, logprobs=0)
    requests = [Request([1], silent), Request([1], chosen)]
    (one,), (other,) = answer(MODEL, params, requests)
    assert one.logprobs is None
    assert [report.likeliest for report in other.logprobs or ()] == [[]] * 4


# --- sizes ---------------------------------------------------------------------------------------


def test_ids_from_n_ids_on_are_never_drawn(params: Params) -> None:
    hot = SamplingConfig(temperature=20, top_p=1, max_new_tokens=16)
    requests = [Request([prompt], hot, (), i) for i, prompt in enumerate([1, 40] * 8)]
    found = answer(MODEL, params, requests, n_ids=11)
    assert {token for (one,) in found for token in one.tokens} == set(range(11))


def test_prompts_of_any_length_are_stored_whole(params: Params) -> None:
    """On both sides of every border between the pieces that prompts are prefilled in."""
    borders = {
        1,
        2,
        700,
        *(size + d for size in (*request.PREFILL, 32, 128) for d in (-1, 0, 1, 2)),
    }
    rng = np.random.default_rng(0)
    prompts = {length: rng.integers(0, V, length).tolist() for length in sorted(borders)}
    config = SamplingConfig(temperature=0, max_new_tokens=3)
    requests = [Request(prompt, config) for prompt in prompts.values()]
    found = answer(MODEL, params, requests, batch_size=8)
    # What follows a prompt does not change its logits: one pass over prompt and answer checks all.
    tokens = np.zeros((len(prompts), 704), np.int32)
    for row, (prompt, (one,)) in enumerate(zip(prompts.values(), found, strict=True)):
        tokens[row, : len(prompt) + 3] = prompt + one.tokens
    forward = jax.jit(
        lambda row: jnp.argmax(MODEL.apply(params, row, np.arange(704)[None]).value[0], axis=-1)
    )
    for row, (length, (one,)) in enumerate(zip(prompts, found, strict=True)):
        likeliest = np.asarray(forward(tokens[row : row + 1]))
        assert one.tokens == likeliest[length - 1 : length + 2].tolist(), length


def test_pieces_cover_a_context_and_never_cost_more_than_the_shortest_would() -> None:
    for least in request.LEAST_COST.values():
        for length in range(1100):
            sizes = list(request.pieces(length, least))
            assert set(sizes) <= set(request.PREFILL)
            assert sum(sizes) >= length
            assert sum(sizes[:-1]) < max(length, 1)
            cost = sum(max(size, least) + request.CALL_COST for size in sizes)
            shortest = request.PREFILL[-1]
            assert cost <= -(-length // shortest) * (max(shortest, least) + request.CALL_COST)


def test_one_program_for_each_piece_and_one_to_advance_and_none_for_settings(
    params: Params,
) -> None:
    model = Llama(CONFIG.model_copy(update={"rope_theta": 9_999.0}))  # met by no other test
    functions = {
        name: getattr(Decoder, name)
        for name in ("start", "prefill", "admit", "copy_context", "advance")
    }
    start = {name: function._cache_size() for name, function in functions.items()}

    def programs() -> dict[str, int]:
        return {name: f._cache_size() - start[name] for name, f in functions.items()}

    prompts = [[1] * 600, [2] * 70, [3] * 10]
    config = SamplingConfig(temperature=0, max_new_tokens=8, n=2)
    requests = [Request(prompt, config, (6,)) for prompt in prompts]
    answer(model, params, requests)
    expected = {
        "start": 1,
        "prefill": len(set(itertools.chain(*map(_pieces, map(len, prompts))))),
        "admit": 1,
        "copy_context": 1,
        "advance": 1,
    }
    assert programs() == expected
    for kind in KINDS.values():
        other = SamplingConfig(**{"max_new_tokens": 7, "logprobs": 1, **kind, "n": 2})
        answer(model, params, [Request(p, other, (9,), 3) for p in prompts], max_length=605)
    answer(model, params, requests, watch=lambda *_: None)
    assert programs() == expected


def _pieces(length: int) -> Iterator[int]:
    return request.pieces(length - 1, request.LEAST_COST["cpu"])


# --- transformers --------------------------------------------------------------------------------


@pytest.mark.parity
def test_penalties_and_bans_are_those_of_transformers(tmp_path: Any) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    make = importlib.import_module("golden.make")
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    reference = make.random_model(shape, seed=3)
    with torch.no_grad():
        reference.lm_head.weight *= 4
    reference.save_pretrained(tmp_path)
    config, params = load_folder(tmp_path)
    reference.generation_config.pad_token_id = 0
    prompts = [[1], [3, 5, 3, 5, 3], [9, 8, 7], [20] * 6]
    cases = list(itertools.product(prompts, (1.0, 1.3, 0.8), (0, 1, 2, 3)))
    requests = [
        Request(
            prompt,
            SamplingConfig(
                temperature=0, max_new_tokens=24, repetition_penalty=penalty, no_repeat_ngram=n
            ),
            (7,),
        )
        for prompt, penalty, n in cases
    ]
    found = answer(Llama(config), params, requests)
    for (prompt, penalty, n), (one,) in zip(cases, found, strict=True):
        output = reference.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=24,
            repetition_penalty=penalty,
            no_repeat_ngram_size=n,
            eos_token_id=7,
        )
        new = output[0, len(prompt) :].tolist()
        assert one.tokens == (new[:-1] if new[-1] == 7 else new), (prompt, penalty, n)
