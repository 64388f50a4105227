"""WorkOrder: what the facade hands to the workers, as one JSON file in the run's directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from mpsdk.backend import TensorSource
from mpsdk.checkpoint.storage import is_remote
from mpsdk.config import Profile
from mpsdk.data import Dataset, LabelledRows, MaskedText, Masking, Samples, load_tokenizer
from mpsdk.data.dataset import Part
from mpsdk.errors import MpsdkError
from mpsdk.families.registry import family_of
from mpsdk.initialise import RandomSource
from mpsdk.plan import Plan

JOB_FILE = "job.json"
EVENTS_FILE = "events.jsonl"
HISTORY_FILE = "history.jsonl"


class PreparedData(BaseModel):
    """A prepared dataset on disk, and which part of it is meant. Every rank opens the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: str
    part: Part = "train"
    validation_fraction: float = 0.0
    labelled: bool = False  # rows with labels, else text
    masking: Masking | None = None  # of text, for masked-lm

    def open(self, sequence_length: int) -> Samples:
        """Raises DataError when the folder is damaged, or too little is in it."""
        held_out = self.validation_fraction
        if self.labelled:
            return LabelledRows.open(self.directory, part=self.part, validation_fraction=held_out)
        window = sequence_length - (self.masking.added if self.masking else 0)
        text = Dataset.open(self.directory, window, part=self.part, validation_fraction=held_out)
        return MaskedText(text, self.masking) if self.masking else text


class WorkOrder(BaseModel):
    """Everything that a worker needs besides its place: plain data, equal on all ranks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    mode: Literal["train", "evaluate"]
    plan: Plan
    output_dir: str
    resume: str  # "auto", "never", or the path of a checkpoint; evaluating always names one
    model_directory: str | None = (
        None  # a Hugging Face directory: its tokenizer, and its weights if it has any
    )
    pretrained: bool = False  # a fresh run starts from the weights in model_directory
    hf_config: dict[str, JsonValue] = {}  # what the model's configuration said, for the export
    import_from: str | None = None  # where the package of the model's factory lies
    train: PreparedData | None = None
    validation: PreparedData | None = None
    profile: Profile = Profile()  # what to measure, which is not of the plan: it changes nothing

    @property
    def checkpoints(self) -> str:
        """The directory that holds this run's checkpoints."""
        chosen = self.plan.distribution.checkpoint.directory
        if chosen is None:
            return os.path.join(self.output_dir, "checkpoints")
        return chosen if is_remote(chosen) else os.path.abspath(chosen)

    def initial_weights(self) -> TensorSource | None:
        """Where a run gets its weights from that starts without a checkpoint. None: from the model's own factory."""
        description = self.plan.description
        if description.factory is not None:
            return None
        if not self.pretrained:
            return RandomSource(description, self.plan.training.seed)
        from mpsdk.families.hf import HuggingFaceSource

        assert self.model_directory is not None and description.spec is not None
        family, seed = family_of(description.spec.family), self.plan.training.seed
        return HuggingFaceSource(self.model_directory, family, description.spec, seed=seed)

    def carried(self) -> tuple[dict[str, JsonValue], Path | None]:
        """What an export of this run's weights takes along: the configuration that the model began with, and the directory of
        its tokenizer's files. None: it has no files."""
        tokenizer = self.plan.training.tokenizer
        named = {"auto": self.model_directory, "bytes": None}.get(tokenizer, tokenizer)
        directory = Path(named) if named else None
        if directory is not None and directory.is_file():
            directory = directory.parent
        config: dict[str, JsonValue] = {"eos_token_id": 256} if tokenizer == "bytes" else {}
        config |= self.hf_config
        classifies = self.plan.training.objective == "sequence-classification"
        spec = self.plan.description.spec
        ends = spec is not None and spec.head.pooled == "last"
        if classifies and ends and config.get("pad_token_id") is None:
            # transformers finds a row's last token by the padding behind it.
            config["pad_token_id"] = load_tokenizer(tokenizer, self.model_directory).specials.pad
        return config, directory

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file whole or not at all: a run that is looked at meanwhile finds the old one or the new."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        partial.write_text(json.dumps(self.model_dump(mode="json"), indent=1), encoding="utf-8")
        os.replace(partial, target)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WorkOrder:
        """Raises MpsdkError when the file is missing or was written by another version."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise MpsdkError(f"{path} can't be read: {error}") from error
        except ValidationError as error:
            raise MpsdkError(f"{path} is no job of this version of mpsdk: {error}") from None
