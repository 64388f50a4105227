"""Training: what is learned, for how long, from how much data a step, by which optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from mpsdk.config.base import rule
from mpsdk.config.document import Document
from mpsdk.config.fields import (
    BelowOne,
    Count,
    ListAsTuple,
    Natural,
    NotNegative,
    PathText,
    Positive,
    Seed,
    Share,
    Text,
)
from mpsdk.config.wording import Accepts
from mpsdk.errors import Problem


class Training(Document):
    """The objective, the optimizer and the length of a run, the same in both frameworks and in every layout.

    >>> Training(steps=200, warmup_steps=10, learning_rate=3e-4).learning_rate_at(9)
    0.0003

    Raises pydantic's ValidationError; `Training.parse` says the same as one ConfigError.
    """

    objective: Literal["causal-lm", "masked-lm", "sequence-classification", "token-classification"] = Field(
        default="causal-lm",
        description="What the model learns to predict; its head follows from it.",
    )
    labels: Annotated[tuple[str, ...], ListAsTuple] | None = Field(
        default=None,
        description="Names of a classifier's classes, in the order of their numbers. None: the model's own.",
    )
    text_column: Text = Field(
        default="text",
        description='Column of the data that has the text; with "token-classification", the list of its words.',
    )
    pair_column: Text | None = Field(
        default=None, description="sequence-classification: column of a second text, read after the first."
    )
    label_column: Text = Field(
        default="label",
        description='Column of a classifier\'s labels, names or numbers; with "token-classification", a list of them.',
    )
    mask_probability: Share = Field(
        default=0.15, description="masked-lm: share of the tokens that are to be predicted."
    )
    steps: Count = Field(default=100, description="Optimizer steps of the whole run, resumed parts included.")
    global_batch: Count = Field(default=8, description="Sequences of one optimizer step, over all ranks.")
    sequence_length: Count = Field(default=128, description="Tokens of a sequence.")
    accumulation: Count = Field(
        default=1,
        description="Equal parts of the global batch whose gradients are summed before an optimizer step.",
    )
    learning_rate: NotNegative = Field(default=3e-4, description="Learning rate at the end of the warmup.")
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="How the learning rate falls from there to the last step."
    )
    warmup_steps: Natural = Field(
        default=0, description="Steps over which the learning rate rises linearly to its full value."
    )
    minimum_learning_rate: NotNegative = Field(
        default=0.0, description='Learning rate of the last step, with schedule "linear" or "cosine".'
    )
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="As PyTorch defines it.")
    weight_decay: NotNegative = Field(
        default=0.1,
        description="Decoupled from the gradient with adamw, in it with sgd. Not on biases and norms.",
    )
    betas: Annotated[tuple[BelowOne, BelowOne], ListAsTuple] = Field(
        default=(0.9, 0.999),
        description="adamw: decay a step of the averages of the gradient and of its square.",
    )
    epsilon: Positive = Field(
        default=1e-8, description="adamw: added to the root of the averaged square, after its correction."
    )
    momentum: BelowOne = Field(
        default=0.0, description="sgd: share of the last update that is kept. 0: none."
    )
    max_grad_norm: Positive | None = Field(
        default=1.0,
        description="L2 norm that the whole gradient is scaled down to when above it. None: never.",
    )
    dropout: BelowOne | None = Field(
        default=None,
        description="Every dropout probability of the model. None: as the model's own configuration says.",
    )
    tokenizer: Annotated[PathText, Accepts('"auto"', '"bytes"', "a path")] = Field(
        default="auto",
        description='"auto": the model directory\'s; "bytes": 257 ids, 256 ends a document; or a directory.',
    )
    log_every: Count = Field(default=10, description="Steps between two rows of the history.")
    evaluate_every: Count | None = Field(
        default=None, description="Steps between evaluations on the validation data. None: only at the end."
    )
    seed: Seed = Field(
        default=0, description="What initial weights, order of samples and dropout are computed from."
    )

    @rule("global_batch", "accumulation")
    def accumulation_divides_global_batch(self) -> Iterator[Problem]:
        """`global_batch` is divisible by `accumulation`."""
        if self.global_batch % self.accumulation:
            below = self.global_batch - self.global_batch % self.accumulation
            choices = " or ".join(str(size) for size in (below, below + self.accumulation) if size)
            remedy = f"must be divisible by accumulation, which is {self.accumulation}; set {choices}"
            yield Problem("global_batch", self.global_batch, remedy)

    @rule("objective", "labels")
    def labels_are_a_classifiers(self) -> Iterator[Problem]:
        """`labels` only with an objective "...-classification"; at least two, each once."""
        if self.labels is None:
            return
        if not self.classifies:
            remedy = f'has no effect with objective "{self.objective}"; leave it out'
            yield Problem("labels", list(self.labels), remedy)
        elif len(self.labels) < 2 or len({*self.labels}) < len(self.labels):
            yield Problem("labels", list(self.labels), "must name at least two classes, each once")

    @rule("objective", "pair_column", "label_column", "mask_probability")
    def settings_fit_objective(self) -> Iterator[Problem]:
        """`pair_column`, `label_column` and `mask_probability` only with an objective that reads them."""
        takers = {
            "pair_column": ("sequence-classification",),
            "label_column": ("sequence-classification", "token-classification"),
            "mask_probability": ("masked-lm",),
        }
        for name, objectives in takers.items():
            if self.objective not in objectives and self.changed(name):
                remedy = f'has no effect with objective "{self.objective}"; leave it out'
                yield Problem(name, getattr(self, name), remedy)

    @rule("text_column", "pair_column", "label_column")
    def columns_differ(self) -> Iterator[Problem]:
        """`text_column`, `pair_column` and `label_column` differ where they are read."""
        if self.pair_column == self.text_column:
            yield Problem("pair_column", self.pair_column, "must be another column than text_column")
        elif self.classifies and self.label_column in (self.text_column, self.pair_column):
            yield Problem("label_column", self.label_column, "must be another column than those of the texts")

    @rule("steps", "warmup_steps")
    def warmup_ends(self) -> Iterator[Problem]:
        """`warmup_steps` is at most `steps`."""
        if self.warmup_steps > self.steps:
            yield Problem("warmup_steps", self.warmup_steps, f"must be at most steps, which is {self.steps}")

    @rule("learning_rate", "minimum_learning_rate", "learning_rate_schedule")
    def minimum_is_reached(self) -> Iterator[Problem]:
        """`minimum_learning_rate` is at most `learning_rate`, and 0 with schedule "constant"."""
        if self.minimum_learning_rate > self.learning_rate:
            remedy = f"must be at most learning_rate, which is {self.learning_rate}"
            yield Problem("minimum_learning_rate", self.minimum_learning_rate, remedy)
        if self.learning_rate_schedule == "constant" and self.changed("minimum_learning_rate"):
            remedy = 'has no effect with schedule "constant"; leave it out, or choose "linear" or "cosine"'
            yield Problem("minimum_learning_rate", self.minimum_learning_rate, remedy)

    @rule("optimizer", "betas", "epsilon", "momentum")
    def options_fit_optimizer(self) -> Iterator[Problem]:
        """`betas` and `epsilon` other than their defaults ask for "adamw", `momentum` for "sgd"."""
        for name, optimizer in (("betas", "adamw"), ("epsilon", "adamw"), ("momentum", "sgd")):
            if self.optimizer != optimizer and self.changed(name):
                remedy = (
                    f'has no effect with "{self.optimizer}"; leave it out, or set optimizer to "{optimizer}"'
                )
                yield Problem(name, getattr(self, name), remedy)

    @property
    def classifies(self) -> bool:
        """Whether what is learned are the data's own labels."""
        return self.objective.endswith("-classification")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0.

        It rises by equal amounts to `learning_rate` at step `warmup_steps` - 1 (at step 0 without warmup), then
        falls as the schedule says to `minimum_learning_rate` at the last step, where it stays.
        """
        if step < self.warmup_steps:
            return self.learning_rate * ((step + 1) / self.warmup_steps)
        peak = max(self.warmup_steps - 1, 0)
        if self.learning_rate_schedule == "constant":
            return self.learning_rate
        progress = min((step - peak) / max(self.steps - 1 - peak, 1), 1.0)
        share = (
            1 - progress
            if self.learning_rate_schedule == "linear"
            else (1 + math.cos(math.pi * progress)) / 2
        )
        return self.minimum_learning_rate + (self.learning_rate - self.minimum_learning_rate) * share
