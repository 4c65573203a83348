"""One writer at a time in a statistics directory, in processes of their own: locks, kills, left-overs, full disks."""

import os
import time
from pathlib import Path

import pytest
import torch

from helpers.calibrated import assert_same_bits, named, tiny
from helpers.forks import Fork, run_ranks
from helpers.samples import word_tokenizer
from spectrim.calibrate import Statistics, calibrate, run
from spectrim.calibrate.manifest import MANIFEST
from spectrim.disk.lock import LOCK, writing
from spectrim.errors import StatisticsError
from spectrim.pipeline import compress

SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from spectrim.errors import SpectrimError
from helpers.calibrated import tiny
from helpers.samples import word_tokenizer
import torch
OPTIONS = {{"processor": word_tokenizer(), "text": {words!r}, "samples": 4, "seqlen": 8, "batch_size": 1}}
def said(*words):
    print(*words, flush=True)
try:
    {body}
except SpectrimError as error:
    said(type(error).__name__, error)
"""
CALIBRATE = """
    from spectrim import calibrate
    from spectrim.calibrate import run
    run._SNAPSHOT_SHARE = float("inf")
    def progress(done, total):
        said(done)
        if done >= 2:
            time.sleep({sleep})
    calibrate(tiny("llama", torch.float32), {out!r}, **OPTIONS, checkpoint_seconds=0, progress=progress)
    said("done")
"""


def process(words: str, body: str, **options: object) -> Fork:
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), words=words, body=body.format(**options).strip())
    return Fork("-c", script)


def options(words: str) -> dict:
    return {"processor": word_tokenizer(), "text": words, "samples": 4, "seqlen": 8, "batch_size": 1}


def test_a_second_writer_is_told_at_once_and_a_dead_one_leaves_no_lock(words, tmp_path):
    out, whole, model = tmp_path / "s", tmp_path / "whole", tiny("llama", torch.float32)
    calibrate(model, whole, **options(words))
    first = process(words, CALIBRATE, out=str(out), sleep=600)
    try:
        assert [first.stdout.readline() for _ in range(3)] == ["0\n", "1\n", "2\n"]
        with pytest.raises(
            StatisticsError, match=rf"another process \({first.process.pid}\) writes to .*s; wait until"
        ):
            calibrate(model, out, **{**options(words), "text": "no file of that name"})  # before samples are loaded
        with pytest.raises(StatisticsError, match="run the same spectrim calibrate command"):
            Statistics.open(out)  # readers need no lock
        (out / ".manifest.json.abc.part").write_bytes(b"of a writer that lives")
        with pytest.raises(StatisticsError, match="another process"), writing(out, alone=True):
            pass
        assert (out / ".manifest.json.abc.part").exists()
    finally:
        first.process.kill()
        first.done()
    (out / "text.model.layers.0.g000099.safetensors").write_bytes(b"of a snapshot that was not finished")
    seen = []
    calibrate(model, out, **options(words), progress=lambda done, _: seen.append(done))
    assert seen[0] > 0  # it went on
    assert_same_bits(whole, out)
    assert {path.name for path in out.iterdir()} == named(out)


COMPRESS = """
    from spectrim import compress
    from spectrim.metrics import spectra
    real = spectra.write_sealed
    def slow(*given, **options):
        said("writes")
        time.sleep(0.02)
        real(*given, **options)
    spectra.write_sealed = slow
    changes = {{"compensate.kind": "anchored"}}
    compress(tiny("llama", torch.float32), recipe="svd-llm", retain=0.5, stats={out!r}, changes=changes,
        processor=OPTIONS["processor"])
    said("done")
"""


def cached(directory: Path) -> dict[str, bytes]:
    found = [path for part in ("spectra", "compensated") for path in (directory / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def test_two_compressions_of_one_directory_run_side_by_side(words, tmp_path):
    out, alone = tmp_path / "s", tmp_path / "alone"
    for directory in (out, alone):
        calibrate(tiny("llama", torch.float32), directory, **options(words))
    both = [process(words, COMPRESS, out=str(out)) for _ in range(2)]
    for one in both:
        done = one.done()
        assert done.stdout.splitlines()[-1:] == ["done"], done.stderr
    given = {"changes": {"compensate.kind": "anchored"}, "processor": word_tokenizer()}
    compress(tiny("llama", torch.float32), recipe="svd-llm", retain=0.5, stats=alone, **given)
    assert {name.partition("/")[0] for name in cached(alone)} == {"spectra", "compensated"}
    files = [path.name for path in out.rglob("*") if path.name.endswith(".part")]
    assert files == []
    assert len(cached(out)) == len(cached(alone))
    compress(tiny("llama", torch.float32), recipe="svd-llm", retain=0.5, stats=out, **given)  # and all can be read


def test_left_overs_of_a_killed_compression_go_and_those_of_a_live_one_stay(words, tmp_path):
    out = tmp_path / "s"
    calibrate(tiny("llama", torch.float32), out, **options(words))
    (out / "spectra" / "key").mkdir(parents=True)
    left = out / "spectra" / "key" / ".x.safetensors.abc.part"
    left.write_bytes(b"half")
    with writing(out, alone=False):  # takes the first one's away
        assert not left.exists()
        left.write_bytes(b"half")
        with writing(out, alone=False):
            assert left.exists()
        with pytest.raises(StatisticsError, match="another process writes to"), writing(out, alone=True):
            pass
    with writing(out, alone=True):
        assert not left.exists()
    calibrate(tiny("llama", torch.float32), out, **options(words))  # finished: nothing to write, nothing to wait for
    with writing(out, alone=False):
        calibrate(tiny("llama", torch.float32), out, **options(words))


FULL = """
    import resource
    from spectrim import calibrate, compress
    for limit, call in {calls!r}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            eval(call)
            said("done")
        except SpectrimError as error:
            said(type(error).__name__, error)
