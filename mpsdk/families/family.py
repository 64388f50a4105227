"""Family: one kind of Hugging Face model as a table, in both directions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError

from mpsdk.errors import ConfigError, Problem
from mpsdk.families.fields import COMMON, Fields
from mpsdk.families.heads import FamilyHead, labels_of, written_labels
from mpsdk.families.rules import WeightRule
from mpsdk.families.spec import Objective, TransformerSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """What mpsdk knows of a `model_type` of transformers. Everything else follows from it.

    `read` turns the configuration's fields into a spec, all but the head, and `write` turns a spec into the fields that make
    it again. `body` pairs its tensors with canonical ones, all but the head's; `ignored` names tensors (same patterns as
    rules) that files may carry and that hold no weights; `spellings` are parts of names in older files, and what they are
    now; `in_memory` are parts of names in files, and what they are in transformers' modules. `prefix` is what models with a
    head put before their base model's tensor names; files written from the base model lack it. `heads`: the first is the
    usual one. `aliases` maps other names that transformers accepts for a field to the field.
    """

    model_type: str
    prefix: str
    read: Callable[[Fields], TransformerSpec]
    write: Callable[[TransformerSpec], dict[str, object]]
    body: tuple[WeightRule, ...]
    heads: tuple[FamilyHead, ...]
    ignored: tuple[str, ...] = ()
    spellings: Mapping[str, str] = field(default_factory=dict[str, str])
    in_memory: Mapping[str, str] = field(default_factory=dict[str, str])
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])

    def rules(self, objective: Objective) -> tuple[WeightRule, ...]:
        """The rules of every tensor of a model with this head."""
        return (*self.body, *self.head(objective).rules)

    def head(self, objective: Objective) -> FamilyHead:
        """Raises ConfigError, with those that there are, when the family has no such head."""
        for head in self.heads:
            if head.form.objective == objective:
                return head
        known = ", ".join(f'"{head.form.objective}"' for head in self.heads)
        remedy = f"{self.model_type} models have no head for it; theirs are for {known}"
        raise ConfigError([Problem("training.objective", objective, remedy)], where="the model")

    def objective_of(self, hf_config: Mapping[str, object]) -> Objective:
        """What the head is for that a configuration's `architectures` names; the usual one's where it names none."""
        named = hf_config.get("architectures")
        for head in self.heads:
            if isinstance(named, list) and head.architecture in named:
                return head.form.objective
        return self.heads[0].form.objective

    def spec(
        self,
        hf_config: Mapping[str, object],
        *,
        objective: Objective | None = None,
        labels: int | None = None,
        exhaustive: bool = False,
    ) -> TransformerSpec:
        """The transformer that a configuration says.

        Fields that are absent have transformers' defaults. `objective` chooses the head (None: as `objective_of` finds),
        `labels` the number of a classifier's classes (None: the configuration's). `exhaustive` makes unknown fields a
        problem, for a configuration written by hand; in a file they get a warning, because transformers ignores them.

        Raises:
            ConfigError: with every setting that is invalid or that no spec can express, as `model.<field>`, or the family
                has no such head.
        """
        head = self.head(objective or self.objective_of(hf_config))
        fields = Fields(hf_config, aliases=self.aliases)
        fields.only(
            "quantization_config", None, "quantised weights can't be trained; load the original model"
        )
        fields.unused("num_labels", "classifier_dropout")
        spec: TransformerSpec | None = None
        try:
            spec = _with_head(self.read(fields), head, fields, labels)
        except ValidationError:
            if not fields.problems:  # which say why, in the configuration's own words
                raise
        if exhaustive:
            fields.refuse_unread(COMMON)
        elif unread := fields.unread(COMMON):
            logger.warning(
                "%s ignores these fields of its configuration: %s", head.architecture, ", ".join(unread)
            )
        fields.finish()
        assert spec is not None
        return spec

    def hf_config(self, spec: TransformerSpec) -> dict[str, object]:
        """The configuration from which transformers builds `spec`, without token ids and other settings of its own.

        Raises:
            ConfigError: naming every setting of the spec that this family can't express.
        """
        head = self.head(spec.head.objective)
        config = {"architectures": [head.architecture], "model_type": self.model_type, **self.write(spec)}
        if spec.head.classifies:
            del config["tie_word_embeddings"]  # there is nothing to tie
            config |= written_labels([f"LABEL_{number}" for number in range(spec.head.labels)])
        if head.dropout is not None:
            config["classifier_dropout"] = spec.head.dropout
        again = self.spec(config)
        lost = [name for name in TransformerSpec.model_fields if getattr(again, name) != getattr(spec, name)]
        if lost:
            raise ConfigError(
                (
                    Problem(
                        f"spec.{name}", getattr(spec, name), f"{self.model_type} models can't express this"
                    )
                    for name in lost
                ),
                where=f"a spec to be written as {self.model_type}",
            )
        return config


def _with_head(
    spec: TransformerSpec, head: FamilyHead, fields: Fields, labels: int | None
) -> TransformerSpec:
    """`spec`, read without a head, with this one."""
    update: dict[str, object] = {"dropout": 0.0 if head.dropout is None else head.dropout(fields)}
    if head.transforms_as_blocks:
        update["transform"] = spec.activation
    if head.form.classifies:
        update["labels"] = labels or labels_of(fields)
    tied = spec.tied and not head.form.classifies
    return spec.model_copy(update={"head": head.form.model_copy(update=update), "tied": tied})
