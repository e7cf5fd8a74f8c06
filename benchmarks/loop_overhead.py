"""What the training loop costs besides the compiled step, and what a checkpoint costs.

    python benchmarks/loop_overhead.py [--json] [--steps 60] [--rounds 3] [--state-mb 300]

First the demo's model (4M parameters) is trained on Python's own sources, in turns with the bare
compiled step on one batch that never changes: the difference is data, logs and Python. host_share
is what the loop itself counts, and a bound from above: it is spent while a step is computed. Then a
state of random numbers is saved, and the time until training could go on is compared with the time
until the checkpoint is complete. On a busy machine trust the shares of CPU time only.
"""

import argparse
import contextlib
import io
import json
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import config as schema
from llama_jax.config import CheckpointConfig, DataPrepareConfig, TokenizerTrainConfig, TrainConfig
from llama_jax.data.prepare import prepare
from llama_jax.tokenizer.train import train_tokenizer
from llama_jax.train import checkpoint, loop
from llama_jax.train.checkpoint import Writer
from llama_jax.train.metrics import METRICS, read_metrics

WARMUP, LOGGED = 5, 10


def make_config(folder, steps):
    """The demo's run on a small corpus, without validation or checkpoints before the end."""
    library = sysconfig.get_path("stdlib")
    texts = tuple(f"{library}/{name}/*.py" for name in ("asyncio", "email", "http", "unittest"))
    model, corpus = f"{folder}/tokenizer.model", f"{folder}/corpus"
    with contextlib.redirect_stdout(io.StringIO()):
        train_tokenizer(TokenizerTrainConfig(paths=texts, out=model, vocab_size=4096))
        prepare(DataPrepareConfig(paths=texts, out=corpus, tokenizer=model, validation_fraction=0))
    recipe = schema.read_yaml(schema.configs_folder() / "runs" / "demo.yaml")
    changes = {
        "out": f"{folder}/run",
        "tokenizer": model,
        "data": {**recipe["data"], "sources": [{"path": corpus}]},
        "steps": steps,
        "log_every": LOGGED,
        "checkpoint": {"every": steps},
        "optimizer": {"warmup_steps": 1},
    }
    return schema.parse(TrainConfig, {**recipe, **changes}, "demo.yaml")


def bare_steps(run, programs, steps):
    """(wall, CPU) seconds of one compiled step, one after another."""
    state = loop.new_state(run)
    batch = loop.place(run, run.data.batch(0))
    for step in range(WARMUP + steps):
        if step == WARMUP:
            start = np.array([time.perf_counter(), time.process_time()])
        state, metrics = programs.step(state, batch)
        jax.block_until_ready(metrics)
    return (np.array([time.perf_counter(), time.process_time()]) - start) / steps


def loop_steps(config, out, cpu_times):
    """(wall, CPU) seconds of one step within `train`, and the share its own log gives the host."""
    config = config.model_copy(update={"out": str(out)})
    cpu_times.clear()
    with contextlib.redirect_stdout(io.StringIO()):
        loop.train(config)
    tokens = config.data.batch_size * config.data.sequence_length
    lines = read_metrics(out / METRICS)[1:]
    wall = statistics.mean(tokens / line["tokens_per_second"] for line in lines)
    cpu = (cpu_times[-1] - cpu_times[WARMUP]) / (len(cpu_times) - 1 - WARMUP)
    return np.array([wall, cpu]), statistics.mean(line["host_share"] for line in lines)


def overhead(folder, steps, rounds):
    config = make_config(folder, steps)
    run = loop.make_run(config)
    with jax.set_mesh(run.program.mesh):
        programs = loop.compile_programs(run)
    cpu_times = []

    def timed_step(state, batch):
        cpu_times.append(time.process_time())
        return programs.step(state, batch)

    loop.compile_programs = lambda run: programs._replace(step=timed_step)
    bare, whole, host = [], [], []
    for number in range(rounds):
        with jax.set_mesh(run.program.mesh):
            bare.append(bare_steps(run, programs, steps))
        seconds, share = loop_steps(config, Path(folder) / f"run{number}", cpu_times)
        whole.append(seconds)
        host.append(share)
    outside = 1 - np.array(bare) / np.array(whole)
    return {
        "bare_step_ms": [1000 * seconds[0] for seconds in bare],
        "loop_step_ms": [1000 * seconds[0] for seconds in whole],
        "outside_step_wall": outside[:, 0].tolist(),
        "outside_step_cpu": outside[:, 1].tolist(),
        "host_share": host,
        "median_outside_step_wall": statistics.median(outside[:, 0]),
        "median_outside_step_cpu": statistics.median(outside[:, 1]),
    }


def pauses(folder, megabytes, rounds):
    """Seconds `save` takes when asynchronous, and when not, and of hashing what was written."""
    keys = jax.random.split(jax.random.key(0), 16)
    size = megabytes * 2**20 // 4 // 16
    state = {str(i): jax.random.normal(key, (size // 1024, 1024)) for i, key in enumerate(keys)}
    jax.block_until_ready(state)
    config = Path(folder) / checkpoint.CONFIG
    config.write_text("{}\n")
    times = {True: [], False: []}
    # The first save of a process also starts threads; it is not counted.
    for number in range(1 + rounds):
        for is_async in (True, False):
            policy = CheckpointConfig(asynchronous=is_async, keep_last=1, keep_best=0)
            with Writer(Path(folder) / f"async{is_async}", policy, [config]) as writer:
                start = time.perf_counter()
                writer.save(number, {"params": state}, {})
                times[is_async].append(time.perf_counter() - start)
                writer.wait()
                state = jax.tree.map(jnp.negative, state)
    ratios = [a / b for a, b in zip(times[True][1:], times[False][1:], strict=True)]
    return {
        "state_mb": megabytes,
        "asynchronous_ms": [1000 * t for t in times[True][1:]],
        "synchronous_ms": [1000 * t for t in times[False][1:]],
        "median_pause_ratio": statistics.median(ratios),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run")
    parser.add_argument("--rounds", type=int, default=3, help="times each is measured")
    parser.add_argument("--state-mb", type=int, default=300, help="size of the saved state")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "loop": overhead(folder, options.steps, options.rounds),
            "checkpoint": pauses(folder, options.state_mb, options.rounds),
        }
    if options.json:
        print(json.dumps(result))
        return
    for part, figures in result.items():
        for name, value in figures.items():
            shown = value if isinstance(value, list) else [value]
            print(f"{part:12}{name:28}{'  '.join(f'{x:.4g}' for x in shown)}")


if __name__ == "__main__":
    main()
