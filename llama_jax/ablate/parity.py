"""The parity matrix: every variant, in every way in which it is used, against its definition.

A cell computes logits (or gradients) in one way and says how far they are from those of
`reference`, in parts of the largest of them, and how far they may be.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.ablate import reference
from llama_jax.config import ComputeConfig, ModelConfig, configs_folder, parse, read_yaml
from llama_jax.model.attention import rules_for
from llama_jax.model.cache import KVCache
from llama_jax.model.llama import Llama
from llama_jax.model.stack import Params, unstack
from sharding.mesh import make_mesh
from sharding.partition import shardings
from sharding.rules import Rules

ROWS, LENGTH = 2, 14
PIECES = (5, 1, 1, 3, 1, 3)  # prefill, decode, verify, ...
TWO_SIZES = (5, *(1,) * 9)  # prefill and decode: fewer programs to compile
LENGTHS, NEW = (5, 2, 8), 2  # of ragged prompts, and tokens that follow
DOCUMENTS = (4, 1, 6)  # of a packed row
DEVICES = 4
# Sums of fp32 in another order; some variants divide by small numbers. Two gradients that are
# compared have such errors of the forward and of the backward pass each.
EXACT = 2e-5
GRADIENT = 4 * EXACT
# In bf16 activations are rounded besides parameters, which alone costs so much; three times that.
BF16 = 3.0
DIRTY = 30.0  # what a cache holds before it is written


class Cell(NamedTuple):
    """A difference, and the largest that passes."""

    difference: float
    tolerance: float

    @property
    def passes(self) -> bool:
        """Whether it is small enough (NaN is not)."""
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Case:
    """A variant with parameters, tokens and what it should make of them."""

    config: ModelConfig

    @functools.cached_property
    def params(self) -> Params:
        """Random parameters, none of them 0 or 1, so that nothing cancels."""
        numbers = np.random.default_rng(0)

        def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            if "norm" in jax.tree_util.keystr(path):
                return jnp.asarray(numbers.uniform(0.5, 1.5, leaf.shape), jnp.float32)
            return jnp.asarray(0.25 * numbers.normal(size=leaf.shape), jnp.float32)

        return jax.tree_util.tree_map_with_path(draw, Llama(self.config).shapes())

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """(3, LENGTH) ids."""
        numbers = np.random.default_rng(1)
        return numbers.integers(0, self.config.vocab_size, (3, LENGTH)).astype(np.int32)

    @functools.cached_property
    def logits(self) -> np.ndarray:
        """The definition's, of every row of tokens (3, LENGTH, V)."""
        return np.stack([reference.logits(self.config, self.params, row) for row in self.tokens])

    @functools.cached_property
    def direction(self) -> np.ndarray:
        """What logits are multiplied with, to make a number of them."""
        return np.random.default_rng(2).normal(size=self.logits[:ROWS].shape).astype(np.float32)

    def off(self, ours: Any, rows: Any = np.s_[:ROWS], tolerance: float = EXACT) -> Cell:
        """How far logits of some rows and tokens are from the definition's."""
        expected = self.logits[rows]
        difference = np.max(np.abs(np.asarray(ours, np.float64) - expected))
        return Cell(float(difference / np.max(np.abs(self.logits))), tolerance)


# Half the time would be compilation, and code that is run once needs no optimizing.
_jit = functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
_apply = _jit(Llama.apply)


@_jit
def _gradients(model: Llama, params: Params, tokens: Any, direction: Any) -> tuple[Any, Any]:
    """Logits, and the gradients of a number made of them."""

    def number(params: Params) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(params, tokens, _rising(*tokens.shape)).value
        return jnp.sum(logits * direction), logits

    gradients, logits = jax.grad(number, has_aux=True)(params)
    return logits, gradients


def forward(case: Case) -> Cell:
    """Whole rows."""
    tokens = case.tokens[:ROWS]
    return case.off(_apply(Llama(case.config), case.params, tokens, _rising(*tokens.shape)).value)


