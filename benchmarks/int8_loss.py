"""What bf16 and int8 cost in loss: one model, several texts, every combination, paired by token.

    python benchmarks/int8_loss.py CHECKPOINT TEXT ... [--stories 60] [--json]

With --stories the model also writes that many texts of its own (temperature 1) and is scored on
them. Differences are means over tokens, with their standard error as if tokens were independent.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

import llama_jax
from llama_jax.evaluate.command import read_texts
from llama_jax.evaluate.perplexity import Score, losses

# (weights, activations, cache); the first is what the others are compared with.
COMBINATIONS = (
    ("float32", "float32", None),
    ("float32", "float32", "int8"),
    ("bfloat16", "bfloat16", None),
    ("int8", "float32", None),
    ("int8", "float32", "int8"),
    ("int8", "bfloat16", None),
    ("int8", "bfloat16", "int8"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("texts", nargs="*", help="files, as for evaluate --perplexity")
    parser.add_argument("--stories", type=int, default=0, help="texts to let the model write")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    corpora = {Path(path).name: read_texts(Path(path), "text") for path in args.texts}
    if args.stories:
        corpora["its own stories"] = write_stories(args.checkpoint, args.stories)
    rows = [row for name, texts in corpora.items() for row in measure(name, texts, args)]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print("| text | weights | activations | cache | nats per token | perplexity | difference |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        change = f"{row['difference']:+.5f} ± {row['standard_error']:.5f}"
        print(
            f"| {row['text']} | {row['weights']} | {row['activations']} | {row['cache']} | "
            f"{row['nll_per_token']:.5f} | {row['perplexity']:.3f} | {change} |"
        )


def write_stories(checkpoint: str, count: int) -> list[str]:
    """Texts that the model draws from its first token on; a BOS too ends them."""
    model = llama_jax.load(checkpoint)
    ends = tuple({*model.end_ids, model.tokenizer.bos_id})
    answers = dataclasses.replace(model, end_ids=ends).generate(
        [[model.tokenizer.bos_id]] * count, temperature=1.0, top_p=1.0, max_new_tokens=500
    )
    return [answer.text for answer in answers if answer.text]


def measure(name: str, texts: list[str], args: argparse.Namespace) -> list[dict]:
    """One row for each combination."""
    rows, reference = [], np.zeros(0)
    size = sum(len(text.encode()) for text in texts)
    for weights, activations, cache in COMBINATIONS:
        model = llama_jax.load(
            args.checkpoint, activations, weights="int8" if weights == "int8" else "as_dtype"
        )
        ids = [model.tokenizer.encode(text, bos=True) for text in texts]
        with jax.set_mesh(model.mesh):
            found = losses(
                model.model, model.params, ids, args.window, args.stride, cache_dtype=cache
            )
        loss = np.concatenate(found).astype(np.float64)
        reference = loss if not rows else reference
        change = loss - reference
        score = Score(float(loss.sum()), len(loss), size)
        rows.append(
            {
                "text": name,
                "documents": len(texts),
                "bytes": size,
                "tokens": len(loss),
                "weights": weights,
                "activations": activations,
                "cache": cache or "none",
                "nll_per_token": score.nll_per_token,
                "perplexity": score.perplexity,
                "bits_per_byte": score.bits_per_byte,
                "difference": float(change.mean()),
                "standard_error": float(change.std() / len(loss) ** 0.5),
                "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
            }
        )
    return rows


if __name__ == "__main__":
    main()
