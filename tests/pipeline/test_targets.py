"""Where a checkpoint may be written: nothing is lost, and killed runs leave nothing behind."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compressed import factored
from families import FAMILIES
from spectrim.checkpoint import check_target, load, read_provenance, save
from spectrim.errors import CheckpointError
from spectrim.pipeline import compress


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(factored("llama"), tmp_path_factory.mktemp("written") / "small", files={"plan.json": "{}\n"})


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "out"))


def content(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def refused(target: str | Path, match: str, **options: object) -> None:
    """The target is refused by `check_target` and by `save`, and nothing around it changes."""
    around = Path(target).absolute().parent
    before = content(around) if around.is_dir() else {}
    with pytest.raises(CheckpointError, match=match):
        check_target(target, **{"overwrite": True, **options})
    if "protected" not in options:
        with pytest.raises(CheckpointError, match=match):
            save(FAMILIES["llama"](), target, **{"overwrite": True, **options})
    assert before == (content(around) if around.is_dir() else {})


def test_nothing_that_exists_is_touched_without_overwrite(checkpoint: Path, tmp_path: Path) -> None:
    refused(checkpoint, "not empty, it holds a checkpoint.*--overwrite", overwrite=False)
    (checkpoint / "notes.txt").write_text("mine")
    refused(checkpoint, r"not empty.*notes\.txt", overwrite=False)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter").touch()
    refused(foreign, "not empty and was not written by spectrim", overwrite=False)
    (tmp_path / "empty").mkdir()
    assert check_target(tmp_path / "empty", overwrite=False) == tmp_path / "empty"
    save(FAMILIES["llama"](), tmp_path / "empty")
    assert read_provenance(tmp_path / "empty")


def test_with_overwrite_what_spectrim_wrote_is_replaced(checkpoint: Path) -> None:
    save(FAMILIES["llama"](), checkpoint, overwrite=True)
    assert not (checkpoint / "plan.json").exists()
    assert sorted(read_provenance(checkpoint)["files"]) == sorted(content(checkpoint))


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "adapter/adapter_model.safetensors", "stats/manifest.json", "empty/", ".git/config", "x.safetensors"],
)
def test_with_overwrite_foreign_things_are_never_removed(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    if name.endswith("/"):
        path.mkdir()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    refused(checkpoint, f"'{name.split('/')[0]}'|'{name}'")


def test_a_foreign_directory_is_never_emptied(tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    for record in ("{}", "[]", '{"files": 3, "spectrim_version": "1"}', "[" * 100_000, '{"a": 1, "a": 2}'):
        (foreign / "spectrim.json").write_text(record)
        refused(foreign, "not written by spectrim")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file")


def test_records_of_before_name_only_what_was_added(checkpoint: Path) -> None:
    """Those checkpoints hold what a model is made of, and may be replaced where that is all."""
    record = checkpoint / "spectrim.json"
    record.write_text('{"spectrim_version": "0.1.0", "files": ["plan.json", "mine.txt"]}')
    (checkpoint / "mine.txt").touch()
    assert check_target(checkpoint, overwrite=True) == checkpoint
    (checkpoint / "notes.txt").touch()
    refused(checkpoint, r"'notes\.txt'")


def test_no_target_is_holds_or_lies_in_what_a_run_reads(checkpoint: Path, tmp_path: Path) -> None:
    stats, plan = tmp_path / "stats", checkpoint / "plan.json"
    stats.mkdir()
    for protected in (checkpoint, tmp_path, plan, str(plan), checkpoint / ".." / "out"):
        refused(checkpoint, "name a directory apart from it", protected=[stats, protected])
    refused(stats / "out", "lies in", protected=[stats])
    link = tmp_path / "link"
    link.symlink_to(checkpoint)
    refused(checkpoint, "which this run reads", protected=[link])
    assert (
        check_target(checkpoint, overwrite=True, protected=[stats, "somebody/model", tmp_path / "none"]) == checkpoint
    )


def test_a_model_does_not_replace_the_files_it_came_from(checkpoint: Path, tmp_path: Path) -> None:
    before = content(checkpoint)
    model = load(checkpoint)
    with pytest.raises(CheckpointError, match=r"out is .*out, which this run reads"):
        save(model, checkpoint, overwrite=True)
    dense = save(FAMILIES["llama"](), tmp_path / "dense")
    with pytest.raises(CheckpointError, match="which this run reads"):
        compress(str(dense), dense, recipe="svd", retain=0.6, overwrite=True, processor=object())
    assert content(checkpoint) == before
    assert not (dense / "plan.json").exists()


def test_the_current_directory_stays(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    for target in (".", checkpoint, "../out", checkpoint.parent, "/"):
        with pytest.raises(CheckpointError, match="current directory"):
            check_target(target, overwrite=True)
    (checkpoint / "deep").mkdir()
    monkeypatch.chdir(checkpoint / "deep")
    with pytest.raises(CheckpointError, match="current directory"):
        check_target("..", overwrite=True)
    assert check_target("fresh", overwrite=False) == checkpoint / "deep" / "fresh"


def test_a_link_is_not_followed_to_what_it_names(checkpoint: Path, tmp_path: Path) -> None:
    for name, to in (("link", checkpoint), ("dangling", tmp_path / "none")):
        (tmp_path / name).symlink_to(to)
        refused(tmp_path / name, "is a link to")
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")  # a link on the way is another matter
    assert save(FAMILIES["llama"](), tmp_path / "data" / "new") == tmp_path / "disk" / "new"


def test_targets_that_cannot_be_are_known_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (
        tmp_path / "file" / "out",
        "/proc/out",
        "/dev/null/out",
        tmp_path / ("x" * 300),
        "a\0b",
        "~nobody_/x",
    ):
        with pytest.raises(CheckpointError, match="name another directory"):
            check_target(target, overwrite=False)
    assert check_target(tmp_path / "deep" / "er" / "out", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_directory_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, target = FAMILIES["llama"](), tmp_path / "late"
    really = model.save_pretrained

    def slowly(*args: object, **kwargs: object) -> None:
        really(*args, **kwargs)
        shutil.copytree(checkpoint, target)

    monkeypatch.setattr(model, "save_pretrained", slowly)
    with pytest.raises(CheckpointError, match="not empty"):
        save(model, target)
    assert content(target) == content(checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late", "out"]


def test_permissions_are_the_usual_ones(tmp_path: Path) -> None:
    former = os.umask(0o027)
    try:
        directory = save(FAMILIES["llama"](), tmp_path / "a")
    finally:
        os.umask(former)
    assert directory.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o640}


# ---- left-overs of killed runs ----


def leave(target: Path, kind: str, source: Path | None = None) -> Path:
    path = target.with_name(f".{target.name}.0123abcd.{kind}")
    return Path(shutil.copytree(source, path)) if source else (path.mkdir(), path)[1]


def test_left_overs_are_removed_and_other_things_are_not(checkpoint: Path, tmp_path: Path) -> None:
    left = [leave(checkpoint, "tmp"), leave(checkpoint, "old", checkpoint)]
    others = [leave(tmp_path / "other", "tmp"), tmp_path / ".out.old", tmp_path / ".out.notes.tmp"]
    for path in others:
        path.mkdir(exist_ok=True)
    save(FAMILIES["llama"](), checkpoint, overwrite=True)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


def test_a_checkpoint_that_was_just_taken_away_comes_back(checkpoint: Path, tmp_path: Path) -> None:
    """As after a kill between the two renamings."""
    before = content(checkpoint)
    leave(checkpoint, "tmp", checkpoint)
    checkpoint.rename(tmp_path / ".out.0123abcd.old")
    with pytest.raises(CheckpointError, match="not empty"):
        check_target(checkpoint, overwrite=False)
    assert content(checkpoint) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_live_process_writes_is_left_alone(tmp_path: Path) -> None:
    busy = leave(tmp_path / "out", "tmp")
    descriptor = os.open(busy, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        save(FAMILIES["llama"](), tmp_path / "out")
        assert busy.is_dir()
    finally:
        os.close(descriptor)
    check_target(tmp_path / "out", overwrite=True)
    assert not busy.exists()


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
from families import FAMILIES
from spectrim.checkpoint import save
model = FAMILIES["llama"]()
model.save_pretrained = lambda *args, **kwargs: (print("writing", flush=True), time.sleep(60))
save(model, sys.argv[1])
"""


def test_a_killed_run_is_cleaned_up_by_the_next_and_not_while_it_runs(tmp_path: Path) -> None:
    target = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(target), str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        check_target(target, overwrite=False)
        assert len(list(tmp_path.iterdir())) == 1  # it still runs
        process.kill()
    time.sleep(0.01)
    check_target(target, overwrite=False)
    assert not list(tmp_path.iterdir())
