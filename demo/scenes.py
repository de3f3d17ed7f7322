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
# Fractions of the shorter image side. The gap keeps "small" and "large" apart after the squash to a square.
RADIUS = {"small": (0.064, 0.078), "large": (0.122, 0.145)}
SIDE_PX = (120, 160)        # native width and height; never the model's input size, so the resize is exercised


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
    """Draws scenes until one has room for all its objects."""
    while True:
        scene = _try_scene(rng)
        if scene is not None:
            return scene


def _try_scene(rng):
    width, height = rng.randint(*SIDE_PX), rng.randint(*SIDE_PX)
    n_groups = rng.choices((1, 2, 3), (0.25, 0.6, 0.15))[0]
    layout = rng.choice(("row", "column", "row", "column", "free")) if n_groups == 2 else "free"
    placed, groups, seen = [], [], set()
    for index in range(n_groups):
        shape, colour = _kind(rng, groups, seen)
        seen.add((shape, colour))
        count = rng.randint(1, COUNT_MAX if n_groups < 3 else 2)
        size = rng.choice(SIZES)
        radius = rng.uniform(*RADIUS[size])
        box = _half(layout, index)
        centres = _place(rng, placed, count, radius, box, (width, height))
        if centres is None:
            return None
        groups.append(Group(shape, colour, size, count, radius, tuple(centres)))
    return Scene(tuple(groups), layout, rng.choice(BACKGROUNDS), width, height)


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
    """(x0, y0, x1, y1): the part of the frame that a group's centres may use."""
    if layout == "row":
        return (0.0, 0.0, 0.48, 1.0) if index == 0 else (0.52, 0.0, 1.0, 1.0)
    if layout == "column":
        return (0.0, 0.0, 1.0, 0.48) if index == 0 else (0.0, 0.52, 1.0, 1.0)
    return (0.0, 0.0, 1.0, 1.0)


def _place(rng, placed, count, radius, box, size):
    """Centres that neither overlap nor touch the border; None when 40 tries find no room for one of them."""
    width, height = size
    short = min(width, height)
    rx, ry = 1.1 * radius * short / width, 1.1 * radius * short / height
    centres = []
    for _ in range(count):
        for _ in range(40):
            x = rng.uniform(box[0] + rx, box[2] - rx)
            y = rng.uniform(box[1] + ry, box[3] - ry)
            if all(math.hypot((x - px) * width, (y - py) * height) > 1.15 * (radius + pr) * short
                   for px, py, pr in placed):
                placed.append((x, y, radius))
                centres.append((x, y))
                break
        else:
            return None
    return centres


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


def patch_targets(scene: Scene, grid: int) -> np.ndarray:
    """What each patch shows, int8 [5, grid, grid]: shape, colour, size, count of its group, place; 0 is background.

    Labels for a throw-away head in training. Place: 1 left, 2 right, 3 above, 4 below (of the other group).
    """
    out = np.zeros((5, grid, grid), np.int8)
    short = min(scene.width, scene.height)
    for index, group in enumerate(scene.groups):
        place = {"row": 1 + index, "column": 3 + index}.get(scene.layout, 0)
        label = (1 + SHAPES.index(group.shape), 1 + COLOUR_NAMES.index(group.colour), 1 + SIZES.index(group.size),
                 group.count, place)
        rx, ry = group.radius * short / scene.width, group.radius * short / scene.height
        for x, y in group.centres:
            # Patches whose centre lies inside the object, and always the one that holds its centre.
            rows = [r for r in range(grid) if abs((r + 0.5) / grid - y) < ry * 0.9] + [int(y * grid)]
            cols = [c for c in range(grid) if abs((c + 0.5) / grid - x) < rx * 0.9] + [int(x * grid)]
            for r in rows:
                out[:, r, cols] = np.array(label, np.int8)[:, None]
    return out


def whole_targets(scene: Scene) -> np.ndarray:
    """int8 [1 + shapes*colours]: the background's index, then how many objects there are of each kind."""
    out = np.zeros(1 + len(SHAPES) * len(COLOUR_NAMES), np.int8)
    out[0] = BACKGROUNDS.index(scene.background)
    for group in scene.groups:
        out[1 + SHAPES.index(group.shape) * len(COLOUR_NAMES) + COLOUR_NAMES.index(group.colour)] = group.count
    return out
