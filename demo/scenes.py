"""Procedurally drawn scenes: what is in them, how they are drawn, how they are spoilt by noise.

A scene holds one to three groups of equal objects on a textured background. Everything is drawn from the
`random.Random` that the caller passes, so a seed fixes every pixel. Captions live in captions.py.
"""
import io
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 32, 36), "orange": (247, 138, 18), "yellow": (246, 226, 40), "green": (34, 160, 60),
    "blue": (36, 76, 214), "purple": (138, 44, 172), "white": (248, 248, 248), "black": (14, 14, 16),
}
COLOUR_NAMES = tuple(COLOURS)
SIZES = ("small", "large")
BACKGROUNDS = ("plain", "striped", "checkered", "dotted")
COUNT_MAX = 4
# Objects sit near the centres of a CELLS x CELLS grid, so that none overlap and each falls into one image patch.
CELLS, JITTER = 4, 0.025
# Fractions of the shorter image side. The gap keeps "small" and "large" apart after the squash to a square.
RADIUS = {"small": (0.060, 0.069), "large": (0.100, 0.112)}
SIDE_PX = (128, 160)        # native width and height; never the model's input size, so the resize is exercised


@dataclass(frozen=True)
class Group:
    """Equal objects: `centres` are (x, y) and `radius` is a fraction of the shorter side, all in 0..1."""

    shape: str
    colour: str
    size: str
    count: int
    radius: float
    centres: tuple


@dataclass(frozen=True)
class Scene:
    """Groups with distinct (shape, colour). `layout` row: group 0 is left of group 1; column: above it."""

    groups: tuple
    layout: str
    background: str
    width: int
    height: int


def sample_scene(rng: random.Random) -> Scene:
    """A random scene; two groups often stand side by side or one above the other, so that captions can say so."""
    n_groups = rng.choices((1, 2, 3), (0.25, 0.6, 0.15))[0]
    layout = rng.choice(("row", "column", "row", "column", "free")) if n_groups == 2 else "free"
    groups, seen, taken = [], set(), set()
    for index in range(n_groups):
        shape, colour = _kind(rng, groups, seen)
        seen.add((shape, colour))
        count, size = rng.randint(1, COUNT_MAX), rng.choice(SIZES)
        cells = rng.sample([c for c in _half(layout, index) if c not in taken], count)
        taken.update(cells)
        centres = tuple(tuple((c + 0.5) / CELLS + rng.uniform(-JITTER, JITTER) for c in cell) for cell in cells)
        groups.append(Group(shape, colour, size, count, rng.uniform(*RADIUS[size]), centres))
    return Scene(tuple(groups), layout, rng.choice(BACKGROUNDS), rng.randint(*SIDE_PX), rng.randint(*SIDE_PX))


def _kind(rng, groups, seen):
    """A new (shape, colour); often shares one of the two with an earlier group, to make binding matter."""
    while True:
        shape, colour = rng.choice(SHAPES), rng.choice(COLOUR_NAMES)
        if groups and rng.random() < 0.3:
            if rng.random() < 0.5:
                shape = groups[0].shape
            else:
                colour = groups[0].colour
        if (shape, colour) not in seen:
            return shape, colour


