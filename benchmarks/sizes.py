"""The models that the benchmarks train, and the step that every contender takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 3e-4, 0.1, 1.0


@dataclass(frozen=True)
class Size:
    """A GPT-2 and its batch. `batch` in sequences, `length` in tokens. `steps`: a turn's, between two looks at
    the clock. `rounds`: turns of each contender."""

    name: str
    config: dict[str, Any]
    batch: int
    length: int
    steps: int
    rounds: int

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.length

    def rows(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids and labels of step number `step`, each of shape (batch, length); equal for every contender."""
        random = np.random.default_rng(step)
        tokens = random.integers(self.config["vocab_size"], size=(self.batch, self.length + 1))
        return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])


def _gpt2(vocabulary: int, blocks: int, width: int, heads: int, positions: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "vocab_size": vocabulary, "n_layer": blocks, "n_embd": width, "n_head": heads,
        "n_positions": positions, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False,
    }  # fmt: skip


SIZES = {
    "small": Size("small", _gpt2(8_192, 4, 256, 4, 128), batch=8, length=128, steps=4, rounds=9),
    "medium": Size("medium", _gpt2(16_384, 6, 512, 8, 256), batch=8, length=256, steps=1, rounds=5),
}
