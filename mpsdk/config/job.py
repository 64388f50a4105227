"""Job: one file that says all of a run, what `mpsdk plan` and `mpsdk run` read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue

from mpsdk.config.base import Section, rule
from mpsdk.config.distribution import Distribution
from mpsdk.config.document import Document
from mpsdk.config.fields import Count, PathText, Positive, Share, Text
from mpsdk.config.profile import Profile
from mpsdk.config.training import Training
from mpsdk.config.wording import Accepts
from mpsdk.errors import Problem


class Data(Section):
    """What the run learns from: a file of text (.txt) or of rows (.jsonl, .csv, .parquet), or a directory of them."""

    shorthand: ClassVar[str | None] = "train"

    train: PathText | None = Field(
        default=None, description="Training data. None: nothing to train on, only to plan."
    )
    validation: Share | PathText | None = Field(
        default=None,
        description="Validation data. A number: that share of the training data, the end of a text or labelled rows "
        "chosen at random. None: no evaluation.",
    )


class Launch(Section):
    """Where the worker processes run. Without effect when torchrun or the like has started them already."""

    shorthand: ClassVar[str | None] = "name"

    name: Text = Field(default="local", description='Which launcher. "local": processes on this machine.')
    processes: Count | None = Field(
        default=None,
        description="Worker processes. None: one a GPU, without GPUs the product of the stated degrees.",
    )
    timeout: Positive = Field(
        default=600.0,
        description="Seconds without progress after which a worker counts as hung and the run is ended.",
    )


class Job(Document):
    """A whole run: the model, how it is spread, how it is trained, on what, where.

    Raises pydantic's ValidationError; `Job.parse` and `Job.from_file` say the same as one ConfigError.
    """

    model: (
        Annotated[
            PathText | dict[str, JsonValue],
            Accepts("a path", "a name on the hub", '"package.module:factory"', "a section of JSON values"),
        ]
        | None
    ) = Field(
        default=None,
        description="A Hugging Face model: its directory, its name on the hub, or the fields of its `config.json` with "
        "`model_type` (initial weights, no tokenizer); or a callable that makes a Keras model, on TensorFlow.",
    )
    entry_point: PathText | None = Field(
        default=None, description="A training script of your own, instead of `model`. Refused so far."
    )
    framework: Literal["torch", "tensorflow"] = Field(default="torch", description="Which framework trains.")
    distribution: Distribution = Field(
        default=Distribution(), description="How the model is spread over ranks."
    )
    training: Training = Field(default=Training(), description="Objective, optimizer and length of the run.")
    data: Data = Field(default=Data(), description="What the run learns from.")
    launcher: Launch = Field(default=Launch(), description="Where the worker processes run.")
    output_dir: PathText = Field(
        default="runs/default", description="Directory of the run's logs, history and checkpoints."
    )
    resume: Annotated[PathText, Accepts('"auto"', '"never"', "the path of a checkpoint")] = Field(
        default="auto",
        description='"auto": from the newest checkpoint of `output_dir` that verifies, if there is one.',
    )
    profile: Profile = Field(
        default=Profile(), description="Steps to trace and time, action by action. By default none."
    )

    @rule("model", "entry_point")
    def one_thing_to_run(self) -> Iterator[Problem]:
        """Exactly one of `model` and `entry_point` is given."""
        if self.model is None and self.entry_point is None:
            yield Problem("model", None, "one of model and entry_point must be given")
        if self.model is not None and self.entry_point is not None:
            yield Problem(
                "entry_point", self.entry_point, "only one of model and entry_point can be given; remove one"
            )

    @rule("model")
    def model_section_has_type(self) -> Iterator[Problem]:
        """A `model` given as a section has the key `model_type`."""
        if isinstance(self.model, dict) and not isinstance(self.model.get("model_type"), str):
            yield Problem(
                "model.model_type",
                self.model.get("model_type"),
                'must be a model type, such as "gpt2" or "llama"',
            )
