"""Beam search: against enumeration, against a plain list of hypotheses, against transformers."""

import functools
import importlib
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import load_folder

from llama_jax.config import ModelConfig
from llama_jax.convert import huggingface
from llama_jax.generate import beam
from llama_jax.generate.batch import answer
from llama_jax.generate.decode import Decoder
from llama_jax.generate.request import Answer, Request
from llama_jax.generate.settings import SamplingConfig
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
SLOTS = 16  # and 8 beams, 2 end ids: nearly all tests share the programs of this size
PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12], [9, 8, 9, 8]]
ENDS = (4, 11)
PENALISED = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}


@functools.cache
def make(vocab_size: int, seed: int = 1) -> tuple[Llama, Params]:
    """A random model whose distributions are far from flat."""
    model = Llama(CONFIG.model_copy(update={"vocab_size": vocab_size}))
    params = jax.jit(model.init)(jax.random.key(seed))
    return model, {**params, "head": 3 * params["head"]}


@pytest.fixture(scope="module")
def params() -> Params:
    return make(CONFIG.vocab_size)[1]


@functools.cache
def reference_of(vocab_size: int, length: int = SLOTS) -> "Reference":
    return Reference(*make(vocab_size), length)


class Reference:
    """Log-probabilities of the next token of texts, by the whole forward, without a cache."""

    def __init__(self, model: Llama, params: Params, length: int):
        positions = jnp.arange(length)[None]
        self._length = length
        self._forward = jax.jit(lambda tokens: model.apply(params, tokens, positions).value[0])

    def logprobs(self, text: list[int]) -> np.ndarray:
        """(V,) float64, of the token after the text."""
        return self._logprobs(tuple(text)).copy()

    @functools.cache  # noqa: B019 -- it lives as long as its test
    def _logprobs(self, text: tuple[int, ...]) -> np.ndarray:
        padded = np.array([[*text, *[0] * (self._length - len(text))]])
        logits = np.asarray(self._forward(padded))[len(text) - 1].astype(np.float64)
        return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())

    def allowed(self, prompt: list[int], new: list[int], config: SamplingConfig) -> np.ndarray:
        """The same after the penalties and the ban on n-grams, token by token."""
        text, scores = prompt + new, self.logprobs(prompt + new)
        for token in set(text):
            factor = config.repetition_penalty
            scores[token] *= factor if scores[token] < 0 else 1 / factor
        for token in set(new):
            scores[token] -= config.presence_penalty + config.frequency_penalty * new.count(token)
        n = config.no_repeat_ngram
        grams = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)} if n else set()
        for token in range(len(scores)):
            if n and tuple([*text, token][-n:]) in grams:
                scores[token] = beam.FORBIDDEN
        return scores


def plain_beam_search(
    reference: Reference, prompt: list[int], config: SamplingConfig, ends: tuple[int, ...]
) -> list[list[int]]:
    """One hypothesis after the other, as lists: new tokens of the num_beams best, ends kept."""
    width, most = config.num_beams, config.max_new_tokens
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    while beams:
        candidates = sorted(
            (
                (total + score, [*new, token])
                for total, new in beams
                for token, score in enumerate(reference.allowed(prompt, new, config))
            ),
            key=lambda candidate: -candidate[0],
        )
        length = len(candidates[0][1])
        for total, new in candidates[:width]:
            if new[-1] in ends or length == most:
                done.append((total / length, new))
        done = sorted(done, key=lambda one: -one[0])[:width]
        beams = [one for one in candidates if one[1][-1] not in ends][:width]
        best = beams[0][0] / length if beams else -math.inf
        if length == most or (len(done) == width and best <= done[-1][0]):
            break
    return [new for _, new in done]


def search(
    model: Llama, params: Params, request: Request, width: int, slots: int = SLOTS
) -> list[Answer]:
    limit = len(request.tokens) + request.sampling.max_new_tokens
    return beam.search(
        Decoder(model, model.config.vocab_size),
        params,
        request,
        limit,
        number=0,
        width=width,
        slots=slots,
        ends=max(2, len(request.ends)),
        cache_dtype="float32",
    )


