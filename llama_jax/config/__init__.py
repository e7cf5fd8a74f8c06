"""The whole configuration schema, and how YAML files become it.

Every section is a frozen, hashable pydantic model that refuses unknown keys. A value is written in
one file (or one flag), checked here once, and only read after that. This module imports no jax, so
`--help` answers at once and a bad configuration is refused before any device is touched.
"""

import difflib
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from llama_jax.config.section import ConfigError, Schema, fixed
from llama_jax.config.section import positional as positional
from llama_jax.config.survival import (
    BatchWindow,
    DistributedConfig,
    ProfileConfig,
    SpikeConfig,
    batch_of,
)

T = TypeVar("T", bound="Schema")


class RopeScaling(Schema):
    """How rotary frequencies are stretched beyond the length a model was trained at."""

    type: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
    """none; linear (positions / factor); dynamic (NTK-aware base, grows with the length); yarn
    (arXiv 2309.00071); llama3 (LLaMA 3.1, wavelength bands)."""
    factor: float = Field(default=1.0, ge=1.0)
    """By how much the context grows."""
    original_context: int | None = Field(default=None, gt=0)
    """Positions of the original training; needed by dynamic, yarn and llama3."""
    low_freq_factor: float | None = Field(default=None, gt=0)
    """llama3: wavelengths above original_context / low_freq_factor are divided by factor."""
    high_freq_factor: float | None = Field(default=None, gt=0)
    """llama3: wavelengths below original_context / high_freq_factor are kept."""
    beta_fast: float | None = Field(default=None, gt=0)
    """yarn: pairs that turn more often than this within original_context are kept (paper: 32)."""
    beta_slow: float | None = Field(default=None, gt=0)
    """yarn: pairs that turn less often than this are divided by factor (paper: 1)."""
    attention_factor: float | None = Field(default=None, gt=0)
    """yarn: scale of cos and sin; absent means 0.1 ln(factor) + 1."""

    @model_validator(mode="after")
    def _fields_belong_to_type(self) -> Self:
        needs = {
            "none": (),
            "linear": (),
            "dynamic": ("original_context",),
            "yarn": ("original_context", "beta_fast", "beta_slow"),
            "llama3": ("original_context", "low_freq_factor", "high_freq_factor"),
        }[self.type]
        optional = ("attention_factor",) if self.type == "yarn" else ()
        for name in type(self).model_fields:
            if name in ("type", "factor") or name in optional:
                continue
            given = getattr(self, name) is not None
            if name in needs and not given:
                raise ValueError(f"rope scaling '{self.type}' needs {name}")
            if name not in needs and given:
                raise ValueError(f"{name} has no meaning for rope scaling '{self.type}'; remove it")
        if self.type == "none" and self.factor != 1.0:
            raise ValueError("factor has no meaning for rope scaling 'none'; remove it")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if low in needs and getattr(self, high) <= getattr(self, low):
                raise ValueError(f"{high} must be larger than {low}")
        return self