def gradient(case: Case) -> Cell:
    """Along a random direction, against differences of the definition in float64."""
    tokens, step = case.tokens[:ROWS], 1e-6
    _, gradients = _gradients(Llama(case.config), case.params, tokens, case.direction)
    numbers = np.random.default_rng(3)
    towards = jax.tree.map(lambda w: numbers.normal(size=w.shape), case.params)

    def number(sign: float) -> float:
        moved = jax.tree.map(
            lambda w, d: np.asarray(w, np.float64) + sign * step * d, case.params, towards
        )
        values = [reference.logits(case.config, moved, row) for row in tokens]
        return float(np.sum(np.stack(values) * case.direction))

    expected = (number(1) - number(-1)) / (2 * step)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(towards), strict=True)
    parts = [np.sum(np.asarray(g, np.float64) * d) for g, d in pairs]
    return Cell(float(abs(sum(parts) - expected) / np.linalg.norm(parts)), GRADIENT)


def decode(case: Case) -> Cell:
    """Prefill, then tokens one by one and several at a time, in a stacked cache used before."""
    return case.off(_in_pieces(case, Llama(case.config), case.params, PIECES))


def ragged(case: Case) -> Cell:
    """Prompts of several lengths, padded on the right, each going on from its own end; layers and
    cache unstacked."""
    model, params = Llama(case.config), unstack(case.params)
    lengths, longest = np.array(LENGTHS), max(LENGTHS)
    real = _rising(len(LENGTHS), longest) < lengths[:, None]
    prompts = np.where(real, case.tokens[:, :longest], 9)
    cache = _dirty(model, len(LENGTHS), LENGTH + 3, stacked=False)
    positions = _rising(*prompts.shape)
    output = _apply(model, params, prompts, positions, real.astype(np.int32), cache)
    cells = [
        case.off(output.value[row, :length], (row, slice(length)))
        for row, length in enumerate(LENGTHS)
    ]
    everyone = np.arange(len(LENGTHS))
    for step in range(NEW):
        ends = lengths + step
        following = case.tokens[everyone, ends][:, None]
        output = _apply(model, params, following, ends[:, None], None, output.cache)
        cells.append(case.off(output.value[:, 0], (everyone, ends)))
    return _worst(cells)


def packed(case: Case) -> Cell:
    """Documents and padding in one row, as if each were alone."""
    order = np.arange(len(DOCUMENTS))
    segments = np.concatenate([np.repeat(order + 1, DOCUMENTS), [0, 0]])[None].astype(np.int32)
    positions = np.concatenate([*map(np.arange, DOCUMENTS), [0, 1]])[None].astype(np.int32)
    texts = [case.tokens[i, :n] for i, n in enumerate(DOCUMENTS)]
    ids = np.concatenate([*texts, [9, 9]])[None].astype(np.int32)
    logits = _apply(Llama(case.config), case.params, ids, positions, segments).value[0]
    ends = np.cumsum((0, *DOCUMENTS))
    return _worst(
        case.off(logits[start:end], (i, slice(end - start)))
        for i, (start, end) in enumerate(pairwise(ends))
    )


def sharded(case: Case) -> Cell:
    """Four devices, fsdp x tensor: logits and gradients in training, logits in decoding."""
    cells = []
    for name in ("train", "decode"):
        mesh = _mesh()
        rules = rules_for(case.config, name, mesh.shape)
        model = Llama(case.config, rules=rules)
        params = _placed(model, case.params, mesh, rules)
        with jax.set_mesh(mesh):
            if name == "decode":
                cells.append(case.off(_in_pieces(case, model, params, TWO_SIZES)))
                continue
            logits, gradients = _gradients(model, params, case.tokens[:ROWS], case.direction)
            cells.append(case.off(logits))
        cells.append(_apart(gradients, _plain_gradients(case)))
    return _worst(cells)


