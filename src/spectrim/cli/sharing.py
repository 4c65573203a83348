"""The verb that hands a checkpoint on: push."""

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli.console import show
from spectrim.cli.verbs import Dry, verb


@verb("push", after_stop="the same command uploads again")
def _push(
    checkpoint: Annotated[Path, typer.Argument(help="A directory that spectrim compress wrote.")],
    repo_id: Annotated[str, typer.Argument(help="Where it goes on the Hugging Face hub: owner/name.")],
    private: Annotated[bool, typer.Option(help="Make the repository a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to write to; the main one if not given.")] = None,
    dry_run: Dry = False,
) -> None:
    """Upload a checkpoint, with its card, to the Hugging Face hub."""
    from spectrim.checkpoint.push import push, uploaded_files

    if dry_run:
        from spectrim.cli.intent import would

        files = uploaded_files(checkpoint)
        would([(f"{len(files)} files of {checkpoint}", sum(files.values()))], (), [(f"{repo_id} on the hub", None)])
        return
    show(push(checkpoint, repo_id, private=private, revision=revision))
