"""From what `fit` and `evaluate` are given as data to prepared datasets that every rank can open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from mpsdk.config import Training
from mpsdk.data import load_tokenizer, prepare
from mpsdk.data.tokenizer import TOKENIZER_FILE
from mpsdk.errors import ConfigError, Problem
from mpsdk.work_order import PreparedData

PARTS = ("train", "validation")


class Inputs(NamedTuple):
    """Sources as `mpsdk.data` takes them; a `validation` that is a number is the share of `train` to hold out."""

    train: object
    validation: object = None

    @property
    def held_out(self) -> float | None:
        """The share of the training data that is held out, at its end, for validation."""
        return float(self.validation) if isinstance(self.validation, (int, float)) else None


def read_inputs(train: object, validation: object = None) -> Inputs:
    """`fit`'s arguments, or one mapping with the same names. Raises ConfigError listing every problem."""
    problems: list[Problem] = []
    if isinstance(train, Mapping):
        given = cast("Mapping[str, object]", train)
        unknown = [key for key in given if key not in PARTS]
        problems += [Problem(f"data.{key}", key, "the keys are train and validation") for key in unknown]
        if validation is not None and "validation" in given:
            remedy = "is given twice, in the mapping and beside it; leave one out"
            problems.append(Problem("data.validation", validation, remedy))
        train, validation = given.get("train"), given.get("validation", validation)
    if train is None:
        remedy = "give the training data: a .txt or .jsonl file, a directory of them, a dataset, or token ids"
        problems.append(Problem("data.train", None, remedy))
    if isinstance(validation, bool) or (isinstance(validation, (int, float)) and not 0 < validation < 1):
        remedy = "a number is the share of the training data to hold out: between 0 and 1, such as 0.1"
        problems.append(Problem("data.validation", validation, remedy))
    if problems:
        raise ConfigError(problems, where="the data")
    return Inputs(train, validation)


@dataclass(frozen=True)
class Preparation:
    """How sources become datasets: by which tokenizer, for which model, into which cache."""

    training: Training
    model_directory: str | None
    vocab_size: int | None
    cache: Path

    def of(self, inputs: Inputs) -> tuple[PreparedData, PreparedData | None]:
        """Training and validation data. Raises ConfigError or DataError for what can't be used."""
        if inputs.held_out is not None:
            train = self.of_one(inputs.train, held_out=inputs.held_out)
            return train, train.model_copy(update={"part": "validation"})
        train = self.of_one(inputs.train)
        return train, None if inputs.validation is None else self.of_one(inputs.validation)

    def of_one(self, source: object, *, held_out: float = 0.0) -> PreparedData:
        """One source, tokenised unless that was done before; its training part, where a part is held out."""
        training = self.training
        tokenizer = load_tokenizer(training.tokenizer, self.model_directory)
        problems = vocabulary_problems(training.tokenizer, tokenizer.vocab_size, self.vocab_size)
        if problems:
            raise ConfigError(problems, where="the data")
        dataset = prepare(
            source,
            tokenizer=tokenizer,
            sequence_length=training.sequence_length,
            cache_directory=self.cache,
            validation_fraction=held_out,
        )
        return PreparedData(directory=str(dataset.path.resolve()), validation_fraction=held_out)


def tokenizer_problems(
    training: Training, model_directory: str | None, vocab_size: int | None
) -> list[Problem]:
    """Whether every id that the tokenizer gives is one of the model's, as far as there is a tokenizer to ask.

    A model without a tokenizer of its own can still be planned; `fit` will ask for one. Older kinds than tokenizer.json
    need transformers to be read, which planning must not import: `fit` looks at them as well.
    """
    name = training.tokenizer
    if name == "auto" and (model_directory is None or not Path(model_directory, TOKENIZER_FILE).is_file()):
        return []
    if name not in ("auto", "bytes") and Path(name).is_dir() and not Path(name, TOKENIZER_FILE).is_file():
        return []
    try:
        tokenizer = load_tokenizer(name, model_directory)
    except ConfigError as error:
        return list(error.problems)
    return vocabulary_problems(name, tokenizer.vocab_size, vocab_size)


def vocabulary_problems(name: str, ids: int, vocab_size: int | None) -> list[Problem]:
    """The tokenizer `name` gives ids below `ids`; the model knows those below `vocab_size`."""
    if vocab_size is None or ids <= vocab_size:
        return []
    remedy = (
        f"gives ids up to {ids - 1}, and the model's vocab_size is {vocab_size}; it must be at least {ids}"
    )
    return [Problem("training.tokenizer", name, remedy)]
