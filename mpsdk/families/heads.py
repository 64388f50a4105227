"""The heads that families share: what they are, which class of transformers has them, under which tensor names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpsdk.families.fields import Fields
from mpsdk.families.rules import WeightRule, renamed
from mpsdk.families.spec import Head

LABELS = 2  # of a classifier, where its configuration doesn't say


@dataclass(frozen=True)
class FamilyHead:
    """A head of a family. `form` lacks `labels` and `dropout`, which the configuration says."""

    architecture: str  # the transformers class that an exported directory loads into
    form: Head
    rules: tuple[WeightRule, ...]
    dropout: Callable[[Fields], float] | None = None  # before a classifier; None: this head drops nothing
    transforms_as_blocks: bool = False  # the activation of `form.transform` is the blocks'


def usual_dropout(fields: Fields) -> float:
    """Before a classifier, as most decoders of transformers have it."""
    return fields.probability("classifier_dropout", 0.1)


def causal_lm(architecture: str, *, output: str = "lm_head", bias: bool = False) -> FamilyHead:
    """The output projection, named `output` in files, and nothing else."""
    return FamilyHead(architecture, Head(bias=bias), renamed(output, "head.output"))


def sequence_classifier(architecture: str) -> FamilyHead:
    """Over a sequence's last token, as all decoders have it."""
    form = Head(objective="sequence-classification", pooled="last")
    return FamilyHead(architecture, form, (WeightRule("score.weight", ("head.classifier.weight",)),))


def token_classifier(
    architecture: str, *, layer: str, dropout: Callable[[Fields], float] = usual_dropout
) -> FamilyHead:
    """Over each token; `layer` is the projection's name in files."""
    form = Head(objective="token-classification", bias=True)
    return FamilyHead(architecture, form, renamed(layer, "head.classifier"), dropout)


def labels_of(fields: Fields) -> int:
    """How many classes a configuration says."""
    stated = fields.optional_integer("num_labels")
    names = fields.mapping("id2label")
    if stated is not None and names is not None and len(names) != stated:
        fields.problem("num_labels", f"id2label names {len(names)} classes; leave one of the two out")
    return stated or len(names or ()) or LABELS


def written_labels(names: Sequence[str]) -> dict[str, object]:
    """The fields that name the classes, in the order of their numbers."""
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
