"""The `models` command: what every configuration in configs/models amounts to."""

import json
import math
from typing import Any

import jax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llama_jax.config import ModelsConfig, load_model, model_names
from llama_jax.model.count import cache_bytes_per_token, flops_per_token
from llama_jax.model.llama import Llama


def describe(name: str, length: int) -> dict[str, Any]:
    """One model's sizes: parameters by shape inference, the rest in closed form."""
    config = load_model(name)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(Llama(config).shapes()))
    return {
        "name": name,
        "parameters": parameters,
        "layers": config.n_layers,
        "d_model": config.d_model,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "d_ff": config.d_ff,
        "vocab_size": config.vocab_size,
        "length": length,
        "training_flops_per_token": flops_per_token(config, length),
        "cache_bytes_per_token_bf16": cache_bytes_per_token(config),
    }


def list_models(config: ModelsConfig) -> int:
    """Prints every model of configs/models, as a table or as JSON."""
    rows = [describe(name, config.length) for name in model_names()]
    if config.as_json:
        print(json.dumps(rows, indent=2))
        return 0
    title = f"Models of configs/models (training FLOPs at length {config.length:,})"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("name", no_wrap=True)
    for heading in ("parameters", "layers", "d_model", "heads/kv", "d_ff", "vocab"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("GFLOPs/token", justify="right", no_wrap=True)
    table.add_column("cache B/token", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            str(row["layers"]),
            str(row["d_model"]),
            f"{row['heads']}/{row['kv_heads']}",
            f"{row['d_ff']:,}",
            f"{row['vocab_size']:,}",
            f"{row['training_flops_per_token'] / 1e9:,.3f}",
            f"{row['cache_bytes_per_token_bf16']:,}",
        )
    Console(width=max(130, Console().width)).print(table)
    return 0
