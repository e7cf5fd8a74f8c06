"""Generation speed on this machine's CPU, against Hugging Face transformers and llama.cpp.

    python benchmarks/generate_cpu.py [--json] [--size 110m] [--precision fp32] [--batch 1 8]
    python benchmarks/generate_cpu.py --continuous [--size 15m] [--rows 32]

Peers continue the same prompts with the same random weights, greedily: 64 tokens in, 128 out, all
cores. Each lives in a process of its own and waits while another works; they take turns, round
after round, because the speed of a shared machine drifts: only ratios within a round mean
something. Time is that of the whole call, prefill and sampling included.

int8 is our int8 weights and llama.cpp's q8_0; transformers has no such thing on a CPU. llama.cpp
keeps its default fp16 cache. --continuous compares ways to batch 200 prompts of mixed length: ours,
ours with static batches, and llama.cpp's parallel sequences filled as they become free.
"""

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from train_cpu import busy_seconds, machine, write_weights

PROMPT, NEW = 64, 128
SIZES = ("15m", "110m")
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "int8": "bfloat16"}
PEERS = ("ours", "transformers", "llama.cpp")
MIXED = 200  # prompts of the continuous race


def prompts_of(rows, vocab, seed):
    """The prompts of a turn, the same for every peer: (rows, PROMPT)."""
    return np.random.default_rng(seed).integers(3, vocab, (rows, PROMPT))


def mixed_requests(vocab):
    """(prompt, new tokens) of the continuous race: 16 to 512 in, 16 to 256 out."""
    random = np.random.default_rng(7)
    return [
        (
            random.integers(3, vocab, random.integers(16, 513)).tolist(),
            int(random.integers(16, 257)),
        )
        for _ in range(MIXED)
    ]


def our_model(weights, precision, rows):
    from llama_jax import process

    process.keep_freed_memory()  # before jax starts its threads
    import jax
    import jax.numpy as jnp

    from llama_jax.config import ComputeConfig
    from llama_jax.convert.formats import open_source
    from llama_jax.convert.source import load_params
    from llama_jax.model.layout import for_decoding, quantize
    from llama_jax.model.llama import Llama

    source = open_source(Path(weights) / "hf")
    dtype = PRECISIONS[precision]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(source, jnp.dtype(dtype), here)
    if precision == "int8":
        params = quantize(params, consume=True)
    model = Llama(source.config, ComputeConfig(dtype=dtype))
    return model, for_decoding(params, rows, consume=True)


def ours(weights, precision, rows):
    """run(prompts) -> (rows, NEW) token ids."""
    from llama_jax.generate.batch import Request, answer
    from llama_jax.generate.settings import SamplingConfig

    model, params = our_model(weights, precision, rows)
    greedy = SamplingConfig(temperature=0, max_new_tokens=NEW)

    def run(prompts):
        requests = [Request(tokens, greedy) for tokens in prompts.tolist()]
        return [group[0].tokens for group in answer(model, params, requests, batch_size=rows)]

    return run


def transformers(weights, precision, rows):
    """run(prompts) -> (rows, NEW) token ids, with generate's defaults."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = getattr(torch, PRECISIONS[precision])
    model = LlamaForCausalLM.from_pretrained(Path(weights) / "hf", dtype=dtype).eval()
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def run(prompts):
        ids = torch.from_numpy(prompts)
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        return out[:, PROMPT:].tolist()

    return run


class LlamaCpp:
    """llama.cpp's own batches of several sequences, through its C interface."""

    def __init__(self, weights, rows, slots):
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(weights).encode(), settings)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = rows * slots
        settings.n_batch = 2048
        settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
        settings.n_seq_max = rows
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)
        self.memory = llama_cpp.llama_get_memory(self.context)

    def clear(self, row=-1):
        self.api.llama_memory_seq_rm(self.memory, row, -1, -1)

    def decode(self, entries):
        """Feeds (row, position, token, wanted) and gives the likeliest next token of the wanted."""
        found = []
        for start in range(0, len(entries), 2048):
            part = entries[start : start + 2048]
            for i, (row, position, token, wanted) in enumerate(part):
                self.batch.token[i], self.batch.pos[i] = token, position
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, row
                self.batch.logits[i] = wanted
            self.batch.n_tokens = len(part)
            if self.api.llama_decode(self.context, self.batch):
                sys.exit("llama.cpp could not decode")
            for i, entry in enumerate(part):
                if entry[3]:
                    pointer = self.api.llama_get_logits_ith(self.context, i)
                    logits = np.ctypeslib.as_array(
                        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocab,)
                    )
                    found.append(int(logits.argmax()))
        return found


