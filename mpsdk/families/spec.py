"""TransformerSpec: everything that a backend needs to assemble one transformer, as plain data.

A family's table turns a Hugging Face configuration into a spec; a backend turns a spec into layers.
No backend ever sees a family's name.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mpsdk.errors import ConfigError, Problem

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Objective = Literal["causal-lm", "masked-lm", "sequence-classification", "token-classification"]

SCALING_NUMBERS = {"linear": 1, "llama3": 4}  # how many numbers follow the kind in `Rotary.scaling`


class Rotary(BaseModel):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    `size`: how many features of a head turn, the first ones; None: all. `interleaved`: feature 2 i turns together with
    feature 2 i + 1 (GPT-J), else feature i with feature i + size / 2 (GPT-NeoX, Llama).
    `scaling` is None, or ("linear", factor), or ("llama3", factor, low_frequency_factor,
    high_frequency_factor, original_max_positions) as Llama 3.1 defines it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    theta: float = Field(gt=0)
    size: int | None = Field(default=None, ge=2, multiple_of=2)
    interleaved: bool = False
    scaling: tuple[str | float, ...] | None = None

    @field_validator("scaling")
    @classmethod
    def _known_scaling(cls, scaling: tuple[str | float, ...] | None) -> tuple[str | float, ...] | None:
        if scaling is None:
            return None
        kind, numbers = str(scaling[0]) if scaling else "", scaling[1:]
        if kind not in SCALING_NUMBERS:
            raise ValueError(f"must begin with one of {', '.join(SCALING_NUMBERS)}; got {kind!r}")
        if len(numbers) != SCALING_NUMBERS[kind] or any(isinstance(number, str) for number in numbers):
            raise ValueError(f"{kind!r} takes {SCALING_NUMBERS[kind]} numbers; got {numbers}")
        return scaling


class Dropout(BaseModel):
    """Probabilities of dropping an element: after the embedding, in attention weights, on each residual branch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    embedding: float = Field(default=0.0, ge=0, lt=1)
    attention: float = Field(default=0.0, ge=0, lt=1)
    residual: float = Field(default=0.0, ge=0, lt=1)

    @property
    def any(self) -> bool:
        return max(self.embedding, self.attention, self.residual) > 0


class Head(BaseModel):
    """What stands on the last block, and so what the model can learn.

    A language model's: `transform` (a dense layer with this activation, then a norm; BERT), then the output projection over
    the vocabulary. A classifier's, of a token's state or of a sequence's, which is its `pooled` token's: `pooler` (a dense
    layer, then tanh), dropout, then the projection over `labels` classes. `bias`: of that last projection.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: Objective = "causal-lm"
    bias: bool = False
    transform: Activation | None = None
    pooler: bool = False
    pooled: Literal["first", "last"] = "last"
    labels: int = Field(default=0, ge=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @property
    def classifies(self) -> bool:
        return self.objective in ("sequence-classification", "token-classification")


class TransformerSpec(BaseModel):
    """One transformer, decoder-only or encoder-only. Sizes are global, before any cut and before vocabulary padding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str  # for messages, import and export only
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    blocks: int = Field(ge=1)
    heads: int = Field(ge=1)
    key_value_heads: int = Field(ge=1)
    head_size: int = Field(ge=1)
    feed_forward_size: int = Field(ge=1)
    max_positions: int = Field(ge=1)

    norm: Literal["layernorm", "rmsnorm"]
    norm_epsilon: float = Field(gt=0)
    positions: Literal["learned", "rotary"]
    rotary: Rotary | None = None
    activation: Activation
    gated: bool  # feed-forward of the form down(activation(gate(x)) * up(x))
    attention_bias: bool  # on query, key, value
    attention_output_bias: bool
    feed_forward_bias: bool
    tied: bool  # the output projection is the token embedding

    causal: bool = True  # a token attends to those before it alone
    norm_position: Literal["before", "after"] = (
        "before"  # each part of a block, and then the head; or the sum after each part
    )
    residual: Literal["sequential", "parallel", "parallel-one-norm"] = "sequential"
    query_key_norm: bool = False  # an RMSNorm over each head's query and key
    attention_scale: float | None = Field(default=None, gt=0)  # of scores; None: 1 / sqrt(head_size)
    attention_windows: tuple[
        int | None, ...
    ] = ()  # of each block: tokens within reach, itself the first; (): all, everywhere
    embedding_norm: bool = False
    token_types: int = Field(default=0, ge=0)  # rows of an embedding for the segment that a token is of
    position_padding: int | None = Field(default=None, ge=0)
    """The id of padding, where padding has no position: other tokens are counted, and stand from row `position_padding` + 1
    of the position table on (RoBERTa)."""
    head: Head = Head()

    initializer_range: float = Field(default=0.02, gt=0)
    scale_residual_initialisation: bool = False  # GPT-2: output projections start at range / sqrt(2 * blocks)
    dropout: Dropout = Dropout()

    @model_validator(mode="after")
    def _fits_together(self) -> TransformerSpec:
        if self.heads % self.key_value_heads:
            raise ValueError(f"key_value_heads ({self.key_value_heads}) must divide heads ({self.heads})")
        if (self.positions == "rotary") != (self.rotary is not None):
            raise ValueError(
                f"rotary must be given with rotary positions and only then; positions: {self.positions!r}"
            )
        if self.rotary is not None and self.rotary.size is None and self.head_size % 2:
            raise ValueError(
                f"head_size ({self.head_size}) must be even: rotary positions turn pairs of features"
            )
        if self.rotary is not None and (self.rotary.size or 0) > self.head_size:
            raise ValueError(f"rotary.size ({self.rotary.size}) must be at most head_size ({self.head_size})")
        if self.attention_windows and len(self.attention_windows) != self.blocks:
            raise ValueError(f"attention_windows must say one window for each of the {self.blocks} blocks")
        if self.norm_position == "after" and self.residual != "sequential":
            raise ValueError("parallel residuals ask for norm_position 'before'")
        if self.head.classifies and (self.tied or not self.head.labels):
            raise ValueError("a classifier has labels and no output projection to tie")
        return self

    @property
    def position_rows(self) -> int:
        """Rows of the table of learned positions."""
        return self.max_positions + (0 if self.position_padding is None else self.position_padding + 1)

    @property
    def drops(self) -> bool:
        """Whether anything is dropped in training."""
        return self.dropout.any or self.head.dropout > 0

    @property
    def masks(self) -> bool:
        """Whether a token's reach has to be written down: in windows, and where batches are padded."""
        return any(size is not None for size in self.attention_windows) or self.head.objective != "causal-lm"

    def shortened(self, positions: int | None) -> TransformerSpec:
        """The same with this many positions; None: with all. Raises ConfigError when it has fewer."""
        if positions is None:
            return self
        if not 1 <= positions <= self.max_positions:
            remedy = f"the model has {self.max_positions} positions; give a number up to that"
            raise ConfigError([Problem("max_seq_len", positions, remedy)], where="the model")
        return self.model_copy(update={"max_positions": positions})

    def window(self, block: int) -> int | None:
        """How many tokens block number `block` can reach from each, itself the first; None: no limit."""
        return self.attention_windows[block] if self.attention_windows else None
