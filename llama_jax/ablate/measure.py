"""What is measured of a variant: the losses of a trained one, the speed and memory of any."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.ablate.records import Capacity, Speed, Stretch
from llama_jax.ablate.settings import CostConfig, EvaluationConfig
from llama_jax.config import ComputeConfig, ModelConfig, TrainConfig
from llama_jax.convert.formats import open_source
from llama_jax.convert.source import load_params
from llama_jax.data.loader import Loader
from llama_jax.model.cache import KVCache
from llama_jax.model.layout import for_decoding
from llama_jax.model.llama import Llama
from llama_jax.model.ops.cross_entropy import token_losses
from llama_jax.model.stack import Params
from llama_jax.plan.hardware import GIB
from llama_jax.tokenizer import load as load_tokenizer

LARGEST = 2**20  # rows beyond which nobody asks
DECODED = 32  # tokens of a row that decoding is timed over
Timer = Callable[[], float]


class Losses(NamedTuple):
    """Of a trained model, in nats per token.

    loss: over all validation batches; batches: of each of them.
    by_position: of rows that may be longer than those trained on.
    """

    loss: float
    batches: tuple[float, ...]
    by_position: tuple[Stretch, ...]


def losses(run: TrainConfig, length: int, asked: EvaluationConfig) -> Losses:
    """Validation losses of the run's last checkpoint.

    Args:
        run: whose folder holds it.
        length: tokens of the rows of the final loss, the same for every variant.
        asked: how many batches, how long rows.
    """
    source = open_source(run.out)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(source, jnp.dtype(jnp.float32), here)
    model = Llama(run.model, run.compute)
    tokens = run.data.batch_size * run.data.sequence_length
    sums = [
        (float(np.sum(loss * weights)), float(np.sum(weights)))
        for loss, weights, _ in _validation(model, params, run, length, tokens, asked.batches)
    ]
    longest = asked.longest or 4 * length
    # As many tokens at a time, in as many batches: rows of other lengths, the same text.
    edges = _edges(longest)
    total, count = np.zeros((2, len(edges) - 1))
    for loss, weights, positions in _validation(
        model, params, run, longest, max(tokens, longest), asked.batches
    ):
        total += np.histogram(positions, edges, weights=loss * weights)[0]
        count += np.histogram(positions, edges, weights=weights)[0]
    stretches = [
        Stretch(int(first), int(after) - 1, float(one / n))
        for first, after, one, n in zip(edges, edges[1:], total, count, strict=False)
        if n
    ]
    return Losses(
        loss=sum(one for one, _ in sums) / sum(n for _, n in sums),
        batches=tuple(one / n for one, n in sums),
        by_position=tuple(stretches),
    )


def _edges(longest: int) -> list[int]:
    """0, 16, 32, 64, ... up to the longest."""
    edges = [0, 16]
    while edges[-1] < longest:
        edges.append(min(2 * edges[-1], longest))
    return edges


def _validation(
    model: Llama, params: Params, run: TrainConfig, length: int, tokens: int, batches: int
) -> Any:
    """Losses, weights and positions (rows, length) of validation batches of so many tokens."""
    data = run.data.model_copy(
        update={"sequence_length": length, "batch_size": max(tokens // length, 1)}
    )
    fingerprint = load_tokenizer(run.tokenizer).fingerprint
    loader = Loader(data, "validation", run.seed, run.model.vocab_size, fingerprint)
    assert loader.steps is not None
    chunks = next(n for n in (8, 4, 2, 1) if length % n == 0)
    for step in range(min(batches, loader.steps)):
        batch = loader.batch(step)
        found = _losses(model, chunks, params, {k: batch[k] for k in NEEDED})
        yield np.asarray(found, np.float64), batch["weights"], batch["positions"]


NEEDED = ("tokens", "targets", "positions", "segments")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _losses(model: Llama, chunks: int, params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
    hidden = model.apply(
        params, batch["tokens"], batch["positions"], batch["segments"], head="none"
    ).value
    return token_losses(hidden, model.output_weight(params), batch["targets"], chunks)


def speeds(models: Mapping[str, ModelConfig], cost: CostConfig) -> dict[str, tuple[Speed, ...]]:
    """Tokens per second of prefill and of decoding, for every variant and context.

    All variants take turns, and the median of the rounds counts: what disturbs the machine disturbs
    all. Parameters are random, and lie as they do for decoding on this platform.
    """
    found: dict[str, list[Speed]] = {name: [] for name in models}
    for context in cost.contexts:
        timed = {name: timers(model, cost.rows, context) for name, model in models.items()}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for _ in range(1 + cost.rounds):  # the first compiles, and does not count
            for name, (prefill, decode) in timed.items():
                taken[name].append((prefill(), decode()))
        for name, seconds in taken.items():
            each = [cost.rows / statistics.median(kind) for kind in zip(*seconds[1:], strict=True)]
            found[name].append(Speed(context, cost.rows, *each))
    return {name: tuple(ones) for name, ones in found.items()}


def timers(config: ModelConfig, rows: int, context: int) -> tuple[Timer, Timer]:
    """Prefill of `context` tokens and decoding behind them, which the first call compiles.

    Each, when called, runs and gives the seconds of one token in every row. What a cache holds does
    not change the time, so that of decoding is never filled.
    """
    model = Llama(config)
    params = for_decoding(jax.jit(model.init)(jax.random.key(0)), rows, consume=True)
    stacked = not isinstance(params["layers"], tuple)
    numbers = np.random.default_rng(0)
    tokens = jnp.asarray(numbers.integers(0, config.vocab_size, (rows, context)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(context), tokens.shape)

    def empty(slots: int) -> KVCache:
        return KVCache.init(config, rows, slots, stacked=stacked)

    def prefill(params: Params, cache: KVCache) -> tuple[KVCache, jax.Array]:
        output = model.apply(params, tokens, positions, None, cache, head="none")
        assert output.cache is not None
        return output.cache, output.value[:, -1]

    def decode(params: Params, cache: KVCache) -> tuple[KVCache, jax.Array]:
        def step(n: jax.Array, carry: tuple[KVCache, jax.Array]) -> tuple[KVCache, jax.Array]:
            cache, last = carry
            output = model.apply(params, last, jnp.full((rows, 1), context) + n, None, cache)
            assert output.cache is not None
            return output.cache, jnp.argmax(output.value, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, DECODED, step, (cache, tokens[:, :1]))

    return (
        _timer(prefill, params, empty(context), context),
        _timer(decode, params, empty(context + DECODED), DECODED),
    )


def _timer(run: Any, params: Params, cache: KVCache, tokens: int) -> Timer:
    """The function on a cache that it writes in place, over and over."""
    compiled, held = jax.jit(run, donate_argnums=1), [cache]

    def seconds() -> float:
        start = time.perf_counter()
        held[0], result = compiled(params, held[0])
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / tokens

    return seconds


def capacity(config: ModelConfig, context: int, memory_gib: float) -> Capacity:
    """The largest power of two of rows that decode with so long a context within a memory.

    As for figure 24 of Llama 2 (arXiv 2307.09288), where the batch was doubled until memory ran
    out; here memory is that of the compiled step, in bf16, and nothing runs.
    """
    limit = int(memory_gib * GIB)

    def fits(rows: int) -> bool:
        return rows <= LARGEST and compiled_bytes(config, rows, context) <= limit

    # Memory grows in a straight line with the rows, but for the first few, whose programs are
    # others: two sizes tell where to look.
    few, more = (compiled_bytes(config, rows, context) for rows in (8, 16))
    guess = 8 + (limit - few) * 8 // max(more - few, 1)
    rows = min(1 << max(guess, 1).bit_length() - 1, LARGEST)
    while fits(2 * rows):
        rows *= 2
    while rows and not fits(rows):
        rows //= 2
    return Capacity(context, memory_gib, rows, rows and compiled_bytes(config, rows, context))


@functools.cache
def compiled_bytes(config: ModelConfig, rows: int, context: int) -> int:
    """Bytes that a decoding step takes: parameters and cache in bf16, and what it works with."""
    model = Llama(config, ComputeConfig(dtype="bfloat16"))
    shapes = model.shapes()
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
    cache = jax.eval_shape(lambda: KVCache.init(config, rows, context, jnp.bfloat16))
    token = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    # Memory is given out before machine code is made, which nobody will run.
    hasty = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    step = jax.jit(model.apply, donate_argnames="cache", compiler_options=hasty)
    memory = step.lower(params, token, token, None, cache).compile().memory_analysis()
    assert memory is not None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held - memory.alias_size_in_bytes + memory.temp_size_in_bytes
