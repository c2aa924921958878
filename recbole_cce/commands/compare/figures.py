"""Figures as PNG; takes matplotlib, which is imported where it is used."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import ColorType

MARKERS = "osD^vP*X<>"


@dataclass(frozen=True)
class Point:
    """Mean of several runs; deviations are 0 for one run."""

    x: float
    y: float
    x_deviation: float
    y_deviation: float


@dataclass(frozen=True)
class Curve:
    """One run; `best` is the index of the epoch that was tested."""

    x: list[float]
    y: list[float]
    best: int


def scatter(points: dict[str, Point], order: list[str], x_label: str, y_label: str) -> bytes:
    """A point with deviations for each model."""
    from matplotlib.ticker import LogFormatter

    figure, axes = empty(x_label, y_label)
    for name, point in points.items():
        axes.errorbar(
            point.x,
            point.y,
            xerr=point.x_deviation or None,
            yerr=point.y_deviation or None,
            fmt=MARKERS[order.index(name) % len(MARKERS)],
            color=color(order, name),
            label=name,
            markersize=8,
            capsize=3,
        )
    positions = [point.x for point in points.values()]
    if min(positions) > 0 and max(positions) > 5 * min(positions):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(LogFormatter())  # labels some between powers of ten where there are few of those
    return png(figure)


def curves(runs: dict[str, list[Curve]], order: list[str], x_label: str, y_label: str) -> bytes:
    """A line for each run, in the colour of its model, with a dot where it was best."""
    figure, axes = empty(x_label, y_label)
    for name, group in runs.items():
        for number, curve in enumerate(group):
            axes.plot(curve.x, curve.y, color=color(order, name), alpha=0.75, label=None if number else name)
            axes.plot(curve.x[curve.best], curve.y[curve.best], "o", color=color(order, name), markersize=6)
    return png(figure)


def bars(values: dict[str, float], x_label: str) -> bytes:
    """A bar for each name, the first on top."""
    figure, axes = empty(x_label, "")
    axes.barh(list(values)[::-1], list(values.values())[::-1])
    return png(figure)


def empty(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """A figure without pyplot, which would look for a screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def color(order: list[str], name: str) -> ColorType:
    """One colour for a model in all figures."""
    from matplotlib import color_sequences

    colors = color_sequences["tab10" if len(order) <= 10 else "tab20"]
    return colors[order.index(name) % len(colors)]


def png(figure: Figure) -> bytes:
    """The finished figure."""
    if figure.axes[0].get_legend_handles_labels()[1]:
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()