class ModelConfig(Schema):
    """The architecture: what decides the numbers, and nothing else.

    No field has a default that a checkpoint should decide. Maximum length, mesh, data type and
    kernels are settings of a run, not of a model.
    """

    d_model: int = Field(gt=0)
    """Width of the residual stream."""
    n_layers: int = Field(gt=0)
    """Transformer blocks."""
    n_heads: int = Field(gt=0)
    """Query heads."""
    n_kv_heads: int = Field(gt=0)
    """Key and value heads: n_heads is multi-head, 1 multi-query, between them grouped-query."""
    d_head: int = Field(gt=0)
    """Width of one head (even: rotary embeddings turn pairs)."""
    d_ff: int = Field(gt=0)
    """Width of the feed-forward layer."""
    vocab_size: int = Field(gt=0)
    """Rows of the embedding."""
    norm_eps: float = Field(gt=0)
    """Epsilon of RMSNorm."""
    rope_theta: float = Field(gt=1)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = RopeScaling()
    """Stretching of the rotary frequencies."""
    tie_embeddings: bool
    """Whether the output matrix is the embedding, transposed."""
    windows: tuple[Annotated[int, Field(gt=0)] | None, ...] = ()
    """Sliding windows (arXiv 2310.06825, section 2): how many keys a query of a layer sees, its own
    and those before it; null: all. One for each layer, and from the first again when they are at
    an end: [4096] for all layers, [1024, null] in turn. Empty: all layers see all keys."""

    @classmethod
    def spelled_out(cls, value: Any) -> Any:
        """A name is the model of that name in configs/models."""
        return load_model(value).model_dump(mode="json") if isinstance(value, str) else value

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})"
            )
        if self.d_head % 2:
            raise ValueError(f"d_head ({self.d_head}) must be even: rotary embeddings turn pairs")
        if self.rope_scaling.type == "dynamic" and self.d_head < 4:
            raise ValueError("rope scaling 'dynamic' needs a d_head of 4 or more")
        return self

    @property
    def n_groups(self) -> int:
        """Query heads that share one key and value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def period(self) -> tuple[int | None, ...]:
        """The windows of the layers until they come again; (None,) where all layers see all."""
        return self.windows or (None,)


RematName = Literal["query", "key", "value", "attended", "attention_out", "gate", "up"]


class ComputeConfig(Schema):
    """How the model is computed; changes speed and memory, not the model."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; parameters, norms, softmax and loss stay fp32."""
    attention: Literal["auto", "xla", "splash", "flash"] = "auto"
    """Kernel of attention without a cache: xla (any device; holds the scores), splash (TPU) or
    flash (NVIDIA GPU); auto takes that of the device."""
    scan_layers: bool = True
    """Compile one block and loop over it (fast compiles), or unroll all blocks (faster on CPU)."""
    remat: Literal["none", "full", "named"] = "none"
    """What the backward pass recomputes: nothing, everything, or all but remat_save."""
    remat_save: tuple[RematName, ...] = ()
    """With remat: named, the values kept for the backward pass."""
    remat_offload: tuple[RematName, ...] = ()
    """With remat: named, values kept for the backward pass in the hosts' memory."""
    loss_chunks: int = Field(default=8, ge=1)
    """Parts of the sequence whose logits exist at one time in the loss."""

    @model_validator(mode="after")
    def _remat_agrees(self) -> Self:
        for name in ("remat_save", "remat_offload"):
            if getattr(self, name) and self.remat != "named":
                raise ValueError(f"{name} is read only with remat: named, not {self.remat}")
        if self.remat == "named" and not (self.remat_save or self.remat_offload):
            raise ValueError(
                "remat: named needs remat_save or remat_offload, some of "
                f"{', '.join(get_args(RematName))}"
            )
        if twice := set(self.remat_save) & set(self.remat_offload):
            raise ValueError(f"both remat_save and remat_offload name {', '.join(sorted(twice))}")
        return self


class MeshConfig(Schema):
    """How devices are arranged. The product must be the number of devices; one axis may be -1."""

    data: int = -1
    """Replicas of the model, each with its share of the batch."""
    fsdp: int = 1
    """Parts of parameters and optimizer state, gathered layer by layer; also splits the batch."""
    context: int = 1
    """Parts of a row's tokens, for long sequences: keys and values are gathered layer by layer.
    Splits parameters as fsdp does; with decode rules, the slots of the cache."""
    tensor: int = 1
    """Parts of each head group and feed-forward width (tensor parallelism)."""
    rules: Literal["train", "decode"] = "train"
    """Table that maps the model's axes to the mesh: train, or decode (weights stay in place)."""

    @model_validator(mode="after")
    def _sizes_make_sense(self) -> Self:
        sizes = self.sizes
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"{name} must be positive, or -1 for all remaining devices")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError("only one mesh axis may be -1 (all remaining devices)")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> number of devices along it (-1: what is left), outermost first."""
        return {name: getattr(self, name) for name in ("data", "fsdp", "context", "tensor")}


class DataSource(Schema):
    """One prepared corpus (a folder written by `data prepare`) and its share of the batches."""

    path: str
    """Folder of token shards."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the samples, relative to the other sources."""

    @classmethod
    def spelled_out(cls, value: Any) -> Any:
        """A path alone is a source of weight 1."""
        return {"path": value} if isinstance(value, str) else value


