"""The page in gradio: a question and an image on the left, a column for each model on the right."""

import socket
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from PIL import Image

from spectrim.demo.tasks import TASKS, questions
from spectrim.errors import UsageError
from spectrim.ui.answers import Speaker, in_turn
from spectrim.ui.columns import CSS, columns

PLAIN = ("What is the capital of France?", "Write one sentence about the sea.", "Count from one to ten.")
_FONTS = ("system-ui", "sans-serif")  # nothing is fetched from elsewhere


def check_page(host: str, port: int | None) -> None:
    """UsageError where gradio is missing, or where nothing can listen at this address; before any model is loaded."""
    if find_spec("gradio") is None:
        raise UsageError("spectrim chat needs the package gradio, which is not installed: pip install 'spectrim[ui]'")
    if port is not None and not 1 <= port <= 65535:
        raise UsageError(f"--port {port} is no port; give a number from 1 to 65535")
    try:
        with socket.create_server((host, port or 0)):
            pass
    except OSError as error:
        address = host if port is None else f"{host}:{port}"
        raise UsageError(
            f"nothing can listen at {address} ({error.strerror}); choose another --port or --host"
        ) from error


def page(speakers: Sequence[Speaker], max_new_tokens: int) -> Any:
    """The page, not running yet; the second value are arguments of its ``launch``."""
    import gradio as gr

    sees = all(speaker.sees for speaker in speakers)

    def ask(text: str, image: Image.Image | None = None) -> Iterator[list[str]]:
        for answers in in_turn(speakers, text, image, max_new_tokens):
            yield columns(speakers, answers)

    with gr.Blocks(title="spectrim chat", analytics_enabled=False, fill_width=True) as made:
        gr.Markdown(f"## spectrim chat\n{_says(speakers)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                asked: list[Any] = [gr.Textbox(label="Question", lines=2, placeholder="Ask something", autofocus=True)]
                if sees:
                    kinds = ["upload", "clipboard"]
                    asked.append(gr.Image(label="Image", type="pil", sources=kinds, height=260))
                with gr.Row():
                    button = gr.Button("Ask", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column(scale=5), gr.Row():
                shown = []
                for text in columns(speakers, None):
                    with gr.Column(min_width=260):
                        shown.append(gr.HTML(text))
        gr.Examples(_examples(sees), asked, label="Examples", examples_per_page=5)
        running = [
            button.click(ask, asked, shown, api_name="ask", show_progress="hidden"),
            asked[0].submit(ask, asked, shown, api_visibility="private", show_progress="hidden"),
        ]
        stop.click(None, cancels=running, api_visibility="private")
    return made


def serve(
    speakers: Sequence[Speaker],
    *,
    max_new_tokens: int,
    host: str,
    port: int | None,
    browser: bool,
    started: Callable[[str], None],
    wait: Callable[[], object],
) -> None:
    """Run the page until ``wait`` returns or raises; ``started`` gets its address."""
    import gradio as gr

    made = page(speakers, max_new_tokens)
    _, address, _ = made.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        show_error=True,
        ssr_mode=False,
        footer_links=[],
        css=CSS,
        theme=gr.themes.Default(font=_FONTS, font_mono=("monospace",)),
    )
    try:
        started(str(address))
        wait()
    finally:
        made.close()


def _says(speakers: Sequence[Speaker]) -> str:
    if len(speakers) == 1:
        return "The model answers greedily."
    return "All models answer greedily. The first token in which an answer differs from the first model's is marked."


def _examples(sees: bool) -> list[list[Any]]:
    if not sees:
        return [[text] for text in PLAIN]
    found = [questions(task, "test", 1, 0)[0] for task in TASKS]
    return [[asked.question, asked.image] for asked in found]
