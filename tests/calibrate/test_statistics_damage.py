"""Statistics that changed since they were written: moments, manifest, spectra, compensated blocks."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.calibrated import tiny
from helpers.samples import WORDS, word_tokenizer
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate
from spectrim.calibrate.manifest import MANIFEST, Gathered
from spectrim.calibrate.moments import Sums
from spectrim.calibrate.snapshot import SnapshotStore
from spectrim.errors import NumericalError, SampleError, StatisticsError
from spectrim.maths.sums import Gram
from spectrim.pipeline import compress, compression

FILE = "text.model.layers.0"
LINEAR = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory) -> Path:
    """Statistics with spectra and compensated blocks of one recipe."""
    path = tmp_path_factory.mktemp("finished")
    given = {"processor": word_tokenizer(), "text": words, "samples": 8, "seqlen": 8}  # too many for rows
    calibrate(tiny("llama", torch.float32), path / "s", **given, gradients=True, curvature=True)
    compressed(path / "s")
    return path / "s"


@pytest.fixture
def statistics(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "s")
    return tmp_path / "s"


def compressed(directory: Path, kind: str = "anchored") -> Any:
    given = {"stats": directory, "processor": word_tokenizer(), "changes": {"compensate.kind": kind}, "retain": 0.5}
    return compress(tiny("llama", torch.float32), recipe="svd-llm", **given)


def file_of(directory: Path, beginning: str = FILE) -> Path:
    return next(iter(sorted(directory.glob(f"{beginning}.*"))))


def sealed(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as somebody would who knows how it is sealed."""
    content = json.loads((directory / MANIFEST).read_text())
    change(content)
    content.pop("digest", None)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (directory / MANIFEST).write_text(json.dumps(content | {"digest": digest}))


