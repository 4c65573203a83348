"""What several files of tests use is in ``helpers``, ``conftest.py`` and the modules beside them."""

import re
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_file_imports_a_file_of_tests(file):
    """Nor does a script that a test writes for a process of its own."""
    found = re.findall(r"^\s*(?:from|import)\s+test_\w+.*", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert found == []