"""


def moments(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def test_a_full_disk_while_moments_are_written_is_a_sentence_and_leaves_the_snapshot(words, tmp_path):
    """A limit on the size of files fails in the same calls as a full disk does: in the manifest, then in moments."""
    out, model = tmp_path / "s", tiny("llama", torch.float32)

    class StopError(Exception):
        pass

    def stop(done, _total):
        if done == 3:
            raise StopError

    given = {"checkpoint_seconds": 0, **options(words)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_SNAPSHOT_SHARE", float("inf"))
        with pytest.raises(StopError):
            calibrate(model, out, **given, progress=stop)
    before = moments(out)
    assert before
    call = f'calibrate(tiny("llama", torch.float32), {str(out)!r}, **OPTIONS)'
    failed = process(words, FULL, calls=[(1000, call), (20_000, call)])
    messages = failed.done().stdout.splitlines()
    assert len(messages) == 2
    assert all(line.startswith(f"StatisticsError {out} cannot be written (") for line in messages)
    assert all("make room" in line for line in messages)
    assert moments(out) == before
    assert {path.name for path in out.iterdir()} == before.keys() | {MANIFEST, LOCK}
    calibrate(model, out, **given)
    calibrate(model, tmp_path / "whole", **given)
    assert_same_bits(out, tmp_path / "whole")


def test_a_full_disk_while_spectra_and_compensated_blocks_are_written_is_a_sentence(words, tmp_path):
    out = tmp_path / "s"
    calibrate(tiny("llama", torch.float32), out, **options(words))
    plain, anchored = (
        f'compress(tiny("llama", torch.float32), recipe="svd-llm", retain=0.5, stats={str(out)!r}, '
        f'processor=OPTIONS["processor"], changes={{"compensate.kind": {kind!r}}})'
        for kind in ("none", "anchored")
    )
    failed = process(words, FULL, calls=[(9000, plain), (-1, plain), (9000, anchored), (-1, anchored)])
    first, second, third, fourth = failed.done().stdout.splitlines()
    assert second == fourth == "done"
    for message, part in ((first, "spectra"), (third, "compensated")):
        assert message.startswith(f"StatisticsError {out / part}/")
        assert "cannot be written (" in message
    assert not [path for path in out.rglob("*") if path.name.endswith(".part")]


def test_a_directory_that_may_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StatisticsError, match="cannot be written"), writing(tmp_path / "file" / "s", alone=True):
        pass


def _rank(rank: int, store: str, out: str, words: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with pytest.raises(StatisticsError, match="another process"):
        calibrate(tiny("llama"), Path(out), **options(words))
    torch.distributed.destroy_process_group()


def test_all_processes_of_a_run_learn_that_another_writes(words, tmp_path):
    with writing(tmp_path / "s", alone=True):
        start = time.monotonic()
        run_ranks(_rank, str(tmp_path / "store"), str(tmp_path / "s"), words)
    assert time.monotonic() - start < 60


def test_children_that_outlive_a_writer_hold_no_lock_and_release_none(tmp_path):
    read, write = os.pipe()
    held = writing(tmp_path, alone=True)
    held.__enter__()
    if (worker := os.fork()) == 0:
        os.read(read, 1)
        os._exit(0)
    if (leaver := os.fork()) == 0:
        held.__exit__(None, None, None)
        os._exit(0)
    try:
        os.waitpid(leaver, 0)
        with pytest.raises(StatisticsError, match="another process"), writing(tmp_path, alone=True):
            pass
        held.__exit__(None, None, None)
        with writing(tmp_path, alone=True):
            pass
    finally:
        os.write(write, b"x")
        os.waitpid(worker, 0)
        os.close(read)
        os.close(write)
