"""Numbers in, small SVG pictures out: lines, points and bars that take their colours from the page's style."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 80, 16, 16, 48
SERIES_CLASSES = ("s0", "s1", "s2", "s3")

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """What the two axes show; a label may name the unit."""

    x_label: str
    y_label: str
    from_zero: bool = False


def line_chart(series: Mapping[str, Sequence[Point]], axes: Axes) -> str:
    """One line for each named series of (x, y); "" when no finite point is there."""
    finite = {name: [point for point in points if _is_finite(point)] for name, points in series.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return ""
    frame = _Frame.around([point for points in finite.values() for point in points], axes)
    marks, legend = [], []
    for index, (name, points) in enumerate(finite.items()):
        style = SERIES_CLASSES[index % len(SERIES_CLASSES)]
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        marks.append(f'<polyline class="line {style}" points="{path}"/>')
        if len(points) <= 40:
            marks += [_dot(frame, point, style, f"{name}: {point[1]:.4g} at {point[0]:g}") for point in points]
        legend.append((name, style))
    return _svg(frame, axes, marks, legend if len(finite) > 1 else [])


def point_chart(points: Mapping[str, Point], axes: Axes, chosen: str | None = None) -> str:
    """One labelled dot for each named (x, y), the chosen one drawn larger; "" when there is none."""
    finite = {name: point for name, point in points.items() if _is_finite(point)}
    if not finite:
        return ""
    frame = _Frame.around(list(finite.values()), axes)
    marks = []
    for name, point in finite.items():
        text = f"{name} (chosen)" if name == chosen else name
        marks.append(_dot(frame, point, "s1" if name == chosen else "s0", text, radius=8 if name == chosen else 5))
        is_right = frame.x(point[0]) > WIDTH / 2
        anchor, shift = ("end", -12) if is_right else ("start", 12)
        marks.append(
            f'<text x="{frame.x(point[0]) + shift:.1f}" y="{frame.y(point[1]) - 10:.1f}" '
            f'text-anchor="{anchor}">{escape(text)}</text>'
        )
    return _svg(frame, axes, marks, [])


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A dot of a third dimension; `title` shows where the pointer rests on it."""

    point: Point
    size: float  # 0 to 1: the area
    style: str
    title: str
    faint: bool = False


def mark_chart(marks: Sequence[Mark], axes: Axes) -> str:
    """A dot for each mark, small ones on top; "" when no finite point is there."""
    finite = [mark for mark in marks if _is_finite(mark.point)]
    if not finite:
        return ""
    frame = _Frame.around([mark.point for mark in finite], axes)
    dots = []
    for mark in sorted(finite, key=lambda mark: (not mark.faint, -mark.size)):
        dot = _dot(frame, mark.point, mark.style, mark.title, radius=4 + 10 * math.sqrt(mark.size))
        dots.append(f'<g fill-opacity="{0.2 if mark.faint else 0.75}">{dot}</g>')
    return _svg(frame, axes, dots, [])


def histogram(values: Sequence[float], axes: Axes, bins: int = 30) -> str:
    """Bars of how many values fall into each of `bins` equal ranges; "" when no finite value is there."""
    finite = [float(value) for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    step = (high - low) / bins or 1.0
    counts = [0] * bins
    for value in finite:
        counts[min(int((value - low) / step), bins - 1)] += 1
    frame = _Frame.around([(low, 0.0), (low + step * bins, float(max(counts)))], axes)
    width = max(frame.x(low + step) - frame.x(low) - 1, 1)
    marks = [
        f'<rect class="bar s0" x="{frame.x(low + step * i):.1f}" y="{frame.y(count):.1f}" width="{width:.1f}" '
        f'height="{frame.y(0) - frame.y(count):.1f}"><title>{low + step * i:.3g}: {count}</title></rect>'
        for i, count in enumerate(counts)
        if count
    ]
    return _svg(frame, axes, marks, [])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    """The ranges of both axes, and where a value lies in the picture."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    x_range: Point
    y_range: Point

    @classmethod
    def around(cls, points: Sequence[Point], axes: Axes) -> "_Frame":
        x_range, y_range = _range([x for x, _ in points]), _range([y for _, y in points])
        if axes.from_zero:
            y_range = (0.0, y_range[1])
        return cls(x_ticks=_ticks(x_range), y_ticks=_ticks(y_range), x_range=x_range, y_range=y_range)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_range[0]) / (self.x_range[1] - self.x_range[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return (
            HEIGHT - BOTTOM - (value - self.y_range[0]) / (self.y_range[1] - self.y_range[0]) * (HEIGHT - TOP - BOTTOM)
        )


def _range(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < high * 0.2 else low - margin), high + margin


def _ticks(limits: Point, wanted: int = 5) -> list[float]:
    """Round numbers inside the limits: steps of 1, 2 or 5 times a power of ten."""
    low, high = limits
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _is_finite(point: Point) -> bool:
    return all(math.isfinite(value) for value in point)


def _dot(frame: _Frame, point: Point, style: str, title: str, radius: float = 3) -> str:
    x, y = frame.x(point[0]), frame.y(point[1])
    return f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(title)}</title></circle>'


def _svg(frame: _Frame, axes: Axes, marks: list[str], legend: list[tuple[str, str]]) -> str:
    label = escape(f"{axes.y_label} against {axes.x_label}", quote=True)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    parts += _grid(frame)
    parts += marks
    parts.append(f'<text class="label" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}">{escape(axes.x_label)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="label" transform="translate(14 {middle}) rotate(-90)" x="0" y="0">{escape(axes.y_label)}</text>'
    )
    for index, (name, style) in enumerate(legend):
        y = TOP + 14 + 18 * index
        parts.append(f'<rect class="bar {style}" x="{WIDTH - 150}" y="{y - 9}" width="12" height="10"/>')
        parts.append(f'<text x="{WIDTH - 132}" y="{y}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _grid(frame: _Frame) -> list[str]:
    parts = []
    for ticks, is_x in ((frame.x_ticks, True), (frame.y_ticks, False)):
        place: Callable[[float], float] = frame.x if is_x else frame.y
        for tick in ticks:
            at = place(tick)
            if is_x:
                parts.append(f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}">{tick:g}</text>')
            else:
                line = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"'
                parts.append(f'<line class="grid" {line}/>')
                parts.append(f'<text class="tick y" x="{LEFT - 8}" y="{at + 4:.1f}">{tick:g}</text>')
    return parts
