"""TransformerSpec: everything that a backend needs to assemble one transformer, as plain data.

A family's table turns a Hugging Face configuration into a spec; a backend turns a spec into layers.
No backend ever sees a family's name.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SCALING_NUMBERS = {"linear": 1, "llama3": 4}  # how many numbers follow the kind in `Rotary.scaling`


class Rotary(BaseModel):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    `scaling` is None, or ("linear", factor), or ("llama3", factor, low_frequency_factor,
    high_frequency_factor, original_max_positions) as Llama 3.1 defines it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    theta: float = Field(gt=0)
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


class TransformerSpec(BaseModel):
    """One decoder-only transformer. Sizes are global, before any cut and before vocabulary padding."""

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
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"]
    gated: bool  # feed-forward of the form down(activation(gate(x)) * up(x))
    attention_bias: bool  # on query, key, value
    attention_output_bias: bool
    feed_forward_bias: bool
    tied: bool  # the output projection is the token embedding

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
        if self.rotary is not None and self.head_size % 2:
            raise ValueError(
                f"head_size ({self.head_size}) must be even: rotary positions turn pairs of features"
            )
        return self
