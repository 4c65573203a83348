"""The model card that `save` writes, and the measured results that are added to it."""

from pathlib import Path

import pytest
from huggingface_hub.repocard import metadata_load

from compressed import factored
from families import FAMILIES
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
    small = compress(
        model, tmp_path / "a", recipe="svd", retain=0.5,
        changes={"allocation.places": ["backbone", "connector"], "storage.pivoted": True},
    )  # fmt: skip
    card = (tmp_path / "a" / "README.md").read_text()
    layers = {name: module for name, module in small.named_modules() if type(module).__name__ == "LowRankLinear"}
    rows = {cells[0]: cells[1:] for line in card.splitlines() if len(cells := line.strip("| ").split(" | ")) == 8}
    for place, part in (("connector", "multi_modal_projector"), ("backbone", "language_model")):
        inside = [layer for name, layer in layers.items() if part in name]
        ranks = sorted(layer.rank for layer in inside)
        pivoted = sum(layer.pivots is not None for layer in inside)
        assert rows[place][2:5] == [str(len(inside)), str(pivoted), "0"]
        assert rows[place][5] == f"{ranks[0]} / {ranks[len(ranks) // 2]} / {ranks[-1]}"
    assert rows["tower"][1:5] == [rows["tower"][0], "0", "0", "0"]
    assert rows["tower"][5:] == ["–", "100.0%"]
    assert f"with {len(layers)} of its linear layers" in card
    assert "name: svd" in card
    assert "AutoModelForImageTextToText" in card


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
