"""The verb that hands a checkpoint on: push."""

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli.verbs import show, verb


@verb("push", after_stop="the same command uploads again")
def _push(
    checkpoint: Annotated[Path, typer.Argument(help="A directory that spectrim compress wrote.")],
    repo_id: Annotated[str, typer.Argument(help="Where it goes on the Hugging Face hub: owner/name.")],
    private: Annotated[bool, typer.Option(help="Make the repository a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to write to; the main one if not given.")] = None,
) -> None:
    """Upload a checkpoint, with its card, to the Hugging Face hub."""
    from spectrim.checkpoint import push

    show(push(checkpoint, repo_id, private=private, revision=revision))
