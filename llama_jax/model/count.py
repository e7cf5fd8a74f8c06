"""The arithmetic of a model: parameters, FLOPs, bytes of cache. Closed forms of the config."""

import itertools

from llama_jax.config import ModelConfig


def n_parameters(config: ModelConfig) -> int:
    """Parameters of the language model."""
    norms = (2 * config.n_layers + 1) * config.d_model
    embeddings = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    return _layer_matrices(config) * config.n_layers + norms + embeddings


def _layer_matrices(config: ModelConfig) -> int:
    attention = config.d_model * config.d_head * 2 * (config.n_heads + config.n_kv_heads)
    return attention + 3 * config.d_model * config.d_ff


def flops_per_token(config: ModelConfig, length: int) -> int:
    """Training FLOPs (forward and backward, no recomputation) of one token in a row of `length`.

    Two per weight forward and four backward, for every matrix a token passes (the head, not the
    embedding table); and the score and value products with the keys a query sees: the causal half
    of the row, or what a window leaves of it.
    """
    matrices = _layer_matrices(config) * config.n_layers + config.d_model * config.vocab_size
    windows = itertools.islice(itertools.cycle(config.period), config.n_layers)
    seen = sum(_seen(length, window) for window in windows)
    attention = config.n_heads * config.d_head * seen // length
    return 6 * (matrices + attention)


def _seen(length: int, window: int | None) -> int:
    """Twice the area that a layer's mask leaves of (length, length): a triangle, less what lies
    before the window."""
    hidden = max(0, length - window) if window else 0
    return length**2 - hidden**2


def forward_flops_per_token(config: ModelConfig, length: int) -> int:
    """The forward third of `flops_per_token`."""
    return flops_per_token(config, length) // 3


def cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values that one token leaves behind (bf16 by default)."""
    return 2 * config.n_layers * config.n_kv_heads * config.d_head * bytes_per_value
