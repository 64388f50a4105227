"""Masked language modelling: windows of packed text in which some tokens are hidden and to be predicted.

Of the tokens, special ones apart, each is chosen with `probability`; of those chosen, 80 % become the mask token, 10 % a random
token of the vocabulary and 10 % stay (Devlin et al. 2018, "BERT", section 3.1). What is chosen is a function of
(seed, epoch, sample): draws of Philox 4x64-10 (Salmon et al. 2011) whose key is a digest of the three, so that every layout
hides the same and each epoch hides something else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpsdk.backend import IGNORED_LABEL
from mpsdk.data.dataset import Dataset

HIDDEN, REPLACED = 0.8, 0.9  # below the first: the mask token; from there to the second: a random token
_PURPOSE = "mpsdk masks 1"
_DRAWS = 2**64


@dataclass(frozen=True)
class Masking:
    """What hides tokens: a tokenizer's special tokens and a run's settings, as plain data.

    `special` tokens are never chosen; `prefix` and `suffix` are put around each window.
    """

    mask: int
    vocab_size: int
    special: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    probability: float = 0.15
    seed: int = 0

    @property
    def added(self) -> int:
        """Tokens of a window that are not text."""
        return len(self.prefix) + len(self.suffix)

    def corrupt(
        self, ids: NDArray[np.int32], *, epoch: int, sample: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """What the model reads in place of the window `ids`, shape (length,), and its labels: -100 where nothing is asked."""
        choice, change, token = self._draws(epoch, sample, ids.size)
        chosen = (choice < _share(self.probability)) & ~np.isin(ids, self.special)
        hidden = chosen & (change < _share(HIDDEN))
        replaced = chosen & ~hidden & (change < _share(REPLACED))
        read = np.where(hidden, self.mask, ids)
        read = np.where(replaced, (token % np.uint64(self.vocab_size)).astype(np.int32), read)
        return read.astype(np.int32), np.where(chosen, ids, IGNORED_LABEL).astype(np.int32)

    def _draws(self, epoch: int, sample: int, count: int) -> NDArray[np.uint64]:
        """Three rows of `count` draws."""
        text = json.dumps([_PURPOSE, self.seed, epoch, sample])
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
        return np.random.Philox(key=key).random_raw(3 * count).reshape(3, count)


def _share(probability: float) -> np.uint64:
    """The draws below this are `probability` of all."""
    return np.uint64(int(probability * _DRAWS))


@dataclass(frozen=True, eq=False)
class MaskedText:
    """Windows of `sequence_length` tokens, special ones at both ends included, each time masked anew.

    `text` is opened with windows that leave room for them: `sequence_length` - `masking.added`.
    """

    text: Dataset
    masking: Masking

    def __len__(self) -> int:
        return len(self.text)

    @property
    def sequence_length(self) -> int:
        return self.text.sequence_length + self.masking.added

    @property
    def fingerprint(self) -> str:
        """Names the windows before anything in them is hidden."""
        return self.text.fingerprint

    def rows(
        self, indices: NDArray[np.int64], epochs: NDArray[np.int64] | None = None
    ) -> dict[str, NDArray[np.int32]]:
        """`input_ids` with hidden tokens, `labels` (-100 where none is hidden), `attention_mask` and `token_type_ids`; each
        int32 of shape (len(indices), sequence_length).

        `epochs`: of each row; None: 0, so that an evaluation repeats. Raises IndexError for an index outside [0, len(self)).
        """
        windows = self.text.rows(indices)["input_ids"]
        shape = (len(indices), self.sequence_length)
        ids, labels = np.empty(shape, np.int32), np.full(shape, IGNORED_LABEL, np.int32)
        start, stop = len(self.masking.prefix), self.sequence_length - len(self.masking.suffix)
        ids[:, :start], ids[:, stop:] = self.masking.prefix, self.masking.suffix
        for row, (sample, window) in enumerate(zip(indices.tolist(), windows, strict=True)):
            epoch = 0 if epochs is None else int(epochs[row])
            ids[row, start:stop], labels[row, start:stop] = self.masking.corrupt(
                window, epoch=epoch, sample=sample
            )
        return {
            "input_ids": ids,
            "attention_mask": np.ones(shape, np.int32),
            "token_type_ids": np.zeros(shape, np.int32),
            "labels": labels,
        }
