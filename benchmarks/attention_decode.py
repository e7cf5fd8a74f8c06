"""How fast variants of attention decode when the cache is long: the compiled step of one row.

    python benchmarks/attention_decode.py            (three minutes on two cores)

All variants take turns, round by round, so that what disturbs the machine disturbs all; the median
counts. A decoding step reads every weight and the whole cache once, so beside each time stands what
it should be: the bytes of both, in parts of multi-head attention's. Nothing is asserted.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from llama_jax.ablate.measure import timers
from llama_jax.config import ModelConfig
from llama_jax.model.cache import cache_bytes
from llama_jax.model.count import cache_bytes_per_row, parameters
from sharding.mesh import machine

SHAPE = {
    **{"d_model": 768, "n_layers": 8, "n_heads": 12, "n_kv_heads": 12, "d_head": 64},
    **{"d_ff": 2048, "vocab_size": 4096, "norm_eps": 1e-5, "rope_theta": 1e4},
    "tie_embeddings": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped-query, 4 key heads": {"n_kv_heads": 4},
    "multi-query": {"n_kv_heads": 1},
    "latent, rank 256 + 32": {
        "attention": "latent",
        "attention_settings": {"kv_rank": 256, "rope_width": 32},
    },
    "keys are values": {"keys_are_values": True},
    "window 1,024": {"window": 1024},
    "gated delta": {"attention": "gated_delta"},
}


def main() -> None:
    """Measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    models = {name: ModelConfig(**SHAPE | changes) for name, changes in VARIANTS.items()}
    records = []
    for context in given.contexts:
        decode = {name: timers(config, 1, context)[1] for name, config in models.items()}
        taken: dict[str, list[float]] = {name: [] for name in models}
        for _ in track(range(1 + given.rounds), f"context {context:,}", transient=True):
            for name, seconds in decode.items():
                taken[name].append(seconds())
        for name, config in models.items():
            weights = 4 * parameters(config).products
            cache = cache_bytes(config, 1, context, jnp.float32)
            records.append(
                {
                    "variant": name,
                    "context": context,
                    # The first call compiles.
                    "milliseconds": 1000 * statistics.median(taken[name][1:]),
                    "fastest": 1000 * min(taken[name][1:]),
                    "cache_bytes_per_token_bf16": cache_bytes_per_row(config, context) // context,
                    "weight_bytes": weights,
                    "cache_bytes": cache,
                }
            )
        del decode
    show(records)
    if given.out:
        record = {"jax": jax.__version__, "device": machine(), "rows": records}
        given.out.write_text(json.dumps(record, indent=1) + "\n")


def show(records: list[dict[str, Any]]) -> None:
    """Times, and times and bytes in parts of multi-head attention's."""
    table = Table(box=SIMPLE_HEAD, title="One decoding step, one row, fp32")
    table.add_column("variant", no_wrap=True)
    for heading in ("context", "cache B/token (bf16)", "ms", "time / MHA", "bytes / MHA", "GB/s"):
        table.add_column(heading, justify="right")
    base = {row["context"]: row for row in records if row["variant"] == "multi-head"}
    for row in records:
        moved = row["weight_bytes"] + row["cache_bytes"]
        first = base[row["context"]]
        table.add_row(
            row["variant"],
            f"{row['context']:,}",
            f"{row['cache_bytes_per_token_bf16']:,}",
            f"{row['milliseconds']:.2f}",
            f"{row['milliseconds'] / first['milliseconds']:.2f}",
            f"{moved / (first['weight_bytes'] + first['cache_bytes']):.2f}",
            f"{moved / row['milliseconds'] / 1e6:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