def as_answer(new: list[int], ends: tuple[int, ...]) -> Answer:
    return Answer(new[:-1], "eos") if new[-1] in ends else Answer(new, "length")


# --- what is found -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra", [{}, PENALISED, {"no_repeat_ngram": 2}], ids=["plain", "penalised", "no_repeat_ngram"]
)
def test_beams_for_every_text_find_the_best_of_all(extra: dict) -> None:
    """64 beams hold all texts of three tokens out of four."""
    model, params = make(vocab_size=4)
    reference, prompt = reference_of(4), [1, 2, 3, 1]
    config = SamplingConfig(num_beams=64, n=16, max_new_tokens=3, **extra)

    def mean(new: tuple[int, ...]) -> float:
        scores = [
            reference.allowed(prompt, list(new[:i]), config)[token] for i, token in enumerate(new)
        ]
        return sum(scores) / len(new)

    ends = (2,)
    texts = [
        new
        for length in (1, 2, 3)
        for new in itertools.product(range(4), repeat=length)
        if not any(token in ends for token in new[:-1]) and (new[-1] in ends or length == 3)
    ]
    expected = sorted(texts, key=mean, reverse=True)[:16]
    found = search(model, params, Request(prompt, config, ends), width=64)
    assert found == [as_answer(list(new), ends) for new in expected]
    assert {one.finish_reason for one in found} == {"eos", "length"}


def test_a_narrow_beam_keeps_what_a_list_of_hypotheses_keeps(params: Params) -> None:
    reference = reference_of(24)
    kinds = [{}, PENALISED, {"no_repeat_ngram": 2}, {"no_repeat_ngram": 1, **PENALISED}]
    reasons, early = set(), 0
    for count, extra, prompt in itertools.product((2, 3, 5, 8), kinds, PROMPTS):
        config = SamplingConfig(num_beams=count, n=count, max_new_tokens=7, **extra)
        expected = plain_beam_search(reference, prompt, config, ENDS)
        found = search(MODEL, params, Request(prompt, config, ENDS), width=8)
        assert found == [as_answer(new, ENDS) for new in expected], (count, extra, prompt)
        reasons |= {one.finish_reason for one in found}
        early += all(len(one.tokens) < 6 for one in found)
    assert reasons == {"eos", "length"}
    assert early > 5  # searches that ended before the limit


def test_one_beam_is_greedy(params: Params) -> None:
    greedy = SamplingConfig(temperature=0, max_new_tokens=7)
    expected = answer(MODEL, params, [Request(prompt, greedy, ENDS) for prompt in PROMPTS])
    found = [search(MODEL, params, Request(prompt, greedy, ENDS), width=8) for prompt in PROMPTS]
    assert found == expected


def test_more_beams_than_needed_change_nothing_and_none_is_compiled_for(params: Params) -> None:
    def hypotheses(count: int, width: int, **extra: float) -> list[Answer]:
        config = SamplingConfig(num_beams=count, n=count, max_new_tokens=6, **extra)
        return search(MODEL, params, Request([1, 2], config, ENDS), width)

    hypotheses(2, 8)
    before = [function._cache_size() for function in (beam.begin, beam.advance)]
    in_eight = [hypotheses(count, 8) for count in range(2, 9)]
    hypotheses(7, 8, repetition_penalty=1.2, presence_penalty=0.1)
    assert [function._cache_size() for function in (beam.begin, beam.advance)] == before
    assert hypotheses(3, 4) == in_eight[1]


def test_hypotheses_differ_and_come_best_first_with_the_model_s_own_log_probabilities(
    params: Params,
) -> None:
    reference, prompt = reference_of(24), [3, 7]
    config = SamplingConfig(num_beams=8, n=8, max_new_tokens=6, logprobs=2)
    found = search(MODEL, params, Request(prompt, config), width=8)
    assert len({tuple(one.tokens) for one in found}) == 8
    means = [np.mean([report.logprob for report in one.logprobs or ()]) for one in found]
    assert means == sorted(means, reverse=True)
    for one in found:
        assert one.logprobs is not None
        for i, (token, report) in enumerate(zip(one.tokens, one.logprobs, strict=True)):
            own = reference.logprobs(prompt + one.tokens[:i])
            assert abs(report.logprob - own[token]) < 1e-5
            assert [token for token, _ in report.likeliest] == np.argsort(-own)[:2].tolist()
            np.testing.assert_allclose(
                [p for _, p in report.likeliest], np.sort(own)[-2:][::-1], atol=1e-5
            )


