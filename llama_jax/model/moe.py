"""A mixture of experts: several feed-forward layers, of which each token passes the few that a
router chooses for it (Shazeer et al., arXiv 1701.06538).

No expert has a capacity: whatever is chosen is computed (Gale et al., arXiv 2211.15841).
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config import ExpertsConfig, ModelConfig
from llama_jax.model import feed_forward
from llama_jax.model.feed_forward import FeedForward, is_gated
from llama_jax.model.ops.activation import activate
from llama_jax.model.ops.grouped import block_size, grouped_product, output_major_product
from llama_jax.model.ops.weight import OutputMajor
from llama_jax.model.param import fan_in_normal, param
from sharding.rules import Rules

Weights = dict[str, Any]  # arrays, or OutputMajor
Aux = dict[str, jax.Array]

# Logical axes of the matrices of all experts.
GOES_IN, GOES_OUT = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
OF_EXPERTS = {"gate": GOES_IN, "up": GOES_IN, "down": GOES_OUT}
TOKENS = ("batch", "residual_seq")  # axes of the tokens, as they lie between blocks


class MixtureOfExperts(nn.Module):
    """Sum of the chosen experts, each times its weight, and of the shared expert if there is one.

    Experts are split over the mesh as the rules say; a device gathers the tokens of those that hold
    other experts, computes its own for all of them, and gives back the sums.
    """

    config: ModelConfig
    rules: Rules | None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, real_BT: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(B, T, D) -> (B, T, D), and what is said of the routing, each an fp32 scalar.

        balance: E sum_e f_e P_e, with f_e the share of choices that fell on an expert and P_e its
        mean score, where the scores of a token sum to 1 (arXiv 2101.03961, section 2.2).
        router_z: mean square of the logits' logsumexp (arXiv 2202.08906, section 2.2).
        load: the largest f_e times E; 1 is perfect balance. It has no gradient.

        Args:
            x_BTD: tokens.
            real_BT: False for padding, which these means do not count; None: all are real.
        """
        D, F = self.config.d_model, self.config.d_ff
        experts = self.config.experts
        assert experts is not None
        E = experts.count
        residual = (2 * self.config.n_layers) ** -0.5
        into, out_of = fan_in_normal(D), fan_in_normal(F, residual)
        weights = {"router": param(self, "router", into, (D, E), ("embed", "router"))}
        if is_gated(self.config):
            weights["gate"] = param(self, "expert_gate", into, (E, D, F), GOES_IN)
        weights["up"] = param(self, "expert_up", into, (E, D, F), GOES_IN)
        weights["down"] = param(self, "expert_down", out_of, (E, F, D), GOES_OUT)
        if real_BT is None:
            real_BT = jnp.ones(x_BTD.shape[:2], bool)
        y, aux = _on_mesh(self.config, self.rules, x_BTD, real_BT, weights)
        if experts.shared_d_ff:
            shared = FeedForward(self.config, self.rules, experts.shared_d_ff, name="shared")
            y = y + shared(x_BTD)
        return y, aux


class Axes(NamedTuple):
    """Mesh axes, inside shard_map."""

    tokens: tuple[str, ...] = ()  # that split the tokens
    experts: tuple[str, ...] = ()  # that split the experts
    width: tuple[str, ...] = ()  # that split F of every expert
    embed: tuple[str, ...] = ()  # that split D of the weights, but not of the tokens


def _on_mesh(
    config: ModelConfig, rules: Rules | None, x_BTD: jax.Array, real_BT: jax.Array, weights: Weights
) -> tuple[jax.Array, Aux]:
    """`_mix` on every device of the mesh in force, or on the only one."""
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty or mesh.size == 1:
        return _mix(config, Axes(), x_BTD, real_BT, weights)

    def splitting(*logical: str) -> tuple[str, ...]:
        named = (axis for name in logical for axis in rules.mesh_axes(name))
        return tuple(axis for axis in named if mesh.shape[axis] > 1)

    axes = Axes(splitting(*TOKENS), *(splitting(name) for name in ("expert", "mlp", "embed")))
    of_weights = {
        "router": rules.spec((None, "router")),
        **{
            name: _spec(rules, names, weights[name])
            for name, names in OF_EXPERTS.items()
            if name in weights
        },
    }
    tokens = rules.spec((*TOKENS, None))
    return jax.shard_map(
        partial(_mix, config, axes),
        in_specs=(tokens, rules.spec(TOKENS), of_weights),
        out_specs=(tokens, rules.spec(())),
        check_vma=False,
    )(x_BTD, real_BT, weights)


