"""The schema of the architecture."""

import difflib
from functools import cache
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from llama_jax.config.reading import configs_folder, explain, read
from llama_jax.config.section import ConfigError, Frozen, Schema


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


class ExpertsConfig(Schema):
    """A mixture of experts in place of a feed-forward layer; each is d_ff wide."""

    count: int = Field(gt=1)
    """Experts of a layer."""
    per_token: int = Field(gt=0)
    """How many of them compute a token: those that the router scores highest."""
    shared_d_ff: int = Field(default=0, ge=0)
    """Width of one more expert, which computes every token (arXiv 2401.06066); 0: none."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become scores: over all experts, or each for itself."""
    normalise: bool = True
    """Whether the scores of a token's experts are divided by their sum."""
    balance: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss (arXiv 2101.03961, section 2.2)."""
    z_loss: float = Field(default=0.001, ge=0)
    """Weight of the router's z-loss (arXiv 2202.08906, section 2.2)."""

    @model_validator(mode="after")
    def _experts_suffice(self) -> Self:
        if self.per_token > self.count:
            raise ValueError(f"per_token ({self.per_token}) must be at most count ({self.count})")
        return self


# What one layer may have otherwise than the next: all but what the whole model shares.
WHOLE_MODEL = ("d_model", "n_layers", "vocab_size", "norm_eps", "tie_embeddings", "pattern")