class DataConfig(Schema):
    """What the model reads."""

    sources: tuple[DataSource, ...] = fixed(min_length=1)
    """Prepared corpora, mixed by weight: paths, or entries of path and weight."""
    sequence_length: int = fixed(gt=0)
    """Tokens of a row."""
    batch_size: int = fixed(gt=0)
    """Rows of one optimizer step, over all devices and accumulated parts."""
    packing: Literal["packed", "padded"] = fixed(default="packed")
    """packed: documents fill the row, kept apart by segment ids; padded: one document a row."""
    shuffle: bool = fixed(default=True)
    """Visit the rows of an epoch in an order drawn from the seed."""
    workers: int = Field(default=0, ge=0)
    """Processes that read ahead; 0 reads in threads of this process. Never changes the order."""


class TextConfig(Schema):
    """Raw text, and how it is cut into documents."""

    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders or globs. JSON lines by suffix (.jsonl, .json, .ndjson), Parquet (.parquet),
    all else plain text; .gz and .zst are opened on the way (.zst and .parquet need extra: data)."""
    text_field: str = "text"
    """Key (JSON lines) or column (Parquet) that holds the text."""
    separator: str = ""
    """Plain text: what stands between two documents of a file; empty: a file is one document."""
    max_document_mb: int = Field(default=64, gt=0)
    """Documents larger than this (MiB of UTF-8) are left out and reported."""


class TokenizerTrainConfig(TextConfig):
    """Learn a tokenizer as LLaMA's (SentencePiece BPE, byte fallback, digits split) from text."""

    out: str
    """File to write (an existing one is replaced); llama_jax looks for the name tokenizer.model."""
    vocab_size: int = Field(default=32000, gt=259)
    """Pieces, with <unk>, <s>, </s> and the 256 bytes among them."""
    character_coverage: float = Field(default=0.99995, gt=0, le=1)
    """Share of all characters that get a piece of their own; the rest are spelt in bytes."""
    sample_mb: int = Field(default=256, gt=0)
    """Text to learn from (MiB); of a larger corpus, documents are drawn by a hash of their text."""


class TokenizerInspectConfig(Schema):
    """Show what a tokenizer holds and how it cuts a text."""

    path: str
    """Tokenizer file, or a folder with a tokenizer.model or tokenizer.json."""
    text: str = "Hello world! Llamas hum 1,234 songs.\n    def f(x): return x"
    """Text to encode."""


class DataPrepareConfig(TextConfig):
    """Turn text into the token shards that training reads. The same command resumes."""

    out: str
    """Folder to write; `data.sources` of a training run names it."""
    tokenizer: str
    """Tokenizer file, or a folder with a tokenizer.model or tokenizer.json; copied beside the
    shards."""
    validation_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Share of the documents kept for validation, chosen by a hash of their text."""
    workers: int = Field(default=0, ge=0)
    """Tokenising processes; 0: one per core, fewer for little text. Never changes the output."""
    shard_tokens: int = Field(default=2**27, gt=0)
    """Tokens after which a shard is closed; a killed run continues after the last closed one."""


class DataInspectConfig(Schema):
    """Show what a prepared corpus holds."""

    path: str
    """Folder written by `data prepare`."""
    split: Literal["train", "validation"] = "train"
    """Split whose documents are shown."""
    documents: int = Field(default=3, ge=0)
    """Documents to print the beginning of, spread over the split."""
    verify: bool = False
    """Read everything, and check the SHA-256 of each shard."""


class OptimizerConfig(Schema):
    """AdamW with a warmed-up schedule (Llama 2, section 2.2)."""

    peak_lr: float = Field(default=3.0e-4, gt=0)
    """Highest learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warmup; wsd holds the peak and falls over the last part."""
    warmup_steps: int = Field(default=2000, ge=0)
    """Steps of linear warmup from zero."""
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """Last learning rate as a part of the peak (cosine, linear, wsd)."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """wsd: part of the steps spent falling."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1.0e-5, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices; norms are left alone."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest global norm of the gradient."""
    offload: bool = False
    """Keep both moments in the hosts' memory; each step they come to the devices and go back."""


