"""GGUF files of the architecture llama as a source and a destination.

As llama.cpp wants them: queries and keys in Meta's order of pairs, norms in fp32, the frequencies
of llama3 scaling as a tensor of one divisor per pair, the tokenizer in the metadata.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import ConfigError, ModelConfig, RopeScaling, parse
from llama_jax.convert import gguf_file, names
from llama_jax.convert.settings import ConvertConfig
from llama_jax.convert.source import (
    DTYPES,
    Advance,
    Source,
    Stored,
    check_tensors,
    elsewhere,
    narrowest,
    outgoing,
)
from llama_jax.convert.tokenizers import from_gguf_fields, gguf_fields
from llama_jax.model.ops.rope import inverse_frequencies

ROPE_DIVISORS = "rope_freqs.weight"
TOKENIZER = "tokenizer.ggml.model"
NO_TOKENIZER = "no_vocab"
# Ids that end a text, in the order of Hugging Face's Llama 3: of the text, of a message that calls
# a tool, of a turn. Of two, the second is the turn's.
END_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eom", "eot"))
FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}  # general.file_type

SCALING = "rope.scaling."
SCALING_KEYS = {
    "linear": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "original_context": "original_context_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    },
}
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # where a file does not say
# Of llama3 scaling the format knows the divisors alone. What they were made from stands under keys
# of our own; a file without them is taken for Llama 3.1's.
OURS = "llama_jax.rope_scaling."
LLAMA3 = {"original_context": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# Keys behind "llama." that are read, and those that change no number.
KNOWN = {field.gguf for field in names.FIELDS} | {
    *("context_length", "rope.dimension_count", "attention.value_length", "tensor_data_layout"),
    *("expert_count", "expert_used_count", "rope.scaling.type", "rope.scaling.finetuned"),
    *(SCALING + key for keys in SCALING_KEYS.values() for key in keys.values()),
}


# Reading ------------------------------------------------------------------------------------------


def open_file(path: Path) -> Source:
    """Opens a .gguf file; quantised tensors are given in fp32.

    Raises:
        ConfigError: the file is damaged, of another architecture, or its tensors are not those its
            metadata describes.
        TokenizerError: its tokenizer is damaged.
    """
    fields, stored = gguf_file.read(path)
    if fields.get("split.count", 1) != 1:
        raise ConfigError(
            f"{path}: one of several files; join them first (llama-gguf-split --merge)."
        )
    divisors = stored.pop(ROPE_DIVISORS, None)
    config = _config(fields, stored, divisors, str(path))
    expected = (
        (row.gguf.name.format(layer=layer), names.shape(row.gguf.axes, config))
        for row, layer in names.entries(config)
    )
    check_tensors(stored, expected, gguf_file.NUMBERS, str(path))

    def tensor(row: names.Tensor, layer: int) -> np.ndarray:
        array = stored[row.gguf.name.format(layer=layer)].read()
        return names.rearrange(array, row.gguf.axes, row.axes, config)

    has_tokenizer = fields.get(TOKENIZER, NO_TOKENIZER) not in (NO_TOKENIZER, "none")
    tokenizer = from_gguf_fields(fields, path) if has_tokenizer else None
    ends = [fields[key] for key in END_KEYS if type(fields.get(key)) is int]
    length = fields.get("llama.context_length")
    return Source(
        format="gguf",
        path=path,
        config=config,
        tokenizer=tokenizer,
        end_ids=tuple(dict.fromkeys(ends)) or (tokenizer.eos_ids if tokenizer else ()),
        context_length=length if type(length) is int and length > 0 else None,
        dtype=narrowest(stored.values()),
        tensor=tensor,
    )


def _config(
    fields: Mapping[str, Any], stored: Mapping[str, Stored], divisors: Stored | None, origin: str
) -> ModelConfig:
    """The architecture that metadata and tensors describe."""
    architecture = fields.get("general.architecture", "missing")
    if architecture != "llama":
        raise ConfigError(
            f"{origin}: general.architecture is {architecture!r:.80}; only 'llama' is read."
        )
    values = {k.removeprefix("llama."): v for k, v in fields.items() if k.startswith("llama.")}
    if unknown := sorted(values.keys() - KNOWN):
        raise ConfigError(f"{origin}: llama.{unknown[0]:.80} is not understood.")
    for key, value in values.items():
        if type(value) not in (int, float, bool, str):
            raise ConfigError(f"{origin}: llama.{key} is a list, expected one value.")
    if values.get("expert_count") or values.get("expert_used_count"):
        raise ConfigError(f"{origin}: a mixture of experts; only dense models are read.")
    heads, width = values.get("attention.head_count"), values.get("embedding_length")
    if type(heads) is not int or type(width) is not int or heads < 1:
        raise ConfigError(f"{origin}: needs llama.attention.head_count and llama.embedding_length.")
    embed = stored.get(names.EMBED.gguf.name)
    values = {
        "attention.head_count_kv": heads,
        "attention.key_length": width // heads,
        "vocab_size": embed.shape[0] if embed and embed.shape else 0,
        "rope.freq_base": 10000.0,
        **values,
    }
    for key in ("rope.dimension_count", "attention.value_length"):
        if values.get(key, values["attention.key_length"]) != values["attention.key_length"]:
            raise ConfigError(
                f"{origin}: llama.{key} is {values[key]}, expected the width of a head, "
                f"{values['attention.key_length']}."
            )
    given = {field.ours: values.get(field.gguf) for field in names.FIELDS if field.gguf}
    if missing := [f.gguf for f in names.FIELDS if f.gguf and given[f.ours] is None]:
        raise ConfigError(f"{origin}: llama.{missing[0]} is missing.")
    tied = names.HEAD.gguf.name not in stored
    config = parse(ModelConfig, given | {"tie_embeddings": tied}, origin)
    scaling = _scaling(values, origin)
    if divisors is not None:
        if scaling.type != "none":
            raise ConfigError(f"{origin}: has {ROPE_DIVISORS} beside a scaling '{scaling.type}'.")
        scaling = _llama3(fields, config, divisors, origin)
    return config.model_copy(update={"rope_scaling": scaling})


def _scaling(values: Mapping[str, Any], origin: str) -> RopeScaling:
    """The scaling that metadata alone describe."""
    kind = values.get(SCALING + "type", "linear" if SCALING + "factor" in values else "none")
    keys = SCALING_KEYS.get(kind, {})
    given = {ours: values[SCALING + key] for ours, key in keys.items() if SCALING + key in values}
    if kind == "yarn":
        given = {"original_context": values.get("context_length"), **YARN, **given}
    elif kind == "linear" and given.get("factor") in (0, 1):  # as much as none
        kind, given = "none", {}
    return parse(RopeScaling, {"type": kind, **given}, origin)


def _llama3(
    fields: Mapping[str, Any], config: ModelConfig, divisors: Stored, origin: str
) -> RopeScaling:
    """The llama3 scaling whose divisors a file holds, one for each pair of a head."""
    check_tensors(
        {ROPE_DIVISORS: divisors}, [(ROPE_DIVISORS, (config.d_head // 2,))], ["float32"], origin
    )
    stored = divisors.read()
    given = {"factor": float(str(stored.max())), **LLAMA3}
    given = {name: fields.get(OURS + name, value) for name, value in given.items()}
    if not all(type(value) in (int, float) for value in given.values()):
        raise ConfigError(f"{origin}: the keys {OURS}* must be numbers.")
    scaling = parse(RopeScaling, {"type": "llama3", **given}, origin)
    if not np.allclose(stored, rope_divisors(config, scaling), rtol=1e-5, atol=0):
        raise ConfigError(
            f"{origin}: {ROPE_DIVISORS} are not those of a llama3 scaling with "
            f"{', '.join(f'{key} {value:g}' for key, value in given.items())}."
        )
    return scaling


def rope_divisors(config: ModelConfig, scaling: RopeScaling) -> np.ndarray:
    """By what a scaling divides the frequency of each pair of a head, (d_head / 2,) fp32."""
    plain = config.model_copy(update={"rope_scaling": RopeScaling()})
    scaled = config.model_copy(update={"rope_scaling": scaling})
    return (inverse_frequencies(plain) / inverse_frequencies(scaled)).astype(np.float32)


# Writing ------------------------------------------------------------------------------------------


def write(source: Source, path: Path, settings: ConvertConfig, advance: Advance) -> None:
    """Writes a file that llama.cpp loads, in fp32, fp16, bf16 or Q8_0; norms are always in fp32.

    Q8_0 needs rows of a multiple of 32 numbers; others stay in fp32.

    Raises ConfigError where the format has no word for the scaling, the context length is not
    known, or there are more than three end ids.
    """
    kind = settings.dtype or source.dtype.name
    fields = _fields(source, kind)
    matrices = outgoing(source, "gguf", DTYPES.get(kind, DTYPES["float32"]), advance)
    vectors = outgoing(source, "gguf", DTYPES["float32"], advance)
    tensors = {n: t if len(t.shape) > 1 else vectors[n] for n, t in matrices.items()}
    if kind == "q8_0":
        for name, tensor in tensors.items():
            if len(tensor.shape) > 1 and tensor.shape[-1] % 32 == 0:
                tensors[name] = tensor._replace(type="Q8_0")
    if source.config.rope_scaling.type == "llama3":
        divisors = rope_divisors(source.config, source.config.rope_scaling)
        tensors[ROPE_DIVISORS] = Stored(divisors.shape, "float32", lambda: divisors)
    gguf_file.write(path, fields, tensors)


def _fields(source: Source, kind: str) -> dict[str, Any]:
    """The metadata."""
    config = source.config
    if found := names.variants(config):
        raise ConfigError(
            f"llama.cpp's LLaMA has no {found[0]} (model.{found[0]}); {elsewhere(config)}."
        )
    if source.context_length is None:
        raise ConfigError(
            f"{source.path} does not say for how many positions the model was trained, which GGUF "
            "needs; add --context_length."
        )
    ours = config.model_dump()
    return {
        "general.architecture": "llama",
        "general.name": source.path.resolve().stem,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        "llama.context_length": source.context_length,
        **{f"llama.{field.gguf}": ours[field.ours] for field in names.FIELDS if field.gguf},
        "llama.attention.value_length": config.d_head,
        "llama.rope.dimension_count": config.d_head,
        **_scaling_fields(config.rope_scaling),
        **_tokenizer_fields(source),
    }


def _scaling_fields(scaling: RopeScaling) -> dict[str, Any]:
    given = scaling.model_dump(exclude={"type"}, exclude_none=True)
    if scaling.type == "none":
        return {}
    if scaling.type == "llama3":
        return {OURS + name: value for name, value in given.items()}
    keys = SCALING_KEYS.get(scaling.type, {})
    if unsaid := given.keys() - keys.keys():
        raise ConfigError(
            f"GGUF cannot say rope scaling '{scaling.type}' with {', '.join(sorted(unsaid))}; "
            "choose another format."
        )
    named = {f"llama.{SCALING}{keys[name]}": value for name, value in given.items()}
    return {f"llama.{SCALING}type": scaling.type, **named}


def _tokenizer_fields(source: Source) -> dict[str, Any]:
    if source.tokenizer is None:
        fields: dict[str, Any] = {TOKENIZER: NO_TOKENIZER}
    else:
        fields = gguf_fields(source.tokenizer, source.config.vocab_size)
    if len(source.end_ids) > len(END_KEYS):
        raise ConfigError(
            f"GGUF names at most {len(END_KEYS)} ids that end a text, and {source.path} has "
            f"{len(source.end_ids)}."
        )
    eos, eom, eot = END_KEYS
    keys = (eos, eot) if len(source.end_ids) == 2 else (eos, eom, eot)
    kept = {key: value for key, value in fields.items() if key not in END_KEYS}
    return kept | dict(zip(keys, source.end_ids, strict=False))
