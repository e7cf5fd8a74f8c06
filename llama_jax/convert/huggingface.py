"""Reads a Hugging Face LlamaForCausalLM folder: architecture, weights, end tokens, tokenizer file.

Everything is checked before anything large is allocated, and whatever would change the numbers
without being understood here is refused by name. The files are treated as untrusted: only JSON and
safetensors are read, never pickles.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import model_validator

from llama_jax.config import ConfigError, ModelConfig, Schema, parse
from llama_jax.convert import names

WEIGHT_TYPES = ("F32", "BF16", "F16")
# Bytes of an index and of a safetensors header; those of the 405B model take 0.1 MB. Longer ones
# are refused, because parsing them alone could fill the memory.
LARGEST_JSON = LARGEST_HEADER = 4 * 2**20
ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

# Keys that would change the numbers, with the one value that is implemented.
IMPLEMENTED = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "original_max_position_embeddings": None,  # belongs inside the rope section
}


class Rope(Schema, strict=True):
    """The section `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""

    type: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    """Spelt rope_type in newer files."""
    rope_theta: float | None = None
    """In transformers 4 it stands outside the section."""
    factor: float | None = None
    """Growth of the context."""
    original_max_position_embeddings: int | None = None
    """llama3 and yarn: absent means max_position_embeddings."""
    low_freq_factor: float | None = None
    """llama3."""
    high_freq_factor: float | None = None
    """llama3."""
    beta_fast: float | None = None
    """yarn: absent means 32."""
    beta_slow: float | None = None
    """yarn: absent means 1."""
    attention_factor: float | None = None
    """yarn."""
    truncate: Literal[True] = True
    """yarn: whether the ends of its ramp are whole pairs."""

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        given = {key: value for key, value in section.items() if value is not None}
        kind = given.pop("rope_type", given.get("type", "default"))
        if given.setdefault("type", kind) != kind:
            raise ValueError(f"rope_type ({kind!r}) and type ({given['type']!r}) disagree")
        return given

    @model_validator(mode="after")
    def _length_and_factor_are_clear(self) -> Self:
        if self.type != "default" and self.factor is None:
            raise ValueError(f"rope type '{self.type}' needs factor")
        if self.type == "dynamic" and self.original_max_position_embeddings is not None:
            raise ValueError(
                "rope type 'dynamic' starts from max_position_embeddings; "
                "remove original_max_position_embeddings"
            )
        return self


class Architecture(Schema, strict=True, extra="ignore"):
    """What config.json says about shapes and numbers; its many other keys do not matter here."""

    hidden_size: int
    """d_model."""
    intermediate_size: int
    """d_ff."""
    num_hidden_layers: int
    """n_layers."""
    num_attention_heads: int
    """n_heads."""
    num_key_value_heads: int | None = None
    """n_kv_heads; absent (LLaMA 1) means as many as heads."""
    head_dim: int | None = None
    """d_head; absent means hidden_size / num_attention_heads."""
    vocab_size: int
    """vocab_size."""
    rms_norm_eps: float
    """norm_eps."""
    max_position_embeddings: int | None = None
    """The original context, where a rope scaling needs one and does not say it."""
    tie_word_embeddings: bool = False
    """tie_embeddings."""
    rope_theta: float | None = None
    """Absent (LLaMA 1 and 2) means 10,000, the class default of the format."""
    rope_scaling: Rope | None = None
    """Spelling of transformers 4."""
    rope_parameters: Rope | None = None
    """Spelling of transformers 5."""


class EndTokens(Schema, strict=True, extra="ignore"):
    """The key of config.json and generation_config.json that ends a text."""

    eos_token_id: int | list[int] | None = None
    """One id, or several (Llama 3)."""


def read_config(folder: str | Path) -> ModelConfig:
    """The architecture of a Hugging Face folder, from the config.json of any LLaMA generation.

    Raises ConfigError naming the key where the file is damaged, is of another architecture, or
    asks for something this model does not compute (biases, other activations or rope types).
    """
    path = Path(folder) / "config.json"
    values = _read_json(path)
    for key, only in IMPLEMENTED.items():
        if values.get(key, only) != only:
            raise ConfigError(
                f"{path}: {key} is {values[key]!r:.80}; only "
                + (f"{only!r} is implemented." if only is not None else "its absence is.")
            )
    file = parse(Architecture, values, str(path))
    theta, scaling = _rope(file, path)
    head_dim = file.head_dim
    if head_dim is None:
        head_dim, rest = divmod(file.hidden_size, max(file.num_attention_heads, 1))
        if rest:
            raise ConfigError(
                f"{path}: hidden_size ({file.hidden_size}) is not a multiple of "
                f"num_attention_heads ({file.num_attention_heads}), and head_dim is not given."
            )
    kv_heads = file.num_key_value_heads
    return parse(
        ModelConfig,
        {
            "d_model": file.hidden_size,
            "n_layers": file.num_hidden_layers,
            "n_heads": file.num_attention_heads,
            "n_kv_heads": file.num_attention_heads if kv_heads is None else kv_heads,
            "d_head": head_dim,
            "d_ff": file.intermediate_size,
            "vocab_size": file.vocab_size,
            "norm_eps": file.rms_norm_eps,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "tie_embeddings": file.tie_word_embeddings,
        },
        str(path),
    )


def _rope(file: Architecture, path: Path) -> tuple[float, dict[str, Any]]:
    """The rope base, and the values of a RopeScaling."""
    sections = [s for s in (file.rope_scaling, file.rope_parameters) if s is not None] or [Rope()]
    given = (file.rope_theta, *(s.rope_theta for s in sections))
    thetas = {theta for theta in given if theta is not None}
    scalings = [_scaling(section, file) for section in sections]
    if len(thetas) > 1 or any(scaling != scalings[0] for scaling in scalings):
        raise ConfigError(
            f"{path}: rope_theta, rope_scaling and rope_parameters contradict each other; "
            "keep the one that is right."
        )
    return thetas.pop() if thetas else 10000.0, scalings[0]


def _scaling(section: Rope, file: Architecture) -> dict[str, Any]:
    """The values of a RopeScaling that a section stands for."""
    given = section.model_dump(exclude={"rope_theta", "truncate"}, exclude_none=True)
    original = given.pop("original_max_position_embeddings", None)
    if section.type == "dynamic" or (section.type in ("llama3", "yarn") and original is None):
        original = file.max_position_embeddings
    if original is not None:
        given["original_context"] = original
    if section.type == "yarn":
        given = {"beta_fast": 32.0, "beta_slow": 1.0, **given}
    return {**given, "type": "none" if section.type == "default" else section.type}


def eos_ids(folder: str | Path) -> tuple[int, ...]:
    """Ids that end a text: those of generation_config.json, else of config.json, else none."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if path.exists():
            ids = parse(EndTokens, _read_json(path), str(path)).eos_token_id
            if ids is not None:
                return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


def tokenizer_path(folder: str | Path) -> Path:
    """The folder's tokenizer.model."""
    path = Path(folder) / "tokenizer.model"
    if not path.is_file():
        raise ConfigError(f"{folder} has no tokenizer.model; put the model's own one there.")
    return path


def load_params(folder: str | Path, config: ModelConfig) -> dict[str, Any]:
    """The weights of a Hugging Face folder as our parameter tree: numpy, fp32, layers stacked.

    Reads model.safetensors, or the shards of model.safetensors.index.json, in fp32, bf16 or fp16.
    Tensors are converted one at a time into their final place. Raises ConfigError before anything
    is allocated, naming the tensor, what was expected and what was found.
    """
    folder = Path(folder)
    with ExitStack() as files:
        stored = _open(folder, files)
        problems = list(islice(_problems(stored, config), 3))
        if problems:
            raise ConfigError(f"{folder} does not hold this model: {'; '.join(problems)}.")
        params: dict[str, Any] = {}
        for row in names.tensors(config):
            branch = params
            for key in row.path[:-1]:
                branch = branch.setdefault(key, {})
            branch[row.path[-1]] = _read(stored, row, config)
    return params


def _read(stored: dict[str, Any], row: names.Tensor, config: ModelConfig) -> np.ndarray:
    """One tensor of our tree, all layers of it."""
    result = np.empty(names.our_shape(row, config), np.float32)
    parts = result if row.is_layered else result[None]
    for part, name in zip(parts, names.hugging_face_names(row, config), strict=True):
        part[...] = names.from_hugging_face(stored[name].get_tensor(name), row, config)
    return result


def _open(folder: Path, files: ExitStack) -> dict[str, Any]:
    """Tensor name -> the open safetensors file that holds it; headers only, nothing is loaded."""
    try:
        # With ml_dtypes (a dependency of jax) numpy knows bfloat16.
        import ml_dtypes  # noqa: F401
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ConfigError(
            "Hugging Face weights need the safetensors library: pip install 'llama-jax[convert]'."
        ) from error
    stored: dict[str, Any] = {}
    for path in _shards(folder):
        try:
            with path.open("rb") as raw:
                header = int.from_bytes(raw.read(8), "little")
            if header > LARGEST_HEADER:
                raise ConfigError(f"{path}: a header of {header} bytes is too large to be genuine.")
            file = files.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: not a readable safetensors file ({error}).") from error
        for name in file.keys():  # noqa: SIM118, not a dict
            if name in stored:
                raise ConfigError(f"{path}: {name} is also in another shard.")
            stored[name] = file
    return stored


def _shards(folder: Path) -> list[Path]:
    """The weight files of a folder: model.safetensors, else those that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ConfigError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json; "
            "other formats (.bin, .pth) are not read."
        )
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ConfigError(f"{index}: weight_map must map tensor names to files.")
    for name in places.values():
        # Plain names only: an index must not reach outside its folder.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ConfigError(f"{index}: {name!r:.80} is not the name of a file in this folder.")
        if not (folder / name).is_file():
            raise ConfigError(f"{index} names {name}, which is missing from the folder.")
    return [folder / name for name in sorted(set(places.values()))]


def _problems(stored: dict[str, Any], config: ModelConfig) -> Iterator[str]:
    """What keeps the stored tensors from being this model, one phrase each."""
    known = set()
    for row in names.tensors(config):
        shape = names.hugging_face_shape(row, config)
        for name in names.hugging_face_names(row, config):
            known.add(name)
            if name in stored:
                yield from _misfit(stored, name, shape)
            else:
                yield f"{name} is missing, expected shape {shape}"
    for name in sorted(stored.keys() - known):
        if config.tie_embeddings and name == "lm_head.weight":
            yield from _untied(stored, (config.vocab_size, config.d_model))
        elif not ROTARY_BUFFER.fullmatch(name):
            yield f"{name} is not part of the model that config.json describes"


def _misfit(stored: dict[str, Any], name: str, shape: tuple[int, ...]) -> Iterator[str]:
    """A wrong shape or type of one tensor."""
    header = stored[name].get_slice(name)
    found, dtype = tuple(header.get_shape()), header.get_dtype()
    if found != shape:
        yield f"{name} has shape {found}, expected {shape}"
    if dtype not in WEIGHT_TYPES:
        yield f"{name} has type {dtype}, expected one of {', '.join(WEIGHT_TYPES)}"


def _untied(stored: dict[str, Any], shape: tuple[int, ...]) -> Iterator[str]:
    """An output matrix beside tied embeddings that is not the embedding, compared in slices."""
    problems = list(_misfit(stored, "lm_head.weight", shape))
    yield from problems
    embed_name = "model.embed_tokens.weight"
    if problems or embed_name not in stored or list(_misfit(stored, embed_name, shape)):
        return
    head, embed = stored["lm_head.weight"].get_slice("lm_head.weight"), stored[embed_name]
    embed = embed.get_slice(embed_name)
    for start in range(0, shape[0], 1024):
        rows = slice(start, min(start + 1024, shape[0]))  # the library refuses a longer slice
        if not np.array_equal(head[rows], embed[rows]):
            yield f"lm_head.weight is not {embed_name}, though tie_word_embeddings is true"
            return


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object without its null keys (null is how the format says absent)."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_JSON + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(content) > LARGEST_JSON:
        raise ConfigError(
            f"{path}: larger than {LARGEST_JSON} bytes, too large for a model's JSON."
        )
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object.")
    return {key: value for key, value in values.items() if value is not None}
