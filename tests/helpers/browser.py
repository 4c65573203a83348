"""Pages in a real browser: Chromium without a window."""

import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)


class _Charts(HTMLParser):
    """Counts the shapes that are drawn inside of each chart."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[str, int] = {}
        self._chart: str | None = None
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "div" and self._chart is not None:
            self._depth += 1
        elif tag == "div" and "data-chart" in given:
            self._chart, self._depth = str(given["data-chart"]), 1
            self.marks[self._chart] = 0
        elif tag in ("path", "line", "text") and self._chart is not None:
            drawn = given.get("d", "M") or ""
            # An aria role says that a mark stands for data, and not for an axis or the background.
            if given.get("aria-roledescription") and (tag != "path" or len(drawn) > 4):
                self.marks[self._chart] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._chart is not None:
            self._depth -= 1
            if self._depth == 0:
                self._chart = None


def opened(page: Path, profile: Path) -> tuple[str, list[str], dict[str, int]]:
    """The document once its scripts have run, what they said on the console, and the marks drawn in each chart."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={profile}", "--virtual-time-budget=30000", "--enable-logging=stderr", "--dump-dom",
            f"{page.as_uri()}#all",
        ],
        capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "DBUS_SESSION_BUS_ADDRESS": ""},
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    charts = _Charts()
    charts.feed(done.stdout)
    return done.stdout, said, charts.marks
