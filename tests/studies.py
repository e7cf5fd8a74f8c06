"""Studies with losses that a test chooses, and everything else made up from them."""

import math

from llama_jax.ablate.records import Account, Capacity, Curve, SeedResult, Speed, Stretch, Study

LENGTH = 256
BATCHES = 6
CHANCES = {"copy": {"8": 0.125, "16": 0.0625}}


def result(variant, seed, loss, **changes):
    """A run that ends with a loss."""
    wobble = [0.01 * math.sin(7 * batch + seed + len(variant)) for batch in range(BATCHES)]
    steps = range(10, 201, 10)
    curve = Curve(
        tuple(steps),
        tuple(1024 * step for step in steps),
        tuple(loss + 5 / step for step in steps),
        (100, 200),
        (loss + 0.05, loss),
    )
    values = {
        "variant": variant,
        "seed": seed,
        "learning_rate": 1e-3,
        "loss": loss,
        "batch_losses": tuple(
            loss + 0.1 * batch + wobble[batch] - sum(wobble) / BATCHES - 0.05 * (BATCHES - 1)
            for batch in range(BATCHES)
        ),
        "curve": curve,
        "loss_by_position": tuple(
            Stretch(first, first + 127, loss + 1 / (1 + first)) for first in (0, 128, 256)
        ),
        "probes": {"copy": {"8": 0.9, "16": 0.4 + 0.001 * seed}},
        "probe_places": {"copy": {"8": {"4": 0.95, "8": 0.85}}},
        "train_seconds": 61.5,
        "tokens_per_second": 15_000.25 + seed,
    }
    return SeedResult(**values | changes)


def account(variant, **changes):
    """What a variant costs."""
    values = {
        "variant": variant,
        "description": f"attention: {variant}",
        "parameters": 15_191_712,
        "parameters_without_embeddings": 14_000_321,
        "active_parameters": 15_191_712,
        "d_ff": 1_376,
        "training_flops_per_token": 91_234_567,
        "cache_bytes_per_token": 9_216,
        "cache_bytes_per_row": 44_000,
        "speeds": (Speed(256, 8, 12_345.6, 1_234.5), Speed(2048, 8, 2_345.6, 54.321)),
        "capacities": (Capacity(256, 16, 1_024, 15 * 2**30 + 2**28),),
    }
    return Account(**values | changes)


def study(losses, **changes):
    """A study of losses {variant: {seed: loss}}, the first variant its base."""
    variants = tuple(losses)
    values = {
        "name": "kv",
        "title": "Keys and values",
        "question": "Which costs least?\n \nThe base shares none.",
        "budget": ("parameters",),
        "budget_tolerance": 0.01,
        "base": variants[0],
        "variants": variants,
        "seeds": tuple(sorted({seed for runs in losses.values() for seed in runs})) or (0,),
        "corpus": "TinyStories",
        "tokens": 8_192_000,
        "sequence_length": LENGTH,
        "device": "2 CPU cores",
        "versions": {"jax": "0.10.2"},
        "command": "llama-jax ablate kv.yaml",
        "accounts": tuple(account(variant) for variant in variants),
        "chances": CHANCES,
        "results": tuple(
            result(variant, seed, loss)
            for variant, runs in losses.items()
            for seed, loss in runs.items()
        ),
        "learning_rates": {name: {3e-4: 1.6, 1e-3: 1.5, 3e-3: 1.55} for name in variants},
    }
    return Study(**values | changes)
