"""Generated pictures with questions that need looking, after "Vision language models are blind" (Pooyan Rahmanzadehgervi,
Logan Bolton, Mohammad Reza Taesiri and Anh Totti Nguyen, 2024, arXiv 2407.06581): labels by construction, seeded.

Every picture is drawn four times too large and shrunk, so that edges are smooth.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIZE = 64  # pixels a side
FINE = 4  # times too large, while drawn
COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 150, 40),
    "blue": (30, 60, 220),
    "yellow": (240, 200, 0),
    "purple": (150, 30, 170),
    "black": (20, 20, 20),
}
KINDS = ("circle", "square", "triangle")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture and what can be asked about it: pairs of question and answer."""

    task: str
    image: Image.Image
    questions: tuple[tuple[str, str], ...]


class Canvas:
    """A white picture with coordinates in its own pixels."""

    def __init__(self) -> None:
        self.fine = Image.new("RGB", (SIZE * FINE, SIZE * FINE), "white")
        self.draw = ImageDraw.Draw(self.fine)

    def line(self, points: list[Point], colour: str, width: float) -> None:
        self.draw.line(_fine(points), fill=COLOURS[colour], width=round(width * FINE), joint="curve")

    def shape(self, kind: str, centre: Point, radius: float, colour: str) -> None:
        (x, y), fill = centre, COLOURS[colour]
        if kind == "circle":
            self.draw.ellipse(_fine([(x - radius, y - radius), (x + radius, y + radius)]), fill=fill)
        elif kind == "square":
            half = radius * 0.88
            self.draw.rectangle(_fine([(x - half, y - half), (x + half, y + half)]), fill=fill)
        else:
            corners = [(x, y - radius), (x - radius, y + radius * 0.8), (x + radius, y + radius * 0.8)]
            self.draw.polygon(_fine(corners), fill=fill)

    def ring(self, centre: Point, radius: float, colour: str, width: float) -> None:
        (x, y) = centre
        box = _fine([(x - radius, y - radius), (x + radius, y + radius)])
        self.draw.ellipse(box, outline=COLOURS[colour], width=round(width * FINE))

    def box(self, corner: Point, opposite: Point, colour: str, width: float) -> None:
        self.draw.rectangle(_fine([corner, opposite]), outline=COLOURS[colour], width=round(width * FINE))

    def letter(self, text: str, centre: Point, height: float, colour: str) -> None:
        font = ImageFont.load_default(size=height * FINE)
        self.draw.text(_fine([centre])[0], text, font=font, fill=COLOURS[colour], anchor="mm")

    @property
    def image(self) -> Image.Image:
        return self.fine.resize((SIZE, SIZE), Image.Resampling.BOX)


def crossing_lines(rng: random.Random) -> Scene:
    """Two lines of two straight parts each, over the same columns: they cross where their order changes."""
    crossings = rng.randrange(3)
    first = rng.choice((1, -1))
    orders = {0: (first, first, first), 1: (first, rng.choice((1, -1)), -first), 2: (first, -first, first)}[crossings]
    columns = (rng.uniform(4, 10), rng.uniform(27, 37), rng.uniform(54, 60))
    upper, lower = [], []
    for x, order in zip(columns, orders, strict=True):
        gap = rng.uniform(12, 32)
        middle = rng.uniform(5 + gap / 2, 59 - gap / 2)
        upper.append((x, middle - order * gap / 2))
        lower.append((x, middle + order * gap / 2))
    canvas, width = Canvas(), rng.uniform(1.5, 3)
    canvas.line(upper, "red", width)
    canvas.line(lower, "blue", width)
    return _scene("crossing_lines", canvas, ("How many times do the red and blue lines cross?", str(crossings)))


def touching_circles(rng: random.Random) -> Scene:
    """Two rings that overlap by at least three pixels, or are that far apart."""
    overlap = rng.random() < 0.5
    radii = (rng.uniform(8, 13), rng.uniform(8, 13))
    distance = sum(radii) + (-rng.uniform(3, 12) if overlap else rng.uniform(3, 12))
    while True:
        angle = rng.uniform(0, math.tau)
        x, y = rng.uniform(14, 50), rng.uniform(14, 50)
        other = (x + distance * math.cos(angle), y + distance * math.sin(angle))
        if all(13 <= coordinate <= 51 for coordinate in other):
            break
    canvas, width = Canvas(), rng.uniform(1.5, 3)
    for centre, radius, colour in zip(((x, y), other), radii, rng.sample(sorted(COLOURS), 2), strict=True):
        canvas.ring(centre, radius, colour, width)
    return _scene("touching_circles", canvas, ("Do the two circles overlap?", "yes" if overlap else "no"))