def _spec(rules: Rules, axes: tuple[str, ...], weight: jax.Array | OutputMajor) -> Any:
    """Of the matrices of all experts, in either layout."""
    if not isinstance(weight, OutputMajor):
        return rules.spec(axes)
    expert, inputs, outputs = axes
    scale = None if weight.scale is None else rules.spec((expert, outputs))
    return OutputMajor(rules.spec((expert, outputs, inputs)), scale)  # type: ignore[arg-type]


def _mix(
    config: ModelConfig, axes: Axes, x_BTD: jax.Array, real_BT: jax.Array, weights: Weights
) -> tuple[jax.Array, Aux]:
    """The sum over the chosen experts for the tokens of this device, and the auxiliary values of
    all tokens."""
    assert config.experts is not None
    x_ND = x_BTD.reshape(-1, config.d_model)
    # Accelerators would round the operands of an fp32 product, and so move choices.
    logits_NE = jnp.matmul(
        x_ND.astype(jnp.float32), weights["router"], precision=lax.Precision.HIGHEST
    )
    chosen_NX, weight_NX, share_NE = route(config.experts, logits_NE)
    aux = _auxiliary(logits_NE, share_NE, chosen_NX, real_BT.reshape(-1), axes.tokens)

    # Devices with other experts, or other parts of them, work on the same tokens: their tokens are
    # gathered and the sums handed back, unless they have the same tokens anyway.
    partners = axes.experts + axes.width
    apart = tuple(axis for axis in partners if axis in axes.tokens)
    together = tuple(axis for axis in partners if axis not in axes.tokens)
    if apart:
        x_ND, chosen_NX, weight_NX = (
            lax.all_gather(x, apart, tiled=True) for x in (x_ND, chosen_NX, weight_NX)
        )
    y_ND = _compute(config, axes, x_ND, chosen_NX, weight_NX, weights)
    if apart:
        y_ND = lax.psum_scatter(y_ND, apart, tiled=True)
    if together:
        y_ND = lax.psum(y_ND, together)
    return y_ND.reshape(x_BTD.shape), aux


