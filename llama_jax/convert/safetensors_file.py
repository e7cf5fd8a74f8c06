"""The container of Hugging Face weights: safetensors, mapped when read, streamed when written.

Layout: 8 bytes with the length of a JSON header, the header (name -> type, shape, range of bytes),
and the arrays, little-endian, one behind the other.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llama_jax.config import ConfigError
from llama_jax.convert.source import DTYPES, Stored

# Bytes of a header; that of the 405B model takes 0.1 MB. Longer ones are refused, because parsing
# them alone could fill the memory.
LARGEST_HEADER = 4 * 2**20
TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name, mapped: nothing of them is read.

    Raises ConfigError for a file that the safetensors library does not find sound: ranges that do
    not fill the file exactly, or do not fit shape and type.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ConfigError(
            "Hugging Face weights need the safetensors library: pip install 'llama-jax[convert]'."
        ) from error
    try:
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            if length > LARGEST_HEADER:
                raise ConfigError(f"{path}: a header of {length} bytes is too large to be genuine.")
            header = raw.read(length)
        with safe_open(path, framework="numpy"):  # checks all that the header says
            pass
        content = np.memmap(path, np.uint8, mode="r")
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not a readable safetensors file ({error}).") from error
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    return {
        name: _stored(content, 8 + length + entry["data_offsets"][0], entry)
        for name, entry in entries.items()
    }


def _stored(content: np.ndarray, start: int, entry: dict) -> Stored:
    shape, kind = tuple(entry["shape"]), TYPES.get(entry["dtype"], entry["dtype"])

    def array() -> np.ndarray:
        # Through ndarray and not a view of a slice: arrays need not be aligned.
        return np.ndarray(shape, DTYPES[kind], buffer=content, offset=start)

    return Stored(shape, kind, array)


def write(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Writes tensors of the types in DTYPES, one at a time."""
    words = {ours: theirs for theirs, ours in TYPES.items()}
    # The key that transformers wants to see, whatever library wrote the file.
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": words[tensor.type],
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.read()).view(np.uint8).data)
