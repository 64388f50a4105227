"""What a Distribution takes, in short and in full, and which combinations it refuses and why."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest
from pydantic import ValidationError

from mpsdk.config import (
    ActivationCheckpointing,
    Checkpoint,
    Compile,
    Distribution,
    Pipeline,
    Precision,
    ShardedDataParallel,
    TensorParallel,
    distribution,
)
from mpsdk.errors import ConfigError
from mpsdk.topology import AXES
from tests.core.config.messages import problems, texts


def test_short_forms_become_sections() -> None:
    d = Distribution(
        sharded_data_parallel=2,
        tensor_parallel=3,
        pipeline=4,
        activation_checkpointing="full",
        precision="bf16",
        compile="auto",
        checkpoint=100,
    )
    assert d.sharded_data_parallel == ShardedDataParallel(degree=2, level="parameters", prefetch=1)
    assert d.tensor_parallel == TensorParallel(degree=3, sequence_parallel=True)
    assert d.pipeline == Pipeline(
        degree=4, microbatches=None, virtual_stages=1, schedule="1f1b", partition="auto"
    )
    assert d.activation_checkpointing == ActivationCheckpointing(
        mode="full", keep=("attention",), offload=False
    )
    assert d.precision == Precision(mode="bf16")
    assert d.compile == Compile(enabled="auto")
    assert d.checkpoint == Checkpoint(every=100, keep=3, asynchronous=False, directory=None)


def test_left_out_is_one_rank_that_trains_plainly() -> None:
    d = Distribution()
    assert d.stated_degree == 1
    assert (d.data_parallel, d.placement) == ("fill", None)
    assert (d.pipeline.degree, d.tensor_parallel.degree, d.sharded_data_parallel.degree) == (1, 1, 1)
    assert (d.activation_checkpointing.mode, d.precision.mode, d.compile.enabled) == ("none", "fp32", False)


def test_a_section_may_be_a_mapping_or_itself() -> None:
    as_mapping = Distribution(pipeline={"degree": 2, "partition": [5, 7]})
    assert as_mapping == Distribution(pipeline=Pipeline(degree=2, partition=(5, 7)))
    assert as_mapping.pipeline.partition == (5, 7)
    assert Distribution.parse(as_mapping) is as_mapping


def test_frozen_and_usable_as_a_key() -> None:
    d = Distribution(tensor_parallel=2)
    with pytest.raises(ValidationError, match="frozen"):
        d.placement = "pp,dp,sdp,cp,tp"  # pyright: ignore
    assert {d: 1}[Distribution(tensor_parallel=2)] == 1


def test_stated_degree_is_the_product_of_degrees_with_fill_as_one() -> None:
    stated = {"pipeline": 2, "tensor_parallel": 3, "sharded_data_parallel": 5}
    assert Distribution.parse(stated).stated_degree == 30
    assert Distribution.parse(stated | {"data_parallel": 7}).stated_degree == 210


def test_axes_are_those_of_the_topology() -> None:
    assert distribution._AXES == AXES
    assert Distribution(placement="tp,cp,sdp,dp,pp").placement == "tp,cp,sdp,dp,pp"


def test_the_signature_for_type_checkers_has_every_field() -> None:
    (init,) = (
        node
        for node in ast.walk(ast.parse(inspect.getsource(distribution)))
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    assert [argument.arg for argument in init.args.kwonlyargs] == list(Distribution.model_fields)


@pytest.mark.parametrize("section", [Distribution, *Distribution.sections().values()])
def test_every_field_has_a_default_and_a_description(section: Any) -> None:
    assert section() == section.model_validate({})
    for name, field in section.model_fields.items():
        assert not field.is_required(), name
        assert field.description and field.description.endswith("."), name
    for rule in section.rules:
        assert rule.needs <= set(section.model_fields)
        assert rule.text.endswith(".")


COUNT = "must be an integer >= 1"
PIPELINE_KEYS = "degree, microbatches, virtual_stages, schedule, partition, memory_weight"
SCHEDULES = '"gpipe", "1f1b", "interleaved", "zb-h1", or "zb-v"'


@pytest.mark.parametrize(
    ("given", "field", "remedy"),
    [
        ({"pipeline": {"degree": "2"}}, "pipeline.degree", f"{COUNT}; write it without quotes"),
        ({"pipeline": {"degree": True}}, "pipeline.degree", COUNT),
        ({"pipeline": {"degree": 2.0}}, "pipeline.degree", f"{COUNT}; write 2"),
        ({"pipeline": {"degree": 0}}, "pipeline.degree", COUNT),
        ({"pipeline": {"degree": None}}, "pipeline.degree", f"{COUNT}; leave the key out for the default"),
        ({"pipeline": 0}, "pipeline", f"{COUNT} or a section with keys {PIPELINE_KEYS}"),
        (
            {"pipeline": None},
            "pipeline",
            f"{COUNT} or a section with keys {PIPELINE_KEYS}; leave the key out for the default",
        ),
        ({"pipeline": {"microbatches": 0}}, "pipeline.microbatches", f"{COUNT} or None"),
        (
            {"pipeline": {"schedule": "1F1B"}},
            "pipeline.schedule",
            f'must be {SCHEDULES}; did you mean "1f1b"?',
        ),
        ({"pipeline": {"schedule": 3}}, "pipeline.schedule", f"must be {SCHEDULES}"),
        (
            {"pipeline": {"degree": 2, "partition": {5, 7}}},
            "pipeline.partition",
            'must be "auto" or a list, each an integer >= 1',
        ),
        ({"pipeline": {"memory_weight": 1.5}}, "pipeline.memory_weight", "must be a number >= 0 and <= 1"),
        (
            {"pipeline": {"memory_weight": float("nan")}},
            "pipeline.memory_weight",
            "must be a number >= 0 and <= 1; it must be finite",
        ),
        ({"data_parallel": "full"}, "data_parallel", f'{COUNT} or "fill"; did you mean "fill"?'),
        ({"data_parallel": False}, "data_parallel", f'{COUNT} or "fill"'),
        (
            {"compile": "true"},
            "compile",
            'must be True, False, "auto", or a section with keys enabled; write it without quotes',
        ),
        (
            {"precision": {"mode": "fp16", "initial_loss_scale": float("inf")}},
            "precision.initial_loss_scale",
            "must be a number > 0; it must be finite",
        ),
        ({"checkpoint": {"directory": ""}}, "checkpoint.directory", "must be a path or None"),
        (
            {"tensor_parallel": {"sequence_parallel": 1}},
            "tensor_parallel.sequence_parallel",
            "must be True or False",
        ),
        ({"placement": "pp,dp,tp"}, "placement", 'must be a permutation of "pp,dp,sdp,cp,tp" or None'),
        ({"placement": "pp,dp,sdp,cp,pp"}, "placement", 'must be a permutation of "pp,dp,sdp,cp,tp" or None'),
        ({"tensor_paralel": 2}, "tensor_paralel", "unknown key; did you mean tensor_parallel?"),
        ({"pipeline": {"Degree": 2}}, "pipeline.Degree", "unknown key; did you mean degree?"),
        ({"microbatches": 8}, "microbatches", "unknown key here; did you mean pipeline.microbatches?"),
        ({"pipeline": {"zzz": 1}}, "pipeline.zzz", f"unknown key; the keys here are {PIPELINE_KEYS}"),
        ({"pipeline": {3: 1}}, "pipeline.3", f"unknown key; the keys here are {PIPELINE_KEYS}"),
    ],
)
def test_a_wrong_value_is_told_with_what_would_do(given: dict[str, Any], field: str, remedy: str) -> None:
    assert texts(Distribution, given) == {field: remedy}


@pytest.mark.parametrize(
    ("given", "field", "remedy"),
    [
        (
            {"pipeline": {"degree": 2, "partition": [5]}},
            "pipeline.partition",
            'has length 1, but degree 2 times virtual_stages 1 makes 2 stages; give 2 numbers of blocks, or "auto"',
        ),
        (
            {"pipeline": {"degree": 2, "partition": [5, 7], "memory_weight": 1}},
            "pipeline.memory_weight",
            'has no effect on a partition given in numbers; leave it out, or set partition to "auto"',
        ),
        (
            {"pipeline": {"degree": 2, "virtual_stages": 2}},
            "pipeline.virtual_stages",
            'schedule "1f1b" asks for 1; set that, or choose another schedule',
        ),
        (
            {"pipeline": {"degree": 2, "schedule": "zb-v"}},
            "pipeline.virtual_stages",
            'schedule "zb-v" asks for 2; set that, or choose another schedule',
        ),
        (
            {"pipeline": {"degree": 2, "schedule": "zb-v", "virtual_stages": 3}},
            "pipeline.virtual_stages",
            'schedule "zb-v" asks for 2; set that, or choose another schedule',
        ),
        (
            {"pipeline": {"degree": 2, "schedule": "interleaved"}},
            "pipeline.virtual_stages",
            'schedule "interleaved" asks for 2 or more; set that, or choose another schedule',
        ),
        (
            {"pipeline": {"schedule": "zb-h1"}},
            "pipeline.degree",
            'schedule "zb-h1" asks for 2 or more; raise degree, or leave schedule out',
        ),
        (
            {"pipeline": {"degree": 4, "schedule": "interleaved", "virtual_stages": 2, "microbatches": 6}},
            "pipeline.microbatches",
            'schedule "interleaved" asks for a multiple of degree 4; set 4 or 8',
        ),
        (
            {"pipeline": {"degree": 4, "schedule": "interleaved", "virtual_stages": 2, "microbatches": 3}},
            "pipeline.microbatches",
            'schedule "interleaved" asks for a multiple of degree 4; set 4',
        ),
        (
            {"sharded_data_parallel": {"degree": 2, "level": "optimizer", "prefetch": 2}},
            "sharded_data_parallel.prefetch",
            'level "optimizer" gathers no parameters; leave prefetch out, or choose another level',
        ),
        (
            {"activation_checkpointing": {"mode": "full", "keep": ["matmul"]}},
            "activation_checkpointing.keep",
            'has no effect with mode "full"; leave it out, or set mode to "selective"',
        ),
        (
            {"activation_checkpointing": {"mode": "selective", "keep": []}},
            "activation_checkpointing.keep",
            'must name an operation; to keep none, set mode to "full"',
        ),
        (
            {"activation_checkpointing": {"mode": "selective", "keep": ["matmul", "matmul"]}},
            "activation_checkpointing.keep",
            "names an operation twice; name each once",
        ),
        (
            {"activation_checkpointing": {"mode": "selective", "offload": True}},
            "activation_checkpointing.offload",
            'has no effect with mode "selective"; leave it out, or set mode to "full"',
        ),
        (
            {"precision": {"mode": "bf16", "initial_loss_scale": 2.0}},
            "precision.initial_loss_scale",
            'has no effect with mode "bf16"; leave it out, or set mode to "fp16"',
        ),
        (
            {"precision": {"loss_scale_growth_interval": 5}},
            "precision.loss_scale_growth_interval",
            'has no effect with mode "fp32"; leave it out, or set mode to "fp16"',
        ),
    ],
)
def test_a_broken_rule_is_told_with_what_would_do(given: dict[str, Any], field: str, remedy: str) -> None:
    assert texts(Distribution, given) == {field: remedy}


@pytest.mark.parametrize(
    "pipeline",
    [
        {"degree": 1, "schedule": "gpipe"},
        {"degree": 4, "microbatches": 1},  # the executor runs any number of microbatches
        {"degree": 2, "schedule": "zb-v", "virtual_stages": 2, "partition": [1, 2, 3, 4]},
        {"degree": 2, "schedule": "interleaved", "virtual_stages": 3, "microbatches": 4},
        {"degree": 1, "partition": [12]},
    ],
)
def test_unusual_pipelines_that_work_are_taken(pipeline: dict[str, Any]) -> None:
    assert Distribution(pipeline=pipeline).pipeline.degree == pipeline["degree"]


@pytest.mark.parametrize("key", ["smdistributed", "torch_distributed"])
def test_sagemaker_dicts_are_refused_by_name(key: str) -> None:
    (problem,) = problems(Distribution, {key: {"enabled": True}})
    assert problem.field == key
    assert "SageMaker" in problem.remedy
    assert "pipeline" in problem.remedy


def test_numpy_integers_are_refused_with_the_way_out() -> None:
    import numpy as np

    assert texts(Distribution, {"data_parallel": np.int64(2)}) == {
        "data_parallel": f'{COUNT} or "fill"; convert it with int()'
    }


def test_a_section_by_itself_raises_pydantics_error_with_the_same_texts() -> None:
    given: dict[str, Any] = {"degree": 0, "schedule": "zb-v", "shedule": 1}
    with pytest.raises(ValidationError) as alone:
        Pipeline(**given)
    with pytest.raises(ConfigError) as whole:
        Distribution.parse({"pipeline": given})
    for problem in whole.value.problems:
        assert problem.remedy in str(alone.value)
    assert len(alone.value.errors()) == len(whole.value.problems) == 2


def test_everything_wrong_is_told_at_once_in_the_order_of_the_fields() -> None:
    found = problems(
        Distribution,
        {
            "degree": 2,
            "sharded_data_parallel": {"degree": -1, "level": "optimiser"},
            "tensor_parallel": True,
            "pipeline": {"degree": 2, "schedule": "zb-v", "memory_weight": "0.5"},
            "precision": {"mode": "fp32", "initial_loss_scale": 1.0},
            "placement": "tp",
        },
    )
    assert [problem.field for problem in found] == [
        "degree",
        "sharded_data_parallel.degree",
        "sharded_data_parallel.level",
        "tensor_parallel",
        "pipeline.memory_weight",
        "pipeline.virtual_stages",
        "precision.initial_loss_scale",
        "placement",
    ]


def test_the_message_of_a_config_error_is_a_numbered_list() -> None:
    with pytest.raises(ConfigError) as caught:
        Distribution.parse({"tensor_parallel": 0.5, "pipline": 2})
    assert str(caught.value) == (
        "2 problems in the distribution:\n"
        "  1. pipline (got 2): unknown key; did you mean pipeline?\n"
        "  2. tensor_parallel (got 0.5): must be an integer >= 1 or a section with keys degree, sequence_parallel"
    )


@pytest.mark.parametrize("source", [None, 3, [1], 2.5])
def test_what_is_no_configuration_at_all_is_one_problem_of_the_whole(source: Any) -> None:
    (problem,) = problems(Distribution, source)
    assert problem.field == "distribution"
    assert problem.got == source
    assert problem.remedy.startswith("must be a section with keys sharded_data_parallel, ")
