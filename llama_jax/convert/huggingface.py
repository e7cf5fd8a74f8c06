"""Hugging Face folders of LLaMA, and of Mistral, which is LLaMA with windows, to read and to write.

Everything is checked before anything large is allocated, and whatever would change the numbers
without being understood here is refused by name. The files are treated as untrusted: only JSON and
safetensors are read, never pickles.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from llama_jax.config import ConfigError, ModelConfig, RopeScaling, Schema, parse
from llama_jax.convert import names, safetensors_file
from llama_jax.convert.settings import ConvertConfig
from llama_jax.convert.source import (
    DTYPES,
    Advance,
    Source,
    Stored,
    check_tensors,
    elsewhere,
    equal,
    find_tokenizer,
    narrowest,
    outgoing,
    read_json,
)
from llama_jax.convert.tokenizers import huggingface_files

MAX_SHARD_BYTES = 5 * 10**9
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

# Keys that would change the numbers, with the one value that is implemented.
IMPLEMENTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "original_max_position_embeddings": None,  # belongs inside the rope section
}
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}  # by model_type
# Absent, these mean something else for Mistral than for LLaMA.
TOLD_BY_MISTRAL = ("sliding_window", "num_key_value_heads")


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
    """Absent (LLaMA 1) means as many as heads."""
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
    sliding_window: int | None = None
    """window, of Mistral only."""
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
    values = read_json(path)
    kind = values.get("model_type", "llama")
    if kind not in CLASSES:
        raise ConfigError(
            f"{path}: model_type is {kind!r:.80}; only {' and '.join(CLASSES)} are implemented."
        )
    for key, only in {"architectures": [CLASSES[kind]], **IMPLEMENTED}.items():
        if values.get(key, only) != only:
            raise ConfigError(
                f"{path}: {key} is {values[key]!r:.80}; only "
                + (f"{only!r} is implemented." if only is not None else "its absence is.")
            )
    if absent := [key for key in TOLD_BY_MISTRAL if kind == "mistral" and key not in values]:
        raise ConfigError(f"{path}: a mistral model must give {absent[0]}.")
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
    given = file.model_dump() | {
        "num_key_value_heads": file.num_attention_heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "rope_theta": theta,
    }
    ours = {field.ours: given[field.huggingface] for field in names.FIELDS}
    window = file.sliding_window if kind == "mistral" else None
    return parse(ModelConfig, ours | {"rope_scaling": scaling, "window": window}, str(path))


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


def open_folder(folder: Path) -> Source:
    """Opens a folder with config.json and model.safetensors, or the shards that an index names.

    Raises:
        ConfigError: the configuration is not understood, or the tensors (fp32, bf16 or fp16) are
            not those of the model it describes.
        TokenizerError: there is a tokenizer file and it is damaged.
    """
    config = read_config(folder)
    stored = {n: t for n, t in _open(folder).items() if not ROTARY_BUFFER.fullmatch(n)}
    expected = (
        (row.huggingface.name.format(layer=layer), names.shape(row.huggingface.axes, config))
        for row, layer in names.entries(config)
    )
    head = stored.pop(names.HEAD.huggingface.name, None) if config.tie_embeddings else None
    check_tensors(stored, expected, DTYPES, str(folder))
    if head is not None:
        _check_tied(head, stored[names.EMBED.huggingface.name], folder)

    def tensor(row: names.Tensor, layer: int) -> Any:
        array = stored[row.huggingface.name.format(layer=layer)].read()
        return names.rearrange(array, row.huggingface.axes, row.axes, config)

    values = read_json(folder / "config.json")
    tokenizer = find_tokenizer(folder)
    return Source(
        format="huggingface",
        path=folder,
        config=config,
        tokenizer=tokenizer,
        end_ids=eos_ids(folder) or (tokenizer.eos_ids if tokenizer else ()),
        context_length=parse(Architecture, values, str(folder)).max_position_embeddings,
        dtype=narrowest(stored.values()),
        tensor=tensor,
    )


def eos_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a text: those of generation_config.json, else of config.json, else none."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.exists():
            ids = parse(EndTokens, read_json(path), str(path)).eos_token_id
            if ids is not None:
                return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


def _open(folder: Path) -> dict[str, Stored]:
    """Tensor name -> the tensor, of all files; headers only, nothing is loaded."""
    stored: dict[str, Stored] = {}
    for path in _shards(folder):
        tensors = safetensors_file.read(path)
        if twice := sorted(stored.keys() & tensors.keys()):
            raise ConfigError(f"{path}: {twice[0]} is also in another shard.")
        stored |= tensors
    return stored


def _check_tied(head: Stored, embed: Stored, folder: Path) -> None:
    """Refuses an output matrix beside tied embeddings that is not the embedding."""
    name = names.HEAD.huggingface.name
    check_tensors({name: head}, [(name, embed.shape)], DTYPES, str(folder))
    if not equal(head.read(), embed.read()):
        raise ConfigError(
            f"{folder} does not hold this model: {name} is not {names.EMBED.huggingface.name}, "
            "though tie_word_embeddings is true."
        )


def _shards(folder: Path) -> list[Path]:
    """The weight files of a folder: model.safetensors, else those that the index names."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ConfigError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json; "
            "other formats (.bin, .pth) are not read."
        )
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ConfigError(f"{index}: weight_map must map tensor names to files.")
    for name in places.values():
        # Plain names only: an index must not reach outside its folder.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ConfigError(f"{index}: {name!r:.80} is not the name of a file in this folder.")
        if not (folder / name).is_file():
            raise ConfigError(f"{index} names {name}, which is missing from the folder.")
    return [folder / name for name in sorted(set(places.values()))]