class CheckpointConfig(Schema):
    """When checkpoints are written and which are kept."""

    every: int = Field(default=1000, gt=0)
    """Steps between checkpoints (one more is written at the end and on a stop signal)."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    keep_best: int = Field(default=1, ge=0)
    """Checkpoints with the lowest validation loss kept besides."""
    keep_every: int | None = Field(default=None, gt=0)
    """Keep each checkpoint whose step is a multiple of this, for ever."""
    asynchronous: bool = True
    """Write while training goes on."""


class TrainConfig(Schema):
    """Pretraining: everything that decides a run."""

    out: str
    """Folder of the run: checkpoints, metrics, plots. The same command continues it."""
    model: ModelConfig = fixed()
    """Architecture: a name from configs/models, or the fields themselves."""
    tokenizer: str
    """Tokenizer file or folder; copied into the run (its content must stay the same on resume)."""
    data: DataConfig
    """What the model reads."""
    steps: int = Field(gt=0)
    """Optimizer steps of the whole run."""
    accumulate: int = Field(default=1, ge=1)
    """Parts a batch is computed in; gradients are summed in fp32."""
    seed: int = fixed(default=0, ge=0)
    """Decides the initial parameters and the order of the data."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of log(Z)^2, which keeps logits from drifting (PaLM, section 5: 1e-4)."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    compute: ComputeConfig = ComputeConfig()
    """How the model is computed."""
    mesh: MeshConfig = MeshConfig()
    """How devices are arranged."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written and kept."""
    parameters_from: str | None = None
    """Start from the parameters of this checkpoint (optimizer and step start anew)."""
    log_every: int = Field(default=10, gt=0)
    """Steps between lines of metrics."""
    evaluate_every: int = Field(default=500, gt=0)
    """Steps between validation losses."""
    evaluate_batches: int = Field(default=16, gt=0)
    """Batches of a validation loss; all of the split where it is smaller."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after this many validation losses without a new best."""
    wandb: str | None = None
    """Weights & Biases project to log to besides (extra: track)."""
    restarts: int = Field(default=0, ge=0)
    """Start again after a crash, at most this often: a parent process keeps watch."""
    distributed: DistributedConfig = DistributedConfig()
    """How the processes of a run over several hosts find and watch each other."""
    checksum_every: int | None = Field(default=100, gt=0)
    """Steps between comparisons of what should be equal on several devices; none: never."""
    skip_batches: tuple[BatchWindow, ...] = ()
    """Batches never to be trained on, as [first, after the last]; a run that has passed the first
    goes back to a checkpoint before it."""
    spikes: SpikeConfig = SpikeConfig()
    """When to skip batches after a rise of the loss without being asked."""
    profile: ProfileConfig = ProfileConfig()
    """Which steps to record for TensorBoard; SIGUSR1 records the next ones at any time."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        batch_of(0, self.skip_batches)  # raises where windows overlap
        rows, parts = self.data.batch_size, self.accumulate
        if rows % parts:
            raise ValueError(f"data.batch_size ({rows}) must be a multiple of accumulate ({parts})")
        known = [n for n in (self.mesh.data, self.mesh.fsdp) if n != -1]
        shards = known[0] * known[1] if len(known) == 2 else known[0]
        if (rows // parts) % shards:
            raise ValueError(
                f"data.batch_size / accumulate ({rows // parts}) must be a multiple of "
                f"mesh.data x mesh.fsdp ({shards}), which split the batch"
            )
        if self.data.sequence_length % self.compute.loss_chunks:
            raise ValueError(
                f"data.sequence_length ({self.data.sequence_length}) must be a multiple of "
                f"compute.loss_chunks ({self.compute.loss_chunks})"
            )
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be smaller than "
                f"steps ({self.steps})"
            )
        return self


class ModelsConfig(Schema):
    """What `models` prints."""

    length: int = Field(default=4096, gt=0)
    """Tokens of a row; attention's FLOPs grow with it."""
    as_json: bool = Field(default=False, alias="json")
    """Print JSON instead of a table."""


