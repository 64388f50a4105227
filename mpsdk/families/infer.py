"""A model's head and spec from the names and shapes of its tensors, as far as these tell."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

from mpsdk.errors import CheckpointError
from mpsdk.families.describe import TOKENS
from mpsdk.families.family import Family
from mpsdk.families.fields import Fields
from mpsdk.families.heads import FamilyHead
from mpsdk.families.rules import WeightRule
from mpsdk.families.spec import TransformerSpec

Shapes = Mapping[str, tuple[int, ...]]

ATTENTION, FEED_FORWARD = "blocks.0.attention", "blocks.0.feed_forward"
POSITIONS, TYPES = "embedding.positions.weight", "embedding.token_types.weight"
OUTPUT, CLASSIFIER = "head.output.weight", "head.classifier.weight"
NEEDED = (TOKENS, f"{ATTENTION}.query.weight", f"{ATTENTION}.key.weight", f"{FEED_FORWARD}.up.weight")


def head_of(family: Family, canonical: Collection[str]) -> FamilyHead:
    """The head that most of the canonical names belong to; the family's usual one where none belongs to any."""

    def found(head: FamilyHead) -> tuple[int, int]:
        names = {name for rule in head.rules for name in rule.canonical}
        return len(names.intersection(canonical)), -len(names)

    best = max(family.heads, key=found)
    return best if found(best)[0] else family.heads[0]


def infer_spec(family: Family, head: FamilyHead, shapes: Shapes) -> TransformerSpec:
    """A spec of `family` whose tensors have these canonical shapes: like the model's in all that tensors show.

    What they don't show is arbitrary: how many heads share a projection, probabilities, frequencies.

    Raises:
        CheckpointError: tensors without which nothing can be said are missing, or attention is cut by heads.
        ConfigError: no model of the family has such shapes.
    """
    if missing := [name for name in NEEDED if len(shapes.get(name, ())) != 2]:
        raise CheckpointError(
            f"these are not the tensors of a {family.model_type} model: there is no {', no '.join(missing)}"
        )
    if counted := [rule for rule in family.body if rule.interleaved_by is not None]:
        raise CheckpointError(
            f"{counted[0].hf.format(block=0)} alternates between {counted[0].interleaved_by}, which shapes don't tell; "
            "give the model's configuration as config"
        )
    usual = family.read(Fields({}))
    form = head.form.model_copy(update={"labels": shapes.get(CLASSIFIER, (0,))[0]})
    sizes = {**_sizes(usual, shapes), "tied": not form.classifies and OUTPUT not in shapes, "head": form}
    # The family's own fields hold what it can vary; the rest becomes what it always is.
    fields = Fields(family.write(usual.model_copy(update=sizes)), aliases=family.aliases)
    spec = family.read(fields)
    fields.finish()
    return spec.model_copy(update={"tied": sizes["tied"], "head": form})


def _sizes(usual: TransformerSpec, shapes: Shapes) -> dict[str, object]:
    """The fields of a spec that shapes show; heads are as wide as one norm or one key can be."""
    queries, keys = (shapes[f"{ATTENTION}.{name}.weight"][0] for name in ("query", "key"))
    head_size = shapes.get(f"{ATTENTION}.query_norm.weight", (math.gcd(queries, keys),))[0]
    sizes: dict[str, object] = {
        "vocab_size": shapes[TOKENS][0],
        "hidden_size": shapes[TOKENS][1],
        "blocks": 1 + _last_block("blocks.{block}.", shapes),
        "heads": queries // head_size,
        "key_value_heads": keys // head_size,
        "head_size": head_size,
        "feed_forward_size": shapes[f"{FEED_FORWARD}.up.weight"][0],
        "attention_bias": f"{ATTENTION}.query.bias" in shapes,
        "attention_output_bias": f"{ATTENTION}.output.bias" in shapes,
        "feed_forward_bias": f"{FEED_FORWARD}.up.bias" in shapes,
        "attention_windows": (),
        "token_types": shapes.get(TYPES, (0,))[0],
    }
    if usual.rotary is not None:
        sizes["rotary"] = usual.rotary.model_copy(update={"size": None})
    if POSITIONS in shapes:
        reserved = usual.position_rows - usual.max_positions
        sizes["max_positions"] = max(shapes[POSITIONS][0] - reserved, 1)
    return sizes


def canonical_shapes(rules: Collection[WeightRule], found: Shapes) -> dict[str, tuple[int, ...]]:
    """Canonical shapes of the first block, and of one tensor of the last, from shapes under Hugging Face's names.

    Joined tensors are taken to be of equal shapes.
    """
    last = max(_last_block(rule.hf, found) for rule in rules if "{block}" in rule.hf)
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        for block in (0, last) if "{block}" in rule.hf else (0,):
            shape = found.get(rule.hf.format(block=block))
            if shape:
                rows, *rest = reversed(shape) if rule.transpose else shape
                part = (rows // len(rule.canonical), *rest)
                shapes |= {name.format(block=block): part for name in rule.canonical}
    return shapes


def _last_block(template: str, names: Collection[str]) -> int:
    """The highest number of a block in the names that begin as `template` says; 0 where none does."""
    before, _, after = template.partition("{block}")
    pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    return max((int(found[1]) for found in map(pattern.match, names) if found), default=0)
