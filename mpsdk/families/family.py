"""Family: one kind of Hugging Face model as a table, in both directions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError

from mpsdk.errors import ConfigError, Problem
from mpsdk.families.fields import COMMON, Fields
from mpsdk.families.rules import WeightRule
from mpsdk.families.spec import TransformerSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """What mpsdk knows of a `model_type` of transformers. Everything else follows from it.

    `read` turns the configuration's fields into a spec and `write` turns a spec into the fields that make it again.
    `rules` pair its tensors with canonical ones, `ignored` names tensors (same patterns as rules) that old files carry
    and that hold no weights. `prefix` is what the causal language model puts before its base model's tensor names; files
    written from the base model lack it. `aliases` maps other names that transformers accepts for a field to the field.
    """

    model_type: str
    architecture: str  # the transformers class that an exported directory loads into
    prefix: str
    read: Callable[[Fields], TransformerSpec]
    write: Callable[[TransformerSpec], dict[str, object]]
    rules: tuple[WeightRule, ...]
    ignored: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])

    def spec(self, hf_config: Mapping[str, object], *, exhaustive: bool = False) -> TransformerSpec:
        """The transformer that a configuration says.

        Fields that are absent have transformers' defaults. `exhaustive` makes unknown fields a problem, for a configuration
        written by hand; in a file they get a warning, because transformers ignores them.

        Raises:
            ConfigError: with every setting that is invalid or that no spec can express, as `model.<field>`.
        """
        fields = Fields(hf_config, aliases=self.aliases)
        fields.only(
            "quantization_config", None, "quantised weights can't be trained; load the original model"
        )
        spec: TransformerSpec | None = None
        try:
            spec = self.read(fields)
        except ValidationError:
            if not fields.problems:  # which say why, in the configuration's own words
                raise
        if exhaustive:
            fields.refuse_unread(COMMON)
        elif unread := fields.unread(COMMON):
            logger.warning(
                "%s ignores these fields of its configuration: %s", self.architecture, ", ".join(unread)
            )
        fields.finish()
        assert spec is not None
        return spec

    def hf_config(self, spec: TransformerSpec) -> dict[str, object]:
        """The configuration from which transformers builds `spec`, without token ids and other settings of its own.

        Raises:
            ConfigError: naming every setting of the spec that this family can't express.
        """
        config = {"architectures": [self.architecture], "model_type": self.model_type, **self.write(spec)}
        again = self.spec(config)
        lost = [name for name in TransformerSpec.model_fields if getattr(again, name) != getattr(spec, name)]
        if lost:
            raise ConfigError(
                (
                    Problem(
                        f"spec.{name}", getattr(spec, name), f"{self.model_type} models can't express this"
                    )
                    for name in lost
                ),
                where=f"a spec to be written as {self.model_type}",
            )
        return config
