"""Small models of each generation for the tests of conversion, in folders of any format."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from llama_jax.convert.convert import convert
from llama_jax.convert.settings import ConvertConfig
from llama_jax.convert.source import DTYPES
from llama_jax.tokenizer.train import train

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))


def huggingface_folder(folder, case, dtype="float32", **values):
    """A golden model in a type, with other values in its config.json."""
    shutil.copytree(GOLDEN / case, folder)
    (folder / "golden.npz").unlink()
    weights = load_file(folder / "model.safetensors")
    rounded = {name: array.astype(DTYPES[dtype]) for name, array in weights.items()}
    save_file(rounded, folder / "model.safetensors")
    change_config(folder, **values)
    return folder


def speaking_folder(folder, case="llama3.2_tied"):
    """A golden model with a tokenizer: 300 pieces, 320 rows, two ids that end a text."""
    huggingface_folder(folder, case, vocab_size=320, eos_token_id=[2, 17])
    weights = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(weights):
        weights[name] = rng.standard_normal((320, 32), np.float32)
    save_file(weights, folder / "model.safetensors")
    words = ["the cat sat on the mat", "abc abd stop here now", "one two three"]
    (folder / "tokenizer.model").write_bytes(train(words * 20, vocab_size=300))
    return folder


def change_config(folder, **values):
    """Lays values over those of config.json; sections are laid over sections."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in values.items():
        inner = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = config[key] | value if inner else value
    path.write_text(json.dumps(config))


def converted(source, destination, to, **settings):
    """The destination, after `convert`."""
    given = {"source": str(source), "destination": str(destination), "to": to}
    assert convert(ConvertConfig(**given, **settings)) == 0
    return destination
