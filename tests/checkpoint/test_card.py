"""The model card that `save` writes, and the measured results that are added to it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.repocard import metadata_load

from compressed import factored
from families import FAMILIES
from spectrim.anatomy import anatomy
from spectrim.checkpoint import add_results, load, save
from spectrim.errors import CheckpointError
from spectrim.pipeline import compress

BASE = "---\nlicense: other\nlicense_name: tongyi\nlanguage: [en]\nbase_model: a/b\n---\n\n# Model seven\n\nText.\n"


def dense_copy(directory: Path, card: str | None = BASE) -> Path:
    FAMILIES["llama"]().save_pretrained(directory)
    if card is not None:
        (directory / "README.md").write_text(card)
    return directory


def test_the_card_says_what_the_plan_did(tmp_path: Path) -> None:
    """Counts by place are those of the layers that the checkpoint really holds."""
    model = FAMILIES["llava"]()
    linears = anatomy(model).linears
    small = compress(
        model, tmp_path / "a", recipe="svd", retain=0.5,
        changes={"allocation.places": ["backbone", "connector"], "storage.pivoted": True},
    )  # fmt: skip
    card = (tmp_path / "a" / "README.md").read_text()
    layers = {name: module for name, module in small.named_modules() if type(module).__name__ == "LowRankLinear"}
    rows = {cells[0]: cells[1:] for line in card.splitlines() if len(cells := line.strip("| ").split(" | ")) == 5}
    for place, part in (("connector", "multi_modal_projector"), ("backbone", "language_model")):
        inside = [layer for name, layer in layers.items() if part in name]
        ranks = sorted(layer.rank for layer in inside)
        number = sum(linear.place == place for linear in linears)
        dense = [f"{number - len(inside)} dense"] if number > len(inside) else []
        assert rows[place][0] == str(number)
        assert rows[place][1] == ", ".join([*dense, f"{len(inside)} low-rank"])
        assert rows[place][2] == f"{ranks[0]} / {ranks[len(ranks) // 2]} / {ranks[-1]}"
    number = rows["tower"][0]
    assert rows["tower"] == [number, f"{number} dense", "–", "100.0%"]
    assert f"with {len(layers)} of its linear layers" in card
    assert "name: svd" in card
    assert "AutoModelForImageTextToText" in card


def test_the_card_names_what_no_sample_reaches(tmp_path: Path) -> None:
    model = FAMILIES["llava"]()
    names = [f"model.vision_tower.layers.{number}" for number in range(7)]
    save(factored("llava", model), tmp_path / "a", provenance={"unreached": names})
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"7 linears are dense because no calibration sample reaches them: `{names[0]}`, " in card
    assert "and 2 more." in card
    save(factored("llava"), tmp_path / "b", provenance={"unreached": []})
    assert "no calibration sample" not in (tmp_path / "b" / "README.md").read_text()


def test_licence_and_language_come_from_the_card_of_the_base_model(tmp_path: Path) -> None:
    dense = dense_copy(tmp_path / "dense")
    small = compress(load(dense), tmp_path / "small", recipe="svd", retain=0.5)
    assert small.name_or_path == str(dense)
    matter = metadata_load(tmp_path / "small" / "README.md")
    assert (matter["license"], matter["license_name"], matter["language"]) == ("other", "tongyi", ["en"])
    assert "base_model" not in matter  # the base of the base, and the directory is on no hub
    card = (tmp_path / "small" / "README.md").read_text()
    assert "# Model seven, compressed by spectrim" in card
    assert str(tmp_path) not in card
    assert "names no licence" not in card


@pytest.mark.parametrize("card", [None, "no front matter", "---\n: : [\n---\n", "---\n- list\n---\n"])
def test_a_base_model_without_a_usable_card(tmp_path: Path, card: str | None) -> None:
    compress(load(dense_copy(tmp_path / "dense", card)), tmp_path / "small", recipe="svd", retain=0.5)
    assert "license" not in metadata_load(tmp_path / "small" / "README.md")
    text = (tmp_path / "small" / "README.md").read_text()
    assert "# dense, compressed by spectrim" in text
    assert "names no licence" in text


def test_a_hub_id_is_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot in the local cache stands for the hub; named by its id and by its directory."""
    snapshot = tmp_path / "models--somebody--llama-3" / "snapshots" / ("0" * 40)
    dense_copy(snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for number, source in enumerate(("somebody/llama-3", snapshot)):
        compress(load(source), tmp_path / str(number), recipe="svd", retain=0.5)
        matter = metadata_load(tmp_path / str(number) / "README.md")
        assert (matter["base_model"], matter["license"]) == ("somebody/llama-3", "other")
    again = save(load(tmp_path / "0"), tmp_path / "again")  # as after fine-tuning
    matter = metadata_load(again / "README.md")
    assert (matter["base_model"], matter["license"]) == ("somebody/llama-3", "other")
    assert "# llama-3, compressed by spectrim" in (again / "README.md").read_text()


def test_what_the_record_does_not_hold_is_not_said(tmp_path: Path) -> None:
    card = (save(factored("llama"), tmp_path / "a") / "README.md").read_text()
    for heading in ("What was kept", "Recipe", "Predicted loss"):
        assert heading not in card
    record = {"recipe": "mine", "retention": {"bytes": 0.25, "by": "hand"}, "predicted_loss": {"text": 0.5}}
    card = (save(factored("llama"), tmp_path / "b", provenance=record) / "README.md").read_text()
    assert "25.00%" in card
    assert "text 0.5000" in card
    tuned = save(factored("llama"), tmp_path / "d", provenance={**record, "fine_tuned": {"steps": 7}})
    card = (tuned / "README.md").read_text()
    assert "trained after compression: steps 7." in card
    assert "Predicted loss" not in card
    dense = (save(FAMILIES["llama"](), tmp_path / "c") / "README.md").read_text()
    assert "import spectrim" not in dense


def test_a_card_of_the_users_own_is_kept(tmp_path: Path) -> None:
    directory = save(factored("llama"), tmp_path / "a", files={"README.md": "mine"})
    assert (directory / "README.md").read_text() == "mine"


EVIL = "Model [seven](http://evil.example) <script>alert(1)</script> `code` | \x1b[31m\u202e https://evil.example"


@pytest.mark.parametrize("title", [EVIL, "x" * 5000, "](javascript:1) ![](http://evil.example/track.png)"])
def test_titles_of_others_are_shown_and_do_nothing(tmp_path: Path, title: str) -> None:
    dense = dense_copy(tmp_path / "dense", f"---\nlicense: mit\n---\n\n# {title}\n")
    small = save(compress(load(dense), recipe="svd", retain=0.5), tmp_path / "small")
    card = (small / "README.md").read_text()
    body = card.split("---\n", 2)[2]
    assert "\x1b" not in card
    assert "\u202e" not in card
    for mark in ("<script", "](http", "](javascript", "![", " `code`", " https://evil"):
        assert re.search(rf"(?<!\\){re.escape(mark)}", body) is None, mark
    heading = next(line for line in body.splitlines() if line.startswith("# "))
    assert len(heading) < 300
    again = save(load(small), tmp_path / "again")  # a title that was escaped before is not escaped twice
    assert heading in (again / "README.md").read_text().splitlines()


@pytest.mark.parametrize(
    "matter",
    [
        {"license": "mit\n# Heading"},
        {"license": ["mit", "<b>x</b>"]},
        {"license": {"a": 1}},
        {"license": 3},
        {"license": "other", "license_link": "javascript:alert(1)"},
        {"license": "other", "license_link": "http://evil.example/x y"},
        {"license": "other", "license_link": "https://evil.example/](x)"},
        {"license": "other", "license_link": "//evil.example/x"},
        {"license": "other", "license_link": "/home/user/LICENSE"},
        {"license": "other", "license_name": "a\x1b[31mb"},
        {"license": "other", "language": ["en", "<b>"]},
        {"license": "other", "language": {"a": [1] * 9}},
    ],
)
def test_terms_of_another_form_are_left_out(tmp_path: Path, matter: dict[str, Any]) -> None:
    text = yaml.safe_dump(matter)
    dense = dense_copy(tmp_path / "dense", f"---\n{text}---\n\n# Model\n")
    compress(load(dense), tmp_path / "small", recipe="svd", retain=0.5)
    stored = metadata_load(tmp_path / "small" / "README.md")
    good = {"license": "other"} if matter["license"] == "other" else {}
    assert {
        key: stored[key] for key in ("license", "license_name", "license_link", "language") if key in stored
    } == good


def test_terms_of_the_usual_forms_are_kept(tmp_path: Path) -> None:
    link = "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE"
    for number, terms in enumerate(
        ({"license": "apache-2.0"}, {"license": "other", "license_name": "qwen-research", "license_link": link},
         {"license": ["mit", "cc-by-4.0"], "license_link": "LICENSE", "language": ["en", "zh-Hant"]})
    ):  # fmt: skip
        dense = dense_copy(tmp_path / f"dense{number}", f"---\n{yaml.safe_dump(terms)}---\n")
        compress(load(dense), tmp_path / f"small{number}", recipe="svd", retain=0.5)
        stored = metadata_load(tmp_path / f"small{number}" / "README.md")
        assert {key: stored.get(key) for key in terms} == terms


@pytest.mark.parametrize("base", ["a/b](http://evil.example)", "a/b\n# x", ["a/b"], "a/b/c", "../x", 3, "<b>"])
def test_a_base_model_that_is_no_id_is_none(tmp_path: Path, base: Any) -> None:
    first = save(factored("llama"), tmp_path / "a")
    (first / "README.md").write_text(f"---\n{yaml.safe_dump({'base_model': base})}---\n\n# Title\n")
    card = save(load(first), tmp_path / "b") / "README.md"
    assert "base_model" not in metadata_load(card)
    assert "# Title, compressed by spectrim" in card.read_text()


def test_texts_of_the_record_do_not_end_what_holds_them(tmp_path: Path) -> None:
    name = "mine`\n```\n# Heading <script>"
    record = {
        "recipe": {"name": name, "summary": "````\n# Heading\n"},
        "data": {"text": "a`b\nc.txt", "images": None},
        "predicted_loss": {"text\n# Heading": 0.5},
        "fine_tuned": {"by\n# Heading": "<script>"},
    }
    card = (save(factored("llama"), tmp_path / "a", provenance=record) / "README.md").read_text()
    block = re.search(r"^(`{3,})yaml\n(.*?)^\1$", card, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert yaml.safe_load(block[2]) == record["recipe"]
    outside = card.replace(block[0], "")
    assert "\n# Heading" not in outside
    assert "<script" not in re.sub(r"`[^`\n]*`", "", outside).replace(r"\<script", "")  # code shows what it holds
    assert "from `ab c.txt`" in outside


def test_results_replace_those_of_before_and_nothing_else(tmp_path: Path) -> None:
    directory = save(factored("llama"), tmp_path / "a")
    before = (directory / "README.md").read_text()
    first = add_results(directory, "| a |").read_text()
    assert first.startswith(before.rstrip())
    (directory / "README.md").write_text(first + "\nMy own words.\n")
    second = add_results(directory, "| b |").read_text()
    assert second == first.replace("| a |", "| b |") + "\nMy own words.\n"
    (directory / "README.md").write_text("<!-- results by spectrim evaluate -->")
    with pytest.raises(CheckpointError, match="not"):
        add_results(directory, "| c |")
    with pytest.raises(CheckpointError, match=r"README\.md cannot be read"):
        add_results(tmp_path, "| c |")


@pytest.mark.parametrize("name", ["/gone/my-model", "a/b/c/d", "owner/<b>", "x\ny"])
def test_a_model_from_a_place_that_is_no_more_is_saved(name: str, tmp_path: Path) -> None:
    model = factored("llama")
    model.name_or_path = name
    card = (save(model, tmp_path / "a") / "README.md").read_text()
    assert "base_model" not in card
    assert "/gone" not in card


@pytest.mark.parametrize(("title", "shown"), [("www.evil.example", r"www\.evil"), ("a@evil.example", r"a\@evil")])
def test_bare_addresses_in_titles_are_no_links(title: str, shown: str, tmp_path: Path) -> None:
    model = factored("llama", load(dense_copy(tmp_path / "dense", f"# {title}\n")))
    card = save(model, tmp_path / "a") / "README.md"
    assert f"# {shown}" in card.read_text()
    again = save(load(tmp_path / "a"), tmp_path / "b") / "README.md"
    assert f"# {shown}" in again.read_text()
