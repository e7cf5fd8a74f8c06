"""The model's program, read without running it: what is computed again, in which number type, and
that no number of the configuration is dead."""

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from llama_jax.config import ComputeConfig, ModelConfig, RematName, RopeScaling
from llama_jax.model.llama import Llama

# Letters as in the model; no two sizes that could be confused are alike.
L, D, N, K, H, F, V = 2, 32, 4, 2, 10, 48, 64
CONFIG = ModelConfig(
    d_model=D,
    n_layers=L,
    n_heads=N,
    n_kv_heads=K,
    d_head=H,
    d_ff=F,
    vocab_size=V,
    norm_eps=1e-5,
    rope_theta=1e4,
    tie_embeddings=False,
)
MODEL = Llama(CONFIG)
BF16 = Llama(CONFIG, ComputeConfig(dtype="bfloat16"))
TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)


def config(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**CONFIG.model_dump(), **changes})


def equations(program: Jaxpr | ClosedJaxpr) -> Iterator[JaxprEqn]:
    """Every equation of a program and, once each, of its inner programs.

    Of code that depends on the platform, the part for accelerators.
    """
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        for name, value in equation.params.items():
            inners = value if isinstance(value, tuple) else (value,)
            for inner in inners[-1:] if name == "branches" else inners:
                if isinstance(inner, Jaxpr | ClosedJaxpr):
                    yield from equations(inner)


def forward_program(model: Llama) -> ClosedJaxpr:
    return jax.make_jaxpr(model.apply)(model.shapes(), TOKENS, TOKENS)


# --- rematerialisation -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remat", "save", "offload", "again"),
    [
        ("none", (), (), 0),
        ("named", get_args(RematName), (), 1),  # the scores, to form the softmax anew
        ("named", ("query", "key", "value"), (), 5),
        ("named", ("query",), ("key", "value"), 5),
        ("full", (), (), 8),  # all but `down`, whose result the backward pass does not read
    ],
)
def test_remat_computes_again_what_it_did_not_save(remat, save, offload, again):
    """Products per layer: of the forward pass 9, of the backward pass 18, and those done again."""
    compute = ComputeConfig(scan_layers=False, remat=remat, remat_save=save, remat_offload=offload)
    model = Llama(CONFIG, compute)

    def loss(params, tokens):
        return jnp.sum(model.apply(params, tokens, tokens).value)

    program = jax.make_jaxpr(jax.grad(loss))(model.shapes(), TOKENS)
    products = sum(equation.primitive.name == "dot_general" for equation in equations(program))
    assert products == 3 * (9 * L + 1) + again * L  # the 1 is the output matrix


def test_every_value_that_remat_can_save_exists():
    names = {
        equation.params["name"]
        for equation in equations(forward_program(MODEL))
        if equation.primitive.name == "name"
    }
    assert names == set(get_args(RematName))


# --- number types ----------------------------------------------------------------------------


def test_in_bf16_norms_softmax_angles_and_logits_stay_fp32():
    seen = Counter()
    for equation in equations(forward_program(BF16)):
        name = equation.primitive.name
        if name in ("rsqrt", "exp", "reduce_sum", "reduce_max", "cos", "sin"):
            assert equation.invars[0].aval.dtype == jnp.float32, equation
            seen[name] += 1
    norms, softmax, angles = {"rsqrt": 3}, {"exp": 1, "reduce_max": 1}, {"cos": 1, "sin": 1}
    assert seen == {**norms, **softmax, **angles, "reduce_sum": 3 + 1}  # of norms and softmax


