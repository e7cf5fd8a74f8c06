"""The whole configuration schema.

Every section is a frozen, hashable pydantic model that refuses unknown keys. A value is written in
one file (or one flag), checked here once, and only read after that. This module imports no jax, so
`--help` answers at once and a bad configuration is refused before any device is touched.
"""

import math
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from llama_jax.config.model import ExpertsConfig as ExpertsConfig
from llama_jax.config.model import ModelConfig
from llama_jax.config.model import RopeScaling as RopeScaling
from llama_jax.config.model import load_model as load_model
from llama_jax.config.model import model_names as model_names
from llama_jax.config.reading import configs_folder as configs_folder
from llama_jax.config.reading import dotted_keys as dotted_keys
from llama_jax.config.reading import flag_name as flag_name
from llama_jax.config.reading import parse as parse
from llama_jax.config.reading import read as read
from llama_jax.config.reading import read_yaml as read_yaml
from llama_jax.config.reading import save as save
from llama_jax.config.section import ConfigError as ConfigError
from llama_jax.config.section import Frozen as Frozen
from llama_jax.config.section import Schema, fixed
from llama_jax.config.section import positional as positional
from llama_jax.config.survival import (
    BatchWindow,
    DistributedConfig,
    ProfileConfig,
    SpikeConfig,
    batch_of,
)

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
    expert: int = 1
    """Parts of the experts of a mixture, which lie along it; also splits the batch. Other
    parameters are repeated along it."""
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
        axes = ("data", "fsdp", "expert", "context", "tensor")
        return {name: getattr(self, name) for name in axes}


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
        splits = (self.mesh.data, self.mesh.fsdp, self.mesh.expert)
        shards = math.prod(n for n in splits if n != -1)
        if (rows // parts) % shards:
            raise ValueError(
                f"data.batch_size / accumulate ({rows // parts}) must be a multiple of "
                f"mesh.data x mesh.fsdp x mesh.expert ({shards}), which split the batch"
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
