"""Pictures of a test, as PNG files: confusion matrices, and predictions over labels."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = 25
"""Labels or outputs that are drawn: the first ones."""

NAMED, NUMBERED = 50, 20  # classes up to which each has its name, and its counts are written
POINTS = 20_000  # beyond them a density is drawn


def confusion(
    file: BinaryIO, matrices: Sequence[Any], names: Sequence[str], titles: Sequence[str]
) -> None:
    """Counts by true (rows) and predicted class (columns), a matrix a title."""
    shown = [_short(name) for name in names] if len(names) <= NAMED else []
    room = 1.5 + 0.08 * max(map(len, shown), default=0)
    figure, panels = _panels(len(matrices), max(3.0, 0.35 * min(len(names), NAMED) + room))
    for axes, matrix, title in zip(panels, matrices, titles):
        _matrix(axes, np.asarray(matrix), shown)
        axes.set_title(_short(title), parse_math=False)
    _save(figure, file)


def scatter(
    file: BinaryIO,
    predicted: npt.NDArray[Any],
    truth: npt.NDArray[Any],
    titles: Sequence[str],
    *,
    same_units: bool = True,
) -> None:
    """Predictions over labels, both (n, K), a panel a title; with `same_units` the line between."""
    figure, panels = _panels(len(titles), 3.5)
    for axes, x, y, title in zip(panels, truth.T, predicted.T, titles):
        if len(x) > POINTS:
            axes.hexbin(x, y, bins="log", gridsize=60, mincnt=1, cmap="Blues")
        else:
            axes.plot(x, y, ".", markersize=4, alpha=0.6)
        if same_units:
            axes.axline((float(x.mean()), float(x.mean())), slope=1, color="0.6", linewidth=1)
        axes.set(xlabel="label", ylabel="prediction")
        axes.set_title(_short(title), parse_math=False)
    _save(figure, file)


def _matrix(axes: Axes, counts: npt.NDArray[Any], names: Sequence[str]) -> None:
    """Shades are shares of the true class: a rare one is as visible as the others."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    flat = len(names) <= 4 and max(map(len, names), default=0) <= 8
    axes.set_xticks(range(len(names)), names, rotation=0 if flat else 90, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    for (row, column), count in np.ndenumerate(counts) if len(counts) <= NUMBERED else ():
        shade = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{count:,}", ha="center", va="center", color=shade, fontsize=8)


def _short(text: str) -> str:
    return text if len(text) <= 32 else f"{text[:31]}\u2026"


def _panels(count: int, inches: float) -> tuple[Figure, list[Axes]]:
    count = min(count, PANELS)
    wide = math.ceil(math.sqrt(count))
    high = math.ceil(count / wide)
    figure = Figure(figsize=(inches * wide + 1, inches * high), layout="constrained")
    grid = figure.subplots(high, wide, squeeze=False).flat
    panels: list[Axes] = list(grid)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _save(figure: Figure, file: BinaryIO) -> None:
    FigureCanvasAgg(figure)  # no screen, no state shared with a user's own plots
    held = io.BytesIO()  # the file itself cannot seek
    figure.savefig(held, format="png", dpi=150)
    file.write(held.getbuffer())