def test_in_bf16_scores_are_rounded_only_after_the_softmax():
    rounded = [
        equation.outvars[0].aval.shape
        for equation in equations(forward_program(BF16))
        if equation.primitive.name == "convert_element_type"
        and equation.invars[0].aval.dtype == jnp.float32
        and equation.params["new_dtype"] == jnp.bfloat16
    ]
    weights, attended = (2, K, 5, N // K, 5), (2, 5, K, N // K, H)
    assert [shape for shape in rounded if len(shape) == 5] == [weights, attended]
    assert (2, 5, V) not in rounded


def test_in_bf16_every_product_is_bf16_and_attention_and_logits_come_out_in_fp32():
    products = Counter()
    for equation in equations(forward_program(BF16)):
        if equation.primitive.name == "dot_general":
            assert {v.aval.dtype.name for v in equation.invars} == {"bfloat16"}
            out = equation.outvars[0].aval
            products[out.dtype.name, out.ndim] += 1
    # q, k, v; o, gate, up, down; then scores and the sum of the values (4 axes each), and logits.
    assert products == {
        ("bfloat16", 4): 3,
        ("bfloat16", 3): 4,
        ("float32", 4): 2,
        ("float32", 3): 1,
    }


# --- no dead numbers -------------------------------------------------------------------------

SCALINGS = {
    "none": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0, "original_context": 4},
    "yarn": {
        "factor": 2.0,
        "original_context": 1024,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.5,
    },
    "llama3": {
        "factor": 2.0,
        "original_context": 4096,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
CHANGED = {
    "d_model": 40,
    "n_layers": 3,
    "n_heads": 6,
    "n_kv_heads": 4,
    "d_head": 12,
    "d_ff": 56,
    "vocab_size": 72,
    "norm_eps": 1e-6,
    "rope_theta": 2e4,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "tie_embeddings": True,
    "attention": "gated",
    "position": "none",
    "rotary_fraction": 0.6,
    "window": 3,
    "chunk": 3,
    "sinks": True,
    "score_cap": 5.0,
    "qk_norm": True,
    "keys_are_values": True,
    "keep_first": 1,
    "attention_settings": {"convolution": 3},
    "shares_kv": {"pattern": ({}, {"shares_kv": True})},
    "parallel_block": True,
    "feed_forward": "relu2",
    "experts": {"count": 4, "per_token": 2},
    "pattern": ({"window": 3}, {}),
}
CHANGED_SCALING = {
    "factor": 3.0,
    "original_context": 2048,
    "beta_fast": 8.0,
    "beta_slow": 0.3,
    "attention_factor": 1.6,
    "low_freq_factor": 0.5,
    "high_freq_factor": 8.0,
}


def fingerprint(config: ModelConfig) -> tuple[Any, ...]:
    """All that decides the numbers: the parameter tree, the program, and the constants in it (a
    program's text shows neither the frequencies of RoPE nor every digit of a scalar)."""
    model = Llama(config)
    program = forward_program(model)
    constants = [np.asarray(constant).tobytes() for constant in program.consts]
    for equation in equations(program):
        constants += [repr(v.val) for v in equation.invars if isinstance(v, Literal)]
        for value in equation.params.values():
            if isinstance(value, ClosedJaxpr):
                constants += [np.asarray(constant).tobytes() for constant in value.consts]
    return str(model.shapes()), str(program), tuple(constants)


@functools.cache
def fingerprint_of_scaling(type: str) -> tuple[Any, ...]:
    return fingerprint(config(rope_scaling={"type": type, **SCALINGS[type]}))


def test_the_fingerprint_of_an_unchanged_configuration_is_unchanged():
    jax.clear_caches()
    assert fingerprint(config()) == fingerprint_of_scaling("none")


# What a field needs to have a meaning.
NEEDED = {
    "keep_first": {"window": 2},
    "attention_settings": {"attention": "gated_delta"},
    "shares_kv": {"pattern": ({}, {})},
}


@pytest.mark.parametrize("field", ModelConfig.model_fields)
def test_no_field_of_the_model_is_dead(field):
    assert field in CHANGED, f"give the new field {field} another value in CHANGED"
    changes = CHANGED[field] if field == "shares_kv" else {field: CHANGED[field]}
    needed = NEEDED.get(field, {})
    before = fingerprint(config(**needed)) if needed else fingerprint_of_scaling("none")
    assert fingerprint(config(**needed | changes)) != before


def test_every_norm_reads_its_epsilon_from_the_configuration():
    program = forward_program(Llama(config(norm_eps=0.125)))
    literals = [v.val for e in equations(program) for v in e.invars if isinstance(v, Literal)]
    assert sum(np.ndim(value) == 0 and value == 0.125 for value in literals) == 3


@pytest.mark.parametrize(
    ("type", "field"), [(type, field) for type in SCALINGS for field in SCALINGS[type]]
)
def test_no_field_of_a_rope_scaling_is_dead(type, field):
    scaling = {"type": type, **SCALINGS[type], field: CHANGED_SCALING[field]}
    assert fingerprint(config(rope_scaling=scaling)) != fingerprint_of_scaling(type)


@pytest.mark.parametrize("type", SCALINGS)
def test_rope_theta_is_read_under_every_scaling(type):
    scaling = {"type": type, **SCALINGS[type]}
    changed = fingerprint(config(rope_theta=2e4, rope_scaling=scaling))
    assert changed != fingerprint_of_scaling(type)


def test_every_scaling_differs_and_every_field_of_one_is_tried():
    assert set(SCALINGS) == set(get_args(RopeScaling.model_fields["type"].annotation))
    assert len({fingerprint_of_scaling(type) for type in SCALINGS}) == len(SCALINGS)
    tried = {field for fields in SCALINGS.values() for field in fields}
    assert tried == set(CHANGED_SCALING) == set(RopeScaling.model_fields) - {"type"}
