"""A Comparison as a picture: size against loss, decode speed as colour, and the front of what no other recipe beats."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from qconvert.errors import printable
from qconvert.ir.comparison import Comparison, Entry
from qconvert.report import wording

Points = Mapping[str, tuple[float, float]]
# Where a label may stand, best first: points to the right and above, and which of its sides is there.
Place = tuple[float, float, Literal["left", "center", "right"], Literal["bottom", "center", "top"]]
NEXT: tuple[tuple[float, Literal["left", "right"]], ...] = ((12, "left"), (-12, "right"))
PLACES: tuple[Place, ...] = (
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (7, 7, "left", "bottom"),
    (7, -7, "left", "top"),
    (-7, 7, "right", "bottom"),
    (-7, -7, "right", "top"),
    *(
        (right, up * side, horizontal, "bottom" if side > 0 else "top")
        for up in (24, 38, 52, 66)
        for side in (1, -1)
        for right, horizontal in NEXT
    ),
)
FAR = 20  # points; from there on a line leads to the label
LEADER = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6}


def plot(comparison: Comparison) -> bytes:
    """Return a PNG that plots size against loss. Lower and further to the left is better; needs at least one point."""
    # Not with the settings of a matplotlibrc, which may lie in the current folder: text.usetex would run LaTeX.
    with style.context("default"):
        return _png(comparison)


def _png(comparison: Comparison) -> bytes:
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # which needs no display
    axes = figure.add_subplot()
    entries = [entry for entry in comparison.entries if entry.name in comparison.points]
    _draw(axes, comparison, entries)
    figure.draw_without_rendering()  # from here on it is known how large a text is
    _label(axes, comparison, entries)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw(axes: Axes, comparison: Comparison, entries: Sequence[Entry]) -> None:
    points, unit = _scaled(comparison)
    front = sorted({points[name] for name in comparison.front})
    axes.step(
        *zip(*front, strict=True), where="post", color="0.6", linewidth=1.2, linestyle="--", zorder=1, label="Pareto front"
    )
    _dots(axes, comparison, entries, points)
    # Names may hold dollars, which would be mathematics.
    title = f"{printable(comparison.model)}: lower left is better, dashed the Pareto front"
    axes.set_title(title, parse_math=False)
    axes.set_xlabel(f"weights, {unit}")
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.set_ylabel("KL(float || artifact), nats" if comparison.task.generates else "1 - cosine to float")
    losses = [loss for _, loss in points.values()]
    axes.margins(x=0.15, y=0.15)
    if min(losses) > 0:
        room = max((max(losses) / min(losses)) ** 0.15, 1.5)
        axes.set_ylim(min(losses) / room, max(losses) * room)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="both", color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)


def _scaled(comparison: Comparison) -> tuple[Points, str]:
    """Name -> (size, loss), and the unit of the sizes."""
    largest = max(size for size, _ in comparison.points.values())
    unit = wording.byte_size(round(largest)).split()[1]
    factor = 1000 ** ("B", "kB", "MB", "GB", "TB").index(unit)
    return {name: (size / factor, loss) for name, (size, loss) in comparison.points.items()}, unit


def _dots(axes: Axes, comparison: Comparison, entries: Sequence[Entry], points: Points) -> None:
    """Coloured by speed, white where it was not measured, or on a busy machine; with a black edge on the front."""
    speeds = {entry.name: speed for entry in entries if (speed := _speed(entry)) is not None}
    dots = axes.scatter(
        [points[entry.name][0] for entry in entries],
        [points[entry.name][1] for entry in entries],
        90,
        [speeds.get(entry.name, math.nan) for entry in entries],
        cmap=colormaps["viridis"].with_extremes(bad="white"),
        plotnonfinite=True,
        edgecolors=["black" if entry.name in comparison.front else "0.6" for entry in entries],
        linewidths=1.2,
        zorder=3,
    )
    if speeds:
        label = "decode, tokens/s" if comparison.task.generates else "runs/s"
        axes.figure.colorbar(dots, ax=axes, label=label, ticks=MaxNLocator(6))


def _speed(entry: Entry) -> float | None:
    """Tokens per second of decoding, for what doesn't decode: runs per second."""
    if entry.latency is None or entry.latency.p50_ms is None or entry.latency.busy:
        return None
    return entry.latency.decode_tokens_per_s or 1e3 / entry.latency.p50_ms


def _label(axes: Axes, comparison: Comparison, entries: Sequence[Entry]) -> None:
    """A name beside each point, where it covers no point and no other name if there is such a place."""
    points, _ = _scaled(comparison)
    taken = [_around(axes, point) for point in points.values()]
    for entry in entries:
        bold = entry.name in comparison.front
        point = points[entry.name]
        boxes = []
        for place in PLACES:
            trial = _annotated(axes, entry.name, point, place, bold)
            boxes.append(trial.get_window_extent())
            trial.remove()
        chosen = min(
            range(len(PLACES)), key=lambda index: (not _inside(axes, boxes[index]), boxes[index].count_overlaps(taken), index)
        )
        _annotated(axes, entry.name, point, PLACES[chosen], bold)
        if abs(PLACES[chosen][1]) > FAR:
            _annotated(axes, "", point, PLACES[chosen], bold, LEADER)
        taken.append(boxes[chosen])


def _inside(axes: Axes, box: Bbox) -> bool:
    return bool(axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1))


def _annotated(
    axes: Axes, text: str, point: tuple[float, float], place: Place, bold: bool, arrow: dict[str, Any] | None = None
) -> Annotation:
    right, up, horizontal, vertical = place
    return axes.annotate(
        text,
        point,
        (right, up),
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        fontsize=9,
        fontweight="bold" if bold else "normal",
        path_effects=[withStroke(linewidth=3, foreground="white")],  # the front may run behind it
        arrowprops=arrow,
        zorder=4,
    )


def _around(axes: Axes, point: tuple[float, float]) -> Bbox:
    """The box of a dot, in pixels."""
    x, y = axes.transData.transform(point)
    return Bbox.from_bounds(x - 10, y - 10, 20, 20)
