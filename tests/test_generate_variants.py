"""Generation with variants whose layers remember less than every token, or another thing than keys:
continuous batching, shared prompts, drafts and beams, against a whole forward pass per token."""

import functools

import jax
import numpy as np
import pytest

from llama_jax.ablate.parity import Case, variants
from llama_jax.generate.batch import answer
from llama_jax.generate.request import Request
from llama_jax.generate.settings import SamplingConfig
from llama_jax.generate.speculative import Draft
from llama_jax.model.layout import for_decoding
from llama_jax.model.llama import Llama

VARIANTS = variants()
NEW = 9
PROMPTS = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9], [8, 8], [2, 7, 1, 8, 2, 8]]
TRIED = [
    *("window", "window_keep_first", "chunks_and_nope", "shared_kv_window", "latent_queries"),
    *("gated_delta", "gated_delta_in_turn", "differential", "mixture"),
]


@functools.cache
def case(name: str) -> Case:
    return Case(VARIANTS[name])


@functools.cache
def greedy(name: str) -> list[list[int]]:
    """What follows each prompt, token by token, by whole rows without a cache."""
    model, length = Llama(VARIANTS[name]), max(map(len, PROMPTS)) + NEW

    @jax.jit
    def logits(tokens):
        return model.apply(case(name).params, tokens, np.arange(length)[None]).value[0]

    found = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(NEW):
            padded = np.array([text + [0] * (length - len(text))], np.int32)
            text.append(int(np.argmax(logits(padded)[len(text) - 1])))
        found.append(text[len(prompt) :])
    return found


def requests(**sampling) -> list[Request]:
    settings = SamplingConfig(temperature=0, max_new_tokens=NEW, **sampling)
    return [Request(prompt, settings, (), i) for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    ("name", "stacked"),
    [(name, False) for name in TRIED]
    + [("window_keep_first", True), ("gated_delta_in_turn", True)],
)
def test_two_rows_serve_five_prompts(name, stacked):
    """Rows are given out anew, in a cache that others have used; prompts are longer than the
    windows, and padded to the length of a piece."""
    params = case(name).params
    params = params if stacked else for_decoding(params, 2)
    found = answer(Llama(VARIANTS[name]), params, requests(), batch_size=2)
    assert [group[0].tokens for group in found] == greedy(name)


@pytest.mark.parametrize("name", ["window_keep_first", "gated_delta_in_turn"])
def test_answers_to_one_prompt_share_its_context(name):
    """Also those that begin when a row has gone beyond the prompt and forgotten its beginning."""
    model = Llama(VARIANTS[name])
    found = answer(model, case(name).params, requests(n=3), batch_size=2)
    assert [[one.tokens for one in group] for group in found] == [[x] * 3 for x in greedy(name)]


@pytest.mark.parametrize("name", ["window", "window_keep_first", "latent_queries"])
def test_a_draft_changes_no_greedy_answer(name):
    """Rejected tokens are taken back, also where they have taken the places of others."""
    model, params = Llama(VARIANTS[name]), case(name).params
    other = Llama(VARIANTS["window"])
    draft = Draft(other, jax.jit(other.init)(jax.random.key(3)), 3)
    found = answer(model, params, requests(), batch_size=2, draft=draft)
    assert [group[0].tokens for group in found] == greedy(name)
    itself = answer(model, params, requests(), batch_size=2, draft=Draft(model, params, 3))
    assert [group[0].tokens for group in itself] == greedy(name)


def test_a_state_cannot_take_tokens_back():
    model, params = Llama(VARIANTS["gated_delta"]), case("gated_delta").params
    with pytest.raises(ValueError, match="gated_delta cannot take back tokens"):
        answer(model, params, requests(), draft=Draft(model, params, 3))


@pytest.mark.parametrize("name", ["window", "gated_delta_in_turn"])
def test_one_beam_is_greedy_among_two(name):
    """Beams move between rows, and what the rows remember moves along."""
    model, params = Llama(VARIANTS[name]), case(name).params
    found = answer(model, params, requests(num_beams=2, n=2, logprobs=0))
    for prompt, group in zip(PROMPTS, found, strict=True):
        for one in group:
            text = np.array([[*prompt, *one.tokens]], np.int32)
            positions = np.arange(text.shape[1])[None]
            logits = model.apply(params, text, positions).value[0]
            each = jax.nn.log_softmax(logits)[np.arange(len(prompt) - 1, text.shape[1] - 1)]
            expected = [float(row[token]) for row, token in zip(each, one.tokens, strict=True)]
            assert one.logprobs is not None
            np.testing.assert_allclose([t.logprob for t in one.logprobs], expected, atol=2e-4)
