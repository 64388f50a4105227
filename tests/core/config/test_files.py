"""Configuration files: YAML's traps, keys that stand twice, lines, and files that can't be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpsdk.config import Distribution, Job, Training
from mpsdk.errors import ConfigError


def refusal(
    path: Path, content: str | bytes, document: type[Distribution | Training | Job] = Training
) -> str:
    """What is said about a file at `path` with `content`."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        document.from_file(path)
    return str(caught.value)


@pytest.mark.parametrize("number", ["3e-4", "3E-4", "3.0e-4", ".0003", "0.3e-3", "3.e-4", "+3e-4"])
def test_yaml_reads_a_learning_rate_however_it_is_written(number: str, tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(f"learning_rate: {number}\n")
    assert Training.from_file(path).learning_rate == pytest.approx(3e-4)


def test_yaml_leaves_words_alone_that_look_a_little_like_numbers(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: 12e\noutput_dir: 3e-4x\n")
    job = Job.from_file(path)
    assert (job.model, job.output_dir) == ("12e", "3e-4x")


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "d.yml").write_text("pipeline: {degree: 2, partition: [5, 7]}\ncompile: off\n")
    (tmp_path / "d.JSON").write_text('{"pipeline": {"degree": 2, "partition": [5, 7]},\n\t"compile": false}')
    assert Distribution.from_file(tmp_path / "d.yml") == Distribution.from_file(str(tmp_path / "d.JSON"))
    assert Distribution.parse(tmp_path / "d.yml").pipeline.partition == (5, 7)


def test_a_key_that_stands_twice_is_told_with_its_line_beside_all_else(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    text = refusal(path, "model: a\ntraining:\n  steps: 1\n  seed: -1\n  steps: 2\nmodel: b\n", Job)
    twice = "the key stands twice in its section, and only one value can hold; remove one"
    assert text.splitlines() == [
        f"3 problems in {path}:",
        f"  1. training.steps (got 2): {twice} (line 5)",
        f"  2. model (got 'b'): {twice} (line 6)",
        "  3. training.seed (got -1): must be an integer >= 0 and <= 9223372036854775807 (line 4)",
    ]


def test_the_same_key_in_two_sections_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text("pipeline: {degree: 2}\ntensor_parallel: {degree: 2}\n")
    assert Distribution.from_file(path).stated_degree == 4


def test_a_key_that_stands_twice_in_json_is_told(tmp_path: Path) -> None:
    text = refusal(tmp_path / "t.json", '{"steps": 1, "steps": 2}')
    assert "1. steps (got 2): the key stands twice" in text


def test_a_merged_section_may_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text("pipeline: &two {degree: 2}\ntensor_parallel:\n  <<: *two\n  degree: 4\n")
    assert Distribution.from_file(path).tensor_parallel.degree == 4


def test_problems_of_a_whole_section_stand_at_the_sections_line(tmp_path: Path) -> None:
    text = refusal(tmp_path / "d.yaml", "precision: fp32\n\npipeline:\n  schedule: zb-h1\n", Distribution)
    assert "pipeline.degree (got 1):" in text
    assert text.endswith("(line 3)")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.yaml", "steps: [1\n", "not valid YAML at line 2, column 1: while parsing a flow sequence"),
        ("t.yaml", "a:\n\t- 1\n", "not valid YAML at line 2, column 1"),
        ("t.yaml", "a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("t.yaml", "a: 2024-13-45\n", "the file can't be read: month must be in 1..12"),
        ("t.yaml", "a: \x00\n", "the file can't be read: unacceptable character"),
        ("t.yaml", "a: é\n".encode("latin-1"), "the file can't be read: 'utf-8' codec can't decode"),
        ("t.yaml", "? [a]\n: 1\n", "found unhashable key"),
        ("t.yaml", "[" * 3000, "the file is nested too deeply"),
        ("t.yaml", "", "the file holds no keys; it may have objective, labels"),
        ("t.yaml", "- steps\n", "the file holds no keys; it may have objective, labels"),
        ("t.yaml", "t.yaml", "the file holds no keys; it may have objective, labels"),
        ("t.json", '{"steps": ', "the file can't be read: Expecting value: line 1 column 11"),
        ("t.json", '{"learning_rate": NaN}', "must be a number >= 0; it must be finite"),
        ("t.json", "[" * 100_000, "the file is nested too deeply"),
        ("t.toml", "steps = 1", "its name must end in one of .yaml, .yml, .json"),
    ],
)
def test_a_file_that_holds_no_configuration_says_why(
    name: str, content: str | bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    text = refusal(path, content)
    assert text.startswith(f"1 problem in {path}:")
    assert said in text


def test_a_missing_file_says_where_it_was_looked_for() -> None:
    with pytest.raises(ConfigError, match=f"there is no such file, looking from {Path.cwd()}"):
        Distribution.parse("no/such/file.yaml")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").mkdir()
    with pytest.raises(ConfigError, match="the file can't be read: Is a directory"):
        Distribution.from_file(tmp_path / "d.yaml")


def test_an_alias_that_holds_itself_ends(tmp_path: Path) -> None:
    text = refusal(tmp_path / "t.yaml", "steps: &a [*a]\n")
    assert "steps (got [[...]]): must be an integer >= 1 (line 1)" in text