def llama_cpp(weights, precision, rows):
    """run(prompts) -> (rows, NEW) token ids."""
    name = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0"}[precision]
    engine = LlamaCpp(Path(weights) / f"{name}.gguf", rows, PROMPT + NEW)

    def run(prompts):
        engine.clear()
        last = PROMPT - 1
        entries = [
            (row, i, int(token), i == last)
            for row, tokens in enumerate(prompts)
            for i, token in enumerate(tokens)
        ]
        answers = [[token] for token in engine.decode(entries)]
        for step in range(NEW - 1):
            entries = [(row, PROMPT + step, new[-1], True) for row, new in enumerate(answers)]
            for new, token in zip(answers, engine.decode(entries), strict=True):
                new.append(token)
        return answers

    return run


def llama_cpp_continuous(weights, rows):
    """Rows filled as they become free; a prompt goes in whole, beside the others' next tokens."""
    engine = LlamaCpp(Path(weights) / "f32.gguf", rows, 512 + 256)

    def run():
        engine.clear()
        waiting = mixed_requests(engine.vocab)[::-1]
        jobs = [None] * rows  # (position, last token, tokens to come)
        tokens = 0
        while waiting or any(jobs):
            entries, wanted = [], []
            for row, job in enumerate(jobs):
                if job:
                    entries.append((row, job[0], job[1], True))
                    wanted.append((row, job[0] + 1, job[2] - 1))
                elif waiting:
                    prompt, new = waiting.pop()
                    last = len(prompt) - 1
                    entries += [(row, i, token, i == last) for i, token in enumerate(prompt)]
                    wanted.append((row, len(prompt), new - 1))
            for (row, position, left), token in zip(wanted, engine.decode(entries), strict=True):
                tokens += 1
                jobs[row] = (position, token, left) if left else None
                if not left:
                    engine.clear(row)
        return tokens

    return run


def our_continuous(weights, rows, continuous):
    """The engine, refilling rows as they end, or only when all have ended."""
    from llama_jax.generate.batch import Engine, Request
    from llama_jax.generate.settings import SamplingConfig

    model, params = our_model(weights, "fp32", rows)

    def run():
        requests = [
            Request(tokens, SamplingConfig(temperature=0, max_new_tokens=new))
            for tokens, new in mixed_requests(model.config.vocab_size)
        ]
        engine = Engine(
            model,
            params,
            requests,
            model.config.vocab_size,
            None,
            rows,
            "float32",
            continuous=continuous,
        )
        return sum(len(found.tokens) for _, found in engine.run())

    return run


def write_all_weights(size, folder):
    """Random weights as a Hugging Face folder, and beside it as llama.cpp reads them."""
    from llama_jax.convert.convert import convert
    from llama_jax.convert.settings import ConvertConfig

    write_weights(size, Path(folder) / "hf")
    for dtype, name in (("float32", "f32"), ("bfloat16", "bf16"), ("q8_0", "q8_0")):
        target = Path(folder) / f"{name}.gguf"
        settings = {"source": f"{folder}/hf", "destination": str(target), "to": "gguf"}
        convert(ConvertConfig(**settings, dtype=dtype))


