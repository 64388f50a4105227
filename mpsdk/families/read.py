"""From what a user calls a model to its family, configuration and spec."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

from mpsdk.errors import ConfigError, Problem
from mpsdk.families.family import Family
from mpsdk.families.registry import FAMILIES, family_of
from mpsdk.families.spec import Objective, TransformerSpec

CONFIG = "config.json"
HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
HUB_FILES = ("*.json", "model*.safetensors", "*.jinja", "*.model", "*.txt")


class ReadModel(NamedTuple):
    """A model of a known family."""

    family: Family
    hf_config: dict[str, object]
    spec: TransformerSpec
    directory: Path | None  # None: only a configuration was given


def read_model(
    model: str | Path | Mapping[str, object] | TransformerSpec,
    *,
    objective: Objective | None = None,
    labels: int | None = None,
    weights: bool = True,
) -> ReadModel:
    """The family, Hugging Face configuration and spec of `model`.

    Args:
        model: a directory with a config.json, a model's name on the Hugging Face hub, a configuration with its
            `model_type`, or a spec.
        objective: what the head is for. None: as the configuration's `architectures` say, else the family's usual one.
        labels: classes of a classifier. None: as the configuration says.
        weights: for a name on the hub, fetch weights and tokenizer too; without, config.json alone.

    Raises:
        ConfigError: no such directory, no or an unreadable config.json, an unknown `model_type`, or settings that are
            invalid or unsupported: all of these in one error.
    """
    if isinstance(model, TransformerSpec):
        family = family_of(model.family)
        if objective not in (None, model.head.objective):
            remedy = (
                f"the spec's head is for {model.head.objective!r}; give a spec with the head that you want"
            )
            raise _refusal("training.objective", objective, remedy)
        return ReadModel(family, family.hf_config(model), model, None)
    if isinstance(model, Mapping):
        config = dict(model)
        family = _family(config, "the configuration")
        spec = family.spec(config, objective=objective, labels=labels, exhaustive=True)
        return ReadModel(family, config, spec, None)
    directory = _local(Path(model).expanduser(), str(model), weights=weights)
    config = _read_config(directory)
    family = _family(config, str(directory / CONFIG))
    return ReadModel(family, config, family.spec(config, objective=objective, labels=labels), directory)


def _family(config: Mapping[str, object], where: str) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        known = ", ".join(sorted(FAMILIES))
        raise _refusal("model.model_type", model_type, f"{where} must name the model's type, one of: {known}")
    return family_of(model_type)


def _read_config(directory: Path) -> dict[str, object]:
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refusal("model", str(path), f"could not be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise _refusal("model", str(path), "must hold a JSON object")
    return cast("dict[str, object]", config)


def _local(path: Path, name: str, *, weights: bool) -> Path:
    """The directory of a model, fetched from the hub if `name` is no directory and can be a name there."""
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise _refusal(
                "model", name, f"the directory has no {CONFIG}, which says what kind of model it is"
            )
        return path
    if path.exists():
        raise _refusal("model", name, f"is a file; give the directory that holds {CONFIG} and the weights")
    if not HUB_NAME.fullmatch(name):
        raise _refusal("model", name, f"no such directory; give one that holds {CONFIG}")
    return _from_hub(name, weights=weights)


def _from_hub(name: str, *, weights: bool) -> Path:
    missing = f"no such directory here; give one that holds {CONFIG}, or the name of a model on the Hugging Face hub"
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    except ImportError:
        remedy = f"{missing} after pip install 'mpsdk[hf]'"
        raise _refusal("model", name, remedy) from None
    try:
        # The configuration first: a model that isn't supported should not be downloaded to find that out.
        directory = Path(snapshot_download(name, allow_patterns=[CONFIG]))
        config = _read_config(directory)
        _family(config, str(directory / CONFIG)).spec(config)
        if weights:
            directory = Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except ConfigError:
        raise
    except (
        Exception
    ) as error:  # the hub's own errors, and those of each of its HTTP clients, share no base class
        remedy = f"{missing}. Fetching {name!r} failed: {type(error).__name__}: {error}"
        raise _refusal("model", name, remedy) from error
    return directory


def _refusal(field: str, got: object, remedy: str) -> ConfigError:
    return ConfigError([Problem(field, got, remedy)], where="the model")