def _half(layout, index):
    """The cells (column, row) that a group may use."""
    half = range(CELLS // 2) if index == 0 else range(CELLS // 2, CELLS)
    columns = half if layout == "row" else range(CELLS)
    rows = half if layout == "column" else range(CELLS)
    return [(c, r) for c in columns for r in rows]


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene in RGB at its native size, before any camera noise."""
    noise = np.random.default_rng(rng.getrandbits(32))
    pixels = _background(scene, rng, noise)
    # Twice the size, then a box filter: Pillow's shapes have no antialiasing of their own.
    canvas = Image.fromarray(pixels).resize((scene.width * 2, scene.height * 2), Image.NEAREST)
    pen = ImageDraw.Draw(canvas)
    short = min(scene.width, scene.height) * 2
    for group in scene.groups:
        for x, y in group.centres:
            fill = tuple(max(0, min(255, c + rng.randint(-14, 14))) for c in COLOURS[group.colour])
            _shape(pen, group.shape, (x * scene.width * 2, y * scene.height * 2), group.radius * short, fill,
                   rng.uniform(-0.2, 0.2))
    return canvas.reduce(2)


def _background(scene, rng, noise):
    """A muted texture as uint8 [height, width, 3]: grey enough that all eight colours stand out."""
    base = np.array([rng.randint(95, 165)] * 3) + np.array([rng.randint(-12, 12) for _ in range(3)])
    y, x = np.mgrid[0:scene.height, 0:scene.width].astype(np.float32)
    angle, period = rng.uniform(0, math.pi), rng.uniform(11, 18)
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    if scene.background == "striped":
        wave = np.sign(np.sin(2 * math.pi * u / period))
    elif scene.background == "checkered":
        wave = np.sign(np.sin(math.pi * u / period) * np.sin(math.pi * v / period))
    elif scene.background == "dotted":
        du, dv = u % period - period / 2, v % period - period / 2
        wave = np.where(du * du + dv * dv < (0.27 * period) ** 2, 1.6, -0.4)
    else:
        wave = np.zeros_like(u)
    contrast = rng.choice((-1, 1)) * rng.uniform(14, 24)
    grain = noise.normal(0, rng.uniform(0, 5), (scene.height, scene.width, 3))
    pixels = base[None, None] + contrast * wave[..., None] + grain
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _shape(pen, shape, centre, radius, fill, tilt):
    cx, cy = centre
    box = (cx - radius, cy - radius, cx + radius, cy + radius)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=max(2, round(radius * 0.42)))
    else:
        pen.polygon([(cx + radius * px * math.cos(tilt) - radius * py * math.sin(tilt),
                      cy + radius * px * math.sin(tilt) + radius * py * math.cos(tilt))
                     for px, py in OUTLINES[shape]], fill=fill)


def _star_outline():
    points = []
    for k in range(10):
        r = 1.12 if k % 2 == 0 else 0.46
        points.append((r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5)))
    return points


OUTLINES = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -1.08), (1.05, 0.85), (-1.05, 0.85)],
    "cross": [(-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34),
              (0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34)],
    "star": _star_outline(),
}


def jpeg_bytes(image: Image.Image, rng: random.Random) -> bytes:
    """Camera noise: sometimes a light blur, always JPEG at a random quality."""
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=rng.randint(35, 92))
    return buffer.getvalue()


def patch_targets(scene: Scene) -> np.ndarray:
    """What each cell holds, int8 [5, CELLS, CELLS]: shape, colour, size, count of its group, place; 0 is background.

    Labels for a throw-away head in training. Place: 1 left, 2 right, 3 above, 4 below (of the other group).
    """
    out = np.zeros((5, CELLS, CELLS), np.int8)
    for index, group in enumerate(scene.groups):
        place = {"row": 1 + index, "column": 3 + index}.get(scene.layout, 0)
        label = (1 + SHAPES.index(group.shape), 1 + COLOUR_NAMES.index(group.colour), 1 + SIZES.index(group.size),
                 group.count, place)
        for x, y in group.centres:
            out[:, int(y * CELLS), int(x * CELLS)] = label
    return out


def whole_targets(scene: Scene) -> np.ndarray:
    """int8 [1 + shapes*colours]: the background's index, then how many objects there are of each kind."""
    out = np.zeros(1 + len(SHAPES) * len(COLOUR_NAMES), np.int8)
    out[0] = BACKGROUNDS.index(scene.background)
    for group in scene.groups:
        out[1 + SHAPES.index(group.shape) * len(COLOUR_NAMES) + COLOUR_NAMES.index(group.colour)] = group.count
    return out
