"""Uploads, with an API that records its calls in place of the hub."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from compressed import factored
from families import FAMILIES
from helpers.command import hub, run
from spectrim.checkpoint import push, save
from spectrim.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(factored("llama"), tmp_path / "small")


def test_a_repository_is_made_and_the_whole_directory_goes_up(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = hub(monkeypatch)
    assert push(checkpoint, "me/small") == "address of the repository"
    (made, options), (uploaded, folder) = api.calls
    assert (made, uploaded) == ("create_repo", "upload_folder")
    assert options == {"repo_id": "me/small", "private": None, "exist_ok": True}
    assert (folder["repo_id"], folder["folder_path"], folder["revision"]) == ("me/small", checkpoint, None)


def test_a_revision_is_a_branch(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = hub(monkeypatch)
    push(checkpoint, "me/small", revision="v2")
    assert api.calls[1] == ("create_branch", {"repo_id": "me/small", "branch": "v2", "exist_ok": True})
    assert api.calls[2][1]["revision"] == "v2"


def test_nothing_private_goes_to_a_public_repository(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = hub(monkeypatch, private=True)
    push(checkpoint, "me/small", private=True)
    assert api.calls[0][1]["private"] is True
    assert api.calls[-1][0] == "upload_folder"
    api = hub(monkeypatch, private=False)
    with pytest.raises(CheckpointError, match="public already"):
        push(checkpoint, "me/small", private=True)
    assert "upload_folder" not in dict(api.calls)


def test_a_directory_that_is_no_checkpoint_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = hub(monkeypatch)
    FAMILIES["llama"]().save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="written by spectrim"):
        push(tmp_path / "dense", "me/small")
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        push(checkpoint, "me/small")
    assert api.calls == []


def refusal(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("Forbidden.\nlong advice", response=response)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": None}, "nobody is logged in"),
        ({"create_repo": OfflineModeIsEnabled("offline mode is enabled.")}, "cannot be reached"),
        ({"upload_folder": HTTPError("no route")}, "cannot be reached (no route)"),
        ({"create_repo": HFValidationError("two slashes")}, "no repository id"),
        ({"upload_folder": refusal(403)}, "refuses me/small (Forbidden)"),
    ],
)
def test_what_fails_is_one_sentence_and_exit_code_2(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    message: str,
) -> None:
    hub(monkeypatch, **options)
    capsys.readouterr()
    code, out, err = run(capsys, "push", checkpoint, "me/small")
    assert (code, out) == (2, "")
    assert message in err
    assert "advice" not in err
    assert "Traceback" not in err


def test_the_command_prints_the_address(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = hub(monkeypatch)
    capsys.readouterr()
    code, out, _ = run(capsys, "push", checkpoint, "me/small", "--revision", "v1")
    assert (code, out) == (0, "address of the repository")
    assert api.calls[-1][1]["revision"] == "v1"