def bf16(case: Case) -> Cell:
    """Computed in bf16, with a cache in bf16 too; against what rounding the parameters costs."""
    model = Llama(case.config, ComputeConfig(dtype="bfloat16"))
    tokens = case.tokens[:ROWS]
    rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), case.params)
    positions = _rising(*tokens.shape)
    exact, inevitable = (
        _apply(Llama(case.config), params, tokens, positions).value
        for params in (case.params, rounded)
    )
    whole = _apply(model, case.params, tokens, positions).value
    pieces = _in_pieces(case, model, case.params, TWO_SIZES, jnp.bfloat16)

    def off(ours: Any, expected: Any) -> float:
        return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))

    found = max(off(ours, case.logits[:ROWS]) for ours in (whole, pieces))
    return Cell(found, BF16 * off(inevitable, exact))


def remat(case: Case) -> Cell:
    """Gradients with everything computed again in the backward pass."""
    return _computed(case, ComputeConfig(remat="full"))


def unrolled(case: Case) -> Cell:
    """Gradients of a program without a loop over layers."""
    return _computed(case, ComputeConfig(scan_layers=False))


CELLS: dict[str, Callable[[Case], Cell]] = {
    cell.__name__: cell
    for cell in (forward, gradient, decode, ragged, packed, sharded, bf16, remat, unrolled)
}


def variants() -> dict[str, ModelConfig]:
    """The models of configs/variants.yaml by name.

    Raises:
        ConfigError: naming a key that is unknown.
    """
    path = configs_folder() / "variants.yaml"
    values = read_yaml(path)
    return {
        name: parse(ModelConfig, values["base"] | changes, f"{path}: {name}")
        for name, changes in values["variants"].items()
    }


def matrix(names: Iterator[str] | list[str]) -> Iterator[tuple[str, str, Cell]]:
    """Every cell of these variants, one after the other."""
    models = variants()
    for name in names:
        case = Case(models[name])
        for cell, compute in CELLS.items():
            yield name, cell, compute(case)
        # No other variant needs its programs, and a process may have only so many: each takes
        # several memory maps, of which Linux allows 65,530, and XLA dies of the next.
        jax.clear_caches()


def _rising(rows: int, length: int) -> Any:
    return np.tile(np.arange(length, dtype=np.int32), (rows, 1))


def _dirty(model: Llama, rows: int, length: int, dtype: Any = jnp.float32, **how: Any) -> KVCache:
    """A cache that was used before."""
    fresh = KVCache.init(model.config, rows, length, dtype, **how)
    return jax.tree.map(lambda slab: jnp.full_like(slab, DIRTY), fresh)


def _in_pieces(
    case: Case, model: Llama, params: Params, pieces: tuple[int, ...], dtype: Any = jnp.float32
) -> np.ndarray:
    cache, found = _dirty(model, ROWS, LENGTH + 3, dtype), []
    for start, end in pairwise(np.cumsum((0, *pieces))):
        positions = _rising(ROWS, LENGTH)[:, start:end]
        output = _apply(model, params, case.tokens[:ROWS, start:end], positions, None, cache)
        cache = output.cache
        found.append(np.asarray(output.value))
    return np.concatenate(found, axis=1)


def _plain_gradients(case: Case) -> Any:
    return _gradients(Llama(case.config), case.params, case.tokens[:ROWS], case.direction)[1]


def _computed(case: Case, compute: ComputeConfig) -> Cell:
    model = Llama(case.config, compute)
    logits, gradients = _gradients(model, case.params, case.tokens[:ROWS], case.direction)
    return _worst([case.off(logits), _apart(gradients, _plain_gradients(case))])


def _apart(ours: Any, theirs: Any) -> Cell:
    """The largest difference of gradients, in parts of each array's largest number."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    worst = max(float(np.abs(a - np.asarray(b)).max() / np.abs(b).max()) for a, b in pairs)
    return Cell(worst, GRADIENT)


def _worst(cells: Any) -> Cell:
    """The cell that is nearest to failing, or fails most."""
    return max(cells, key=lambda cell: (not cell.passes, cell.difference / cell.tolerance))


@functools.cache
def _mesh() -> Mesh:
    sizes = {"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    return make_mesh(sizes, jax.devices()[:DEVICES])


def _placed(model: Llama, params: Params, mesh: Mesh, rules: Rules) -> Params:
    return jax.device_put(params, shardings(model.shapes(), model.axes(), mesh, rules))
