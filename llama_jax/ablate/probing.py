"""Trains a small model on a generated task, and tells how often it answers right."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.ablate.probes import Rows, accuracy, batch
from llama_jax.ablate.settings import ProbesConfig
from llama_jax.config import ComputeConfig, ModelConfig, OptimizerConfig
from llama_jax.model.llama import Llama
from llama_jax.model.stack import Params
from llama_jax.train.optimizer import adamw
from llama_jax.train.step import Batch, init_state, lm_loss, make_step


def probe(
    model: ModelConfig, name: str, difficulty: int, seed: int, asked: ProbesConfig
) -> tuple[float, dict[int, float]]:
    """Accuracy on rows that were not trained on, 0 to 1: of all answers, and of each place's.

    Args:
        model: the variant; its vocabulary becomes that of the probe.
        name, difficulty: of the probe.
        seed: of the first parameters and of the rows.
        asked: sizes and steps.

    Raises:
        ConfigError: there is no such probe, or the sizes do not suit it.
    """
    sized = model.model_copy(update={"vocab_size": asked.vocab_size})
    llama = Llama(sized, ComputeConfig(loss_chunks=1))
    rows = functools.partial(
        batch,
        name,
        seed,
        rows=asked.rows,
        length=asked.length,
        vocab_size=asked.vocab_size,
        difficulty=difficulty,
    )
    params = _trained(llama, rows, seed, asked)
    right, seen = [], []
    for number in range(asked.test_batches):
        test = rows(number, split="test")
        right.append(np.asarray(_right(llama, params, _as_batch(test))))
        seen.append(test)
    whole = Rows(*(np.concatenate(parts) for parts in zip(*seen, strict=True)))
    return accuracy(np.concatenate(right), whole)


def _trained(llama: Llama, rows: Any, seed: int, asked: ProbesConfig) -> Params:
    settings = OptimizerConfig(peak_lr=asked.peak_lr, warmup_steps=min(50, asked.steps // 10))
    optimizer = adamw(settings, asked.steps, llama.axes())
    step = jax.jit(make_step(lm_loss(llama), optimizer), donate_argnums=0)
    state = jax.jit(lambda key: init_state(llama.init(key), optimizer))(jax.random.key(seed))
    for number in range(asked.steps):
        state, _ = step(state, _as_batch(rows(number, split="train")))
    return state.params


def _as_batch(rows: Rows) -> Batch:
    """What training takes: each row one document, weights 1 where an answer follows."""
    tokens = jnp.asarray(rows.tokens)
    length = tokens.shape[1] - 1
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": jnp.broadcast_to(jnp.arange(length), (len(tokens), length)),
        "segments": jnp.ones((len(tokens), length), jnp.int32),
        "weights": jnp.asarray(rows.weights),
    }


@functools.partial(jax.jit, static_argnums=0)
def _right(llama: Llama, params: Params, batch: Batch) -> jax.Array:
    logits = llama.apply(params, batch["tokens"], batch["positions"]).value
    return jnp.argmax(logits, axis=-1) == batch["targets"]
