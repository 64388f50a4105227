"""Weight rules: how a family's Hugging Face tensors and the canonical ones make each other up.

One rule serves loading and export. It says which canonical tensors an HF tensor holds, joined along their first dimension
(output features), and whether the result is transposed:

    HF = transpose(join(canonical[0], canonical[1], ...))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class WeightRule:
    """One HF tensor, or one in each block where the names say `{block}`.

    `interleaved_by` names a count of the spec: the joined tensors alternate, one such part of each at a time, as in fused
    query-key-value weights that keep a head's three parts together. Without it, they follow one another whole.

    A rule whose canonical tensors are not in the model (biases of a model without them) does not apply; nor does one whose
    `tied` is not the model's, where it says.
    """

    hf: str
    canonical: tuple[str, ...]
    transpose: bool = False
    interleaved_by: Literal["heads", "key_value_heads"] | None = None
    tied: bool | None = None


def renamed(hf: str, canonical: str, *, transpose: bool = False) -> tuple[WeightRule, WeightRule]:
    """Rules for the weight and the bias of one layer, from the layers' names without `.weight` and `.bias`."""
    return (
        WeightRule(f"{hf}.weight", (f"{canonical}.weight",), transpose=transpose),
        WeightRule(f"{hf}.bias", (f"{canonical}.bias",)),
    )
