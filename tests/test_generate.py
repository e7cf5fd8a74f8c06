"""Decoding: equal to the plain forward, row by row, sharded or not; ends, limits, text, errors."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import load_folder

from llama_jax import tokenizer as tokenizers
from llama_jax.config import ComputeConfig, ModelConfig, RopeScaling
from llama_jax.generate import batch
from llama_jax.generate.batch import Answer, Request, answer
from llama_jax.generate.decode import Decoder, Reason, Rows, State
from llama_jax.generate.settings import SamplingConfig
from llama_jax.generate.text import Completion, Prompt, StopSearch, generate
from llama_jax.model.cache import KVCache
from llama_jax.model.llama import Llama, Output
from llama_jax.model.stack import Params, unstack
from llama_jax.tokenizer import SentencePiece, Tokenizer
from llama_jax.tokenizer.train import train
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
    vocab_size=96,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    tie_embeddings=False,
)
MODEL = Llama(CONFIG)
GREEDY = SamplingConfig(temperature=0, max_new_tokens=10)
WARM = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=10, seed=5)
# Eight rows that fit 16 slots: nearly all tests share the programs of this size.
PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12], [9, 8, 7, 6], [95], [4] * 6, [11, 12], [13] * 5]
LONG = [*PROMPTS[:7], list(range(30))]


@pytest.fixture(scope="module")
def params() -> Params:
    return jax.jit(MODEL.init)(jax.random.key(1))


def requests_of(
    prompts: list[list[int]], sampling: SamplingConfig, ends: Sequence[int] = ()
) -> list[Request]:
    return [Request(tokens, sampling, ends, index) for index, tokens in enumerate(prompts)]


def answers(model: Llama, params: Params, requests: list[Request], **more: Any) -> list[Answer]:
    """Of requests that want one answer each."""
    return [one for (one,) in answer(model, params, requests, **more)]


def row_of(tokens: list[int], limit: int, end: int = -1) -> Rows:
    """One row of 16 slots that begins with these tokens."""
    length = jnp.array([len(tokens)])
    return replace(
        Rows.free(1, 16, 1),
        tokens=jnp.array([tokens + [0] * (16 - len(tokens))]),
        lengths=length,
        prompts=length,
        limits=jnp.array([limit]),
        reasons=jnp.array([Reason.RUNNING]),
        ends=jnp.array([[end]]),
    )


def prefilled(
    model: Llama, params: Params, rows: list[Rows], cache_dtype: str = "float32"
) -> State:
    """A state of eight rows, of which the first have these, prefilled up to their last token."""
    decoder = Decoder(model, model.config.vocab_size)
    state = decoder.start(8, 16, 1, cache_dtype, not isinstance(params["layers"], tuple))
    for number, row in enumerate(rows):
        # The whole row as one piece: what follows its context is padding, and does no harm.
        state = decoder.prefill(params, state, np.int32(number), row.tokens[0], np.int32(0))
        state = decoder.admit(state, np.int32(number), row)
    return state


def greedy_by_full_forward(
    model: Llama, params: Params, prompts: list[list[int]], n: int, length: int
) -> list[list[int]]:
    """Without a cache: the whole texts, padded to `length`, go through the model each time."""
    forward = jax.jit(lambda tokens: model.apply(params, tokens, positions).value)
    positions = jnp.broadcast_to(jnp.arange(length), (len(prompts), length))
    texts = [list(prompt) for prompt in prompts]
    for _ in range(n):
        # Attention is causal: what follows a token does not change its logits.
        logits = forward(jnp.array([text + [0] * (length - len(text)) for text in texts]))
        for row, text in enumerate(texts):
            text.append(int(jnp.argmax(logits[row, len(text) - 1])))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


# --- what is decoded ---------------------------------------------------------------------------


def test_greedy_decoding_equals_the_full_forward(params: Params) -> None:
    expected = greedy_by_full_forward(MODEL, params, LONG, 10, length=40)
    found = answer(MODEL, params, requests_of(LONG, GREEDY))
    assert found == [[Answer(tokens, "length")] for tokens in expected]


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_row_alone_equals_the_row_in_a_batch_of_eight(
    params: Params, sampling: SamplingConfig
) -> None:
    requests = requests_of(LONG, sampling)
    together = answer(MODEL, params, requests)
    assert answer(MODEL, params, requests, batch_size=1) == together
    assert answer(MODEL, params, requests[::-1]) == together[::-1]


def test_rows_of_a_batch_may_differ_in_everything(params: Params) -> None:
    kinds = [
        GREEDY,
        SamplingConfig(temperature=1, top_p=1, max_new_tokens=3),
        SamplingConfig(temperature=2, top_k=7, max_new_tokens=8, seed=3),
        SamplingConfig(temperature=1, top_p=0.5, min_p=0.01, max_new_tokens=10),
    ]
    requests = [Request([1, 2], kind, index=index) for index, kind in enumerate(kinds * 2)]
    mixed = answers(MODEL, params, requests)
    for request, one in zip(requests, mixed, strict=True):
        among_its_like = requests_of([[1, 2]] * 8, request.sampling)
        assert answers(MODEL, params, among_its_like)[request.index] == one
    assert [len(one.tokens) for one in mixed] == [10, 3, 8, 10] * 2


def test_equal_prompts_draw_different_answers_and_the_seed_decides_them(params: Params) -> None:
    def texts(seed: int) -> list[list[int]]:
        warm = WARM.model_copy(update={"seed": seed})
        return [one.tokens for one in answers(MODEL, params, requests_of([[1]] * 8, warm))]

    first = texts(0)
    assert len({tuple(tokens) for tokens in first}) == 8
    assert texts(0) == first != texts(1)


def test_long_prompts_are_prefilled_in_pieces(params: Params) -> None:
    """Of 128 and of 32 tokens; the last one ends in padding."""
    prompts = [[(7 * n + start) % 96 for n in range(200)] for start in (0, 5)]
    found = answers(MODEL, params, requests_of(prompts, GREEDY))
    expected = greedy_by_full_forward(MODEL, params, prompts, 10, length=210)
    assert [one.tokens for one in found] == expected


def test_unstacked_parameters_decode_the_same(params: Params) -> None:
    requests = requests_of(PROMPTS, WARM)
    assert answer(MODEL, unstack(params), requests) == answer(MODEL, params, requests)


def test_bfloat16_runs_and_begins_like_float32(params: Params) -> None:
    model = Llama(CONFIG, ComputeConfig(dtype="bfloat16"))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    full = answers(MODEL, params, requests_of(PROMPTS, GREEDY))
    found = answers(model, half, requests_of(PROMPTS, GREEDY))
    assert [len(one.tokens) for one in found] == [10] * len(PROMPTS)
    assert sum(a.tokens[0] == b.tokens[0] for a, b in zip(found, full, strict=True)) >= 6
    state = prefilled(model, half, [row_of([1, 2], 12)], cache_dtype="bfloat16")
    assert state.cache.layers[0]["key"].dtype == jnp.bfloat16


def test_dynamic_rope_depends_on_max_length_and_not_on_the_batch() -> None:
    scaling = RopeScaling(type="dynamic", factor=2, original_context=8)
    model = Llama(CONFIG.model_copy(update={"rope_scaling": scaling}))
    params = jax.jit(model.init)(jax.random.key(1))
    requests = requests_of(PROMPTS, GREEDY)
    with pytest.raises(ValueError, match="give max_length"):
        answer(model, params, requests)
    # The texts would fit 16 slots; the angles are those of 40.
    found = answers(model, params, requests, max_length=40)
    expected = greedy_by_full_forward(model, params, PROMPTS, 10, length=40)
    assert [one.tokens for one in found] == expected
    assert greedy_by_full_forward(model, params, PROMPTS, 10, length=16) != expected


# --- meshes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "stacked"), [({"tensor": 2}, True), ({"data": 2, "tensor": 2}, False)], ids=str
)
def test_sharded_tokens_equal_unsharded(
    params: Params, sizes: dict[str, int], stacked: bool
) -> None:
    requests = requests_of(PROMPTS[:5], WARM)
    plain = answer(MODEL, params, requests_of(PROMPTS, WARM))[:5]
    sizes = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, **sizes}
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    model = Llama(CONFIG, rules=PRESETS["decode"])
    placed = jax.device_put(
        params, shardings(model.shapes(), model.axes(), mesh, PRESETS["decode"])
    )
    with jax.set_mesh(mesh):
        placed = placed if stacked else jax.jit(unstack)(placed)
        assert answer(model, placed, requests) == plain
        assert answer(model, placed, requests, watch=lambda *_: None) == plain

        state = prefilled(model, placed, [row_of(tokens, 14) for tokens in PROMPTS])
        layout = jax.tree.map(lambda x: x.sharding, state)
        slab = state.cache.layers[0]["key"]
        rows, heads, _, _ = slab.addressable_shards[0].data.shape[-4:]
        assert (rows, heads) == (8 // sizes["data"], CONFIG.n_kv_heads // sizes["tensor"])
        assert state.rows.tokens.addressable_shards[0].data.shape[0] == 8 // sizes["data"]
        state = Decoder(model, 96).advance(placed, state, np.int32(2), np.int32(1))
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, layout)
        assert all(jax.tree.leaves(same))
        # One row cannot be split.
        assert batch._row_count(model, 1) == sizes["data"]


# --- compilation -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tracer(Llama):
    """A model that counts how often it is traced."""

    count = 0

    def apply(self, *args: object, **kwargs: object) -> Output:
        Tracer.count += 1
        return super().apply(*args, **kwargs)  # type: ignore[arg-type]


def test_programs_are_few_and_settings_do_not_add_any(params: Params) -> None:
    model = Tracer(CONFIG, ComputeConfig(scan_layers=False))

    def traces(
        prompts: list[list[int]], sampling: SamplingConfig, ends: Sequence[int], **more: Any
    ) -> int:
        before = Tracer.count
        answer(model, params, requests_of(prompts, sampling, ends), **more)
        return Tracer.count - before

    assert traces(PROMPTS, GREEDY, ends=[3]) > 0
    # Other settings, prompts, end ids, limits, a watcher: nothing new.
    penalties = SamplingConfig(
        repetition_penalty=2, presence_penalty=1, no_repeat_ngram=2, logprobs=3, max_new_tokens=9
    )
    hot = SamplingConfig(temperature=2, top_k=3, min_p=0.1, max_new_tokens=4)
    for sampling in (WARM, hot, penalties):
        assert traces(PROMPTS, sampling, ends=[4]) == 0
    assert traces([[3], [1] * 6, [2, 2], [5], [1, 2]], GREEDY, ends=[3], max_length=12) == 0
    assert traces(PROMPTS, GREEDY, ends=[3], watch=lambda *_: None) == 0


def test_sizes_are_few_and_waste_little() -> None:
    slots = [batch._slots(n) for n in range(1, 4097)]
    assert len(set(slots)) == 4 * 8 + 1
    assert all(s >= 16 and n <= s <= max(16, 1.25 * n) for n, s in enumerate(slots, start=1))


# --- ends --------------------------------------------------------------------------------------


def test_end_ids_end_their_row_alone_and_are_not_part_of_the_answer(params: Params) -> None:
    whole = answers(MODEL, params, requests_of(PROMPTS, GREEDY))
    ends = (whole[0].tokens[1], whole[3].tokens[5])
    found = answers(MODEL, params, requests_of(PROMPTS, GREEDY, ends))
    for one, all_of_it in zip(found, whole, strict=True):
        hits = [i for i, token in enumerate(all_of_it.tokens) if token in ends]
        reason = "eos" if hits else "length"
        assert one == Answer(all_of_it.tokens[: hits[0] if hits else None], reason)
    assert {one.finish_reason for one in found} == {"eos", "length"}


def test_a_row_that_has_ended_stays_as_it_is(params: Params) -> None:
    decoder = Decoder(MODEL, 96)
    whole = answers(MODEL, params, requests_of(PROMPTS, GREEDY))
    end = whole[0].tokens[2]
    limits = [len(tokens) + 10 for tokens in PROMPTS[:7]]
    limits[1] = 3
    rows = [row_of(tokens, limit) for tokens, limit in zip(PROMPTS, limits, strict=False)]
    rows[0] = row_of(PROMPTS[0], limits[0], end)
    state = decoder.advance(params, prefilled(MODEL, params, rows), np.int32(4), np.int32(1))
    early = jax.device_get(state)  # before it is given away
    late = jax.device_get(decoder.advance(params, state, np.int32(1000), np.int32(1)))

    ended = early.rows.reasons != Reason.RUNNING
    assert early.rows.reasons[ended].tolist() == [Reason.EOS, Reason.LENGTH, Reason.FREE]
    assert early.rows.lengths[ended].tolist() == [3 + whole[0].tokens.index(end), 3, 1]
    assert np.all(late.rows.reasons != Reason.RUNNING)
    for one, other in ((early, late), (late, early)):
        assert one.rows.lengths[ended].tolist() == other.rows.lengths[ended].tolist()
        assert one.rows.reasons[ended].tolist() == other.rows.reasons[ended].tolist()
    # Whoever goes on from it finds its text, and keys and values of all of it but the last token.
    texts = [prompt + one.tokens for prompt, one in zip(PROMPTS[:7], whole[:7], strict=True)]
    for row, text in enumerate(texts):
        length = late.rows.lengths[row]
        assert late.rows.tokens[row, :length].tolist() == text[:length]
        tokens, fresh = jnp.array([text]), KVCache.init(CONFIG, 1, 16)
        stored = MODEL.apply(params, tokens, jnp.arange(len(text))[None], cache=fresh).cache
        np.testing.assert_allclose(
            late.cache.layers[0]["key"][:, row, :, : length - 1],
            stored.layers[0]["key"][:, 0, :, : length - 1],
            atol=1e-5,
        )


def test_max_length_ends_answers_and_counts_the_prompt(params: Params) -> None:
    found = answers(MODEL, params, requests_of(PROMPTS, GREEDY), max_length=8)
    whole = answers(MODEL, params, requests_of(PROMPTS, GREEDY))
    for prompt, one, all_of_it in zip(PROMPTS, found, whole, strict=True):
        assert one == Answer(all_of_it.tokens[: 8 - len(prompt)], "length")


def test_watchers_see_every_token_once_and_may_end_an_answer(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of(PROMPTS, GREEDY)
    whole = answers(MODEL, params, requests)
    for steps in (1, 3, 8):
        monkeypatch.setattr(batch, "WATCHED_STEPS", steps)
        seen: dict[int, list[int]] = {number: [] for number in range(8)}
        lasts = []

        def watch(
            number: int, k: int, tokens: list[int], is_last: bool, seen=seen, lasts=lasts
        ) -> int | None:
            assert k == 0
            seen[number] += tokens
            lasts.append((number, is_last))
            # The second answer ends at its fifth token, wherever the calls are cut.
            beyond = len(seen[1]) - 5
            return len(tokens) - beyond if number == 1 and beyond >= 0 else None

        found = answers(MODEL, params, requests, watch=watch)
        assert found == [whole[0], Answer(whole[1].tokens[:5], "stop"), *whole[2:]]
        assert [seen[0], seen[2]] == [whole[0].tokens, whole[2].tokens]
        assert len(seen[1]) < 5 + steps
        assert lasts.count((0, True)) == lasts.count((2, True)) == 1


def test_nothing_to_do(params: Params) -> None:
    assert answer(MODEL, params, []) == []


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "more", "message"),
    [
        ([], {}, "prompt 1 is empty"),
        ([96], {}, r"prompt 1: token id 96 is not in the model's vocabulary of 96 \(0 to 95\)"),
        ([3, -1], {}, "prompt 1: token id -1"),
        ([2**40], {}, "prompt 1: token id 1099511627776"),
        ([1.5], {}, "prompt 1: expected a list of token ids"),
        ([[1]], {}, "prompt 1: expected a list of token ids"),
        (["a"], {}, "prompt 1: expected a list of token ids"),
        ("ab", {}, "prompt 1: expected a list of token ids"),
        ([1] * 20, {"max_length": 20}, "prompt 1 has 20 tokens, which leaves no room.* 20"),
        ([1] * 200, {"max_length": 20}, "prompt 1 has 200 tokens, which leaves no room.* 20"),
        ([1], {"max_length": 1}, "max_length is 1"),
        ([1], {"max_length": -3}, "max_length is -3"),
        ([1], {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_jax_would_not_notice_is_refused(
    params: Params, tokens: list, more: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        answer(MODEL, params, requests_of([[1], tokens], GREEDY), **more)


def test_end_ids_outside_the_vocabulary_are_refused(params: Params) -> None:
    for end in (96, -1):
        with pytest.raises(ValueError, match=f"the end ids: token id {end}"):
            answer(MODEL, params, requests_of([[1]], GREEDY, ends=[end]))


def test_more_new_tokens_than_can_be_indexed_are_refused_unless_max_length_is_given(
    params: Params,
) -> None:
    for many in (2**31 - 1, 2**31, 2**63):
        endless = SamplingConfig(temperature=0, max_new_tokens=many)
        with pytest.raises(ValueError, match=rf"max_new_tokens {many} .* give max_length"):
            answer(MODEL, params, requests_of([[1]], endless))
    (found,) = answers(MODEL, params, requests_of([[1]], endless), max_length=16)
    assert len(found.tokens) == 15


def test_logits_that_are_not_finite_are_an_error_that_names_the_prompt(params: Params) -> None:
    poisoned = {**params, "embed": params["embed"].at[40].set(jnp.nan)}
    prompts = [*PROMPTS[:6], [40, 2], [1]]
    once = GREEDY.model_copy(update={"max_new_tokens": 1})
    with pytest.raises(FloatingPointError, match="prompt 6: the logits after 2 tokens"):
        answer(MODEL, poisoned, requests_of(prompts, once))


# --- text --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = ["the cat sat on the mat", "abc abd stop here now", "one two three"]
    return SentencePiece(train(words * 20, vocab_size=300), "words")


@dataclass(frozen=True)
class Scripted(Llama):
    """A model that says params["script"] after the first token of a row, whatever that is."""

    def apply(
        self,
        params: Params,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        cache: KVCache | None = None,
        head: str = "lm",
        rows_B: jax.Array | None = None,
    ) -> Output:
        said = params["script"].at[positions_BT].get(mode="fill", fill_value=0)
        return Output(jax.nn.one_hot(said, self.config.vocab_size) * 50, cache, {})


def prompts_of(
    contents: Sequence[str | list[int]], sampling: SamplingConfig, ends: Sequence[int] = ()
) -> list[Prompt]:
    return [Prompt(content, sampling, ends, index) for index, content in enumerate(contents)]


def say(
    tokenizer: Tokenizer,
    ids: list[int],
    ends: Sequence[int] | None = None,
    stop: tuple[str, ...] = (),
    prompt: str | list[int] = "",
) -> tuple[Completion, list[str]]:
    """The completion by a model that says these ids after its first token; the parts it came in."""
    config = CONFIG.model_copy(update={"vocab_size": tokenizer.vocab_size})
    sampling = SamplingConfig(max_new_tokens=100, temperature=0, stop=stop)
    parts: list[str] = []
    ((completion,),) = generate(
        Scripted(config),
        {"layers": {}, "script": jnp.array([*ids, *[2] * (100 - len(ids))])},  # then </s>
        tokenizer,
        prompts_of([prompt], sampling, tokenizer.eos_ids if ends is None else ends),
        on_text=lambda number, answer, text: parts.append(text),
    )
    return completion, parts


TEXTS = ["the cat sat on the mat", "é😀 한국 naïve", " two spaces  in\n\n", "x" * 40, ""]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_whole_and_never_half_a_character(
    tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "WATCHED_STEPS", 1)
    ids = tokenizer.encode(text)
    completion, parts = say(tokenizer, ids)
    assert completion == Completion(ids, text, "eos")
    assert "".join(parts) == text
    assert all("\ufffd" not in part and part for part in parts)
    assert len(parts) > 3 or len(text) < 20


def test_text_that_ends_in_half_a_character_is_shown_with_its_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀")[:-1]
    completion, parts = say(tokenizer, ids)
    assert completion.text == "".join(parts) == "a\ufffd"


# Stop strings inside a token, across tokens, at both ends, of bytes; a beginning that leads on.
@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("the cat sat on the mat", ["t sat o"], "the ca"),
        ("the cat sat on the mat", ["cat"], "the "),
        ("the cat sat on the mat", ["the"], ""),
        ("the cat sat on the mat", ["mat"], "the cat sat on the "),
        ("the cat sat on the mat", ["mat", "sat", "at o"], "the cat "),
        ("abd abc", ["abc"], "abd "),
        ("aaaab", ["aab"], "aa"),
        ("x😀y", ["😀"], "x"),
        ("one two", ["three", "two!"], None),
        ("one tw", ["two"], None),
    ],
)
def test_stop_strings_end_answers_wherever_tokens_are_cut(
    tokenizer: Tokenizer,
    text: str,
    stops: list[str],
    expected: str | None,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch, "WATCHED_STEPS", steps)
    ids = tokenizer.encode(text)
    completion, parts = say(tokenizer, ids, stop=tuple(stops))
    assert "".join(parts) == completion.text == (text if expected is None else expected)
    assert completion.finish_reason == ("eos" if expected is None else "stop")
    if expected is not None:
        # The tokens go on to the one that completes a stop string, and no further.
        assert completion.tokens == ids[: len(completion.tokens)]
        assert any(stop in tokenizer.decode(completion.tokens) for stop in stops)
        assert not any(stop in tokenizer.decode(completion.tokens[:-1]) for stop in stops)


def stop_by_letters(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the first at which some stop string has just ended."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.text("abc", max_size=5), max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_search_does_not_depend_on_how_text_is_cut(parts: list[str], stops: list[str]) -> None:
    search, shown, found = StopSearch(stops), "", False
    for part in parts:
        text, found = search.feed(part)
        shown += text
        expected = stop_by_letters("".join(parts), stops)[0]
        assert expected.startswith(shown)  # nothing shown is ever taken back
        if found:
            break
    assert (shown + search.finish(), found) == stop_by_letters("".join(parts), stops)


def test_text_continues_its_prompt(tokenizer: Tokenizer) -> None:
    config = CONFIG.model_copy(update={"vocab_size": tokenizer.vocab_size})
    model = Llama(config)
    params = jax.jit(model.init)(jax.random.key(0))
    contents = ["the cat", "one"]
    ids = [tokenizer.encode(prompt, bos=True) for prompt in contents]
    warm = SamplingConfig(temperature=1, top_p=1, max_new_tokens=20)
    found = generate(model, params, tokenizer, prompts_of(contents, warm))
    for prompt, prompt_ids, (one,) in zip(contents, ids, found, strict=True):
        assert prompt + one.text == tokenizer.decode(prompt_ids + one.tokens)
    # The space between two words is a part of the second.
    words = tokenizer.encode("the cat", bos=True)
    cut = next(n for n in range(len(words)) if tokenizer.decode(words[:n]) == "the")
    assert say(tokenizer, words[1:], prompt=words[:cut])[0].text == " cat"
    # Ids are taken as they are; streaming changes nothing; text goes to its own prompt and answer.
    pair = warm.model_copy(update={"n": 2})
    parts = dict.fromkeys(itertools.product(range(2), range(2)), "")

    def on_text(number: int, answer: int, text: str) -> None:
        parts[number, answer] += text

    pairs = generate(model, params, tokenizer, prompts_of(ids, pair), on_text=on_text)
    assert [first for first, _ in pairs] == [one for (one,) in found]
    assert parts == {(i, k): one.text for i, two in enumerate(pairs) for k, one in enumerate(two)}
    assert all(first.text != second.text for first, second in pairs)


def test_end_ids_may_differ_from_the_tokenizer_s(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat sat")
    completion, _ = say(tokenizer, ids)
    assert completion.finish_reason == "eos"
    completion, _ = say(tokenizer, ids, ends=[ids[1]])
    assert (completion.tokens, completion.finish_reason) == (ids[:1], "eos")


def test_a_trained_model_tells_its_story_up_to_the_stop_string(shared_data: Path) -> None:
    folder = shared_data / "weights" / "stories260K_hf"
    config, params = load_folder(folder)
    params, tokenizer = unstack(params), tokenizers.load(folder)
    greedy = SamplingConfig(temperature=0, max_new_tokens=60, stop=("play",))
    parts: list[str] = []
    ((found,),) = generate(
        Llama(config),
        params,
        tokenizer,
        prompts_of([""], greedy),
        on_text=lambda number, answer, text: parts.append(text),
    )
    story = "Once upon a time, there was a little girl named Lily. She loved to "
    assert ("".join(parts), found.text, found.finish_reason) == (story, story, "stop")


def test_text_errors(tokenizer: Tokenizer, params: Params) -> None:
    config = CONFIG.model_copy(update={"vocab_size": tokenizer.vocab_size})
    with pytest.raises(ValueError, match="the tokenizer has 300 ids, the model 96"):
        generate(MODEL, params, tokenizer, prompts_of(["a"], GREEDY))
    with pytest.raises(ValueError, match="lone surrogate"):
        generate(Llama(config), params, tokenizer, prompts_of(["\ud800"], GREEDY))