def counting(rng: random.Random) -> Scene:
    """Up to five shapes of each of one or two kinds, in places of their own."""
    kinds = rng.sample(KINDS, rng.randint(1, 2))
    numbers = {kind: rng.randint(1, 5) for kind in kinds}
    places = rng.sample([(row, column) for row in range(4) for column in range(4)], sum(numbers.values()))
    canvas = Canvas()
    for kind, (row, column) in zip((k for k in kinds for _ in range(numbers[k])), places, strict=True):
        centre = (8 + 16 * column + rng.uniform(-1.5, 1.5), 8 + 16 * row + rng.uniform(-1.5, 1.5))
        canvas.shape(kind, centre, rng.uniform(4.5, 6), rng.choice(sorted(COLOURS)))
    asked = [(f"How many {kind}s are there?", str(number)) for kind, number in numbers.items()]
    rng.shuffle(asked)
    return _scene("counting", canvas, *asked)


def colours(rng: random.Random) -> Scene:
    """One shape of each of one to three kinds, in colours of their own."""
    canvas, kinds = Canvas(), rng.sample(KINDS, rng.randint(1, 3))
    places = rng.sample([(x, y) for x in (17, 47) for y in (17, 47)], len(kinds))
    asked = []
    for kind, (x, y), colour in zip(kinds, places, rng.sample(sorted(COLOURS), len(kinds)), strict=True):
        canvas.shape(kind, (x + rng.uniform(-5, 5), y + rng.uniform(-5, 5)), rng.uniform(7, 11), colour)
        asked.append((f"What colour is the {kind}?", colour))
    rng.shuffle(asked)
    return _scene("colours", canvas, *asked)


def words(rng: random.Random) -> Scene:
    """One to three letters, any."""
    canvas, word = Canvas(), "".join(rng.choices(LETTERS, k=rng.randint(1, 3)))
    height, colour = rng.uniform(18, 22), rng.choice(("red", "green", "blue", "purple", "black"))
    x, y = 32 + rng.uniform(-2, 2), 32 + rng.uniform(-6, 6)
    for place, letter in enumerate(word):
        canvas.letter(letter, (x + 18 * (place - (len(word) - 1) / 2), y), height, colour)
    return _scene("words", canvas, ("Which letters are written?", word))


def grids(rng: random.Random) -> Scene:
    """Two to five rows and columns."""
    rows, columns = rng.randint(2, 5), rng.randint(2, 5)
    left, top = rng.uniform(3, 12), rng.uniform(3, 12)
    right, bottom = rng.uniform(52, 61), rng.uniform(52, 61)
    canvas, colour, width = Canvas(), rng.choice(("red", "green", "blue", "purple", "black")), rng.uniform(1.25, 2.25)
    for row in range(rows + 1):
        y = top + (bottom - top) * row / rows
        canvas.line([(left, y), (right, y)], colour, width)
    for column in range(columns + 1):
        x = left + (right - left) * column / columns
        canvas.line([(x, top), (x, bottom)], colour, width)
    asked = [("How many rows has the grid?", str(rows)), ("How many columns has the grid?", str(columns))]
    rng.shuffle(asked)
    return _scene("grids", canvas, *asked)


def nested_squares(rng: random.Random) -> Scene:
    """Two to five outlines, each within the one before."""
    number, width = rng.randint(2, 5), rng.uniform(1.25, 2)
    canvas = Canvas()
    left, top, side = rng.uniform(2, 6), rng.uniform(2, 6), rng.uniform(52, 55)
    for _ in range(number):
        canvas.box((left, top), (left + side, top + side), rng.choice(sorted(COLOURS)), width)
        step = rng.uniform(8, 11)
        left, top, side = left + step * rng.uniform(0.4, 0.6), top + step * rng.uniform(0.4, 0.6), side - step
    return _scene("nested_squares", canvas, ("How many squares are nested?", str(number)))


TASKS: dict[str, Callable[[random.Random], Scene]] = {
    task.__name__: task for task in (crossing_lines, touching_circles, counting, colours, words, grids, nested_squares)
}
SHARES = {"counting": 2, "colours": 2, "words": 2}  # of pictures of any task, in place of 1: these are learned last


def scene(seed: str, number: int, task: str = "") -> Scene:
    """The picture with this number under this seed, of any task or a given one; equal arguments draw equal pictures."""
    rng = random.Random(f"{seed}/{number}")
    shares = [SHARES.get(name, 1) for name in TASKS]
    return TASKS[task or rng.choices(list(TASKS), shares)[0]](rng)


def _scene(task: str, canvas: Canvas, *questions: tuple[str, str]) -> Scene:
    return Scene(task=task, image=canvas.image, questions=questions)


def _fine(points: list[Point]) -> list[Point]:
    return [(x * FINE, y * FINE) for x, y in points]
