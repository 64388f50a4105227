"""Which tokens a token attends to: those before it, those near it, those that are not padding."""

from __future__ import annotations

import torch
from torch import Tensor

from mpsdk.families.spec import TransformerSpec


class Reach:
    """The masks of one microbatch, each made once for all blocks with the same window.

    Args:
        attention_mask: (batch, length), 0 where a row is padded, left or right; None: nowhere.
    """

    def __init__(
        self, spec: TransformerSpec, length: int, attention_mask: Tensor | None, device: torch.device
    ) -> None:
        self._spec, self._length, self._device = spec, length, device
        self._valid = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        self._made: dict[int | None, Tensor | None] = {}

    def of_block(self, block: int) -> Tensor | None:
        """(batch or 1, 1, length, length), true where a query attends to a key; None where `Scores.causal` says it all.

        Before left padding there may be nothing but padding: there a token reaches itself, so that its state, which nobody
        reads, is a number.
        """
        window = self._spec.window(block)
        if window is not None and window >= self._length:
            window = None
        if window not in self._made:
            self._made[window] = self._make(window)
        return self._made[window]

    def _make(self, window: int | None) -> Tensor | None:
        if window is None and self._valid is None:
            return None
        positions = torch.arange(self._length, device=self._device)
        back = positions[:, None] - positions  # how far back a key lies
        near = torch.ones_like(back, dtype=torch.bool)
        if self._spec.causal:
            near &= back >= 0
        if window is not None:
            near &= back < window
        near = near[None, None]
        if self._valid is None:
            return near
        return near & self._valid | (back == 0) if self._spec.causal else near & self._valid


def pooled_index(
    spec: TransformerSpec, attention_mask: Tensor | None, length: int, batch: int, device: torch.device
) -> Tensor:
    """(batch,): where the token stands whose state is its sequence's: the first, or the last that is not padding."""
    if spec.head.pooled == "first":
        return torch.zeros(batch, dtype=torch.int64, device=device)
    if attention_mask is None:
        return torch.full((batch,), length - 1, dtype=torch.int64, device=device)
    return (attention_mask * torch.arange(length, device=device)).argmax(dim=-1)
