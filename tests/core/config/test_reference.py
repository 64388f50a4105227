"""docs/configuration.md is made from the models, complete, and its example works."""

from __future__ import annotations

from pathlib import Path

import yaml

from mpsdk.config import Job
from mpsdk.config.reference import EXAMPLE, reference_markdown

PAGE = Path(__file__).resolve().parents[3] / "docs" / "configuration.md"


def test_the_committed_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference_markdown(), (
        "run: python -m mpsdk.config.reference > docs/configuration.md"
    )


def test_every_section_has_a_table_with_every_field() -> None:
    text = reference_markdown()
    waiting = [Job]
    while waiting:
        section = waiting.pop()
        waiting.extend(section.sections().values())
        part = text.partition(f"\n## {section.__name__}\n")[2].partition("\n## ")[0]
        rows = [line.split("|") for line in part.splitlines() if line.startswith("| `")]
        assert [row[1].strip(" `") for row in rows] == list(section.model_fields)
        assert all(len(row) == 6 and all(cell.strip() for cell in row[1:5]) for row in rows)
        assert all(f"- {rule.text}" in part for rule in section.rules)


def test_the_example_of_the_page_is_a_job(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(EXAMPLE)
    job = Job.from_file(path)
    assert (job.distribution.stated_degree, job.training.learning_rate) == (4, 3e-4)
    assert set(yaml.safe_load(EXAMPLE)) < set(Job.model_fields)
