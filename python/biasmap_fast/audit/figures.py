"""Figures of the report: SVG text from matplotlib, PNG panels from pictures and maps.

No figure is decided by global settings of matplotlib, and the same numbers give the same bytes.
"""

from __future__ import annotations

import base64
import io
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

# Okabe and Ito's colours, told apart with every common colour blindness; shapes repeat the code.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_SHAPES = ("o", "s", "D", "^", "v", "P")
_MASKS = {"semantic": (0, 114, 178), "demographic": (230, 159, 0), "both": (60, 10, 75)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#222222",
}
_PANEL = 176  # pixels of a panel's longer side


def hex_colour(part: str) -> str:
    """Colour of a mask panel's ``part``: ``"semantic"``, ``"demographic"`` or ``"both"``."""
    return "#{:02x}{:02x}{:02x}".format(*_MASKS[part])


def intervals(
    rows: Sequence[str],
    series: Mapping[str, Sequence[Mapping[str, Any] | None]],
    *,
    label: str,
    reference: float | None = None,
    reference_label: str = "",
    targets: Mapping[str, Sequence[float | None]] | None = None,
    rule_above: int | None = None,
    first_colour: int = 0,
) -> str:
    """Points with intervals, one line a row: SVG.

    Args:
        rows: names, from the top.
        series: name -> one figure (`statistics.Figure` as dict) a row, or ``None``.
        label: of the horizontal axis.
        reference: where to draw a dashed vertical line.
        reference_label: its text.
        targets: name -> known values a row, drawn as open rings.
        rule_above: index of the row above which a rule separates the rest.
        first_colour: number of the first series' colour, so that a word keeps its own.
    """
    with _style():
        figure, axes = _canvas(8.6, 0.9 + 0.30 * len(rows))
        offsets = _offsets(len(series), 0.52)
        for y in range(0, len(rows), 2):
            axes.axhspan(y - 0.5, y + 0.5, color="#f4f5f7", zorder=0)
        if rule_above is not None:
            axes.axhline(rule_above - 0.5, color="#999999", linewidth=0.8)
        for index, (name, figures) in enumerate(series.items()):
            colour, shape = _look(index + first_colour)
            for y, one in enumerate(figures):
                if one is None or one["value"] is None:
                    continue
                where = y + offsets[index]
                if one["low"] is not None:
                    axes.plot([one["low"], one["high"]], [where, where], color=colour, lw=1.6)
                axes.plot(one["value"], where, shape, color=colour, markersize=4.8)
                target = None if targets is None else targets.get(name, [None] * len(rows))[y]
                if target is not None:
                    axes.plot(target, where, "|", color="#111111", markersize=10, mew=1.8)
            axes.plot([], [], shape, color=colour, markersize=5, label=name)
        if targets is not None:
            axes.plot([], [], "|", color="#111111", markersize=9, mew=1.8, label="planted")
        if reference is not None:
            axes.axvline(reference, color="#333333", linestyle=(0, (4, 3)), linewidth=1)
            axes.plot([], [], color="#333333", linestyle=(0, (4, 3)), lw=1, label=reference_label)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        _legend(axes, len(series) + (targets is not None) + (reference is not None))
        return _svg(figure, label)


