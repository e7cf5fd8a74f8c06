"""What the comparisons with other implementations share: one mapping, and the plainest decoding."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.convert import huggingface, names
from llama_jax.convert.source import load_params
from llama_jax.model.cache import KVCache


def in_our_layout(arrays, config):
    """Hugging Face name -> array becomes path in our tree -> array, layers stacked."""
    layout = {}
    for row in names.tensors(config):
        parts = [
            names.rearrange(
                arrays[row.huggingface.name.format(layer=layer)],
                row.huggingface.axes,
                row.axes,
                config,
            )
            for layer in names.layers(row, config)
        ]
        layout[row.path] = np.stack(parts) if row.is_layered else parts[0]
    return layout


def load_folder(folder):
    """Architecture and fp32 parameters (numpy) of a Hugging Face folder."""
    source = huggingface.open_folder(Path(folder))
    return source.config, load_params(source, np.float32)


def greedy(model, params, prompts, count):
    """Continues each prompt (a list of ids, of any length) by its `count` likeliest tokens.

    A Python loop over `Llama.apply` with a cache; prompts are padded on the right.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < lengths[:, None]).astype(np.int32)
    stacked = not isinstance(params["layers"], tuple)
    cache = KVCache.init(model.config, len(prompts), lengths.max() + count, stacked=stacked)

    step = jax.jit(model.apply)
    output = step(params, tokens, positions, segments, cache)
    logits = output.value[jnp.arange(len(prompts)), lengths - 1]
    chosen = []
    for offset in range(count):
        chosen.append(np.asarray(logits.argmax(axis=-1)))
        output = step(params, chosen[-1][:, None], (lengths + offset)[:, None], None, output.cache)
        logits = output.value[:, 0]
    return np.stack(chosen, axis=1).tolist()
