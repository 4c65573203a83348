"""Drawing: coloured shapes, rendered words and icons on a 112x112 canvas, from a seeded generator alone."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 112  # pixels, both sides of every image
_SCALE = 2  # drawn at twice the size and averaged down, which smooths the edges
GRID = 4  # objects sit in the cells of a 4x4 grid, so that they never overlap

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (40, 80, 210),
    "yellow": (240, 215, 30),
    "orange": (255, 127, 14),
    "purple": (130, 60, 180),
    "pink": (247, 140, 190),
    "brown": (130, 80, 45),
    "black": (20, 20, 20),
    "cyan": (30, 200, 215),
}
BACKGROUNDS = ((255, 255, 255), (235, 235, 225), (205, 215, 225), (225, 210, 205), (210, 225, 205), (175, 175, 175))
QUARTERS = (("top left", "top right"), ("bottom left", "bottom right"))


def _regular(corners: int, turn: float = 0.0, inner: float | None = None) -> tuple[tuple[float, float], ...]:
    """Corner points on the unit circle; `inner` adds points at that radius in between (a star)."""
    steps = corners if inner is None else 2 * corners
    radii = [1.0 if inner is None or i % 2 == 0 else inner for i in range(steps)]
    return tuple((r * sin(2 * pi * i / steps + turn), -r * cos(2 * pi * i / steps + turn)) for i, r in enumerate(radii))


def _heart() -> tuple[tuple[float, float], ...]:
    angles = np.linspace(0, 2 * pi, 40, endpoint=False)
    x = 16 * np.sin(angles) ** 3 / 17
    y = -(13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)) / 17
    return tuple(zip(x.tolist(), y.tolist(), strict=True))


_THIRD = 0.34
_CROSS = tuple(
    (x, y)
    for x, y in (
        (-_THIRD, -1), (_THIRD, -1), (_THIRD, -_THIRD), (1, -_THIRD), (1, _THIRD), (_THIRD, _THIRD),
        (_THIRD, 1), (-_THIRD, 1), (-_THIRD, _THIRD), (-1, _THIRD), (-1, -_THIRD), (-_THIRD, -_THIRD),
    )
)  # fmt: skip
SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": _regular(48),
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": _regular(3),
    "star": _regular(5, inner=0.42),
    "cross": _CROSS,
    "heart": _heart(),
    "diamond": ((0, -1), (0.62, 0), (0, 1), (-0.62, 0)),
    "hexagon": _regular(6, turn=pi / 6),
}


@dataclass(frozen=True)
class Item:
    """One shape of a scene: its cell in the 4x4 grid and its radius in pixels."""

    shape: str
    colour: str
    row: int
    column: int
    radius: float

    @property
    def name(self) -> str:
        """Colour and shape, as a question says it."""
        return f"{self.colour} {self.shape}"

    @property
    def quarter(self) -> str:
        """The quarter of the image that it is in."""
        return QUARTERS[2 * self.row // GRID][2 * self.column // GRID]


def _canvas(rng: np.random.Generator) -> Image.Image:
    colour = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    return Image.new("RGB", (SIZE * _SCALE, SIZE * _SCALE), colour)


def _finish(canvas: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Average down to SIZE and add faint pixel noise, so that no two images are equal."""
    pixels = np.asarray(canvas.reduce(_SCALE), dtype=np.int16)
    noise = rng.integers(-6, 7, pixels.shape, dtype=np.int16)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def draw_scene(items: list[Item], rng: np.random.Generator) -> Image.Image:
    """Draw the items, each with a small random shift inside its cell and a small random turn."""
    canvas = _canvas(rng)
    pen = ImageDraw.Draw(canvas)
    cell = SIZE / GRID
    for item in items:
        slack = max(0.0, cell / 2 - item.radius)
        dx, dy = rng.uniform(-slack, slack, 2)
        cx, cy = (item.column + 0.5) * cell + dx, (item.row + 0.5) * cell + dy
        turn = rng.uniform(-0.2, 0.2)
        points = [
            (
                _SCALE * (cx + item.radius * (x * cos(turn) - y * sin(turn))),
                _SCALE * (cy + item.radius * (x * sin(turn) + y * cos(turn))),
            )
            for x, y in SHAPES[item.shape]
        ]
        pen.polygon(points, fill=COLOURS[item.colour])
    return _finish(canvas, rng)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels carry FreeType and one scalable font
    return font


def draw_word(word: str, row: int, column: int, rng: np.random.Generator) -> Image.Image:
    """Render a word of at most GRID letters, widely spaced: one letter to a cell, from the given cell to the right."""
    canvas = _canvas(rng)
    pen = ImageDraw.Draw(canvas)
    colour = list(COLOURS.values())[rng.integers(len(COLOURS))]
    font = _font(int(rng.integers(22, 28)) * _SCALE)
    cell = SIZE / GRID
    for index, letter in enumerate(word):
        dx, dy = rng.uniform(-1.5, 1.5, 2)
        place = (_SCALE * ((column + index + 0.5) * cell + dx), _SCALE * ((row + 0.5) * cell + dy))
        pen.text(place, letter, font=font, fill=colour, anchor="mm")
    return _finish(canvas, rng)


@cache
def icon_names() -> tuple[str, ...]:
    """Names of the packaged icons, sorted (Noto Emoji, Apache-2.0)."""
    return tuple(sorted(p.name.removesuffix(".png") for p in files(__package__).joinpath("icons").iterdir()))


@cache
def _icon(name: str) -> Image.Image:
    with files(__package__).joinpath("icons", f"{name}.png").open("rb") as stream:
        return Image.open(stream).convert("RGBA")


def draw_icon(name: str, rng: np.random.Generator) -> Image.Image:
    """Place an icon at a random size and place, with a small random turn and a random mirror image."""
    canvas = _canvas(rng)
    icon = _icon(name)
    if rng.random() < 0.5:
        icon = icon.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = int(rng.integers(44, 90)) * _SCALE
    icon = icon.resize((side, side)).rotate(rng.uniform(-15, 15), resample=Image.Resampling.BILINEAR)
    room = canvas.width - side
    canvas.paste(icon, (int(rng.integers(room)), int(rng.integers(room))), icon)
    return _finish(canvas, rng)
