"""Image files as RGB with 8 bits, upright, as transformers' own loader opens them."""

import base64
import io
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image, ImageOps

from spectrim.errors import SampleError, first_line

_SCALES = (1.0, 255.0, 65535.0)  # possible values of white where the mode does not define it


def opener(named: Any, base: Path | None, where: str) -> Callable[[], Image.Image]:
    """A function that opens an image that a row names by path or address (``file:``, ``data:``), or holds.

    Args:
        named: of the row; content is bytes, or ``{"bytes": ...}``.
        base: the folder that paths are relative to; None where there are no files.
        where: the row, for errors.

    Raises:
        SampleError: there is no such image; a broken one is only found when it is opened.
    """
    if isinstance(named, bytes):
        return partial(open_image, named, f"an image of {where}")
    if isinstance(named, dict):
        if isinstance(data := named.get("bytes"), bytes):
            return partial(open_image, data, f"an image of {where}")
        keys = [key for key in ("base64", "url", "path", "image") if isinstance(named.get(key), str)]
        if keys:
            return opener(("data:;base64," if keys[0] == "base64" else "") + named[keys[0]], base, where)
    if not isinstance(named, str) or not named:
        raise SampleError(f"{where} names an image by {type(named).__name__} {str(named)[:40]!r}; write its path")
    if named.startswith("data:"):
        return partial(open_image, _decoded(named, where), f"an image of {where}")
    if named.startswith(("http://", "https://")) and base is not None:
        raise SampleError(f"{where} names an image by the address {named[:80]}; download it and write its path")
    if base is None:
        raise SampleError(f"{where} holds no images but names such as {named[:80]!r}; give a data set of images")
    path = Path(unquote(urlsplit(named).path) if named.startswith("file:") else named)
    path = base / (path.expanduser() if path.parts[:1] == ("~",) else path)  # ~a.png is a name like any other
    try:
        if path.is_dir():
            raise SampleError(f"{where} names the image '{named}', which is a folder; name an image in it")
        there = path.is_file()
    except (OSError, ValueError):  # a name that is too long or holds a null byte
        there = False
    if not there:
        raise SampleError(f"{where} names the image '{named[:200]}', which does not exist; correct the path")
    return partial(open_image, path, f"{path} ({where})")


def open_image(origin: Path | bytes, label: str) -> Image.Image:
    """An image file, or its content, as RGB; the first frame of several.

    Raises:
        SampleError: it is no image, broken, too large, or of a mode that cannot be shown in RGB; names ``label``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on large images and on damaged metadata that changes no pixel
            with Image.open(io.BytesIO(origin) if isinstance(origin, bytes) else origin) as image:
                return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise errors of many kinds; the cause stays chained
        raise SampleError(f"{label} cannot be read as an image ({first_line(error)}); repair or remove it") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB with 8 bits; alpha is dropped. Deeper ones are scaled: Pillow would clip them.

    Raises:
        ValueError: the mode has no RGB, or its values no scale.
    """
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct way
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    scales = _SCALES[2:] if image.mode.startswith("I;16") else _SCALES[1:] if image.mode == "I" else _SCALES
    white = next((scale for scale in scales if high <= scale), None)
    if white is None or not low >= 0:
        raise ValueError(f"its values from {low:g} to {high:g} have no known scale")
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8)).convert("RGB")


def _decoded(address: str, where: str) -> bytes:
    head, comma, data = address.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("it is not base64")
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise SampleError(f"{where} has an image as data that cannot be read ({error}); write its path") from error
