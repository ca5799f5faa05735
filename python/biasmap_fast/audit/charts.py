"""Charts and pictures of a report: SVG text from matplotlib, WebP panels from pictures and masks.

No chart depends on global settings of matplotlib, and the same numbers give the same bytes.
"""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .sentences import measure_name
from .summary import unpacked, where

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from .plan import AuditPlan

# Okabe and Ito's colours, told apart with every common colour blindness; shapes repeat the code.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_SHAPES = ("o", "s", "D", "^", "v", "P")
MASK_COLOURS = {"profession": "#0072b2", "word": "#e69f00", "both": "#3c0a4b"}
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
    "axes.axisbelow": True,
    "xtick.color": "#444444",
    "ytick.color": "#222222",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
_DASHED: dict[str, Any] = {"color": "#333333", "linestyle": (0, (4, 3)), "linewidth": 1}
_TICK: dict[str, Any] = {"color": "#111111", "markersize": 10, "markeredgewidth": 1.8}
_WIDTH = 5.8  # inches: at the width of a phone the text is still read
_SIDES = ("profession", "word")
_PANEL = 176  # pixels of a panel's longer side


def dots(
    rows: Sequence[str],
    series: Mapping[str, pd.DataFrame],
    *,
    label: str,
    reference: float | None = None,
    reference_label: str = "chance",
    ticks: Mapping[str, pd.Series[float]] | None = None,
    rule_above: int | None = None,
    first_colour: int = 0,
) -> str:
    """Points with intervals on named rows: SVG.

    Args:
        rows: Names of the rows, from the top.
        series: Name -> figures (estimate, low, high), indexed by row; rows may be missing.
        label: Label of the horizontal axis.
        reference: Position of a dashed vertical line.
        reference_label: Its name in the legend.
        ticks: Name of a series -> planted values, indexed by row, drawn as upright bars.
        rule_above: Index of the row above which a rule separates the rest.
        first_colour: Index of the first series' colour, so that a word keeps its own.
    """
    with _style():
        figure, axes = _canvas(0.9 + 0.3 * len(rows))
        for y in range(0, len(rows), 2):
            axes.axhspan(y - 0.5, y + 0.5, color="#f4f5f7", zorder=0)
        if rule_above is not None:
            axes.axhline(rule_above - 0.5, color="#999999", linewidth=0.8)
        offsets = np.linspace(-0.26, 0.26, len(series)) if len(series) > 1 else [0.0]
        for index, (name, figures) in enumerate(series.items(), first_colour):
            colour, shape = _COLOURS[index % 6], _SHAPES[index % 6]
            own = figures.reindex(list(rows))
            places = np.arange(len(rows)) + offsets[index - first_colour]
            axes.hlines(places, own["low"], own["high"], color=colour, linewidth=1.6)
            axes.plot(own["estimate"], places, shape, color=colour, markersize=4.8, label=name)
            if ticks and name in ticks:
                axes.plot(ticks[name].reindex(list(rows)), places, "|", **_TICK)
        if ticks:
            axes.plot([], [], "|", label="planted truth", **_TICK)
        if reference is not None:
            axes.axvline(reference, label=reference_label, **_DASHED)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_xlabel(label)
        _legend(axes)
        return _svg(figure, label)