def route(experts: ExpertsConfig, logits_NE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Experts of each token (N, X), their weights (N, X), and all scores, made to sum to 1 (N, E).

    In logarithms, so that no sum of scores is 0.
    """
    log_score = jax.nn.log_softmax if experts.score == "softmax" else jax.nn.log_sigmoid
    log_scores_NE = log_score(logits_NE)
    top_NX, chosen_NX = lax.top_k(log_scores_NE, experts.per_token)
    weight_NX = jax.nn.softmax(top_NX) if experts.normalise else jnp.exp(top_NX)
    return chosen_NX, weight_NX, jax.nn.softmax(log_scores_NE)


def _auxiliary(
    logits_NE: jax.Array,
    share_NE: jax.Array,
    chosen_NX: jax.Array,
    real_N: jax.Array,
    mesh_axes: tuple[str, ...],
) -> Aux:
    """balance, router_z and load, over the real tokens of all devices along the axes."""
    E, X = logits_NE.shape[1], chosen_NX.shape[1]
    real_N1 = real_N[:, None].astype(jnp.float32)
    sums = (
        jnp.sum(real_N1),
        jnp.sum(real_N1 * jnp.sum(jax.nn.one_hot(chosen_NX, E), axis=1), axis=0),
        jnp.sum(real_N1 * share_NE, axis=0),
        jnp.sum(real_N1[:, 0] * jnp.square(jax.nn.logsumexp(logits_NE, axis=1))),
    )
    tokens, choices_E, shares_E, squares = lax.psum(sums, mesh_axes) if mesh_axes else sums
    tokens = jnp.maximum(tokens, 1)
    f_E = lax.stop_gradient(choices_E / (tokens * X))
    return {
        "balance": E * jnp.sum(f_E * shares_E / tokens),
        "router_z": squares / tokens,
        "load": E * jnp.max(f_E),
    }


def _compute(
    config: ModelConfig,
    axes: Axes,
    x_ND: jax.Array,
    chosen_NX: jax.Array,
    weight_NX: jax.Array,
    weights: Weights,
) -> jax.Array:
    """The weighted sum of those chosen experts that this device holds: (N, D)."""
    N, X = chosen_NX.shape
    here = jax.tree.leaves(weights["up"])[0].shape[0]
    expert_M = chosen_NX.reshape(-1)
    if axes.experts:
        expert_M = expert_M - lax.axis_index(axes.experts) * here
    # Pairs of experts elsewhere come last, beyond all groups.
    expert_M = jnp.where((expert_M >= 0) & (expert_M < here), expert_M, here)
    sizes_E = jnp.sum(expert_M[:, None] == jnp.arange(here), axis=0, dtype=jnp.int32)
    order_M = jnp.argsort(expert_M, stable=True)
    place_M = jnp.argsort(order_M)

    def times(x: jax.Array, name: str) -> jax.Array:
        weight, block = weights[name], block_size(N * X, weights["router"].shape[1])
        multiply = output_major_product if isinstance(weight, OutputMajor) else grouped_product
        split = OF_EXPERTS[name].index("embed")
        return multiply(x, weight, sizes_E, block, axes.embed, split)

    x_MD = _sorted_pairs(x_ND, order_M, place_M)
    gate = checkpoint_name(times(x_MD, "gate"), "gate") if is_gated(config) else None
    up = checkpoint_name(times(x_MD, "up"), "up")
    y_MD = times(activate(config.feed_forward, gate, up), "down")
    y_NXD = _permuted(y_MD, place_M, order_M).reshape(N, X, -1)
    return jnp.sum(weight_NX[:, :, None] * y_NXD, axis=1).astype(x_ND.dtype)


@jax.custom_vjp
def _sorted_pairs(x_ND: jax.Array, order_M: jax.Array, place_M: jax.Array) -> jax.Array:
    """The tokens of the pairs (token, choice) in their order: (N, D) -> (M, D).

    The gradient is a sum over the choices: differentiating would add up rows one by one.

    Args:
        x_ND: tokens.
        order_M: which pair comes where.
        place_M: where each pair comes.
    """
    return x_ND[order_M // (len(order_M) // len(x_ND))]


def _sorted_pairs_forward(x_ND, order_M, place_M):
    return _sorted_pairs(x_ND, order_M, place_M), (place_M, len(x_ND))


def _sorted_pairs_backward(kept, gradient_MD):
    place_M, N = kept
    gradient_NXD = gradient_MD[place_M].reshape(N, -1, gradient_MD.shape[1])
    gradient_ND = jnp.sum(gradient_NXD, axis=1, dtype=jnp.float32)
    return gradient_ND.astype(gradient_MD.dtype), None, None


_sorted_pairs.defvjp(_sorted_pairs_forward, _sorted_pairs_backward)


@jax.custom_vjp
def _permuted(x_MD: jax.Array, index_M: jax.Array, inverse_M: jax.Array) -> jax.Array:
    """x_MD[index_M], for a permutation, whose inverse gives the gradient."""
    return x_MD[index_M]


def _permuted_forward(x_MD, index_M, inverse_M):
    return x_MD[index_M], inverse_M


def _permuted_backward(inverse_M, gradient_MD):
    return gradient_MD[inverse_M], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)


def reference(config: ModelConfig, weights: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """The definition in numpy: (T, D) -> (T, D).

    weights: the parameters by name; those of the shared expert under "shared".
    """
    experts = config.experts
    assert experts is not None
    y = np.zeros_like(x)
    for t, token in enumerate(x):
        logits = token @ weights["router"]
        scores = np.exp(logits) / np.exp(logits).sum()
        if experts.score == "sigmoid":
            scores = 1 / (1 + np.exp(-logits))
        chosen = np.argsort(-scores, kind="stable")[: experts.per_token]
        total = scores[chosen].sum() if experts.normalise else 1
        for e in chosen:
            names = [name for name in ("gate", "up", "down") if f"expert_{name}" in weights]
            own = {name: weights[f"expert_{name}"][e] for name in names}
            expert = feed_forward.reference(config, own, token[None])[0]
            y[t] += scores[e] / total * expert
    if experts.shared_d_ff:
        y += feed_forward.reference(config, weights["shared"], x)
    return y