def test_log_probabilities_are_the_model_s_own_where_penalties_change_the_choice(
    params: Params,
) -> None:
    config = SamplingConfig(num_beams=4, n=1, max_new_tokens=6, logprobs=0, **PENALISED)
    (found,) = search(MODEL, params, Request([1, 2], config), width=8)
    reference = reference_of(24)
    own = [
        reference.logprobs([1, 2, *found.tokens[:i]])[token] for i, token in enumerate(found.tokens)
    ]
    np.testing.assert_allclose([one.logprob for one in found.logprobs or ()], own, atol=1e-5)


def test_steps_are_bounded_and_calls_may_be_cut_anywhere(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request([1, 2], SamplingConfig(num_beams=8, n=8, max_new_tokens=7), ENDS)
    whole = search(MODEL, params, request, width=8)
    calls = []
    advance = beam.advance
    monkeypatch.setattr(beam, "STEPS", 2)
    monkeypatch.setattr(beam, "advance", lambda *args: calls.append(args[-1]) or advance(*args))
    assert search(MODEL, params, request, width=8) == whole
    assert 2 <= len(calls) <= 4


def test_ids_beyond_the_tokenizer_s_are_never_taken(params: Params) -> None:
    config = SamplingConfig(num_beams=8, n=8, max_new_tokens=6)
    assert max(max(one.tokens) for one in search(MODEL, params, Request([1], config), 8)) >= 8
    (found,) = answer(MODEL, params, [Request([1], config)], n_ids=8)
    assert len(found) == 8
    assert max(max(one.tokens) for one in found) < 8
    # With fewer ids than hypotheses there might be none for some.
    with pytest.raises(ValueError, match="prompt 0: n is 8, but beam search over 7 ids"):
        answer(MODEL, params, [Request([1], config)], n_ids=7)


def test_a_text_with_nothing_allowed_left_still_ends() -> None:
    model, params = make(vocab_size=4)
    config = SamplingConfig(num_beams=64, n=4, max_new_tokens=8, no_repeat_ngram=1)
    found = search(model, params, Request([1, 2], config), width=64)
    assert [len(one.tokens) for one in found] == [8] * 4
    assert {0, 3} == set(found[0].tokens[:2])  # what was allowed came first


# --- beside other requests -----------------------------------------------------------------------


def test_requests_for_beams_and_for_samples_go_together(params: Params) -> None:
    beams = SamplingConfig(num_beams=5, n=2, max_new_tokens=7)
    warm = SamplingConfig(temperature=1, max_new_tokens=7, n=2)
    kinds = [beams, warm, beams, warm]
    requests = [
        Request(prompt, kind, ENDS, index)
        for index, (prompt, kind) in enumerate(zip(PROMPTS, kinds, strict=True))
    ]
    done: list[tuple[int, list[Answer]]] = []
    watched: list[tuple[int, int, list[int], bool]] = []
    together = answer(
        MODEL,
        params,
        requests,
        watch=lambda *event: watched.append(event),
        on_done=lambda *event: done.append(event),
    )
    assert together == [answer(MODEL, params, [request])[0] for request in requests]
    assert sorted(done) == list(enumerate(together))
    for i in (0, 2):
        assert [event for event in watched if event[0] == i] == [
            (i, k, one.tokens, True) for k, one in enumerate(together[i])
        ]


def test_a_watcher_may_cut_a_hypothesis(params: Params) -> None:
    config = SamplingConfig(num_beams=5, n=2, max_new_tokens=7, logprobs=1)
    request = Request([1, 2], config, ENDS)
    (whole,) = answer(MODEL, params, [request])
    (cut,) = answer(MODEL, params, [request], watch=lambda _i, k, *_: 3 if k else None)
    assert cut[0] == whole[0]
    assert cut[1] == Answer(whole[1].tokens[:3], "stop", (whole[1].logprobs or [])[:3])


def test_prompts_of_any_length_are_prefilled_in_pieces(params: Params) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 24, length).tolist() for length in (1, 2, 33, 128, 200)]
    config = SamplingConfig(num_beams=4, n=4, max_new_tokens=4)
    found = answer(MODEL, params, [Request(prompt, config) for prompt in prompts])
    reference = reference_of(24, 204)
    for prompt, hypotheses in zip(prompts, found, strict=True):
        expected = plain_beam_search(reference, prompt, config, ())
        assert [one.tokens for one in hypotheses] == expected


