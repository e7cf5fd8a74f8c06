"""Parameters as inference wants them: in int8, and in the layout that the platform decodes fastest.

The model computes the same with any of them; what differs is speed, memory and, for int8, the
rounding of the weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.model.ops.weight import OutputMajor, Words
from llama_jax.model.stack import Params, by_place, in_turn

EXPERTS = ("expert_gate", "expert_up", "expert_down")
# Output axes of every matrix. `embed` has its output, the vocabulary, first, since its rows are
# looked up; all others have their outputs last.
OUTPUTS = {
    **{"embed": 1, "q": 2, "k": 2, "v": 2, "o": 1, "gate": 1, "up": 1, "down": 1, "head": 1},
    **{"q_pair": 3, "k_pair": 3, "head_gate": 2, "q_down": 1, "q_up": 2, "kv_down": 1},
    **dict.fromkeys(EXPERTS, 1),
}
INPUTS = {**dict.fromkeys(OUTPUTS, 1), "o": 2}


def quantize(params: Params, consume: bool = False) -> Params:
    """The parameters with every matrix in int8 and a scale for each output; norms stay floats.

    The weights of an output are rounded to 127 steps of the largest of them: symmetric, without a
    zero point. Matrices that are in int8 stay as they are. With `consume` the given matrices are
    deleted one by one.

    Raises:
        ValueError: layers are not stacked.
    """
    if isinstance(params["layers"], tuple):
        raise ValueError("layers are unstacked: quantise the parameters before that")

    def convert(name: str, matrix: Any) -> Any:
        weight = _output_major(name, matrix)
        return _int8(weight, INPUTS[name]) if weight.scale is None else weight

    return _map_matrices(convert, params, consume)


def int8_shapes(shapes: Params) -> Params:
    """The tree of `quantize(params)` as ShapeDtypeStructs, from that of the parameters."""

    def convert(name: str, matrix: Any) -> OutputMajor:
        values, scale = int8_order(name, matrix.shape)
        return OutputMajor(
            jax.ShapeDtypeStruct(values, jnp.int8),  # type: ignore[arg-type]
            jax.ShapeDtypeStruct(scale, jnp.float32),  # type: ignore[arg-type]
        )

    return _map_matrices(convert, shapes, consume=False)


def int8_axes(axes: Params) -> Params:
    """The tree of `quantize(params)` with logical axis names, from that of the parameters."""

    def convert(name: str, matrix: Any) -> OutputMajor:
        return OutputMajor(*int8_order(name, matrix))

    return _map_matrices(convert, axes, consume=False)


def int8_order(name: str, axes: Any) -> Any:
    """Axes of a matrix (sizes, or names) as they are in int8: those of its values and its scale."""
    inputs, outputs = INPUTS[name], OUTPUTS[name]
    if name != "embed":
        stacked = len(axes) - inputs - outputs
        ins, outs = axes[stacked : stacked + inputs], axes[stacked + inputs :]
        axes = axes[:stacked] + outs + ins
    return axes, axes[: len(axes) - inputs]


def is_quantized(params: Params) -> bool:
    """Whether the matrices are in int8."""
    return isinstance(params["embed"], OutputMajor | Words) and params["embed"].scale is not None


def for_decoding(params: Params, rows: int, consume: bool = False) -> Params:
    """The parameters in the layout for decoding `rows` rows at a time on this platform.

    On a CPU layers are unstacked, because a scan would copy every layer's weights for every token,
    and matrices are output-major; where rows is 1, bf16 and int8 ones whose inputs fill words are
    in words, but for experts, of which a token passes few. An embedding that is only looked up
    stays as it is. Elsewhere parameters stay as they are.

    With `consume` the given matrices are deleted one by one, so that memory never holds two models.
    """
    if jax.default_backend() != "cpu" or isinstance(params["layers"], tuple):
        return params
    is_tied = "head" not in params

    def convert(name: str, matrix: Any) -> Any:
        if name == "embed" and not is_tied:
            return matrix
        weight = _output_major(name, matrix)
        if rows > 1 or name in EXPERTS or not Words.can_hold(weight, OUTPUTS[name]):
            return weight
        return _words(weight, OUTPUTS[name])

    def convert_layers(name: str, stacked: Any) -> tuple[Any, ...]:
        layers = range(jax.tree.leaves(stacked)[0].shape[0])
        return tuple(convert(name, _layer(stacked, i)) for i in layers)

    outside = {name: leaf for name, leaf in params.items() if name != "layers"}
    places = []
    for stack in by_place(params["layers"]):
        columns = _map_matrices(convert_layers, stack, consume, other=_layers)
        count = len(columns["attention_norm"])
        places.append(tuple(_pick(columns, turn) for turn in range(count)))
    return {**_map_matrices(convert, outside, consume), "layers": in_turn(tuple(places))}


def _map_matrices(
    convert: Callable[[str, Any], Any],
    tree: Any,
    consume: bool,
    other: Callable[[Any], Any] = lambda leaf: leaf,
) -> Any:
    """The nested dict with convert(name, matrix) for every matrix and other(leaf) for the rest."""
    result = {}
    for name, leaf in tree.items():
        if isinstance(leaf, dict):
            result[name] = _map_matrices(convert, leaf, consume, other)
        elif name not in OUTPUTS:
            result[name] = other(leaf)
        else:
            result[name] = jax.block_until_ready(convert(name, leaf))
            kept = {id(array) for array in jax.tree.leaves(result[name])}
            for array in jax.tree.leaves(leaf):
                if consume and id(array) not in kept:
                    array.delete()
    return result


def _output_major(name: str, matrix: Any) -> OutputMajor:
    if isinstance(matrix, OutputMajor):
        return matrix
    if name == "embed":
        return OutputMajor(matrix)
    return OutputMajor(_outputs_first(matrix, INPUTS[name], OUTPUTS[name]))


@partial(jax.jit, static_argnums=(1, 2))
def _outputs_first(matrix: jax.Array, inputs: int, outputs: int) -> jax.Array:
    """(layers, in..., out...) as (layers, out..., in...); layers may be missing."""
    first = matrix.ndim - inputs - outputs
    return jnp.moveaxis(matrix, range(first + inputs, matrix.ndim), range(first, first + outputs))


@partial(jax.jit, static_argnums=1)
def _int8(weight: OutputMajor, inputs: int) -> OutputMajor:
    values = weight.values.astype(jnp.float32)
    axes = tuple(range(values.ndim - inputs, values.ndim))
    largest = jnp.max(jnp.abs(values), axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest, 127) / 127
    return OutputMajor(jnp.round(values / scale).astype(jnp.int8), jnp.squeeze(scale, axes))


@partial(jax.jit, static_argnums=1)
def _words(weight: OutputMajor, outputs: int) -> Words:
    return Words.of(weight, outputs)


def _layers(stacked: Any) -> tuple[Any, ...]:
    return tuple(_layer(stacked, i) for i in range(stacked.shape[0]))


@jax.jit
def _layer(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _pick(columns: Any, index: int) -> Any:
    """One layer of a tree whose leaves are tuples of layers."""
    if isinstance(columns, dict):
        return {name: _pick(column, index) for name, column in columns.items()}
    return columns[index]
