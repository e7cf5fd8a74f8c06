"""Training speed on this machine's CPU, against Hugging Face transformers on torch.

    python benchmarks/train_cpu.py [--json] [--size 15m] [--precision fp32] [--rounds 5]

Three peers do the same optimizer steps from the same weights on the same random tokens: ours,
Hugging Face eager, and Hugging Face under torch.compile; in fp32, or with bf16 products (torch:
autocast). Each lives in a process of its own and waits while another works. They take turns, round
after round, because the speed of a shared machine drifts by tens of percent within an hour: only
ratios within a round mean something, and those of wall time only where nobody else computes (the
report says how many cores others used). Losses are compared as well: peers that disagree did not
do the same work.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

BATCHES = {"15m": (8, 256), "110m": (2, 1024)}  # rows, tokens of a row
PEERS = ("ours", "eager", "compile")
RATE, BETAS, EPS, DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-5, 0.1, 1.0
WARMUP_STEPS = 2
PACKAGES = ("jax", "jaxlib", "torch", "transformers")


def tokens_of(size, vocab, step):
    """The tokens of one step, the same for every peer: (rows, length) int64."""
    return np.random.default_rng(step).integers(0, vocab, BATCHES[size])


def our_step(size, precision, weights):
    """step(tokens) -> loss, with the program and the process of `train` on a CPU."""
    from llama_jax import process

    process.keep_freed_memory()  # before jax starts its threads
    import jax

    from llama_jax.config import ComputeConfig, OptimizerConfig, load_model
    from llama_jax.convert.huggingface import open_folder
    from llama_jax.convert.source import load_params
    from llama_jax.model.llama import Llama
    from llama_jax.train.optimizer import adamw
    from llama_jax.train.step import init_state, lm_loss, make_step

    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    config = load_model(f"small_{size}")
    model = Llama(config, ComputeConfig(dtype=dtype, scan_layers=False))
    settings = OptimizerConfig(
        peak_lr=RATE,
        schedule="constant",
        warmup_steps=0,
        beta1=BETAS[0],
        beta2=BETAS[1],
        eps=EPS,
        weight_decay=DECAY,
        clip_norm=CLIP,
    )
    optimizer = adamw(settings, steps=1_000_000, axes=model.axes())
    start = jax.jit(lambda params: init_state(params, optimizer))  # no two arrays share a buffer
    state = start(load_params(open_folder(Path(weights)), np.float32))
    run = jax.jit(make_step(lm_loss(model), optimizer), donate_argnums=0)

    def step(tokens):
        nonlocal state
        rows, length = tokens.shape
        targets, counted = np.roll(tokens, -1, axis=1), np.ones(tokens.shape, np.float32)
        counted[:, -1] = 0  # the last token of a row has no next one
        batch = {
            "tokens": tokens.astype(np.int32),
            "targets": targets.astype(np.int32),
            "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
            "segments": np.ones(tokens.shape, np.int32),
            "weights": counted,
        }
        state, metrics = run(state, batch)
        return float(metrics["loss"])  # waits for the whole step

    return step


def torch_step(size, precision, weights, compiled):
    """step(tokens) -> loss, as a user of transformers would write it with fused AdamW."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = LlamaForCausalLM.from_pretrained(weights, dtype=torch.float32).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS, fused=True)
    forward = torch.compile(model) if compiled else model

    def step(tokens):
        tokens = torch.from_numpy(tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def write_weights(size, folder):
    """Random weights of the benchmark's shape, as a Hugging Face folder both sides can read."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_jax.config import load_model

    ours = load_model(f"small_{size}")
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.d_model,
        num_hidden_layers=ours.n_layers,
        num_attention_heads=ours.n_heads,
        num_key_value_heads=ours.n_kv_heads,
        head_dim=ours.d_head,
        intermediate_size=ours.d_ff,
        max_position_embeddings=BATCHES[size][1],
        rms_norm_eps=ours.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        tie_word_embeddings=ours.tie_embeddings,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def work(peer, size, precision, weights):
    """A peer's process: warms up, then answers each number n on stdin with n timed steps."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    step = (
        our_step(size, precision, weights)
        if peer == "ours"
        else torch_step(size, precision, weights, compiled=peer == "compile")
    )
    vocab = json.loads((Path(weights) / "config.json").read_text())["vocab_size"]
    began = time.perf_counter()
    losses = [step(tokens_of(size, vocab, n)) for n in range(WARMUP_STEPS)]
    report = {"warmup_seconds": time.perf_counter() - began, "losses": losses}
    print(json.dumps(report), file=answers, flush=True)
    number = WARMUP_STEPS
    for line in sys.stdin:
        steps = int(line)
        batches = [tokens_of(size, vocab, number + n) for n in range(steps)]
        number += steps
        wall, cpu = time.perf_counter(), time.process_time()
        losses = [step(tokens) for tokens in batches]
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        report = {"wall": wall, "cpu": cpu, "losses": losses}
        print(json.dumps(report), file=answers, flush=True)


