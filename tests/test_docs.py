"""What the documentation shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runners.commands import COMMANDS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["index.md", "howto/planner.md"])
def test_python_examples_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})
    attainments = [float(line) for line in capsys.readouterr().out.split()]
    assert all(0.0 <= attainment <= 1.0 for attainment in attainments)


@pytest.mark.parametrize("page", sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")))
def test_commands_on_pages_exist(page: str) -> None:
    for line in re.findall(r"^qlm ([^\n]*)", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE):
        words = line.split()
        assert words[0] in COMMANDS or " ".join(words[:2]) in COMMANDS or words[0] == "COMMAND", line
