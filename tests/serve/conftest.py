from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def process(monkeypatch) -> Iterator[Any]:
    """``process(rank, size)``: vLLM's layers are built as in that one of `size` processes."""
    from helpers.vllm_layers import processes

    with processes(monkeypatch) as become:
        yield become