class Peer:
    """A running peer, seen from the process that takes the time."""

    def __init__(self, name, size, precision, weights):
        arguments = [name, size, precision, str(weights)]
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--peer", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.start = self._answer()

    def run(self, steps):
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"peer {self.name} ended early; its error is printed above")
        return json.loads(line)


def busy_seconds():
    """CPU seconds that the whole machine has worked since it started."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, file.readline().split()[1:9]
        )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def measure(size, precision, rounds, steps):
    """One race: a report with the ratios of every round."""
    rows, length = BATCHES[size]
    with tempfile.TemporaryDirectory() as weights:
        # In a process of its own: this one must hold neither torch nor its threads.
        subprocess.run([sys.executable, __file__, "--write-weights", size, weights], check=True)
        peers = [Peer(name, size, precision, weights) for name in PEERS]
    results = {name: [] for name in PEERS}
    foreign = []
    for number in range(rounds):
        for peer in peers[number % 3 :] + peers[: number % 3]:
            began, busy = time.perf_counter(), busy_seconds()
            result = peer.run(steps)
            others = busy_seconds() - busy - result["cpu"]
            foreign.append(max(0.0, others) / (time.perf_counter() - began))
            results[peer.name].append(result)
    for peer in peers:
        peer.close()

    def speeds(name, clock):
        return [rows * length * steps / result[clock] for result in results[name]]

    def ratios(name, clock):
        return [a / b for a, b in zip(speeds("ours", clock), speeds(name, clock), strict=True)]

    last = {name: results[name][-1]["losses"][-1] for name in PEERS}
    return {
        "size": size,
        "precision": precision,
        "batch": [rows, length],
        "steps_per_round": steps,
        "tokens_per_second": {name: speeds(name, "wall") for name in PEERS},
        "tokens_per_cpu_second": {name: speeds(name, "cpu") for name in PEERS},
        "ours_over": {name: ratios(name, "wall") for name in PEERS[1:]},
        "ours_over_per_cpu_second": {name: ratios(name, "cpu") for name in PEERS[1:]},
        "first_loss": {peer.name: peer.start["losses"][0] for peer in peers},
        "last_loss": last,
        "warmup_seconds": {peer.name: peer.start["warmup_seconds"] for peer in peers},
        "cores_used_by_others": foreign,
    }


def machine(*more):
    """What a reader must know to compare figures; `more` are packages whose versions matter."""
    flags, model = "", platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        flags = value if name.strip() == "flags" else flags
        model = value.strip() if name.strip() == "model name" else model
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [name for name in known if name in flags.split()],
        "versions": {name: version(name) for name in (*PACKAGES, *more)},
    }


def summary(values):
    """min / median / max."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def show(report):
    """Prints one race for a reader."""
    rows, length = report["batch"]
    print(f"\n{report['size']} {report['precision']}, batch {rows} x {length}")
    print(f"  {'peer':<10}{'tokens/s':>10}{'per CPU s':>11}{'first loss':>12}{'last loss':>11}")
    for name in PEERS:
        wall = statistics.median(report["tokens_per_second"][name])
        cpu = statistics.median(report["tokens_per_cpu_second"][name])
        first, last = report["first_loss"][name], report["last_loss"][name]
        print(f"  {name:<10}{wall:>10.0f}{cpu:>11.0f}{first:>12.4f}{last:>11.4f}")
    for key, clock in (("ours_over", "wall"), ("ours_over_per_cpu_second", "CPU")):
        for name in PEERS[1:]:
            s = summary(report[key][name])
            print(
                f"  ours / {name:<8} {clock:<5} median {s['median']:.2f}  "
                f"(min {s['min']:.2f}, max {s['max']:.2f})"
            )
    others = summary(report["cores_used_by_others"])
    print(f"  cores used by others: median {others['median']:.2f}, max {others['max']:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--size", choices=BATCHES, help="only this size")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="only this precision")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each peer (default 5)")
    parser.add_argument("--steps", type=int, help="steps of a turn (default 15m: 4, 110m: 1)")
    parser.add_argument("--peer", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--write-weights", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return work(*options.peer)
    if options.write_weights:
        return write_weights(*options.write_weights)

    try:
        here = machine()
    except ModuleNotFoundError as error:
        sys.exit(f"{error}. `make bench` installs what this comparison needs.")
    reports = []
    for size in [options.size] if options.size else list(BATCHES):
        for precision in [options.precision] if options.precision else ["fp32", "bf16"]:
            steps = options.steps or {"15m": 4, "110m": 1}[size]
            report = measure(size, precision, options.rounds, steps)
            reports.append(report)
            if not options.json:
                show(report)
    if options.json:
        print(json.dumps({"machine": here, "races": reports}, indent=1))
    else:
        print(f"\n{here['cpu']}, {here['cores']} cores, {' '.join(here['instructions'])}")
        print(", ".join(f"{name} {number}" for name, number in here["versions"].items()))


if __name__ == "__main__":
    main()