def lines(
    series: Mapping[str, pd.DataFrame],
    *,
    x_label: str,
    label: str,
    reference: float | None = None,
) -> str:
    """Lines with bands around them, series as in `dots` indexed by a number: SVG."""
    with _style():
        figure, axes = _canvas(2.9)
        if reference is not None:
            axes.axhline(reference, label="chance", **_DASHED)
        for index, (name, figures) in enumerate(series.items()):
            own = figures.sort_index()
            colour, shape = _COLOURS[index % 6], _SHAPES[index % 6]
            low, high = (own[end].fillna(own["estimate"]) for end in ("low", "high"))
            axes.fill_between(own.index, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(own["estimate"], color=colour, marker=shape, markersize=3.5, label=name)
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        axes.grid(axis="y")
        _legend(axes)
        return _svg(figure, f"{label} over {x_label}")


@dataclass(frozen=True)
class Strips:
    """Pictures with their maps and regions, one strip per profession.

    Attributes:
        rows: Profession, its rank ("highest", "median", "lowest" or ""), and panels (data URI,
            alternative text, caption).
        scales: Side ("profession", "word") -> map values of the coldest and the hottest colour.
    """

    rows: list[tuple[str, str, list[tuple[str, str, str]]]]
    scales: dict[str, tuple[float, float]]


def strips(
    folder: Path, plan: AuditPlan, axis: str, condition: str, order: Sequence[str]
) -> Strips | None:
    """Pictures of the plan's first seed with maps, and with the regions that were measured.

    Professions come in this order, the highest first; those without picture or maps are left out.
    """
    from PIL import Image as PILImage
    from safetensors.torch import load_file

    loaded = []
    for profession in order:
        word = re.sub("[^A-Za-z0-9]", "-", profession)
        stem = f"{plan.professions.index(profession):03d}-{word}-{plan.seeds[0]}"
        stem += "" if condition == "plain" else f"-{condition}"
        picture, maps = folder / f"pictures/{stem}.png", folder / f"maps/{stem}.safetensors"
        if picture.is_file() and maps.is_file():
            with PILImage.open(picture) as opened:
                loaded.append((profession, _sized(opened), load_file(maps)))
    if not loaded:
        return None
    words = plan.axes[axis]
    scales = {}
    for side in _SIDES:
        values = np.stack(
            [
                m[f"{axis}/{word}/{plan.measure}/{side}"].numpy()
                for *_, m in loaded
                for word in words
            ]
        )
        # one pixel in 200 is hotter: the hottest of all would leave the other maps dark
        scales[side] = float(values.min()), float(np.quantile(values, 0.995))
    regions = _regions(folder, plan, axis, condition)
    ranks = {0: "highest", len(loaded) // 2: "median", len(loaded) - 1: "lowest"}
    rows = []
    for index, (profession, image, maps) in enumerate(loaded):
        prompt = plan.prompt(profession, condition)
        panels = [(_data_uri(image), f"picture of {profession}", prompt)]
        for word in words:
            for side, name in zip(_SIDES, (profession, word), strict=True):
                heat = _heat(image, maps[f"{axis}/{word}/{plan.measure}/{side}"], scales[side])
                panels.append((heat, f"map of {name} over the picture", f"“{name}”"))
            for text, *masks in regions.get((profession, word), []):
                shown = f"regions of {profession} and {word}, {text}"
                panels.append((_mask(image, *masks), shown, text))
        rows.append((profession, ranks.get(index, "") if len(loaded) > 1 else "", panels))
    return Strips(rows, scales)


def _regions(
    folder: Path, plan: AuditPlan, axis: str, condition: str
) -> dict[tuple[str, str], list[tuple[Any, ...]]]:
    """Profession and word -> value and both masks, the lead measure first."""
    if not (folder / "masks").is_dir():
        return {}
    names = {"condition": condition, "axis": axis, "seed": plan.seeds[0]}
    part = [(name, "==", value) for name, value in names.items()]
    masks, values = (pd.read_parquet(folder / t, filters=part) for t in ("masks", "measurements"))
    values = where(values, part="", control="")
    keys = ["profession", "word", "measure", "setting"]
    rows = masks.merge(values[[*keys, "value"]], on=keys)
    regions: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
    shown = dict.fromkeys([(plan.measure, plan.setting), ("iou", f"{plan.fractions[0]:.10g}")])
    for measure, setting in shown:
        for key, own in where(rows, measure=measure, setting=setting).groupby(
            ["profession", "word"]
        ):
            sides = (unpacked(own, side)[0] for side in _SIDES)
            text = f"{measure_name(measure)} {own['value'].iloc[0]:.2f}"
            regions.setdefault(key, []).append((text, *sides))
    return regions


def _heat(picture: Image, heat: torch.Tensor, value_range: tuple[float, float]) -> str:
    from ..maps import AttributionMaps

    maps = AttributionMaps(heat[None, None], ("map",))
    shown = maps.overlay([picture], "map", strength=0.85, value_range=value_range)
    return _data_uri(shown[0] if isinstance(shown, list) else shown)


def _mask(picture: Image, profession: Any, word: Any) -> str:
    from PIL import Image as PILImage
    from PIL.ImageColor import getrgb

    a, b = (
        np.asarray(PILImage.fromarray(mask).resize(picture.size, PILImage.Resampling.NEAREST))
        for mask in (profession, word)
    )
    grey = np.asarray(picture.convert("L"), dtype=np.float64)[..., None].repeat(3, axis=2)
    shown = 0.45 * grey + 0.55 * 255
    for part, pixels in (("profession", a & ~b), ("word", b & ~a), ("both", a & b)):
        shown[pixels] = 0.35 * shown[pixels] + 0.65 * np.array(getrgb(MASK_COLOURS[part]))
    return _data_uri(PILImage.fromarray(shown.round().astype(np.uint8)))


def _sized(picture: Image) -> Image:
    from PIL import Image as PILImage

    scale = _PANEL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resampling = PILImage.Resampling.NEAREST if scale > 1 else PILImage.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, resampling)


def _data_uri(picture: Image) -> str:
    # WebP takes a quarter of PNG's bytes; Pillow may have been built without it
    from PIL import features

    kind = "webp" if features.check("webp") else "png"
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=88)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _style() -> Any:
    from matplotlib import rc_context

    return rc_context(_STYLE)


def _canvas(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=3,
        borderaxespad=0.2,
        handletextpad=0.4,
        columnspacing=1.4,
    )


def _svg(figure: Figure, name: str) -> str:
    """The chart as inline SVG: no prolog, no addresses but name spaces, ids of its own."""
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