def scatter(
    panels: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]],
    titles: Mapping[str, str],
    *,
    x_label: str,
    y_label: str,
    reference: float,
) -> str:
    """Measured figures with intervals over known values, one panel a word: SVG.

    Args:
        panels: word -> (known value, figure as dict) a profession.
        titles: word -> title of its panel.
        x_label: of every horizontal axis.
        y_label: of the vertical axis, shared.
        reference: where to draw a dashed horizontal line.
    """
    with _style():
        columns = min(2, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure, _ = _canvas(8.6, 3.3 * rows, axes=False)
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for index, (word, points) in enumerate(panels.items()):
            axes = grid[index // columns][index % columns]
            colour, shape = _look(index)
            shifts = _spread([known for known, _ in points])
            for (known, one), shift in zip(points, shifts, strict=True):
                if one["low"] is not None:
                    axes.plot([known + shift] * 2, [one["low"], one["high"]], color=colour, lw=1.2)
                axes.plot(known + shift, one["value"], shape, color=colour, markersize=4.8)
            axes.axhline(reference, color="#333333", linestyle=(0, (4, 3)), linewidth=1)
            axes.set_title(titles[word], fontsize=10, loc="left")
            axes.set_xlabel(x_label)
            axes.grid(color="#e3e3e3", linewidth=0.6)
            axes.set_axisbelow(True)
        for empty in range(len(panels), rows * columns):
            grid[empty // columns][empty % columns].set_visible(False)
        grid[0][0].set_ylabel(y_label)
        return _svg(figure, f"{y_label} over {x_label}")


def columns(
    names: Sequence[str],
    series: Mapping[str, Sequence[Mapping[str, Any] | None]],
    *,
    label: str,
    reference: float,
) -> str:
    """Points with intervals over named columns: SVG.

    Args:
        names: of the columns, from the left.
        series: name -> one figure as dict a column, or ``None``.
        label: of the vertical axis.
        reference: where to draw a dashed horizontal line.
    """
    with _style():
        figure, axes = _canvas(8.6, 3.1)
        offsets = _offsets(len(series), 0.3)
        for index, (name, figures) in enumerate(series.items()):
            colour, shape = _look(index)
            xs = [x + offsets[index] for x in range(len(names))]
            for x, one in zip(xs, figures, strict=True):
                if one is None or one["value"] is None:
                    continue
                if one["low"] is not None:
                    axes.plot([x, x], [one["low"], one["high"]], color=colour, lw=1.8)
                axes.plot(x, one["value"], shape, color=colour, markersize=5.5)
            axes.plot([], [], shape, color=colour, markersize=5, label=name)
        axes.axhline(reference, color="#333333", linestyle=(0, (4, 3)), linewidth=1, label="chance")
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylabel(label)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        _legend(axes, len(series) + 1)
        return _svg(figure, label)


def bands(
    xs: Sequence[float],
    series: Mapping[str, Sequence[Mapping[str, float] | None]],
    *,
    x_label: str,
    label: str,
    reference: float | None = None,
) -> str:
    """Lines with bands around them (medians and quartiles, or means and intervals): SVG.

    Args:
        xs: places on the horizontal axis.
        series: name -> ``{"median", "low", "high"}`` a place, or ``None``.
        x_label: of the horizontal axis.
        label: of the vertical axis.
        reference: where to draw a dashed horizontal line.
    """
    with _style():
        figure, axes = _canvas(8.6, 2.9)
        if reference is not None:
            axes.axhline(
                reference, color="#333333", linestyle=(0, (4, 3)), linewidth=1, label="chance"
            )
        for index, (name, values) in enumerate(series.items()):
            colour, shape = _look(index)
            kept = [(x, one) for x, one in zip(xs, values, strict=True) if one is not None]
            places = [x for x, _ in kept]
            axes.fill_between(
                places,
                [one["low"] for _, one in kept],
                [one["high"] for _, one in kept],
                color=colour,
                alpha=0.18,
                linewidth=0,
            )
            medians = [one["median"] for _, one in kept]
            axes.plot(places, medians, color=colour, marker=shape, markersize=3.5, label=name)
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        _legend(axes, len(series) + (reference is not None))
        return _svg(figure, f"{label} over {x_label}")


def picture_panel(picture: Image) -> str:
    """A picture as data URI, at the size of a panel."""
    return _data_uri(_sized(picture))


def heat_panel(
    picture: Image, heat: torch.Tensor, concept: str, value_range: tuple[float, float]
) -> str:
    """A map over its picture as data URI.

    Args:
        picture: the picture.
        heat: ``[H, W]`` attribution map.
        concept: whose map it is.
        value_range: map values of the coldest and hottest colour.
    """
    from ..maps import AttributionMaps

    maps = AttributionMaps(heat[None, None], (concept,))
    shown = maps.overlay(_sized(picture), concept, strength=0.85, value_range=value_range)
    if isinstance(shown, list):
        raise TypeError("expected one overlay for one picture, got a list")
    return _data_uri(shown)


def mask_panel(
    picture: Image, semantic: torch.Tensor, demographic: torch.Tensor, percentile: float
) -> str:
    """Both concepts' masks over the grey picture as data URI.

    Args:
        picture: the picture.
        semantic: ``[H, W]`` the profession's map.
        demographic: ``[H, W]`` the demographic word's map.
        percentile: of both masks.
    """
    from PIL import Image as PILImage

    sized = _sized(picture)
    masks = []
    for heat in (semantic, demographic):
        values = heat.numpy().astype(np.float64)
        mask = values > np.percentile(values, percentile)
        shown = PILImage.fromarray((mask * 255).astype(np.uint8))
        masks.append(np.asarray(shown.resize(sized.size, PILImage.Resampling.NEAREST)) > 0)
    grey = np.asarray(sized.convert("L"), dtype=np.float64)[..., None].repeat(3, axis=2)
    base = 0.45 * grey + 0.55 * 255
    a, b = masks
    for part, where in (("semantic", a & ~b), ("demographic", b & ~a), ("both", a & b)):
        base[where] = 0.35 * base[where] + 0.65 * np.array(_MASKS[part])
    return _data_uri(PILImage.fromarray(base.round().astype(np.uint8)))


def _sized(picture: Image) -> Image:
    from PIL import Image as PILImage

    scale = _PANEL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resampling = PILImage.Resampling.NEAREST if scale > 1 else PILImage.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, resampling)


def _data_uri(picture: Image) -> str:
    """The picture as WebP, a quarter of PNG's bytes; as PNG where Pillow was built without it."""
    from PIL import features

    kind = "webp" if features.check("webp") else "png"
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=88)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _style() -> Any:
    from matplotlib import rc_context

    return rc_context(_STYLE)


def _canvas(width: float, height: float, *, axes: bool = True) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot() if axes else None


def _legend(axes: Axes, entries: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=min(entries, 5),
        frameon=False,
        borderaxespad=0.2,
        handletextpad=0.4,
        columnspacing=1.4,
    )


def _look(index: int) -> tuple[str, str]:
    return COLOURS[index % len(COLOURS)], _SHAPES[index % len(_SHAPES)]


def _offsets(count: int, width: float) -> list[float]:
    return [0.0] if count == 1 else list(np.linspace(-width / 2, width / 2, count))


def _spread(values: Sequence[float]) -> list[float]:
    """Small shifts that keep points of one known value apart."""
    step = 0.012 * (max(values) - min(values) or 1.0)
    groups: dict[float, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(round(value, 6), []).append(index)
    shifts = [0.0] * len(values)
    for members in groups.values():
        for rank, index in enumerate(members):
            shifts[index] = (rank - (len(members) - 1) / 2) * step
    return shifts


def _svg(figure: Figure, name: str) -> str:
    """The figure as inline SVG: no prolog, no addresses but name spaces, ids of its own."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.hashsalt": name, "svg.id": None}):
        figure.savefig(buffer, format="svg", metadata=empty, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    prefix = re.sub(r"\W+", "-", name).strip("-").lower()
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", text)
    # width and height are the page's to decide; the view box keeps the proportions
    return re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
