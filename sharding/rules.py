"""The rules table: logical axes, which a model speaks of, to mesh axes, which devices lie along."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jax.sharding import PartitionSpec

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Rules:
    """Logical axis -> the mesh axes that split it; hashable, so a legal static argument of jit.

    Made by `Rules.of`. An axis that is in the table without mesh axes is not split; an axis that is
    not in the table is a mistake.
    """

    table: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, table: Mapping[str, MeshAxes]) -> "Rules":
        """Rules from a plain mapping: a mesh axis, several (the first outermost), or None.

        Raises:
            ValueError: one rule names a mesh axis twice.
        """
        rows = []
        for logical, mesh_axes in table.items():
            row = (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes or ())
            if len(set(row)) < len(row):
                raise ValueError(f"the rule for axis '{logical}' names a mesh axis twice: {row}")
            rows.append((logical, row))
        return cls(tuple(rows))

    def replace(self, **changes: MeshAxes) -> "Rules":
        """These rules with some logical axes mapped anew, or added."""
        return Rules.of({**dict(self.table), **changes})

    def mesh_axes(self, logical: str | None) -> tuple[str, ...]:
        """The mesh axes that split a logical axis; none for None, an axis without a name.

        Raises:
            ValueError: the rules do not have the axis.
        """
        if logical is None:
            return ()
        table = dict(self.table)
        if logical not in table:
            near = difflib.get_close_matches(logical, table, n=1)
            hint = f"the nearest is '{near[0]}'" if near else f"known are {', '.join(table)}"
            raise ValueError(
                f"the sharding rules have no axis '{logical}'; {hint}. Correct it, or add a rule"
            )
        return table[logical]

    def parts(self, logical: str | None, sizes: Mapping[str, int]) -> int:
        """Into how many parts a logical axis is split; sizes: mesh axis -> devices along it."""
        return math.prod(sizes[axis] for axis in self.mesh_axes(logical))

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """The PartitionSpec of an array whose dimensions have these logical axes.

        Raises:
            ValueError: an axis is unknown, or one mesh axis would split two dimensions.
        """
        entries = [self.mesh_axes(axis) for axis in axes]
        taken: dict[str, str | None] = {}
        for axis, entry in zip(axes, entries, strict=True):
            for mesh_axis in entry:
                if mesh_axis in taken:
                    raise ValueError(
                        f"the sharding rules split both '{taken[mesh_axis]}' and '{axis}' of an "
                        f"array {tuple(axes)} over mesh axis '{mesh_axis}'; map one of them to None"
                    )
                taken[mesh_axis] = axis
        return PartitionSpec(*(_entry(mesh_axes) for mesh_axes in entries))


def _entry(mesh_axes: tuple[str, ...]) -> MeshAxes:
    """What PartitionSpec writes for no axis, one axis, several."""
    return mesh_axes if len(mesh_axes) > 1 else next(iter(mesh_axes), None)


_TRAIN = Rules.of(
    {
        # Parameters, their gradients and their optimizer state.
        "vocab": "tensor",
        "embed": ("fsdp", "context"),
        "heads": "tensor",
        "kv_heads": "tensor",
        "head_dim": None,
        "mlp": "tensor",
        "expert": "expert",
        "router": None,
        "rank": None,
        "pair": None,
        "place": None,
        "layers": None,
        # Activations and caches.
        "batch": ("data", "fsdp", "expert"),
        "seq": "context",
        "residual_seq": ("context", "tensor"),
        "kv_seq": None,
        "act_embed": None,
        "act_heads": "tensor",
        "act_kv_heads": "tensor",
        "act_mlp": "tensor",
        "act_vocab": "tensor",
    }
)

PRESETS: dict[str, Rules] = {
    # Every parameter is split over fsdp x tensor and gathered over fsdp just before its layer runs
    # (ZeRO stage 3, arXiv 1910.02054); with tensor > 1 a layer's heads and widths stay split while
    # it runs (Megatron, arXiv 1909.08053). data, fsdp and expert split the batch, and expert the
    # experts of a mixture too (arXiv 2006.16668). context splits a row's tokens, and between
    # blocks, where every token is on its own, tensor does so too (arXiv 2205.05198): norms and the
    # values kept for the backward pass are not repeated.
    "train": _TRAIN,
    # A decoding step is over before a layer's weights could be gathered, so weights stay where they
    # are: split over tensor, whole along fsdp, which here only splits the batch, as data does. What
    # a device holds is parameters / tensor: if that is too much, use a larger tensor axis, or the
    # train rules, which fit wherever training fits and gather every weight for every token.
    # context splits the cache's slots.
    "decode": _TRAIN.replace(embed=None, seq=None, residual_seq=None, kv_seq="context"),
}
