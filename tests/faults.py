"""Runs of a tiny model as programs of their own, in one process or several, to be killed."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml

from llama_jax.config import DataPrepareConfig, TokenizerTrainConfig
from llama_jax.data.prepare import prepare
from llama_jax.tokenizer.train import train_tokenizer
from llama_jax.train import checkpoint
from llama_jax.train.metrics import read_metrics

REPOSITORY = Path(__file__).parents[1]
MODEL = {
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_head": 4,
    "d_ff": 24,
    "vocab_size": 320,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_embeddings": True,
}


def prepared(folder):
    """A tokenizer and a corpus of forty documents of a few words, in a folder."""
    words = ["the", "llama", "hums", "under", "old", "stars", "while", "rivers", "sleep"]
    draw = random.Random(0)
    for number in range(40):
        text = " ".join(draw.choices(words, k=draw.randrange(5, 60)))
        (folder / f"{number}.txt").write_text(text)
    texts, model, out = (f"{folder}/*.txt",), f"{folder}/tokenizer.model", f"{folder}/shards"
    train_tokenizer(TokenizerTrainConfig(paths=texts, out=model, vocab_size=320))
    prepare(
        DataPrepareConfig(paths=texts, out=out, tokenizer=model, validation_fraction=0.2, workers=1)
    )
    return folder


class Runs:
    """Starts training programs on one corpus; compiled programs are kept for the next ones."""

    def __init__(self, folder):
        self.folder = folder
        self.started = []
        prepared(folder)
        self.environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "True",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def settings(self, name, **changes):
        """A configuration file; the run's folder is beside it."""
        values = {
            "out": str(self.folder / name),
            "model": MODEL,
            "tokenizer": str(self.folder / "tokenizer.model"),
            "data": {
                "sources": [str(self.folder / "shards")],
                "sequence_length": 16,
                "batch_size": 4,
            },
            "steps": 12,
            "optimizer": {"peak_lr": 1e-2, "warmup_steps": 2},
            "compute": {"loss_chunks": 2, "scan_layers": False},
            "checkpoint": {"every": 4, "keep_last": 3},
            "log_every": 1,
            "evaluate_every": 6,
            "evaluate_batches": 2,
            "checksum_every": 5,
            "distributed": {"cluster": "none"},
            **changes,
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def start(self, path, *flags, name="process", environment=None, program=None):
        """A program that trains; its output goes to a file beside the configuration."""
        log = path.with_name(f"{path.stem}.{name}.log")
        command = program or [str(REPOSITORY / "main.py"), "train"]
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *command, "--config", str(path), *flags],
                cwd=REPOSITORY,
                env={**self.environment, **(environment or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        process.log = log
        self.started.append(process)
        return process

    def end(self):
        """Leaves nothing running, whatever a test has found."""
        for process in self.started:
            for pid in (*children(process), process.pid) if process.poll() is None else ():
                os.kill(pid, signal.SIGKILL)

    def start_several(self, path, count, *flags, program=None):
        """Processes of one run, which find each other on this machine."""
        port = free_port()
        return [
            self.start(
                path,
                *("--distributed.cluster", "auto"),
                *("--distributed.coordinator", f"127.0.0.1:{port}"),
                *("--distributed.processes", str(count), "--distributed.process", str(index)),
                *flags,
                name=f"process{index}",
                program=program,
            )
            for index in range(count)
        ]


def free_port():
    """A port of this machine that is free, as is the one after it."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("", port + 1))
                return port
            except (OSError, OverflowError):
                continue


def codes(processes, seconds=240):
    """Exit codes, once all have ended; what they wrote is shown where they do not."""
    try:
        wait_until(lambda: all(process.poll() is not None for process in processes), seconds)
    except AssertionError:
        raise AssertionError("still running:\n" + "\n".join(map(said, processes))) from None
    return [process.returncode for process in processes]


def said(process):
    """What a program has written so far."""
    return process.log.read_text(errors="replace")


def children(process):
    """The processes that a process has started."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def wait_until(condition, seconds=120.0):
    """Waits for something that another process does; the machine's own sleep does not count."""
    waited, last = 0.0, time.monotonic()
    while not (value := condition()):
        now = time.monotonic()
        waited, last = waited + min(now - last, 0.1), now
        assert waited < seconds, "it did not happen"
        time.sleep(0.001)
    return value


def steps_logged(out):
    """The steps whose loss is in the journal."""
    path = Path(out) / "metrics.jsonl"
    return [x["step"] for x in read_metrics(path) if "loss" in x] if path.exists() else []


def losses(out):
    """Step -> (loss, gradient norm), and step -> validation loss."""
    lines = read_metrics(Path(out) / "metrics.jsonl")
    training = {x["step"]: (x["loss"], x["grad_norm"]) for x in lines if "loss" in x}
    validation = {x["step"]: x["validation_loss"] for x in lines if "validation_loss" in x}
    return training, validation


def hashes(out, step):
    """The SHA-256 of every array of a checkpoint, by the tree and the path."""
    import hashlib

    import jax
    import numpy as np

    found = checkpoint.find(Path(out) / "checkpoints" / str(step))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    digests = {}
    for tree in ("params", "training"):
        shapes = checkpoint.shapes(found, tree)
        for path, shape in shapes.items():
            target = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
            array = np.asarray(checkpoint.load_array(found, tree, shapes, path, target))
            digests[f"{tree}/{path}"] = hashlib.sha256(array.tobytes()).hexdigest()
    return digests


def goodput(out):
    return json.loads((Path(out) / "goodput.json").read_text())
