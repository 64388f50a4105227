"""Weights from and to Hugging Face directories, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mpsdk.backend import TensorSource
from mpsdk.description import Initial
from mpsdk.errors import CheckpointError, ConfigError
from mpsdk.families import TransformerSpec, family_of
from mpsdk.families.describe import describe_spec
from mpsdk.families.export import export
from mpsdk.families.hf import HuggingFaceSource, has_weights, read_model
from mpsdk.initialise import RandomSource
from tests.core.families.configurations import GPT2, LLAMA, specs

Tensors = dict[str, NDArray[np.generic]]


def random_source(spec: TransformerSpec, seed: int = 0) -> RandomSource:
    """Weights that are all random, norms and biases too."""
    description = describe_spec(spec)
    kinds = {
        kind: tuple(t.model_copy(update={"initial": Initial(kind="normal", std=1.0)}) for t in tensors)
        for kind, tensors in description.kinds.items()
    }
    return RandomSource(description.model_copy(update={"kinds": kinds}), seed)


def written(directory: Path, config: Mapping[str, object], **options: object) -> TransformerSpec:
    """A directory with random weights for `config`."""
    family = family_of(str(config["model_type"]))
    spec = family.spec(config)
    export(random_source(spec), spec, directory, hf_config=config, **options)  # type: ignore[arg-type]
    return spec


def reopen(directory: Path) -> HuggingFaceSource:
    found = read_model(directory)
    assert found.directory is not None
    return HuggingFaceSource(found.directory, found.family, found.spec)


def change(directory: Path, edit: Mapping[str, NDArray[np.generic] | None]) -> None:
    """Replace, add or (None) remove tensors in model.safetensors."""
    tensors = {**load_file(directory / "model.safetensors"), **edit}
    save_file(
        {name: value for name, value in tensors.items() if value is not None}, directory / "model.safetensors"
    )


def equal(first: TensorSource, second: TensorSource, spec: TransformerSpec) -> bool:
    return all(
        np.array_equal(
            *(source.read(t.name, "weight", (0,) * len(t.shape), t.shape) for source in (first, second))
        )
        for t in describe_spec(spec).tensors()
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=specs)
def test_weights_survive_the_way_to_hugging_face_and_back_bit_for_bit(
    spec: TransformerSpec, tmp_path_factory: pytest.TempPathFactory
):
    out = tmp_path_factory.mktemp("export")
    source = random_source(spec)
    export(source, spec, out / "one")
    assert equal(reopen(out / "one"), source, spec)
    export(reopen(out / "one"), spec, out / "two")
    first, second = (load_file(out / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_gpt2_query_key_and_value_are_columns_of_one_transposed_weight(tmp_path: Path):
    spec = written(tmp_path / "m", GPT2)
    stored = load_file(tmp_path / "m" / "model.safetensors")["transformer.h.1.attn.c_attn.weight"]
    source = reopen(tmp_path / "m")
    for number, name in enumerate(("query", "key", "value")):
        part = source.read(f"blocks.1.attention.{name}.weight", "weight", (2, 3), (4, 5))
        np.testing.assert_array_equal(part, stored[3:8, 8 * number + 2 : 8 * number + 6].T)
    assert equal(source, random_source(spec), spec)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_in_several_files_of_any_precision(tmp_path: Path, config: dict[str, object], dtype: str):
    spec = written(tmp_path / "m", config, dtype=dtype, max_shard_bytes=1500)
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    held = {name: load_file(tmp_path / "m" / name) for name in files}
    assert all(name in held[file] for name, file in index["weight_map"].items())
    assert index["metadata"] == {
        "total_parameters": describe_spec(spec).parameters,
        "total_size": sum(value.nbytes for tensors in held.values() for value in tensors.values()),
    }
    assert all(
        len(tensors) == 1 or sum(v.nbytes for v in tensors.values()) <= 1500 for tensors in held.values()
    )

    source, original = reopen(tmp_path / "m"), random_source(spec)
    for tensor in describe_spec(spec).tensors():
        offset = (0,) * len(tensor.shape)
        expected = original.read(tensor.name, "weight", offset, tensor.shape)
        rounded = expected.astype(np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)).astype(
            np.float32
        )
        found = source.read(tensor.name, "weight", offset, tensor.shape)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, rounded)


def test_a_read_slice_is_that_slice_of_the_whole(tmp_path: Path):
    written(tmp_path / "m", LLAMA)
    source = reopen(tmp_path / "m")
    whole = source.read("blocks.0.feed_forward.down.weight", "weight", (0, 0), (16, 24))
    part = source.read("blocks.0.feed_forward.down.weight", "weight", (3, 8), (5, 8))
    np.testing.assert_array_equal(part, whole[3:8, 8:16])


def test_a_tied_tensor_is_written_once_and_read_under_both_names(tmp_path: Path):
    written(tmp_path / "m", GPT2)
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    source = reopen(tmp_path / "m")
    head, tokens = (
        source.read(n, "weight", (0, 0), (31, 8)) for n in ("head.output.weight", "embedding.tokens.weight")
    )
    np.testing.assert_array_equal(head, tokens)


def test_files_of_transformers_4_with_both_tied_tensors_and_masks_are_read(tmp_path: Path):
    spec = written(tmp_path / "m", GPT2)
    tokens = load_file(tmp_path / "m" / "model.safetensors")["transformer.wte.weight"]
    mask = np.tril(np.ones((1, 1, 16, 16), dtype=bool))
    extra = {
        "transformer.h.0.attn.bias": mask,
        "h.1.attn.bias": mask,
        "h.1.attn.masked_bias": np.float32([-1e4]),
    }
    change(tmp_path / "m", {"lm_head.weight": tokens, **extra})
    assert equal(reopen(tmp_path / "m"), random_source(spec), spec)


def test_the_tied_head_alone_will_do(tmp_path: Path):
    spec = written(tmp_path / "m", GPT2)
    tokens = load_file(tmp_path / "m" / "model.safetensors")["transformer.wte.weight"]
    change(tmp_path / "m", {"lm_head.weight": tokens, "transformer.wte.weight": None})
    assert equal(reopen(tmp_path / "m"), random_source(spec), spec)


def test_tied_tensors_that_differ_are_refused(tmp_path: Path):
    written(tmp_path / "m", GPT2)
    change(tmp_path / "m", {"lm_head.weight": np.zeros((31, 8), dtype=np.float32)})
    with pytest.raises(CheckpointError, match="differ, and the configuration has tie_word_embeddings = true"):
        reopen(tmp_path / "m")


@pytest.mark.parametrize("config, prefix", [(GPT2, "transformer."), (LLAMA, "model.")], ids=["gpt2", "llama"])
def test_names_of_the_base_model_are_read(tmp_path: Path, config: dict[str, object], prefix: str):
    spec = written(tmp_path / "m", config)
    path = tmp_path / "m" / "model.safetensors"
    save_file({name.removeprefix(prefix): value for name, value in load_file(path).items()}, path)
    assert equal(reopen(tmp_path / "m"), random_source(spec), spec)


def test_every_tensor_that_does_not_fit_is_listed_at_once(tmp_path: Path):
    written(tmp_path / "m", LLAMA)
    change(
        tmp_path / "m",
        {
            "model.norm.weight": None,
            "lm_head.weight": np.zeros((31, 8), dtype=np.float32),
            "model.layers.0.self_attn.q_proj.weight": np.zeros((16, 16), dtype=np.int8),
            "model.layers.2.mlp.up_proj.weight": np.zeros((24, 16), dtype=np.float32),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        reopen(tmp_path / "m")
    message = str(caught.value)
    assert "missing: model.norm.weight (16,)" in message
    assert "wrong shape: lm_head.weight is (31, 8), the configuration makes it (31, 16)" in message
    assert "wrong type: model.layers.0.self_attn.q_proj.weight is I8; F32, F16, BF16 can be read" in message
    assert (
        "unexpected: model.layers.2.mlp.up_proj.weight (24, 16), which a llama model of 2 blocks" in message
    )


def test_pickled_weights_are_not_opened(tmp_path: Path):
    written(tmp_path / "m", GPT2)
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"not read")
    assert has_weights(tmp_path / "m")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin, which mpsdk does not open.*save_pretrained"
    ):
        reopen(tmp_path / "m")


def test_a_directory_without_weights(tmp_path: Path):
    written(tmp_path / "m", GPT2)
    (tmp_path / "m" / "model.safetensors").unlink()
    assert not has_weights(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"holds no weights; expected model\.safetensors"):
        reopen(tmp_path / "m")


def test_a_damaged_file_is_named(tmp_path: Path):
    written(tmp_path / "m", GPT2)
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors can't be read"):
        reopen(tmp_path / "m")


def test_a_missing_shard_and_a_wrong_index_are_named(tmp_path: Path):
    written(tmp_path / "m", GPT2, max_shard_bytes=1500)
    path = tmp_path / "m" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    index["weight_map"]["transformer.wte.weight"] = last
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"transformer.wte.weight is not in {last}"):
        reopen(tmp_path / "m")
    index["weight_map"]["transformer.wte.weight"] = first
    path.write_text(json.dumps(index))
    (tmp_path / "m" / first).unlink()
    with pytest.raises(CheckpointError, match=f"{first} can't be read"):
        reopen(tmp_path / "m")


@pytest.mark.parametrize(
    "index", ['{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {}}', "[]", "nonsense"]
)
def test_an_index_that_is_none_or_leads_elsewhere_is_refused(tmp_path: Path, index: str):
    written(tmp_path / "m", GPT2)
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        reopen(tmp_path / "m")


@pytest.mark.parametrize(
    "name, slot, offset, shape",
    [
        ("head.norm.weight", "exp_avg", (0,), (8,)),
        ("head.norms.weight", "weight", (0,), (8,)),
        ("head.norm.weight", "weight", (1,), (8,)),
    ],
)
def test_what_a_directory_does_not_hold_cannot_be_read(
    tmp_path: Path, name: str, slot: str, offset: tuple[int, ...], shape: tuple[int, ...]
):
    written(tmp_path / "m", GPT2)
    with pytest.raises(CheckpointError):
        reopen(tmp_path / "m").read(name, slot, offset, shape)


def test_an_export_keeps_what_the_configuration_said_beyond_the_spec(tmp_path: Path):
    older = {
        **LLAMA,
        "rope_theta": 5e5,
        "rope_scaling": None,
        "torch_dtype": "float16",
        "auto_map": {"AutoModel": "x.py"},
    }
    del older["rope_parameters"], older["dtype"]
    written(tmp_path / "m", older, dtype="bfloat16")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["dtype"]) == (1, 2, "bfloat16")
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert not {"rope_theta", "rope_scaling", "torch_dtype", "auto_map", "transformers_version"} & set(config)


def test_an_export_without_an_original_configuration_names_no_tokens(tmp_path: Path):
    spec = family_of("gpt2").spec(GPT2)
    export(random_source(spec), spec, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["eos_token_id"] is None and config["architectures"] == ["GPT2LMHeadModel"]


def test_an_export_carries_tokenizer_files_along(tmp_path: Path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "merges.txt", "generation_config.json", "config.json", "notes.md"):
        (tokenizer / name).write_text(name)
    written(tmp_path / "m", GPT2, tokenizer_dir=tokenizer)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "gpt2"


def test_an_export_does_not_write_over_anything(tmp_path: Path):
    (tmp_path / "m").mkdir()
    written(tmp_path / "m", GPT2)
    with pytest.raises(ConfigError, match="already exists and is not empty"):
        written(tmp_path / "m", GPT2)


def test_an_export_that_fails_leaves_nothing(tmp_path: Path):
    spec = family_of("gpt2").spec({**GPT2, "initializer_range": 1e5})
    with pytest.raises(CheckpointError, match=r"embedding\.tokens\.weight has values too large for float16"):
        export(RandomSource(describe_spec(spec), 0), spec, tmp_path / "m", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_exported_files_are_marked_for_transformers(tmp_path: Path):
    written(tmp_path / "m", GPT2)
    with safe_open(tmp_path / "m" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
