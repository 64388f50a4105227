"""What a user may call a model, and what they are told when it can't be found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mpsdk.errors import ConfigError
from mpsdk.families import family_of, read_model
from tests.core.families.configurations import GPT2, LLAMA


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the hub's library; a test gives it `snapshot_download`."""
    module = ModuleType("huggingface_hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def write(directory: Path, config: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def refusal(model: object) -> str:
    with pytest.raises(ConfigError) as caught:
        read_model(model)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_directory(tmp_path: Path):
    for name in (tmp_path, str(tmp_path)):
        found = read_model(write(tmp_path, GPT2) and name)
        assert found.family is family_of("gpt2")
        assert found.hf_config == GPT2
        assert found.spec == family_of("gpt2").spec(GPT2)
        assert found.directory == tmp_path


def test_a_configuration():
    family, config, spec, directory = read_model(LLAMA)
    assert (family.model_type, config, spec.blocks, directory) == ("llama", LLAMA, 2, None)


def test_a_spec():
    spec = family_of("llama").spec(LLAMA)
    found = read_model(spec)
    assert found.spec == spec
    assert family_of("llama").spec(found.hf_config) == spec


def test_a_field_that_transformers_ignores_is_a_warning_in_a_file_and_refused_by_hand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = {**LLAMA, "sliding_windows": 4}
    assert read_model(write(tmp_path, config)).spec == family_of("llama").spec(LLAMA)
    assert [record.getMessage() for record in caplog.records] == [
        "LlamaForCausalLM ignores these fields of its configuration: sliding_windows"
    ]
    assert "model.sliding_windows (got 4)" in refusal(config)


def test_a_missing_model_type_lists_the_families():
    assert "one of: bert, gpt2, gpt_neo, gpt_neox, gptj, llama, mistral, qwen2, qwen3, roberta" in refusal(
        {"n_layer": 2}
    )


def test_an_unknown_model_type_suggests_the_nearest(tmp_path: Path):
    assert "did you mean 'gpt2'?" in refusal({"model_type": "gpt-2"})
    assert "model.model_type (got 'mamba')" in refusal(write(tmp_path, {"model_type": "mamba"}))


def test_a_directory_without_a_configuration(tmp_path: Path):
    assert "has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text, message", [("{", "could not be read as JSON"), ("[]", "must hold a JSON object")]
)
def test_an_unreadable_configuration(tmp_path: Path, text: str, message: str):
    (tmp_path / "config.json").write_text(text)
    assert message in refusal(tmp_path)


def test_a_file_instead_of_its_directory(tmp_path: Path):
    write(tmp_path, GPT2)
    assert "is a file; give the directory" in refusal(tmp_path / "config.json")


def test_a_missing_directory(tmp_path: Path):
    assert "no such directory" in refusal(tmp_path / "absent")


def test_a_hub_name_without_the_hubs_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'mpsdk[hf]'" in refusal("somebody/a-model")


def test_a_hub_name_is_fetched_configuration_first(tmp_path: Path, hub: ModuleType):
    asked: list[list[str]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "somebody/a-model"
        asked.append(allow_patterns)
        return str(write(tmp_path, GPT2))

    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    assert read_model("somebody/a-model").directory == tmp_path
    assert asked[0] == ["config.json"]
    assert "model*.safetensors" in asked[1] and not any("bin" in pattern for pattern in asked[1])

    asked.clear()
    read_model("somebody/a-model", weights=False)
    assert asked == [["config.json"]]


def test_the_weights_of_an_unsupported_hub_model_are_not_fetched(tmp_path: Path, hub: ModuleType):
    asked: list[list[str]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(write(tmp_path, {**GPT2, "add_cross_attention": True}))

    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    assert "model.add_cross_attention" in refusal("somebody/a-model")
    assert asked == [["config.json"]]


def test_a_hub_name_that_cannot_be_fetched_gives_the_hubs_reason(hub: ModuleType):
    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        raise FileNotFoundError("offline, and not in the cache")

    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    message = refusal("somebody/a-model")
    assert "no such directory here" in message
    assert "offline, and not in the cache" in message
