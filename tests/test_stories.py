"""A trained model from a Hugging Face folder tells the story it is known to tell."""

import pytest
import sentencepiece
from parity import greedy, load_folder

from llama_jax.convert import huggingface
from llama_jax.model.llama import Llama
from llama_jax.model.stack import unstack

pytestmark = pytest.mark.optimized
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
)


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "weights" / "stories260K_hf"


@pytest.mark.parametrize("layout", ["stacked", "per_layer"])
def test_greedy_from_the_first_token_tells_the_known_story(folder, layout):
    config, params = load_folder(folder)
    if layout == "per_layer":
        params = unstack(params)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    (ids,) = greedy(Llama(config), params, [[tokenizer.bos_id()]], 200)
    assert len(ids) == 200
    assert tokenizer.decode(ids).startswith(STORY)
    assert huggingface.eos_ids(folder) == (tokenizer.eos_id(),)
