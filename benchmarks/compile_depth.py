"""Compile time and memory of the training step by depth: with scanned layers they hardly differ.

    python benchmarks/compile_depth.py [--json] [--depths 4 32]

The step of a Llama 2 7B shape narrowed to width 512 is lowered and compiled for this machine from
shapes alone; nothing is run. Memory is XLA's own account: `state` is what the step takes and gives
back, `temporary` what it needs besides.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp

from llama_jax.config import ComputeConfig, OptimizerConfig, load_model
from llama_jax.model.llama import Llama
from llama_jax.train.optimizer import adamw
from llama_jax.train.step import init_state, lm_loss, make_step

ROWS, LENGTH = 1, 512


def measure(depth: int, scan: bool) -> dict:
    config = load_model("llama2_7b").model_copy(
        update={"n_layers": depth, "d_model": 512, "n_heads": 8, "n_kv_heads": 8, "d_ff": 1376}
        | {"d_head": 64}
    )
    model = Llama(config, ComputeConfig(scan_layers=scan, remat="full"))
    optimizer = adamw(OptimizerConfig(), steps=10_000, axes=model.axes())
    state = jax.eval_shape(lambda params: init_state(params, optimizer), model.shapes())
    whole = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segments"), whole)
    batch["weights"] = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32)
    step = jax.jit(make_step(lm_loss(model), optimizer), donate_argnums=0)

    start = time.perf_counter()
    lowered = step.lower(state, batch)
    traced = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    return {
        "layers": depth,
        "program": "scan" if scan else "unrolled",
        "trace_seconds": traced - start,
        "compile_seconds": time.perf_counter() - traced,
        "state_mib": memory.argument_size_in_bytes / 2**20,
        "temporary_mib": memory.temp_size_in_bytes / 2**20,
        "code_mib": memory.generated_code_size_in_bytes / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    rows = [measure(depth, scan) for scan in (True, False) for depth in args.depths]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(
            f"{row['program']:9} {row['layers']:3} layers   trace {row['trace_seconds']:5.1f} s   "
            f"compile {row['compile_seconds']:6.1f} s   state {row['state_mib']:7.1f} MiB   "
            f"temporary {row['temporary_mib']:7.1f} MiB"
        )


if __name__ == "__main__":
    main()