class ModelConfig(Schema):
    """The architecture: what decides the numbers, and nothing else.

    No field has a default that a checkpoint should decide: those with one are variants, and the
    default is LLaMA. Maximum length, mesh, data type and kernels are settings of a run.
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
    """Width of one head."""
    d_ff: int = Field(gt=0)
    """Width of the feed-forward layer, or of one expert."""
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

    attention: str = "grouped_query"
    """Which attention: a name of llama_jax.model.attention (`ablate --list` describes them)."""
    attention_settings: Frozen = Frozen()
    """What that attention wants to know besides, by name."""
    position: Literal["rope", "alibi", "none"] = "rope"
    """How queries and keys learn their places: rope (arXiv 2104.09864); alibi, scores that fall
    with the distance (arXiv 2108.12409); none."""
    rotary_fraction: float = Field(default=1.0, gt=0, le=1)
    """Part of a head, its first numbers, that rope turns."""
    window: int | None = Field(default=None, gt=0)
    """Sliding window (arXiv 2310.06825, section 2): how many keys a query sees, its own and those
    before it; none: all."""
    chunk: int | None = Field(default=None, gt=0)
    """Chunked attention: a query sees the keys of its own stretch of so many positions."""
    keep_first: int = Field(default=0, ge=0)
    """First tokens of a document that a window or chunk shows to all (arXiv 2309.17453)."""
    sinks: bool = False
    """A learned score per head that takes attention without giving a value (arXiv 2508.10925)."""
    score_cap: float | None = Field(default=None, gt=0)
    """Soft cap: scores become cap x tanh(scores / cap) (arXiv 2408.00118, section 2)."""
    qk_norm: bool = False
    """RMSNorm of every query and key head, before rope (arXiv 2505.09388, section 2)."""
    keys_are_values: bool = False
    """One projection makes keys and values, which are the keys before rope; the cache holds one."""
    shares_kv: bool = False
    """The layer has no keys and values, but those of the last layer before it that has (arXiv
    2405.12981); only in a pattern."""
    parallel_block: bool = False
    """Attention and feed-forward read the same norm, and both are added (arXiv 2204.02311,
    section 2)."""
    feed_forward: Literal["swiglu", "geglu", "relu2"] = "swiglu"
    """swiglu or geglu: a gate of silu or of tanh-approximated gelu (arXiv 2002.05202); relu2: no
    gate, the square of relu (arXiv 2109.08668)."""
    experts: ExpertsConfig | None = None
    """Several feed-forward layers, of which each token passes a few; none: one for all."""
    pattern: tuple[Frozen, ...] = ()
    """Layers that differ: for each of them in turn, and from the first again, the fields above that
    it has otherwise: [{window: 1024}, {position: none}]. Empty: all layers are alike."""

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
        if self.position == "rope" and (self.rotary_width % 2 or self.rotary_width == 0):
            raise ValueError(
                f"rope turns pairs of numbers, so d_head x rotary_fraction ({self.rotary_width}) "
                "must be even"
            )
        if self.rope_scaling.type == "dynamic" and self.rotary_width < 4:
            raise ValueError("rope scaling 'dynamic' needs a d_head of 4 or more")
        return self

    @model_validator(mode="after")
    def _settings_have_a_meaning(self) -> Self:
        if self.window and self.chunk:
            raise ValueError("window and chunk exclude each other; give one of them")
        if self.keep_first and not (self.window or self.chunk):
            raise ValueError("keep_first has a meaning only with a window or a chunk")
        if self.position != "rope":
            for name in ("rotary_fraction", "rope_scaling"):
                if self.differs(name):
                    raise ValueError(f"{name} has no meaning with position: {self.position}")
        if self.shares_kv and self.keys_are_values:
            raise ValueError("a layer that shares_kv makes no keys; remove keys_are_values")
        return self

    @model_validator(mode="after")
    def _layers_agree(self) -> Self:
        if not self.pattern and self.shares_kv:
            raise ValueError("shares_kv stands in an entry of the pattern, behind one without it")
        for number, entry in enumerate(self.pattern):
            for name in entry:
                if name in WHOLE_MODEL:
                    raise ValueError(f"pattern.{number}: {name} is the same in all layers")
        if len(self.pattern) > self.n_layers:
            raise ValueError(
                f"the pattern has {len(self.pattern)} entries for n_layers ({self.n_layers})"
            )
        lender = None
        for number, place in enumerate(self.places):
            if place.shares_kv:
                _check_lender(lender, place, number)
            else:
                lender = place
        return self

    @property
    def places(self) -> tuple["ModelConfig", ...]:
        """The layers in turn until they come again, each as a model whose layers are all like it;
        only shares_kv is left to be read with the place before."""
        return _places(self) if self.pattern else (self,)

    def layer(self, depth: int) -> "ModelConfig":
        """The layer of this number, from 0, as a model whose layers are all like it."""
        return self.places[depth % len(self.places)]

    def differs(self, field: str) -> bool:
        """Whether a field that has a default, which is LLaMA, is something else."""
        return getattr(self, field) != type(self).model_fields[field].default

    @property
    def n_groups(self) -> int:
        """Query heads that share one key and value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def rotary_width(self) -> int:
        """Numbers of a head that rope turns."""
        return round(self.rotary_fraction * self.d_head)

    @property
    def reach(self) -> int | None:
        """Keys that a query sees at most, besides keep_first; none: all."""
        return self.window or self.chunk


class _Place(ModelConfig):
    """A layer of a pattern; the pattern checks shares_kv."""

    @model_validator(mode="after")
    def _layers_agree(self) -> Self:
        return self


@cache
def _places(config: ModelConfig) -> tuple[ModelConfig, ...]:
    base = {name: getattr(config, name) for name in ModelConfig.model_fields if name != "pattern"}
    places = []
    for number, entry in enumerate(config.pattern):
        try:
            places.append(_Place.model_validate(base | entry.plain()))
        except ValidationError as error:
            raise ValueError(explain(error, ModelConfig, f"pattern.{number}")) from error
    return tuple(places)


def _check_lender(lender: ModelConfig | None, place: ModelConfig, number: int) -> None:
    """Refuses a layer that shares keys and values that would not fit it."""
    if lender is None:
        raise ValueError(f"pattern.{number}: shares_kv needs a layer before it that has its own")
    fields = (
        *("attention", "attention_settings", "n_kv_heads", "d_head", "position", "rope_theta"),
        *("rope_scaling", "rotary_fraction", "window", "chunk", "keep_first", "qk_norm"),
    )
    for name in fields:
        if getattr(place, name) != getattr(lender, name):
            raise ValueError(
                f"pattern.{number}: with shares_kv its {name} must be that of the layer whose keys "
                "and values it reads"
            )


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
