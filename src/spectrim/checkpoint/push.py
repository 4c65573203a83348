"""Uploading a checkpoint to the Hugging Face hub."""

import logging
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # the client exports not all it raises
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)

from spectrim.checkpoint.model_files import all_files, checkpoint_files
from spectrim.checkpoint.read import read_provenance
from spectrim.errors import CheckpointError, first_line, printable

logger = logging.getLogger(__name__)


def uploaded_files(directory: str | Path) -> dict[str, int]:
    """What `push` would upload: names, and bytes. Raises CheckpointError where the directory is no whole checkpoint."""
    path = Path(directory)
    wanted = checkpoint_files(path, read_provenance(path))
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json, so it is no whole checkpoint; compress the model again")
    return {name: (path / name).stat().st_size for name in wanted}


def push(directory: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a checkpoint that spectrim wrote to the model repository `repo_id`, in one commit; returns its address.

    Only what spectrim wrote and what a model is made of goes up; what else lies there is left, and logged by name.

    The repository, and the branch `revision` (None: the main one), are made where they are missing. Raises
    CheckpointError for a directory without spectrim's record or without a config, when nobody is logged in, offline,
    for an id that is none, for a hub that refuses, and for `private` where the repository is public already.
    """
    path = Path(directory)
    wanted = uploaded_files(path)
    if get_token() is None:
        raise CheckpointError("nobody is logged in to the Hugging Face hub; run `hf auth login`, or set HF_TOKEN")
    left = [name for name in all_files(path) if name not in wanted]
    if left:
        logger.warning("not uploaded, since not part of the model: %s", printable(", ".join(left)))
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise CheckpointError(f"{repo_id} is public already; name another repository, or leave --private out")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=path,
            revision=revision,
            commit_message="Upload a checkpoint made by spectrim",
            allow_patterns=[escape(name) for name in wanted],
        )
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo_id!r} is no repository id ({first_line(error)}); write it as owner/name"
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"the Hugging Face hub refuses {repo_id} ({first_line(error)}); check its name and your token's rights"
        ) from error
    except (OfflineModeIsEnabled, HTTPError) as error:
        raise CheckpointError(
            f"the Hugging Face hub cannot be reached ({first_line(error)}); unset HF_HUB_OFFLINE and check the network"
        ) from error
    return str(address)
