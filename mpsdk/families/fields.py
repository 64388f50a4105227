"""Reads the fields of a Hugging Face configuration one by one, and remembers every problem instead of stopping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar, cast

from mpsdk.errors import ConfigError, Problem

T = TypeVar("T")

# What transformers writes into any model's configuration and that says nothing about the training of a language model.
COMMON = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


class Fields:
    """A configuration being read.

    A method gives the field's value, or its default where the field is absent or null; a value of the wrong kind is a
    problem and gives the default too, so that reading goes on. `finish` raises one ConfigError with every problem.

    >>> fields = Fields({"n_head": "twelve", "n_layer": 0})
    >>> fields.integer("n_head", 12), fields.integer("n_layer", 12)
    (12, 12)
    >>> fields.finish()
    Traceback (most recent call last):
    ...
    mpsdk.errors.ConfigError: 2 problems in the model's configuration:
      1. model.n_head (got 'twelve'): must be a whole number, at least 1
      2. model.n_layer (got 0): must be a whole number, at least 1
    """

    def __init__(
        self, config: Mapping[str, object], *, aliases: Mapping[str, str] | None = None, path: str = "model"
    ) -> None:
        """`aliases`: other names that transformers accepts for a field; `path`: what problems call the configuration."""
        self._aliases = dict(aliases or {})
        self._config = config
        self._path = path
        self._known: set[str] = set(self._aliases)
        self._faulty: set[str] = set()
        self.problems: list[Problem] = []

    def raw(self, name: str) -> object:
        """The value as it stands, None when absent."""
        self._known.add(name)
        if name in self._config:
            return self._config[name]
        for alias, field in self._aliases.items():
            if field == name and alias in self._config:
                return self._config[alias]
        return None

    def states(self, name: str) -> bool:
        """Whether the configuration has the field, be it null."""
        return name in self._config

    def unused(self, *names: str) -> None:
        """These fields are known and do not change training."""
        self._known.update(names)

    def problem(self, name: str, remedy: str, *, got: object = None) -> None:
        """Remember that `name` is wrong; `got` defaults to its value."""
        self._faulty.add(name)
        self.problems.append(Problem(f"{self._path}.{name}", self.raw(name) if got is None else got, remedy))

    def sound(self, *names: str) -> bool:
        """None of these fields has a problem so far: their values can be checked against each other."""
        return self._faulty.isdisjoint(names)

    def integer(self, name: str, default: int, *, minimum: int = 1) -> int:
        value = self.optional_integer(name, minimum=minimum)
        return default if value is None else value

    def optional_integer(self, name: str, *, minimum: int = 1) -> int | None:
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.problem(name, f"must be a whole number, at least {minimum}")
            return None
        return value

    def positive(self, name: str, default: float) -> float:
        value = self._number(name, default)
        if value is None or not 0 < value < math.inf:
            self.problem(name, "must be a positive number" + self._hint(name))
            return default
        return value

    def probability(self, name: str, default: float) -> float:
        value = self._number(name, default)
        if value is None or not 0 <= value < 1:
            self.problem(name, "must be a number from 0 up to, but not including, 1" + self._hint(name))
            return default
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(name, "must be true or false")
            return default
        return value

    def choice(self, name: str, table: Mapping[str, T], default: str) -> T:
        """What `table` says for the field's value."""
        value = self.raw(name)
        if value is None:
            return table[default]
        if not isinstance(value, str) or value not in table:
            self.problem(name, f"not supported; these are: {', '.join(table)}")
            return table[default]
        return table[value]

    def mapping(self, name: str) -> Mapping[str, object] | None:
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.problem(name, "must be a mapping")
            return None
        return cast("Mapping[str, object]", value)

    def only(self, name: str, value: object, why: str) -> None:
        """The field must be absent, null or `value`."""
        found = self.raw(name)
        if found is not None and found != value:
            self.problem(name, f"{why}; only {value!r} is supported")

    def unread(self, allowed: Iterable[str] = ()) -> list[str]:
        """The fields that were not read, without those `allowed`."""
        known = self._known | set(allowed)
        return [name for name in self._config if name not in known]

    def refuse_unread(self, allowed: Iterable[str] = ()) -> None:
        """Every field that was not read and is not `allowed` is a problem: it would have no effect."""
        known = sorted(self._known | set(allowed))
        for name in self.unread(allowed):
            close = get_close_matches(name, known, n=1)
            self.problem(name, "is not a field here" + (f"; did you mean {close[0]!r}?" if close else ""))

    def finish(self) -> None:
        """Raise ConfigError if there are problems."""
        if self.problems:
            raise ConfigError(self.problems, where="the model's configuration")

    def _number(self, name: str, default: float) -> float | None:
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value)

    def _hint(self, name: str) -> str:
        """For the number that YAML takes for text, as it does with 1e-5."""
        value = self.raw(name)
        try:
            return (
                f"; YAML reads this as text without a dot: write {float(value):.1e}"
                if isinstance(value, str)
                else ""
            )
        except ValueError:
            return ""