class DemoConfig(Schema):
    """The whole path on two cores: corpus, tokenizer, training, generation."""

    out: str = "runs/demo"
    """Folder of everything the demo makes; the same command continues a stopped one."""
    corpus: str | None = None
    """Folder of .py files to learn from; by default Python's own standard library."""
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps, instead of those of the recipe."""
    recipe: str = "demo"
    """Run recipe: a name from configs/runs, or a file."""


def configs_folder() -> Path:
    """The configs/ folder: inside the package when installed, beside it in a clone."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def model_names() -> list[str]:
    """Names of every model in configs/models, sorted."""
    return sorted(path.stem for path in (configs_folder() / "models").glob("*.yaml"))


def load_model(name: str) -> ModelConfig:
    """The ModelConfig of configs/models/<name>.yaml."""
    path = configs_folder() / "models" / f"{name}.yaml"
    if name not in model_names():
        near = difflib.get_close_matches(name, model_names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else " `models` lists them."
        raise ConfigError(f"No model is called '{name}'.{hint}")
    return read(ModelConfig, path)


def read(schema: type[T], path: str | Path) -> T:
    """Reads one YAML file into a section.

    Raises ConfigError naming the file, every bad key and, for an unknown key, the nearest one.
    """
    return parse(schema, read_yaml(path), str(path))


class _UniqueKeys(yaml.SafeLoader):
    """YAML without the rule that the last of two equal keys wins in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; raises YAMLError for a key that stands twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{twice[0]}' stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The values of a YAML file, unchecked but for being `key: value` lines."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.load(text, _UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines at the top level")
    return values


def parse(schema: type[T], values: dict[str, Any], origin: str) -> T:
    """Checks a dict against a section; errors begin with `origin` (a file name, say)."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, schema, origin)) from error


def explain(error: ValidationError, schema: type[Schema], origin: str) -> str:
    """One line per mistake: origin, dotted key, what is wrong, the nearest valid key."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, dotted_keys(schema), n=1, cutoff=0.5)
            message = "unknown key" + (f"; the nearest is '{near[0]}'" if near else "")
        elif item["type"] == "missing":
            message = "is required"
        elif item["type"] != "value_error":
            message += f" (got {reprlib.repr(item['input'])})"  # YAML aliases may unfold for ever
        lines.append(": ".join(part for part in (origin, key, message) if part))
    return "\n".join(lines)


def dotted_keys(schema: type[Schema], prefix: str = "") -> list[str]:
    """Every key of a schema, sections spelt out as section.field."""
    keys = []
    for name, field in schema.model_fields.items():
        key = prefix + flag_name(name, field)
        keys.append(key)
        inner = field.annotation
        if get_origin(inner) is tuple:  # of sections, which go by number
            inner, key = get_args(inner)[0], f"{key}.0"
        if isinstance(inner, type) and issubclass(inner, Schema):
            keys += dotted_keys(inner, f"{key}.")
    return keys


def flag_name(name: str, field: FieldInfo) -> str:
    """How users write a field, in YAML and as a flag."""
    return field.alias or name


def save(section: Schema, path: str | Path) -> None:
    """Writes a section as YAML that `read` gives back equal."""
    values = section.model_dump(mode="json", by_alias=True)
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
