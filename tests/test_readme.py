"""Every command and every Python block of README.md and docs/ that needs no hub and no server, each in a process of its
own, in order, in one folder for each page.

MODEL is a tiny image-text model, and sample counts are small. The first Python block of README.md runs as it stands.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from families import FAMILIES
from helpers.forks import fork
from helpers.samples import image_folder, llava_processor
from spectrim.evaluate.suites import Suite

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = re.compile(
    r"OWNER/NAME|--suite|\blm_eval|lmms_eval|\bvllm\b|Qwen|spectrim chat"
)  # needs a hub, or a server
MODELS = {"MODEL", "DENSE", "demo"}
SMALLER = {
    "calibrate": ["--samples", "6", "--batch-size", "6"],
    "compress": ["--samples", "6", "--batch-size", "6", "--text", "words.txt", "--images", "images"],
    "evaluate": ["--samples", "2", "--max-tokens", "1024"],
    "pareto": ["--samples", "2", "--max-tokens", "1024"],
    "kl": ["--samples", "2", "--kl-tokens", "32", "--seqlen", "64"],
}


def commands(page: Path) -> list[list[str]]:
    """Indented commands of spectrim on a page, without their comments."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    (?:python -m )?(spectrim .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines if not ELSEWHERE.search(line)]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(folder: Path, *arguments: str) -> None:
    done = fork("-m", "spectrim", *arguments, folder=folder)
    assert done.returncode == 0, f"{arguments}: {done.stderr}"


def run_file(folder: Path, name: str) -> None:
    done = subprocess.run([sys.executable, name], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}: {done.stderr}"


def real(command: list[str], checkpoint: str = "small") -> list[str]:
    """A command on the things that there are; `checkpoint` is what it writes, if it does."""
    verb = command[0]
    compressed = checkpoint if verb == "compress" else "small"
    names = {**dict.fromkeys(MODELS, "model"), **dict.fromkeys(("OUT", "SMALL", "small"), compressed)}
    names |= {"STATS": "statistics", "3.5GB": "330kB"}
    sources = {"--text": "words.txt", "--images": "images"}
    parts = [
        sources[before] if part == "SRC" else names.get(part, part)
        for before, part in zip(["", *command], command, strict=False)
    ]
    more = [] if "--stats" in parts and verb != "pareto" else SMALLER.get("kl" if "kl" in parts else verb, [])
    return [*parts, *more]


README = commands(PAGES[0])
CALIBRATE = next(command for command in README if command[0] == "calibrate")
COMPRESS = next(command for command in README if command[0] == "compress")
OTHERS = [command for command in README if command not in (CALIBRATE, COMPRESS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and samples, and what the first commands of README.md make of them: statistics and a checkpoint."""
    home = tmp_path_factory.mktemp("pages")
    model = FAMILIES["llava"]()
    model.config.text_config.max_position_embeddings = 1024
    model.save_pretrained(home / "model")
    processor = llava_processor()
    processor.tokenizer.pad_token = processor.tokenizer.unk_token
    processor.save_pretrained(home / "model")
    (home / "words.txt").write_text(" ".join(f"w{(7 * i * i + 3 * i) % 115 + 2}" for i in range(6000)))
    image_folder(home / "images", 8)
    run(home, *real(CALIBRATE))
    run(home, *real(COMPRESS))
    return home


@pytest.mark.parametrize("number", range(len(OTHERS)), ids=lambda number: " ".join(OTHERS[number][:1]))
def test_commands_of_readme(folder, number):
    if OTHERS[number][0] == "report" and not (folder / "FRONT" / "results.json").exists():  # made elsewhere
        made = next(command for command in OTHERS if command[0] == "pareto")
        run(folder, *real(made))
    run(folder, *real(OTHERS[number], f"small-{number}"))
    if "--json" in OTHERS[number]:
        assert (folder / "results.json").exists()
        assert "## Measured" in (folder / "small" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_commands_of_docs(folder, page):
    listed = commands(page)
    if not listed:
        pytest.skip("names none that runs here")
    for number, command in enumerate(listed):
        run(folder, *real(command, f"{page.stem}-{number}"))


def test_readme_names_the_verbs():
    assert {command[0] for command in README} == {
        "anatomy", "recipes", "calibrate", "plan", "compress", "inspect", "evaluate", "bench", "pareto", "report",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_code_of_docs(folder, page):
    found = [block for block in blocks(page, "python") if not ELSEWHERE.search(block)]
    suites = blocks(page, "yaml")
    if not found and not suites:
        pytest.skip("has none that runs here")
    for number, block in enumerate(found):
        (folder / f"{page.stem}-{number}.py").write_text(block)
        run_file(folder, f"{page.stem}-{number}.py")
    for block in suites:
        (folder / "suite.yaml").write_text(block)
        assert Suite.read(folder / "suite.yaml").tasks


@pytest.mark.slow
def test_python_of_readme_as_it_stands(tmp_path):
    (block,) = blocks(PAGES[0], "python")
    (tmp_path / "block.py").write_text(block)
    run_file(tmp_path, "block.py")
    assert {path.name for path in tmp_path.iterdir()} == {"block.py", "small", "small.stats"}
