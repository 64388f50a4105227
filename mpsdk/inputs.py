"""From what `fit` and `evaluate` are given as data to prepared datasets that every rank can open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from mpsdk.config import Training
from mpsdk.data import Labelling, Labels, Masking, Tokenizer, load_tokenizer, prepare, prepare_labelled
from mpsdk.data.labels import names_in
from mpsdk.data.tokenizer import TOKENIZER_FILE
from mpsdk.errors import ConfigError, DataError, Problem
from mpsdk.work_order import PreparedData, WorkOrder

PARTS = ("train", "validation")


class Inputs(NamedTuple):
    """Sources as `mpsdk.data` takes them; a `validation` that is a number is the share of `train` to hold out."""

    train: object
    validation: object = None

    @property
    def held_out(self) -> float | None:
        """The share of the training data that is held out for validation."""
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
        remedy = "give the training data: a file, a directory of files, a dataset, rows, or token ids"
        problems.append(Problem("data.train", None, remedy))
    if isinstance(validation, bool) or (isinstance(validation, (int, float)) and not 0 < validation < 1):
        remedy = "a number is the share of the training data to hold out: between 0 and 1, such as 0.1"
        problems.append(Problem("data.validation", validation, remedy))
    if problems:
        raise ConfigError(problems, where="the data")
    return Inputs(train, validation)


@dataclass(frozen=True)
class Preparation:
    """How sources become datasets: for which order's training and model, into which cache."""

    order: WorkOrder
    cache: Path

    def of(self, inputs: Inputs) -> tuple[PreparedData, PreparedData | None]:
        """Training and validation data. Raises ConfigError or DataError listing all that can't be used of either."""
        if inputs.held_out is not None:
            train = self.of_one(inputs.train, held_out=inputs.held_out)
            return train, train.model_copy(update={"part": "validation"})
        prepared: list[PreparedData] = []
        errors: list[DataError] = []
        for source in (inputs.train, inputs.validation):
            try:
                if source is not None:
                    prepared.append(self.of_one(source))
            except DataError as error:
                errors.append(error)
        if errors:
            raise errors[0] if len(errors) == 1 else DataError("\n".join(map(str, errors)))
        return prepared[0], (prepared[1] if len(prepared) > 1 else None)

    def of_one(self, source: object, *, held_out: float = 0.0) -> PreparedData:
        """One source, tokenised unless that was done before; its training part, where a part is held out."""
        training, vocab_size = self.order.plan.training, self.order.plan.description.vocab_size
        tokenizer = load_tokenizer(training.tokenizer, self.order.model_directory)
        problems = ids_problems(training, tokenizer, vocab_size)
        if problems:
            raise ConfigError(problems, where="the data")
        if training.classifies:
            rows = prepare_labelled(
                source,
                labelling=_labelling(self.order),
                tokenizer=tokenizer,
                sequence_length=training.sequence_length,
                cache_directory=self.cache,
                validation_fraction=held_out,
            )
            return PreparedData(
                directory=str(rows.path.resolve()), validation_fraction=held_out, labelled=True
            )
        masking = _masking(training, tokenizer) if training.objective == "masked-lm" else None
        dataset = prepare(
            source,
            tokenizer=tokenizer,
            sequence_length=training.sequence_length - (masking.added if masking else 0),
            cache_directory=self.cache,
            validation_fraction=held_out,
            text_column=training.text_column,
        )
        return PreparedData(
            directory=str(dataset.path.resolve()), validation_fraction=held_out, masking=masking
        )


def _labelling(order: WorkOrder) -> Labelling:
    """What `order` trains a classifier on. Its classes are the model's, and so are their names unless training names them."""
    training, spec = order.plan.training, order.plan.description.spec
    names = training.labels or names_in(order.hf_config)
    return Labelling(
        labels=Labels(spec.head.labels if spec else len(names), names),
        words=training.objective == "token-classification",
        text_column=training.text_column,
        pair_column=training.pair_column,
        label_column=training.label_column,
    )


def _masking(training: Training, tokenizer: Tokenizer) -> Masking:
    specials = tokenizer.specials
    assert specials.mask is not None
    return Masking(
        mask=specials.mask,
        vocab_size=tokenizer.vocab_size,
        special=specials.ids,
        prefix=specials.prefix,
        suffix=specials.suffix,
        probability=training.mask_probability,
        seed=training.seed,
    )


def tokenizer_problems(
    training: Training, model_directory: str | None, vocab_size: int | None
) -> list[Problem]:
    """Whether the tokenizer does for the model and for the objective, as far as there is a tokenizer to ask.

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
    return ids_problems(training, tokenizer, vocab_size)


def ids_problems(training: Training, tokenizer: Tokenizer, vocab_size: int | None) -> list[Problem]:
    """Whether every id that the tokenizer gives is one of the model's, those that the objective needs are there, and a
    sequence has room for them."""
    name, ids, specials, problems = (
        training.tokenizer,
        tokenizer.vocab_size,
        tokenizer.specials,
        list[Problem](),
    )
    if vocab_size is not None and ids > vocab_size:
        remedy = f"gives ids up to {ids - 1}, and the model's vocab_size is {vocab_size}; it must be at least {ids}"
        problems.append(Problem("training.tokenizer", name, remedy))
    if training.objective != "masked-lm":
        return problems
    if specials.mask is None:
        remedy = 'has no mask token, which masked-lm needs; add "mask_token" to tokenizer_config.json, or use another'
        problems.append(Problem("training.tokenizer", name, remedy))
    shortest = len(specials.prefix) + len(specials.suffix) + 1
    if training.sequence_length < shortest:
        remedy = (
            f"must be at least {shortest}: the tokenizer puts {shortest - 1} special tokens around a text"
        )
        problems.append(Problem("training.sequence_length", training.sequence_length, remedy))
    return problems
