"""The LLaMA family (1, 2, 3.x) in JAX: one functional Flax model, from a laptop to a TPU pod.

From Python:

    model = llama_jax.load("runs/demo")            # or a folder or .gguf of another project
    model.logits([[1, 15043]])                     # fp32 (batch, length, vocab)
    model.generate(["def main("], temperature=0.8)
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # Resolved when asked for: `import llama_jax.config` must not load jax.
    if name in ("load", "LanguageModel"):
        return getattr(importlib.import_module("llama_jax.api"), name)
    raise AttributeError(f"module 'llama_jax' has no attribute '{name}'")