def gathered(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the manifest says of text."""
    sealed(directory, lambda content: change(content["gathered"]["text"]))


def rewritten(directory: Path, change: Callable[[dict[str, torch.Tensor]], None], beginning: str = FILE) -> None:
    """Change the tensors of a file, and the manifest with it."""
    path = file_of(directory, beginning)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    known = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    def update(content: dict[str, Any]) -> None:
        for unit in content["gathered"].values():
            for file in unit["files"].values():
                file.update(known if file["name"] == path.name else {})

    sealed(directory, update)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def moved_out(directory: Path, name: str) -> None:
    """Beside the directory, where the manifest says that it is."""
    path = file_of(directory)
    path.rename(directory.parent / path.name)
    gathered(directory, lambda text: text["files"]["model.layers.0"].update(name=name.format(path)))


def linked_out(directory: Path) -> None:
    path = file_of(directory)
    path.rename(directory.parent / path.name)
    path.symlink_to(directory.parent / path.name)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "byte": (lambda d: flip(file_of(d), -1000), r"layers\.0.*has changed since it was written; delete"),
    "header": (lambda d: flip(file_of(d), 30), r"layers\.0.*has changed since it was written"),
    "gradients": (lambda d: flip(file_of(d, "text-gradients.model.layers.1"), -9), r"text-grad.*has changed since"),
    "swapped": (lambda d: swap(file_of(d), file_of(d, "text.model.layers.1")), "has changed since"),
    "up": (
        lambda d: moved_out(d, "../{0.name}"),
        "manifest.json is damaged at 'gathered.text.files.model.layers.0.name'",
    ),
    "absolute": (
        lambda d: moved_out(d, "{0}"),
        "manifest.json is damaged at 'gathered.text.files.model.layers.0.name'",
    ),
    "link": (linked_out, r"layers\.0.*is a link"),
    "folder": (lambda d: (file_of(d).unlink(), file_of(d, "text.model.layers.1").rename(d / f"{FILE}.x")), "missing"),
    "digit": (lambda d: flip(d / MANIFEST, (d / MANIFEST).read_bytes().index(b'"seed": 0') + 8), "has changed since"),
    "no digest": (lambda d: (d / MANIFEST).write_text(json.dumps(unsealed(d))), "has changed since it was written"),
    "count": (
        lambda d: gathered(d, lambda text: text["counts"].update({LINEAR: 0})),
        "is damaged at 'gathered.text.counts",
    ),
    "negative": (
        lambda d: gathered(d, lambda text: text["counts"].update({LINEAR: -3})),
        "is damaged at 'gathered.text.c",
    ),
    "stranger": (
        lambda d: gathered(d, lambda text: text["counts"].update(attic=3)),
        r"is damaged \(attic is missing from a part",
    ),
    "lost owner": (lambda d: gathered(d, lambda text: text["owners"].update({LINEAR: "attic"})), r"is damaged \(attic"),
    "lost unit": (
        lambda d: sealed(d, lambda content: content["gathered"].pop("text")),
        r"is damaged \(text is missing from a part",
    ),
    "form": (lambda d: sealed(d, lambda content: content["forms"].update({LINEAR: "round"})), "'round' is no form"),
    "parameter": (
        lambda d: sealed(d, lambda c: c["model"]["tensors"].update(x="float32")),
        "is damaged at 'model.tensors.x'",
    ),
    "shape": (
        lambda d: rewritten(d, lambda t: t.update({f"{LINEAR}.second": torch.eye(3).double()})),
        r"does not hold the",
    ),
    "dtype": (lambda d: rewritten(d, lambda t: t.update({k: x.float() for k, x in t.items()})), "holds moments in F32"),
    "missing": (
        lambda d: rewritten(d, lambda t: t.pop(f"{LINEAR}.second.half")),
        r"does not hold the moments.*down_proj.second",
    ),
    "extra": (lambda d: rewritten(d, lambda t: t.update(attic=torch.ones(2).double())), r"does not hold.*attic"),
    "twice": (
        lambda d: (d / MANIFEST).write_text((d / MANIFEST).read_text()[:-2] + ',"version":3}'),
        "'version' twice",
    ),
    "deep": (lambda d: (d / MANIFEST).write_text("[" * 10**5), "nested too deeply"),
    "latin": (lambda d: (d / MANIFEST).write_bytes(b'{"format": "\xe9"}'), "is not UTF-8"),
    "former": (
        lambda d: sealed(d, lambda c: c.update(version=2)),
        r"statistics format 2 and this spectrim reads 5; delete",
    ),
}


def unsealed(directory: Path) -> dict[str, Any]:
    content = json.loads((directory / MANIFEST).read_text())
    del content["digest"]
    return content


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_changed_in_a_directory_is_found_when_it_is_opened(damage, statistics):
    change, message = DAMAGES[damage]
    change(statistics)
    with pytest.raises(StatisticsError, match=message) as found:
        Statistics.open(statistics)
    assert "\n" not in str(found.value)
    assert str(statistics) in str(found.value)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("damage", ["byte", "up", "link", "count", "dtype"])
def test_a_calibration_does_not_go_on_from_what_changed(damage, complete, statistics):
    change, message = DAMAGES[damage]
    sealed(statistics, lambda content: content.update(complete=complete))
    change(statistics)
    words = statistics.parent / "words.txt"
    words.write_text(WORDS)
    given = {"processor": word_tokenizer(), "text": str(words), "samples": 8, "seqlen": 8}
    before = {path: path.read_bytes() for path in statistics.rglob("*.*s*")}  # all but the lock
    with pytest.raises(StatisticsError, match=message):
        calibrate(tiny("llama", torch.float32), statistics, **given, gradients=True, curvature=True)
    assert {path: path.read_bytes() for path in statistics.rglob("*.*s*")} == before


def read_all(directory: Path) -> None:
    opened = Statistics.open(directory)
    for read in (opened.moment, opened.output, opened.gradient):
        read(LINEAR, "text")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["second.half", "traces", "output.half", "fisher_cols"])
def test_moments_that_are_not_finite_name_their_linear(part, value, statistics):
    beginning = FILE if part == "second.half" else "text-gradients.model.layers.0"
    rewritten(statistics, lambda t: t[f"{LINEAR}.{part}"].flatten()[1:2].fill_(value), beginning)
    with pytest.raises(NumericalError, match=rf"{LINEAR}\.{part.removesuffix('.half')} in .* holds NaN or infinity"):
        read_all(statistics)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("second.half", lambda t: t[2:3].fill_(-1.0)),  # the second entry of the diagonal
        ("abs_sum", lambda t: t[3:4].fill_(-1.0)),
        ("output.half", lambda t: t[5:6].fill_(-1.0)),
        ("traces", lambda t: t.neg_()),
        ("fisher_cols", lambda t: t[0:1].fill_(-1.0)),
    ],
)
def test_moments_that_are_no_sums_of_squares_are_refused(part, change, statistics):
    beginning = FILE if part in ("second.half", "abs_sum") else "text-gradients.model.layers.0"
    rewritten(statistics, lambda t: change(t[f"{LINEAR}.{part}"]), beginning)
    with pytest.raises(
        StatisticsError, match=rf"holds no sum of squares in {LINEAR}\.{part.removesuffix('.half')}; delete"
    ):
        read_all(statistics)


def resaved(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Other tensors under the header of the file."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=header)


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "emptied": lambda path, other: path.write_bytes(b""),
    "cut": lambda path, other: path.write_bytes(path.read_bytes()[:-8]),
    "no tensors": lambda path, other: save_file({}, path),
    "no tensors under its header": lambda path, other: resaved(path, dict.clear),
    "byte": lambda path, other: flip(path, -5),
    "header": lambda path, other: flip(path, path.read_bytes().index(b"of") + 8),
    "tensor": lambda path, other: resaved(path, lambda tensors: next(iter(tensors.values())).add_(1)),
    "another's": lambda path, other: shutil.copyfile(other, path),
    "folder": lambda path, other: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", ["spectra", "compensated"])
def test_what_changed_in_spectra_and_compensated_blocks_is_found(part, change, statistics):
    files = sorted((statistics / part).rglob("*.safetensors"))
    blocks = [path for path in files if path.name.startswith("model.layers.1")]
    CHANGES[change](blocks[0], files[0])
    with pytest.raises(StatisticsError, match=r"cannot be read .*; delete it and compress again") as found:
        compressed(statistics, "none" if part == "spectra" else "anchored")
    assert str(blocks[0]) in str(found.value)
    assert "\n" not in str(found.value)


def test_spectra_of_another_key_are_not_taken(statistics):
    (key,) = (statistics / "spectra").iterdir()
    compress(tiny("llama", torch.float32), recipe="asvd", retain=0.5, stats=statistics)
    (other,) = (path for path in (statistics / "spectra").iterdir() if path != key)
    shutil.rmtree(other)
    shutil.copytree(key, other)
    with pytest.raises(StatisticsError, match=f"it is that of {key.name}/"):
        compress(tiny("llama", torch.float32), recipe="asvd", retain=0.5, stats=statistics)


def test_what_was_deleted_is_made_again(statistics):
    expected = compressed(statistics).state_dict()
    for part in ("spectra", "compensated"):
        shutil.rmtree(statistics / part)
        again = compressed(statistics).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    assert len(list((statistics / "spectra").rglob("*.safetensors"))) == len(anatomy(tiny("llama")).linears)


def test_a_moment_over_no_position_is_none(statistics, tmp_path):
    """As where all positions of a linear are padding; what was written opens again."""
    manifest = Statistics.open(statistics).manifest
    fresh = {"gathered": {unit: Gathered() for unit in manifest.gathered}, "complete": False}
    store, sums = (
        SnapshotStore(tmp_path / "new", manifest.model_copy(update=fresh)),
        Sums(torch.device("cpu"), batches=1),
    )
    width = anatomy(tiny("llama")).linear(LINEAR).in_features
    sums.owners[LINEAR] = LINEAR
    sums.moment(LINEAR, width)
    store.save({"text": sums}, finished=True, complete=True)
    assert Statistics.open(tmp_path / "new").moment(LINEAR, "text") is None


def test_samples_that_are_needed_again_are_found_from_every_folder_and_missed_at_once(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("words.txt").write_text(WORDS)
    given = {"processor": word_tokenizer(), "text": "words.txt", "samples": 4, "seqlen": 8, "curvature": False}
    calibrate(tiny("llama", torch.float32), "s", **given)
    monkeypatch.chdir(tmp_path / "there")
    compressed(Path("../here/s"))
    (tmp_path / "here" / "words.txt").unlink()
    monkeypatch.setattr("spectrim.pipeline.run.make_spectra", None)  # which takes long
    for rule, kind in (("uniform", "anchored"), ("adacr", "none")):
        changes = {"compensate.kind": kind, "allocation.rule": rule}
        prepared = compression(tiny("llama", torch.float32), "svd-llm", stats="../here/s", changes=changes)
        with pytest.raises(SampleError, match=r"of ../here/s are needed again, and /.*words.txt is gone"), prepared:
            pass


def test_a_directory_of_the_format_before_opens_with_the_same_moments(statistics):
    """Format 4 kept matrices, symmetric up to rounding."""
    expected = Statistics.open(statistics)

    def spread(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".half")]:
            matrix = Gram.of_half(tensors.pop(name)).dense()
            skew = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0)).double().tril(-1) * 1e-9
            tensors[name.removesuffix(".half")] = matrix + skew - skew.T

    for path in sorted(statistics.glob("*.safetensors")):
        rewritten(statistics, spread, path.name.removesuffix(".safetensors"))
    sealed(statistics, lambda content: content.update(version=4))
    found = Statistics.open(statistics)
    for name in expected.manifest.blocks:
        for read in ("moment", "output"):
            one, other = (getattr(x, read)(name, "text") for x in (found, expected))
            one, other = (x.second if read == "moment" else x.sums["output"] for x in (one, other))
            assert torch.equal(one, one.T)
            torch.testing.assert_close(one, other)
