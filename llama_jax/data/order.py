"""Which row comes when: pure functions of the seed and a number, without any state.

Nothing here may change between releases: a resumed run would then see other data. Tests hold the
values.
"""

import functools
import hashlib
from collections.abc import Sequence

from grain.experimental import index_shuffle

# Above this, index_shuffle wraps around without a word and rows would repeat.
MAX_ROWS = 2**32 - 1


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as integers of sum about 2^30, each at least 1, so that turns are exact."""
    total = sum(weights)
    return tuple(max(1, round(weight / total * 2**30)) for weight in weights)


def turn(sample: int, weights: tuple[int, ...]) -> tuple[int, int]:
    """(source, how many samples it gave before) of a sample when sources take turns by weight.

    Among the first n samples a source has its share of n, to within the number of sources. Of the
    draws not given to sources before it, each source leaves a fixed share to those behind it; the
    sample belongs to the first source whose count grows with it.
    """
    before, after = sample, sample + 1
    weight_left = sum(weights)
    for source, weight in enumerate(weights):
        passed_before = before * (weight_left - weight) // weight_left
        passed_after = after * (weight_left - weight) // weight_left
        if passed_before == passed_after:
            return source, before - passed_before
        before, after = passed_before, passed_after
        weight_left -= weight
    raise AssertionError("the last source passes nothing on")


def shuffled(place: int, rows: int, key: str) -> int:
    """The row at a place of a permutation of `rows` rows, drawn from the key; O(1) in memory."""
    return index_shuffle(index=place, max_index=rows - 1, seed=_seed(key), rounds=4)


@functools.lru_cache(maxsize=1024)
def _seed(key: str) -> int:
    digest = hashlib.blake2b(key.encode("ascii"), digest_size=4).digest()
    return int.from_bytes(digest, "little")
