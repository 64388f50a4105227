"""Training data: sources, tokenising, packing, labels, and the order in which samples are read.

    text ---> prepare ----------> Dataset [--> MaskedText] --.
                                                              >--> SampleStream -> training_batch -> a backend's `step`
    rows ---> prepare_labelled -> LabelledRows --------------'---> evaluation_batches -------------> a backend's `evaluate`

Text is packed for the language objectives: samples of a static shape, cut from one long line of documents. What has labels
stays a row, filled up to that shape.
"""

from __future__ import annotations

from mpsdk.data.batches import Samples, evaluation_batches, training_batch
from mpsdk.data.cache import prepare
from mpsdk.data.dataset import Dataset, split_validation, unigram_entropy
from mpsdk.data.labelled import Labelling, prepare_labelled
from mpsdk.data.labels import Labels
from mpsdk.data.masking import MaskedText, Masking
from mpsdk.data.rows import LabelledRows
from mpsdk.data.stream import SampleStream
from mpsdk.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "BytesTokenizer",
    "Dataset",
    "LabelledRows",
    "Labelling",
    "Labels",
    "MaskedText",
    "Masking",
    "SampleStream",
    "Samples",
    "Tokenizer",
    "evaluation_batches",
    "load_tokenizer",
    "prepare",
    "prepare_labelled",
    "split_validation",
    "training_batch",
    "unigram_entropy",
]