# Writing ------------------------------------------------------------------------------------------


def write(source: Source, folder: Path, settings: ConvertConfig, advance: Advance) -> None:
    """Writes a folder that transformers (4 and 5) loads: configuration, weights, tokenizer.

    Raises ConfigError where the source does not say for how many positions it was trained.
    """
    dtype = DTYPES[settings.dtype] if settings.dtype else source.dtype
    tensors = outgoing(source, "huggingface", dtype, advance)
    special = _special_ids(source)
    config = {**config_values(source), **special, "dtype": dtype.name, "torch_dtype": dtype.name}
    folder.mkdir()
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **special})
    if source.tokenizer is not None:
        for name, content in huggingface_files(source.tokenizer).items():
            (folder / name).write_bytes(content)
    shards = list(_split(tensors))
    if len(shards) == 1:
        safetensors_file.write(folder / SINGLE, tensors)
        return
    places: dict[str, str] = {}
    for number, part in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        safetensors_file.write(folder / file, {name: tensors[name] for name in part})
        places |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def config_values(source: Source) -> dict[str, Any]:
    """config.json without token ids and type, spelt as transformers 4 and 5 both read it."""
    config = source.config
    values = config.model_dump()
    kind = "mistral" if config.window else "llama"
    if found := [name for name in names.variants(config) if name != "window"]:
        raise ConfigError(
            f"transformers has no LLaMA with {found[0]} (model.{found[0]}); {elsewhere(config)}."
        )
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        **({"sliding_window": config.window} if kind == "mistral" else {}),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "max_position_embeddings": _context_length(source),
        **{field.huggingface: values[field.ours] for field in names.FIELDS},
        "rope_scaling": _rope_section(config.rope_scaling),
    }


def _context_length(source: Source) -> int:
    """max_position_embeddings, from which dynamic scaling starts whatever the source says."""
    scaling = source.config.rope_scaling
    length = scaling.original_context if scaling.type == "dynamic" else source.context_length
    if length is None:
        raise ConfigError(
            f"{source.path} does not say for how many positions the model was trained, which "
            "config.json needs; add --context_length."
        )
    return length


def _rope_section(scaling: RopeScaling) -> dict[str, Any] | None:
    """The key rope_scaling, with the type under both its spellings; no scaling is no section."""
    if scaling.type == "none":
        return None
    given = scaling.model_dump(exclude={"type"}, exclude_none=True)
    original = given.pop("original_context", None)
    if scaling.type != "dynamic" and original is not None:
        given["original_max_position_embeddings"] = original
    return {"rope_type": scaling.type, "type": scaling.type, **given}


def _special_ids(source: Source) -> dict[str, Any]:
    """Ids of the first and last token of a text; null where unknown, or 1 and 2 are taken."""
    ends = source.end_ids
    return {
        "bos_token_id": source.tokenizer.bos_id if source.tokenizer else None,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
    }


def _split(tensors: Mapping[str, Stored]) -> Iterator[list[str]]:
    """Names of each file's tensors, in order; a file is full at MAX_SHARD_BYTES."""
    part: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > MAX_SHARD_BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += tensor.nbytes
    yield part


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
