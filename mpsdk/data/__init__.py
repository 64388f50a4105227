"""Training data: sources, tokenising, packing, and the order in which samples are read.

    source -> prepare -> Dataset -> SampleStream -> training_batch -> a backend's `step`
                              `---> evaluation_batches ------------> a backend's `evaluate`

Everything is causal language modelling so far: samples of a static shape, cut from one long line of documents.
"""

from __future__ import annotations

from mpsdk.data.batches import evaluation_batches, training_batch
from mpsdk.data.cache import prepare
from mpsdk.data.dataset import Dataset, split_validation, unigram_entropy
from mpsdk.data.stream import SampleStream
from mpsdk.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "BytesTokenizer",
    "Dataset",
    "SampleStream",
    "Tokenizer",
    "evaluation_batches",
    "load_tokenizer",
    "prepare",
    "split_validation",
    "training_batch",
    "unigram_entropy",
]
