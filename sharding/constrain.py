"""The one way to state the layout of an activation, and to ask for it."""

import jax

from sharding.partition import divided_spec
from sharding.rules import Rules


def parts(axis: str, rules: Rules | None) -> int:
    """How many devices split a logical axis, by the rules and the mesh in force."""
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return 1
    return rules.parts(axis, mesh.shape)


def constrain(x: jax.Array, axes: tuple[str | None, ...], rules: Rules | None) -> jax.Array:
    """x, laid out over the mesh in force as the rules say; values and gradients are untouched.

    Identity without rules, or outside `with jax.set_mesh(mesh):` (the older `with mesh:` does not
    count).

    Args:
        x: any array, inside jit or not.
        axes: one logical axis, or None, for each dimension.
        rules: which mesh axes split which logical axis, or None.

    Raises:
        ValueError: a dimension does not divide into the devices that share it (a batch of 3 on
            data=2), or the rules refuse the axes; the message names the numbers and the remedies.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return x
    spec = divided_spec(
        x.shape, axes, mesh.shape, rules, f"activation ({', '.join(map(str, axes))})"
    )
    return jax.lax.with_sharding_constraint(x, spec)
