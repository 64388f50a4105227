"""A Job says all of a run: its parts, what stands for them in short, and every mistake of the file at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpsdk.config import Distribution, Job, Training
from mpsdk.errors import ConfigError
from tests.core.config.messages import problems, texts


def test_parts_in_short() -> None:
    job = Job.parse(
        {"model": "models/gpt2", "data": "corpus.txt", "launcher": "local", "distribution": {"pipeline": 2}}
    )
    assert (job.data.train, job.data.validation) == ("corpus.txt", None)
    assert (job.launcher.name, job.launcher.processes, job.launcher.timeout) == ("local", None, 600.0)
    assert job.distribution == Distribution(pipeline=2)
    assert job.training == Training()
    assert (job.framework, job.output_dir, job.resume) == ("torch", "runs/default", "auto")


def test_paths_may_be_path_objects() -> None:
    job = Job.parse({"model": Path("a/b"), "output_dir": Path("c")})
    assert (job.model, job.output_dir) == ("a/b", "c")


def test_model_may_be_a_hugging_face_configuration() -> None:
    configuration = {"model_type": "llama", "rope_scaling": {"factor": 2.0}, "layer_types": ["full", None]}
    assert Job.parse({"model": configuration}).model == configuration


@pytest.mark.parametrize(
    ("given", "field", "remedy"),
    [
        ({}, "model", "one of model and entry_point must be given"),
        (
            {"model": "a", "entry_point": "b.py"},
            "entry_point",
            "only one of model and entry_point can be given; remove one",
        ),
        ({"model": {"n_layer": 2}}, "model.model_type", 'must be a model type, such as "gpt2" or "llama"'),
        (
            {"model": {"model_type": "gpt2", "n": object}},
            "model",
            'must be a path, a name on the hub, "package.module:factory", a section of JSON values, or None',
        ),
        (
            {"model": "a", "framework": "pytorch"},
            "framework",
            'must be "torch" or "tensorflow"; did you mean "torch"?',
        ),
        ({"model": "a", "launcher": {"timeout": 0}}, "launcher.timeout", "must be a number > 0"),
        (
            {"model": "a", "data": {"validation": 1}},
            "data.validation",
            "must be a number > 0 and < 1, a path, or None",
        ),
        ({"model": "a", "resume": ""}, "resume", 'must be "auto", "never", or the path of a checkpoint'),
        (
            {"model": "a", "steps": 3},
            "steps",
            "unknown key here; did you mean training.steps or profile.steps?",
        ),
        ({"modle": "a"}, "modle", "unknown key; did you mean model?"),
    ],
)
def test_a_wrong_value_or_broken_rule_is_told_with_what_would_do(
    given: dict[str, Any], field: str, remedy: str
) -> None:
    assert texts(Job, given) == {field: remedy}


def test_mistakes_in_all_sections_are_told_at_once() -> None:
    found = problems(
        Job,
        {
            "distribution": {"pipeline": {"degree": 2, "schedule": "interleaved"}, "tensor_parallel": -1},
            "training": {"steps": 0, "global_batch": 3, "accumulation": 2},
            "launcher": {"procesess": 2},
        },
    )
    assert [problem.field for problem in found] == [
        "distribution.tensor_parallel",
        "distribution.pipeline.virtual_stages",
        "training.steps",
        "training.global_batch",
        "launcher.procesess",
        "model",
    ]


def test_a_path_may_stand_for_the_distribution_and_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.yaml").write_text("pipeline: 2\n")
    Path("t.json").write_text('{"steps": 7}')
    Path("job.yaml").write_text("model: m\ndistribution: d.yaml\ntraining: t.json\n")
    job = Job.from_file("job.yaml")
    assert (job.distribution.pipeline.degree, job.training.steps) == (2, 7)


def test_mistakes_in_a_file_that_a_job_names_are_told_with_both_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.yaml").write_text("precision: fp32\npipeline:\n  degree: 0\n")
    Path("job.yaml").write_text("model: m\ndistribution: d.yaml\ntraining: nowhere.yaml\n")
    with pytest.raises(ConfigError) as caught:
        Job.from_file("job.yaml")
    assert str(caught.value) == (
        "2 problems in job.yaml:\n"
        "  1. distribution.pipeline.degree (got 0): must be an integer >= 1 (line 3), in d.yaml (line 2)\n"
        f"  2. training (got 'nowhere.yaml'): there is no such file, looking from {tmp_path} (line 3)"
    )
