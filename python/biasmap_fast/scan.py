"""Shares of many professions without drawing a picture: what ``biasmap scan`` does."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .files import write_text
from .shares import NoShareError, share

if TYPE_CHECKING:
    from .audit.plan import AuditPlan

_SETTINGS = ("model", "revision", "dtype", "scheduler", "professions", "axes", "steps")
_TEXTS = ("prompt_template", "attribution_template", "negative_prompt", "height", "width")
_COLUMNS = ("profession", "axis", "word", "share", "low", "high", "draws", "rows", "status")


class ScanError(RuntimeError):
    """A folder holds a scan of other settings."""


def scan(
    pipe: Any, plan: AuditPlan, out: Path, *, draws: int = 64, progress: bool = True
) -> list[dict[str, Any]]:
    """Estimates the share of every word of every axis for each profession of a plan.

    Each profession is written when it is done, so a scan that was stopped goes on with the next.

    Args:
        pipe: The plan's pipeline.
        plan: Its model, professions, axes and templates count; nothing is drawn.
        out: Folder for ``scan.json`` and ``scan.csv``.
        draws: Draws of noise per profession and axis.
        progress: Show a progress bar on stderr.

    Returns:
        One row per profession, axis and word: profession, axis, word, share, low and high (95 %
        interval over draws), draws, rows (images that went through the denoiser once), status.
        ``status`` is ``"ok"``, or why there is no share.

    Raises:
        ScanError: The folder holds a scan of other settings.
        ValueError: The attribution template does not name profession and word together.
    """
    if not isinstance(plan.attribution_template, str):
        raise ValueError(
            "a scan needs one attribution template with {profession} and {demographic}, got "
            f"{list(plan.attribution_template)}"
        )
    stored = plan.model_dump(mode="json", include={*_SETTINGS, *_TEXTS}) | {"draws": draws}
    path = out / "scan.json"
    rows = _read(path, stored)
    done = {row["profession"] for row in rows}
    out.mkdir(parents=True, exist_ok=True)
    todo = [profession for profession in plan.professions if profession not in done]
    for profession in tqdm(todo, "scan", unit="profession", disable=not progress, file=sys.stderr):
        rows += _shares(pipe, plan, profession, draws)
        lines = ",\n".join(json.dumps(row) for row in rows)
        write_text(path, f'{{"settings": {json.dumps(stored)},\n"shares": [\n{lines}\n]}}\n')
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "scan.csv", text.getvalue())
    return rows


def _read(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        before, rows = dict(stored["settings"]), list(stored["shares"])
    except (ValueError, KeyError, TypeError) as error:
        raise ScanError(
            f"{path} cannot be read ({error}): delete it, or choose a folder"
        ) from error
    if before != settings:
        names = sorted(n for n in settings if before.get(n) != settings[n])
        raise ScanError(
            f"{path} holds a scan with other settings ({', '.join(names)}): choose another folder"
        )
    return rows


def _shares(pipe: Any, plan: AuditPlan, profession: str, draws: int) -> Iterator[dict[str, Any]]:
    options: dict[str, Any] = {"num_inference_steps": plan.steps}
    for name in ("height", "width", "negative_prompt"):
        if (value := getattr(plan, name)) is not None:
            options[name] = value
    for axis, words in plan.axes.items():
        row: dict[str, Any] = {
            "profession": profession,
            "axis": axis,
            "draws": draws,
            "status": "ok",
        }
        pairs = [pair for pair in plan.pairs(profession) if pair.axis == axis]
        prompts = {pair.word: pair.word_prompt.text for pair in pairs}
        try:
            estimate = share(pipe, plan.prompt(profession), prompts, draws=draws, **options)
        except NoShareError as error:
            for word in words:
                yield {**row, "word": word, "share": None, "status": str(error)}
            continue
        for word in words:
            low, high = estimate.intervals[word]
            values = {"share": estimate[word], "low": low, "high": high, "rows": estimate.rows}
            yield {**row, "word": word, **values}


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yields one line of text per profession and axis, the furthest from equal shares first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["profession"], row["axis"]), []).append(row)

    def distance(group: list[dict[str, Any]]) -> float:
        return max(abs(float(row["share"] or 0) - 1 / len(group)) for row in group)

    for (profession, axis), group in sorted(groups.items(), key=lambda item: -distance(item[1])):
        if group[0]["share"] is None:
            yield f"{profession}, {axis}: no share: {group[0]['status']}"
            continue
        shown = (
            f"{row['word']} {100 * row['share']:.0f} % "
            f"[{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
            for row in group
        )
        yield f"{profession}, {axis}: {', '.join(shown)}"
