"""Damaged copies of a file: every reader must take or refuse them, quickly and in little memory."""

import resource
import time

import numpy as np

from llama_jax.config import ConfigError
from llama_jax.tokenizer import TokenizerError
from llama_jax.train.checkpoint import CheckpointError

SHORT, LONG = 300, 100_000  # inputs in the normal suite, and in the slow one
SECONDS, MEGABYTES = 1.0, 100  # most time for one input, and most growth of the process
EXTREMES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def damaged(content, rng, head, tail):
    """A copy with one to four changes, most of them in the first `head` or last `tail` bytes."""
    result = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(head + tail if rng.random() < 0.9 else len(result)))
        place = max(min(place if place < head else len(result) - place + head, len(result) - 1), 0)
        match rng.integers(6):
            case 0:
                result[place : place + 1] = bytes([rng.integers(256)])
            case 1:
                result[place] ^= 1 << int(rng.integers(8)) if result else 0
            case 2:
                value = EXTREMES[rng.integers(len(EXTREMES))]
                result[place : place + 8] = value.to_bytes(8, "little")
            case 3:
                count = int(rng.integers(1, 65))
                result[place : place + count] = b""
            case 4:
                count = int(rng.integers(1, 65))
                result[place:place] = result[place : place + count]
            case 5:
                if rng.random() < 0.3:
                    del result[place:]
        if not result:
            break
    return bytes(result)


def survive(open_and_read, path, content, inputs, head, tail=0):
    """Opens that many damaged copies; returns how many were refused, and prints what it took.

    The numbers that matter are in the first `head` and the last `tail` bytes of the content.

    Anything but the three clear errors is a failure, and so are long times and much memory.
    """
    rng = np.random.default_rng(0)
    before, refused, longest = _peak(), 0, 0.0
    for _ in range(inputs):
        path.write_bytes(damaged(content, rng, head, tail))
        started = time.perf_counter()
        try:
            open_and_read()
        except (ConfigError, TokenizerError, CheckpointError):
            refused += 1
        longest = max(longest, time.perf_counter() - started)
    grown = _peak() - before
    print(f"{inputs} inputs, {refused} refused, longest {longest:.3f} s, +{grown:.0f} MB")
    assert longest <= SECONDS
    assert grown <= MEGABYTES
    return refused


def _peak():
    """Most memory the process has held so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
