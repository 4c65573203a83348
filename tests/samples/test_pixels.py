"""Image files as RGB: depth, orientation, modes, and what cannot be read."""

import base64
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from helpers.samples import noise, write_jsonl
from spectrim.errors import SampleError
from spectrim.evaluate import load_questions
from spectrim.samples import load_images
from spectrim.samples.pixels import open_image, opener, to_rgb

RAMP = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
ORIENTATION = 0x0112


def saved(folder: Path, image: Image.Image, name: str, **options) -> Path:
    image.save(folder / name, **options)
    return folder / name


def pixels(path: Path) -> np.ndarray:
    """By a folder of images, the same by a file of questions."""
    (sample,) = load_images(str(path.parent), samples=1, seed=0)
    row = {"image": path.name, "question": "q", "answer": "a"}
    (question,) = load_questions(write_jsonl(path.parent / "questions.jsonl", [row]), 1, 0)
    assert np.array_equal(sample.images[0], question.image)
    assert sample.images[0].mode == "RGB"
    return np.asarray(sample.images[0])


def png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """An RGB file with these rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "values", "white"),
    [
        ("grey16.png", RAMP, 65535),
        ("dark16.png", (RAMP // 400).astype(np.uint16), 65535),  # the depth counts and not the content
        ("grey16.tiff", RAMP, 65535),
        ("big16.tiff", RAMP.astype(">u2"), 65535),
        ("int32.tiff", RAMP.astype(np.int32), 65535),
        ("small32.tiff", (RAMP // 257).astype(np.int32), 255),
        ("unit.tiff", (RAMP / 65535).astype(np.float32), 1),
        ("float8.tiff", (RAMP / 257).astype(np.float32), 255),
        ("float16.tiff", RAMP.astype(np.float32), 65535),
    ],
)
def test_deep_images_are_scaled_and_not_cut_off_at_white(tmp_path, name, values, white):
    got = pixels(saved(tmp_path, Image.fromarray(values), name))
    expected = np.rint(values.astype(np.float64) / white * 255)
    assert np.abs(got.astype(int) - expected[..., None]).max() <= 1
    assert (got[..., 0] == got[..., 1]).all()


def test_colour_of_16_bits_keeps_its_high_bytes(tmp_path):
    """Pillow writes no such file; this one is put together by hand."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 65536, (5, 7, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(png(7, 5, 16, rows))
    assert np.abs(pixels(tmp_path / "a.png").astype(int) - values.astype(int) / 257).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff", "a.webp"])
def test_images_are_turned_as_transformers_turns_them(tmp_path, orientation, name):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    path = saved(tmp_path, noise(0, 24, 16), name, exif=tags)
    got = pixels(path)
    assert got.shape == ((24, 16, 3) if orientation > 4 else (16, 24, 3))
    assert np.array_equal(got, load_image(str(path)))


@pytest.mark.parametrize("orientation", [3, 6])
def test_deep_images_are_turned_as_well(tmp_path, orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    values = RAMP[:, :48]
    turned = np.rot90(values, 2 if orientation == 3 else -1)
    got = pixels(saved(tmp_path, Image.fromarray(values), "a.png", exif=tags))
    assert np.array_equal(got[..., 0], np.rint(turned / 257))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "PA", "RGBa", "RGBX"])
def test_other_modes_become_rgb_as_pillow_converts_them(mode):
    image = noise(0).convert({"PA": "P", "RGBa": "RGBA"}.get(mode, "RGB")).convert(mode)
    assert np.array_equal(to_rgb(image), image.convert("RGB"))


def test_alpha_is_dropped_as_transformers_drops_it(tmp_path):
    image = noise(0).convert("RGBA")
    image.putalpha(Image.fromarray(np.asarray(noise(1))[..., 0]))
    path = saved(tmp_path, image, "a.png")
    assert np.array_equal(pixels(path), load_image(str(path)))
    palette = saved(tmp_path / "..", noise(0).convert("P"), "p.png", transparency=bytes(range(200)))
    assert np.array_equal(open_image(palette, "p"), Image.open(palette).convert("RGBA").convert("RGB"))


def test_a_moving_image_is_its_first_frame(tmp_path):
    first, second = noise(0).convert("P"), noise(1).convert("P")
    path = saved(tmp_path, first, "a.gif", save_all=True, append_images=[second, second])
    with Image.open(path) as image:
        assert image.n_frames > 1
        assert np.array_equal(pixels(path), load_image(image))


def damaged(kind: str) -> tuple[bytes, str]:
    content = io.BytesIO()
    if kind == "negative":
        Image.fromarray(np.full((4, 4), -3.0, np.float32)).save(content, "TIFF")
        return content.getvalue(), "values from -3 to -3 have no known scale"
    if kind == "not a number":
        Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(content, "TIFF")
        return content.getvalue(), "no known scale"
    if kind == "too large":
        return png(60_000, 60_000, 8, b""), "decompression bomb"
    if kind == "no pixels":
        return png(0, 5, 8, b""), "cannot be read"
    noise(0, 64, 64).save(content, "PNG" if kind != "truncated jpeg" else "JPEG")
    whole = content.getvalue()
    if kind == "empty":
        return b"", "cannot identify"
    return whole[: len(whole) // 2], "cannot be read"


@pytest.mark.parametrize(
    "kind", ["truncated png", "truncated jpeg", "negative", "not a number", "no pixels", "too large", "empty"]
)
def test_what_cannot_be_read_is_named(tmp_path, kind):
    content, reason = damaged(kind)
    (tmp_path / "odd.png").write_bytes(content)
    samples = load_images(str(tmp_path), samples=1, seed=0)
    with pytest.raises(SampleError, match=r"odd\.png cannot be read as an image") as error:
        samples[0]
    assert reason in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_ways_to_name_an_image(tmp_path):
    path = saved(tmp_path, noise(0), "a picture.png")
    coded = base64.b64encode(path.read_bytes()).decode()
    for named in (
        "a picture.png",
        str(path),
        path.as_uri(),
        f"data:image/png;base64,{coded}",
        {"url": f"data:image/png;base64,{coded}"},
        {"path": "a picture.png"},
        {"base64": coded},
        {"bytes": path.read_bytes(), "path": None},
    ):
        assert np.array_equal(opener(named, tmp_path, "line 1")(), noise(0))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("https://example.org/a.png", r"address https://example\.org/a\.png; download it"),
        ("deeper", "is a folder"),
        ("no.png", "does not exist"),
        ("a\0b.png", "does not exist"),
        ("x" * 5000, "does not exist"),
        ("", "write its path"),
        (7, "by int '7'; write its path"),
        ({}, "write its path"),
        ({"url": 3}, "write its path"),
        ("data:image/png,plain", "not base64"),
        ("data:image/png;base64,###", "cannot be read"),
    ],
)
def test_images_that_cannot_be_found_name_the_line(tmp_path, named, message):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "s.jsonl").write_text(json.dumps({"images": [named]}) + "\n")
    with pytest.raises(SampleError, match=message) as error:
        load_images(str(tmp_path / "s.jsonl"), samples=1, seed=0)
    assert "s.jsonl, line 1" in str(error.value)
