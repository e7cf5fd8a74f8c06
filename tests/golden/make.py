"""Writes the golden files of this folder: tiny random Hugging Face models and what they compute.

Needs torch and transformers (`make test-parity` installs them):  python tests/golden/make.py

Every case is a folder with config.json and model.safetensors, as Hugging Face writes them, and
golden.npz: token ids (B, T), fp32 logits (B, T, V), the mean cross entropy of the next tokens, and
its gradient by each weight, under the weight's Hugging Face name. Attention is eager, everything
fp32, one thread: running this again gives the same files.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

FOLDER = Path(__file__).parent
BATCH, LENGTH = 2, 40

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
# Wide heads have eight rotary pairs: enough for kept, blended and stretched ones in one model.
WIDE = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}

CASES = {
    "llama1": {"num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "llama2_gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "llama3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3.1": {
        **WIDE,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama3.2_tied": {
        **WIDE,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "wide_heads": {"head_dim": 16},
    "linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "dynamic": {
        "max_position_embeddings": LENGTH // 2,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
    "yarn": {
        **WIDE,
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"sliding_window": 7, "head_dim": 8},
}


def random_model(settings: dict, seed: int) -> PreTrainedModel:
    """An fp32 model with eager attention and weights that depend on the seed alone.

    Matrices keep the size of what they multiply, and norms differ from one: attention is not
    uniform, no tensor can be mistaken for another unnoticed, and rounding does not grow.
    """
    windowed = "sliding_window" in settings
    make_config, make_model = (
        (MistralConfig, MistralForCausalLM) if windowed else ((LlamaConfig, LlamaForCausalLM))
    )
    config = make_config(**settings, bos_token_id=1, eos_token_id=2)
    config._attn_implementation = "eager"
    model = make_model(config).to(torch.float32).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            draws = rng.standard_normal(tuple(weight.shape), np.float32)
            if weight.ndim == 1:
                draws = 1 + 0.3 * draws
            else:
                draws *= weight.shape[1] ** -0.5
            weight.copy_(torch.from_numpy(draws))
    return model


def compute(model: PreTrainedModel, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Logits, loss and gradients of a model for token ids (B, T)."""
    tokens = torch.from_numpy(ids).long()
    output = model(input_ids=tokens, labels=tokens, use_cache=False)
    model.zero_grad()
    output.loss.backward()
    arrays = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    arrays |= {"logits": output.logits.detach().numpy(), "loss": output.loss.detach().numpy()}
    return {"ids": ids, **arrays}


def golden(case: str) -> tuple[PreTrainedModel, dict[str, np.ndarray]]:
    """A case's model, and the arrays of its golden.npz."""
    torch.set_num_threads(1)
    seed = list(CASES).index(case)
    model = random_model({**SHAPE, **CASES[case]}, seed)
    draw = np.random.default_rng(1000 + seed).integers(0, SHAPE["vocab_size"], (BATCH, LENGTH))
    return model, compute(model, draw.astype(np.int32))


def main() -> None:
    """Writes every case."""
    disable_progress_bar()
    for case in CASES:
        model, arrays = golden(case)
        model.save_pretrained(FOLDER / case)
        (FOLDER / case / "generation_config.json").unlink()
        np.savez_compressed(FOLDER / case / "golden.npz", **arrays)


if __name__ == "__main__":
    main()