def work(peer, precision, rows, weights):
    """A peer's process: answers each line on stdin, a seed, with a turn's figures."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    rows = int(rows)
    makers = {"ours": ours, "transformers": transformers, "llama.cpp": llama_cpp}
    mixed = {
        "continuous": lambda: our_continuous(weights, rows, True),
        "static": lambda: our_continuous(weights, rows, False),
        "llama.cpp continuous": lambda: llama_cpp_continuous(weights, rows),
    }
    began = time.perf_counter()
    if peer in mixed:
        run_mixed = mixed[peer]()

        def turn(seed):
            return run_mixed(), None
    else:
        run = makers[peer](weights, precision, rows)
        vocab = json.loads((Path(weights) / "hf" / "config.json").read_text())["vocab_size"]

        def turn(seed):
            tokens = run(prompts_of(rows, vocab, seed))
            return sum(map(len, tokens)), [new[:32] for new in tokens[:8]]

    turn(0)  # compiles
    print(json.dumps({"warmup_seconds": time.perf_counter() - began}), file=answers, flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        count, tokens = turn(int(line))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report = {"wall": wall, "cpu": cpu, "tokens": count, "ids": tokens, "peak_bytes": peak}
        if peer in ("ours", "continuous", "static"):
            report["programs"] = programs()
        print(json.dumps(report), file=answers, flush=True)


def programs():
    """Compiled programs of the decoder, by function."""
    from llama_jax.generate.decode import Decoder

    names = ("start", "prefill", "admit", "advance", "copy_context")
    return {name: getattr(Decoder, name)._cache_size() for name in names}


class Peer:
    """A running peer, seen from the process that takes the time."""

    def __init__(self, name, precision, rows, weights):
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--peer", name, precision, str(rows), str(weights)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.start = self._answer()
        self.turns = []
        self.foreign = []

    def run(self, seed):
        began, busy = time.perf_counter(), busy_seconds()
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        result = self._answer()
        others = busy_seconds() - busy - result["cpu"]
        self.foreign.append(max(0.0, others) / (time.perf_counter() - began))
        self.turns.append(result)

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"peer {self.name} ended early; its error is printed above")
        return json.loads(line)


def race(names, precision, rows, weights, rounds):
    """One race: tokens per second of every turn, and ratios within rounds."""
    peers = [Peer(name, precision, rows, weights) for name in names]
    for number in range(rounds):
        for i in range(len(peers)):
            peers[(number + i) % len(peers)].run(number + 1)
    for peer in peers:
        peer.close()
    first = peers[0]

    def speeds(peer, clock):
        return [turn["tokens"] / turn[clock] for turn in peer.turns]

    def ratios(peer, clock):
        pairs = zip(speeds(first, clock), speeds(peer, clock), strict=True)
        return [a / b for a, b in pairs]

    report = {
        "precision": precision,
        "rows": rows,
        "tokens_per_second": {peer.name: speeds(peer, "wall") for peer in peers},
        "tokens_per_cpu_second": {peer.name: speeds(peer, "cpu") for peer in peers},
        f"{first.name}_over": {peer.name: ratios(peer, "wall") for peer in peers[1:]},
        "per_cpu_second": {peer.name: ratios(peer, "cpu") for peer in peers[1:]},
        "warmup_seconds": {peer.name: peer.start["warmup_seconds"] for peer in peers},
        "peak_bytes": {peer.name: peer.turns[-1]["peak_bytes"] for peer in peers},
        "cores_used_by_others": [share for peer in peers for share in peer.foreign],
        "programs": first.turns[-1].get("programs"),
    }
    if first.turns[-1]["ids"]:
        report["equal_tokens"] = {p.name: equal_tokens(first, p) for p in peers[1:]}
    return report


def equal_tokens(first, second):
    """How many of the first 32 tokens of up to 8 answers agree, of how many."""
    pairs = [
        (a, b)
        for one, other in zip(first.turns, second.turns, strict=True)
        for mine, theirs in zip(one["ids"], other["ids"], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    return [sum(a == b for a, b in pairs), len(pairs)]


def show(size, report):
    names = list(report["tokens_per_second"])
    print(f"\n{size} {report['precision']}, {report['rows']} rows")
    for name in names:
        wall = statistics.median(report["tokens_per_second"][name])
        cpu = statistics.median(report["tokens_per_cpu_second"][name])
        peak = report["peak_bytes"][name] / 1e6
        print(f"  {name:<22}{wall:>8.0f} tokens/s{cpu:>8.0f} per CPU s{peak:>8.0f} MB")
    for name in names[1:]:
        for key, clock in ((f"{names[0]}_over", "wall"), ("per_cpu_second", "CPU")):
            values = report[key][name]
            print(
                f"  {names[0]} / {name:<20} {clock:<5} median {statistics.median(values):.2f} "
                f"(min {min(values):.2f}, max {max(values):.2f})"
            )
    if "equal_tokens" in report:
        print(f"  equal tokens: {report['equal_tokens']}")
    print(f"  programs: {report['programs']}")
    print(f"  cores used by others: median {statistics.median(report['cores_used_by_others']):.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--size", choices=SIZES, help="only this size")
    parser.add_argument("--precision", choices=PRECISIONS, help="only this precision")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows (default 1 8)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each peer (default 5)")
    parser.add_argument("--continuous", action="store_true", help="race of mixed prompts instead")
    parser.add_argument("--rows", type=int, default=32, help="rows of that race (default 32)")
    parser.add_argument("--peer", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--write-weights", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return work(*options.peer)
    if options.write_weights:
        return write_all_weights(*options.write_weights)

    try:
        here = machine("llama-cpp-python")
    except ModuleNotFoundError as error:
        sys.exit(f"{error}. `make bench` installs what this comparison needs.")
    reports = []
    for size in [options.size] if options.size else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--write-weights", size, folder]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if options.continuous:
                names = ("continuous", "static", "llama.cpp continuous")
                races = [(names, "fp32", options.rows)]
            else:
                chosen = [options.precision] if options.precision else list(PRECISIONS)
                races = [
                    ([p for p in PEERS if (precision, p) != ("int8", "transformers")], precision, n)
                    for precision in chosen
                    for n in options.batch
                ]
            for names, precision, rows in races:
                report = race(names, precision, rows, folder, options.rounds)
                reports.append({"size": size, **report})
                if not options.json:
                    show(size, report)
    if options.json:
        print(json.dumps({"machine": here, "races": reports}, indent=1))
    else:
        print(f"\n{here['cpu']}, {here['cores']} cores, {' '.join(here['instructions'])}")
        print(", ".join(f"{name} {number}" for name, number in here["versions"].items()))


if __name__ == "__main__":
    main()
