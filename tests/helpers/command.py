"""The command line in this process, and a hub that records what it is asked."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spectrim import cli
from spectrim.checkpoint import push


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    argv, sys.argv = sys.argv, ["spectrim", *map(str, arguments)]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = argv
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), " ".join(err.split())


class FakeApi:
    """Records calls; `fails` maps the name of a call to what it raises."""

    def __init__(self, private: bool = False, **fails: Exception) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.private, self.fails = private, fails

    def __getattr__(self, name: str) -> Any:
        def call(repo_id: str, **options: Any) -> Any:
            self.calls.append((name, {"repo_id": repo_id, **options}))
            if name in self.fails:
                raise self.fails[name]
            return SimpleNamespace(private=self.private) if name == "model_info" else "address of the repository"

        return call


def hub(monkeypatch: pytest.MonkeyPatch, token: str | None = "token", **options: Any) -> FakeApi:
    api = FakeApi(**options)
    monkeypatch.setitem(push.__globals__, "HfApi", lambda: api)
    monkeypatch.setitem(push.__globals__, "get_token", lambda: token)
    return api
