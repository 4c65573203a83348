"""The page of `spectrim chat` in a headless Chromium: `pytest -m ui`."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES
from helpers.samples import word_tokenizer
from spectrim.demo.tasks import TASKS, questions
from spectrim.pipeline import compress

pytestmark = pytest.mark.ui
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One page of a headless Chromium, driven through the DevTools protocol."""

    def __init__(self, port: int) -> None:
        import websocket

        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            target = next(page for page in json.load(answer) if page["type"] == "page")
        self._socket = websocket.create_connection(target["webSocketDebuggerUrl"], suppress_origin=True, timeout=60)
        self._numbers, self.errors = count(1), []
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            got = json.loads(self._socket.recv())
            if got.get("method") == "Runtime.exceptionThrown":
                self.errors.append(got["params"]["exceptionDetails"]["text"])
            if got.get("method") == "Log.entryAdded" and got["params"]["entry"]["level"] == "error":
                self.errors.append(got["params"]["entry"]["text"] + " " + got["params"]["entry"].get("url", ""))
            if got.get("id") == number:
                assert "error" not in got, got
                return got["result"]

    def run(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """The first true value of a script."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script}: {self.run('document.body.innerText')}"
            time.sleep(0.2)
        return value

    def close(self) -> None:
        self._socket.close()

    def picture(self, name: str) -> None:
        """Keeps a screenshot where SCREENSHOTS says."""
        if folder := os.environ.get("SCREENSHOTS"):
            shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
            Path(folder, f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def opened(*models: str | Path, size: str = "1280,1000") -> Iterator[Browser]:
    """The page of `spectrim chat` in a browser; ended as Ctrl-C does."""
    chat = [sys.executable, "-m", "spectrim", "chat", *map(str, models), "--no-browser", "--max-new-tokens", "12"]
    with ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(chat, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        stack.callback(server.kill)
        home = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={size}"]
        command += ["--remote-debugging-port=0", f"--user-data-dir={home}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        chromium = stack.enter_context(subprocess.Popen(command, **quiet))
        stack.callback(chromium.terminate)
        address = server.stdout.readline().split()[0]
        assert address.startswith("http://127.0.0.1:")
        told, end = Path(home, "DevToolsActivePort"), time.monotonic() + 60
        while not told.exists() or not told.read_text():
            assert time.monotonic() < end
            time.sleep(0.1)
        browser = Browser(int(told.read_text().split()[0]))
        stack.callback(browser.close)
        browser.call("Page.navigate", url=address)
        browser.wait("document.querySelector('textarea') !== null && document.querySelectorAll('.answer').length")
        yield browser
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 130
        assert server.stderr.read() == "spectrim: stopped; the same command starts the page again\n"


ANSWERS = "[...document.querySelectorAll('.answer')].map(x => x.innerText)"
PRESS = "[...document.querySelectorAll('button')].find(x => x.innerText.trim() === 'Ask').click()"
ASKED = "!document.body.innerText.includes('no question yet')"


def write(browser: Browser, text: str) -> None:
    browser.run("document.querySelector('textarea').focus(); document.querySelector('textarea').select()")
    browser.call("Input.insertText", text=text)


def test_two_models_answer_about_an_example_and_about_an_upload(tmp_path):
    compress("demo", tmp_path / "small", retain=0.1, recipe="svd")
    with opened("demo", tmp_path / "small") as browser:
        browser.wait("document.querySelectorAll('.gallery-item, tr.tr-body, [class*=example] img').length")
        browser.picture("before")
        browser.run("document.querySelector('tr.tr-body, .gallery-item').click()")
        browser.wait("document.querySelector('textarea').value.length")
        browser.wait("document.querySelector('[data-testid=image] img, .image-frame img') !== null")
        browser.run(PRESS)
        browser.wait(f"{ASKED} && /first difference/.test(document.body.innerText)")
        browser.wait("/tokens\\/s/.test(document.body.innerText) || /after 0/.test(document.body.innerText)")
        browser.picture("example")
        asked = questions(TASKS[0], "test", 1, 0)[0]
        said = browser.run(ANSWERS)
        assert len(said) == 2
        assert said[0].strip().casefold() == asked.answer  # the dense model knows it
        asked.image.save(tmp_path / "a.png")
        browser.run("document.querySelector('button[aria-label*=Clear], button[aria-label*=Remove]')?.click()")
        browser.wait("document.querySelector('input[type=file]') !== null")
        node = browser.call("DOM.getDocument", depth=-1, pierce=True)["root"]["nodeId"]
        file = browser.call("DOM.querySelector", nodeId=node, selector="input[type=file]")["nodeId"]
        browser.call("DOM.setFileInputFiles", nodeId=file, files=[str(tmp_path / "a.png")])
        browser.wait("document.querySelector('[data-testid=image] img, .image-frame img') !== null")
        write(browser, "What is <image>?")
        browser.run(PRESS)
        browser.wait("/as text/.test(document.body.innerText)")  # one sentence in place of an answer
        write(browser, asked.question)
        browser.run(PRESS)
        browser.wait("!/as text/.test(document.body.innerText) && /first difference/.test(document.body.innerText)")
        assert browser.run(ANSWERS)[0].strip().casefold() == asked.answer
        browser.picture("upload")
        assert browser.errors == []


def test_one_model_of_text_alone(tmp_path):
    FAMILIES["llama"]().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with opened(tmp_path, size="420,900") as browser:
        assert browser.run("document.querySelector('input[type=file]')") is None
        write(browser, "w7 w8 w9")
        browser.run(PRESS)
        browser.wait(f"{ASKED} && /tokens.s/.test(document.body.innerText)")
        (said,) = browser.run(ANSWERS)
        assert said.strip().startswith("w")
        assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")  # on a phone
        browser.picture("narrow")
        assert browser.errors == []
