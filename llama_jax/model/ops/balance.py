"""An order of tokens that shares causal attention evenly among devices that split a row.

The last queries of a row see the most keys. Cut into 2 n parts of which device i holds parts i and
2 n - 1 - i, a row gives every device the same work (as in Llama 3's training, arXiv 2407.21783,
section 3.3.2).
"""

import numpy as np


def balanced_order(length: int, devices: int) -> np.ndarray:
    """Which token stands at each place, (length,) int32: parts 0, 2 n - 1, 1, 2 n - 2, ...

    Raises:
        ValueError: 2 n does not divide the length.
    """
    if length % (2 * devices):
        raise ValueError(
            f"{length} tokens cannot be shared evenly by {devices} devices: the sequence length "
            f"must be a multiple of 2 x mesh.context ({2 * devices})"
        )
    parts = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    first = np.arange(devices)
    return parts[np.stack([first, 2 * devices - 1 - first], axis=1).ravel()].ravel()
