"""What charts share: colours and shapes that all eyes tell apart, scales, labels that keep apart, whole files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import cos, exp, expm1, log, log1p, pi, sin
from pathlib import Path
from typing import Any

import altair as alt

from leadline.store.files import replacing

# Of methods; a GPU's has its colour's other shape.
LOOKS = {
    "exact": ("#000000", "circle"),
    "flat": ("#56B4E9", "square"),
    "ivf-flat": ("#0072B2", "triangle-up"),
    "ivf-pq": ("#CC79A7", "diamond"),
    "hnsw": ("#D55E00", "triangle-down"),
    "hnsw-sq8": ("#E69F00", "triangle-right"),
    "hnswlib": ("#009E73", "triangle-left"),
    "gpu-flat": ("#56B4E9", "cross"),
    "gpu-ivf-flat": ("#0072B2", "cross"),
    "gpu-ivf-pq": ("#CC79A7", "cross"),
    "cagra": ("#009E73", "cross"),
}
# Okabe and Ito's colours ("Color universal design", 2008), told apart by all eyes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#999999"
FONT_SIZE = 11
CHARACTER = 6.4  # pixels of a character, at most on average
MARGIN = 7  # pixels around a point that no label may cover
SCALE = 2  # pixels of a PNG for one of the chart
STEPS = (0.0, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
RESOLUTION = 0.001  # of a share: below it the distance from 1 is drawn in proportion, above it by its logarithm
APART = 18  # pixels between ticks
Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """From values to pixels, from `low` at 0 to `high` at `length`, by what `forward` makes of them."""

    low: float
    high: float
    length: float
    forward: Callable[[float], float]
    backward: Callable[[float], float]

    def pixel(self, value: float) -> float:
        return self.length * (self.forward(value) - self._first) / self._span

    def value(self, pixel: float) -> float:
        return self.backward(self._first + self._span * pixel / self.length)

    @property
    def _first(self) -> float:
        return self.forward(self.low)

    @property
    def _span(self) -> float:
        return self.forward(self.high) - self._first


def log_scale(values: Sequence[float], length: float) -> Scale:
    """Of positive values, with room on both sides."""
    low, high = min(values), max(values)
    room = (high / low) ** 0.08 * 1.1
    return Scale(low / room, high * room, length, log, exp)


def miss_scale(misses: Sequence[float], length: float) -> Scale:
    """Of what shares lack to 1, stretched towards 0: a logarithm that is linear below RESOLUTION."""

    def forward(miss: float) -> float:
        return log1p(miss / RESOLUTION) if miss >= 0 else -log1p(-miss / RESOLUTION)

    def backward(value: float) -> float:
        return RESOLUTION * expm1(value) if value >= 0 else -RESOLUTION * expm1(-value)

    span = forward(max(*misses, RESOLUTION))
    return Scale(backward(-0.08 * span), backward(1.08 * span), length, forward, backward)


def miss_ticks(scale: Scale) -> list[float]:
    """Round values of a `miss_scale` that keep apart."""
    ticks: list[float] = []
    for step in STEPS:
        if step <= scale.high and (not ticks or scale.pixel(step) - scale.pixel(ticks[-1]) >= APART):
            ticks.append(step)
    return ticks


def log_ticks(scale: Scale) -> list[float]:
    """1, 2 and 5 times powers of ten within a `log_scale`; where that is too many, the powers alone."""
    powers = range(-9, 13)
    ticks = [m * 10.0**power for power in powers for m in (1, 2, 5)]
    within = [tick for tick in ticks if scale.low <= tick <= scale.high]
    if len(within) * 3 * APART > scale.length:
        within = [10.0**power for power in powers if scale.low <= 10.0**power <= scale.high] or within
    return within


def look(methods: Sequence[str]) -> dict[str, Any]:
    """Colour, filling and shape of a mark by its field `family`, the family of its method; one legend for all."""
    families = [name for name in LOOKS if name in {family(method) for method in methods}]
    colours, shapes = zip(*(LOOKS[name] for name in families), strict=True)
    legend = alt.Legend(title="method", orient="bottom", columns=len(families))
    scale = alt.Scale(domain=families, range=colours)
    return {
        "color": alt.Color("family:N", scale=scale, legend=legend),
        "fill": alt.Fill("family:N", scale=scale, legend=None),
        "shape": alt.Shape("family:N", scale=alt.Scale(domain=families, range=shapes), legend=legend),
    }


def family(method: str) -> str:
    """The name in a method's text."""
    return method.partition(":")[0]


def short_names(methods: Sequence[str]) -> list[str]:
    """Texts of methods without the parameters that all of a family have in common."""
    given = {method: list(filter(None, method.partition(":")[2].split(","))) for method in methods}
    names = []
    for method in methods:
        alike = [set(given[other]) for other in methods if family(other) == family(method)]
        common = alike[0].intersection(*alike)
        names.append(" ".join([family(method), *(part for part in given[method] if part not in common)]))
    return names


def place_labels(points: Sequence[Point], texts: Sequence[str], width: float, height: float) -> list[Point]:
    """Middles of labels beside their points, in pixels of a panel [width, height].

    Each is as near to its point as it can be, where it covers no point and no label before it.
    """
    taken = [(x - MARGIN, y - MARGIN, x + MARGIN, y + MARGIN) for x, y in points]
    places = []
    for (x, y), text in zip(points, texts, strict=True):
        half, tall = CHARACTER * len(text) / 2, FONT_SIZE / 2 + 1
        around = product(range(MARGIN, round(width), 4), range(16))
        tried = [
            (x + cos(turn * pi / 8) * (reach + half), y + sin(turn * pi / 8) * (reach + tall)) for reach, turn in around
        ]
        boxes = [(a - half, b - tall, a + half, b + tall) for a, b in tried]
        free = (
            i
            for i, box in enumerate(boxes)
            if box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height
            if not any(_overlap(box, other) for other in taken)
        )
        best = next(free, 0)
        taken.append(boxes[best])
        places.append(tried[best])
    return places


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def finished(chart: Any, title: str, subtitle: Sequence[str]) -> Any:
    """A chart with its title, and one look for all."""
    return (
        chart.properties(title=alt.TitleParams(title, subtitle=list(subtitle), anchor="start", fontSize=15, offset=14))
        .configure(background="white", font="Liberation Sans")
        .configure_axis(labelFontSize=FONT_SIZE, titleFontSize=12, titleFontWeight="normal", gridColor="#E6E6E6")
        .configure_legend(labelFontSize=FONT_SIZE, titleFontSize=FONT_SIZE, symbolSize=90)
        .configure_view(stroke="#CCCCCC")
    )


def save_chart(chart: Any, path: Path) -> None:
    """Write a chart as what the name ends in, .png or .svg: whole, or not at all."""
    with replacing(path) as beside:
        chart.save(str(beside), format=path.suffix.removeprefix("."), scale_factor=SCALE)