def test_a_mesh_finds_the_same(params: Params) -> None:
    config = SamplingConfig(num_beams=7, n=7, max_new_tokens=6, **PENALISED)
    requests = [Request([1, 2], config, ENDS)]
    plain = answer(MODEL, params, requests)
    sizes = {"data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 2}
    mesh = make_mesh(sizes, jax.devices()[:4])
    model = Llama(CONFIG, rules=PRESETS["decode"])
    placed = jax.device_put(
        params, shardings(model.shapes(), model.axes(), mesh, PRESETS["decode"])
    )
    with jax.set_mesh(mesh):
        placed = jax.jit(unstack)(placed)
        assert answer(model, placed, requests) == plain


# --- errors --------------------------------------------------------------------------------------


def test_logits_that_are_not_finite_are_an_error_that_names_the_prompt(params: Params) -> None:
    poisoned = {**params, "final_norm": params["final_norm"] * jnp.nan}
    config = SamplingConfig(num_beams=5, max_new_tokens=3)
    with pytest.raises(FloatingPointError, match="prompt 0: the logits after"):
        answer(MODEL, poisoned, [Request([1, 2], config, ENDS)])


# --- transformers --------------------------------------------------------------------------------


def beams_of_transformers(
    torch, reference, prompt: list[int], config: SamplingConfig, ends: tuple[int, ...]
) -> list[Answer]:
    """`generate` of transformers with the same settings."""
    reference.generation_config.pad_token_id = 0
    output = reference.generate(
        torch.tensor([prompt]),
        do_sample=False,
        num_beams=config.num_beams,
        num_return_sequences=config.n,
        max_new_tokens=config.max_new_tokens,
        repetition_penalty=config.repetition_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram,
        length_penalty=1.0,
        early_stopping=False,
        eos_token_id=list(ends) or None,
    )
    answers = []
    for row in output[:, len(prompt) :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), None)
        answers.append(Answer(row[:end], "length" if end is None else "eos"))
    return answers


def equal_cases(torch, reference, model: Llama, params: Params, prompts, ends) -> int:
    """How many cases were compared; every one must be equal, token for token."""
    kinds = [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram": 2}]
    cases = list(itertools.product(prompts, (2, 3, 4, 8), kinds))
    reasons = set()
    for prompt, count, extra in cases:
        config = SamplingConfig(num_beams=count, n=count, max_new_tokens=20, **extra)
        expected = beams_of_transformers(torch, reference, prompt, config, ends)
        found = search(model, params, Request(prompt, config, ends), width=8, slots=48)
        assert found == expected, (prompt, count, extra)
        reasons |= {one.finish_reason for one in found}
    assert reasons == ({"eos", "length"} if ends else {"length"})
    return len(cases)


@pytest.mark.parity
def test_a_trained_model_s_beams_are_those_of_transformers(shared_data: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "weights" / "stories260K_hf"
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, params = load_folder(folder)
    prompts = [[1], [1, 403, 407, 261], [1, 50, 60, 70, 80, 90, 100]]
    assert equal_cases(torch, reference, Llama(config), params, prompts, (2, 432)) == 36


@pytest.mark.parity
@pytest.mark.parametrize("ends", [(7,), (4, 11, 23), ()], ids=str)
def test_a_random_model_s_beams_are_those_of_transformers(
    ends: tuple[int, ...], tmp_path: Path
) -> None:
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
    config = huggingface.read_config(tmp_path)
    params = load_folder(tmp_path)[1]
    prompts = [[1], [3, 5, 3, 5, 3], [9, 8, 7]]
    assert equal_cases(torch, reference, Llama(config), params, prompts, ends) == 36
