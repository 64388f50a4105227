"""Dropout whose mask is a function of where it stands, never of what ran before.

The seed of a mask derives from (seed, step, microbatch, block, site), and from the tensor-parallel coordinate where
the tensor is split, so that recomputation repeats it and a resumed run continues it.

What seeds a generator is kept out of compiled programs, which have random numbers of their own: there the numbers of a moment
would be constants, and the masks others than without compilation.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor


class Moment(NamedTuple):
    """When a forward pass happens: the run's seed, the step, and the microbatch counted over the global batch."""

    seed: int
    step: int
    microbatch: int


class Site(NamedTuple):
    """Where in the model a mask is drawn. `part` is the tensor-parallel coordinate where the tensor is split, else 0."""

    block: int  # -1: the embedding
    name: str
    part: int


def seed_site(moment: Moment | None, site: Site, device: torch.device) -> None:
    """Seed the generator of `device` for the mask at `site`. Without a moment (ordinary use of the module) do nothing."""
    if moment is None:
        return
    text = ":".join(map(str, (*moment, *site)))
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
    # Not torch.manual_seed: it seeds every device of the machine, and takes a hundred times as long.
    generator = (
        torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
    )
    generator.manual_seed(seed)


def dropout(
    tensor: Tensor, probability: float, moment: Moment | None, site: Site, *, training: bool
) -> Tensor:
    """`tensor` with elements dropped while training, the rest scaled by 1 / (1 - probability)."""
    if probability == 0.0 or not training:
        return tensor
    return _drop(tensor, probability, moment, site)


@torch.compiler.disable(reason="it seeds a generator")
def _drop(tensor: Tensor, probability: float, moment: Moment | None, site: Site) -> Tensor:
    seed_site(moment, site, tensor.device)
    return functional.dropout(tensor, probability)
