"""The verb that answers in a browser: chat."""

from pathlib import Path
from threading import Event
from typing import Annotated, Any

import typer

from spectrim.cli.console import quiet, show
from spectrim.cli.verbs import Device, Dtype, Trust, dtype_of, verb
from spectrim.errors import UsageError


@verb("chat", after_stop="the same command starts the page again")
def _chat(
    models: Annotated[list[str], typer.Argument(help="Model directories, hub ids or 'demo'; the dense one first.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 128,
    host: Annotated[str, typer.Option(help="The address to listen at; by default only this machine can reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int | None, typer.Option(help="The port; a free one from 7860 on if not given.")] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
) -> None:
    """Ask models side by side in a browser, with what each costs and where answers differ (needs the extra 'ui')."""
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {max_new_tokens} is too small; give at least 1")
    from spectrim.checks import check_device
    from spectrim.demo import resolve
    from spectrim.ui.answers import open_speakers
    from spectrim.ui.page import check_page, serve

    quiet()
    check_page(host, port)
    check_device(device)
    how: dict[str, Any] = {"device_map": device, "dtype": dtype_of(dtype), "trust_remote_code": trust_remote_code}
    short = [Path(model).name or model for model in models]
    names = short if len(set(short)) == len(short) else models
    speakers = open_speakers([resolve(model) for model in models], names, **how)
    serve(
        speakers,
        max_new_tokens=max_new_tokens,
        host=host,
        port=port,
        browser=browser,
        started=lambda address: show(f"{address} (Ctrl-C ends it)"),
        wait=Event().wait,
    )
