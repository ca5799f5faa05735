"""The report of a run, its tables and its model card: made from the folder and the summary."""

from __future__ import annotations

import io
import json
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import write_file, write_text
from ..pipelines import TESTBED
from . import charts, sentences
from .sentences import interval, number, p_value, percent
from .summary import SCHEMA_VERSION, where

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from .plan import AuditPlan
    from .summary import Summary

    Table = dict[str, Any]  # caption, head, rows

_MEAN = "mean over professions"


def write_report(folder: Path, plan: AuditPlan, summary: Summary) -> list[Path]:
    """Writes the report and the figures into a run folder.

    Args:
        folder: Run folder; pictures, maps, masks and environment are read from it.
        plan: Plan of the run.
        summary: Its summary.

    Returns:
        Paths of ``figures.parquet``, ``figures.csv``, ``summary.json``, ``model-card.md`` and
        ``report.html``, each written whole or not at all.
    """
    version = {"biasmap_fast.schema_version": str(SCHEMA_VERSION)}
    table = pa.Table.from_pandas(summary.figures, preserve_index=False)
    binary = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(version), binary, compression="zstd")
    write_file(folder / "figures.parquet", binary.getvalue())
    texts = {
        "figures.csv": summary.figures.to_csv(index=False),
        "summary.json": summary_json(summary),
        "model-card.md": model_card(plan, summary),
        "report.html": _html(folder, plan, summary),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in ("figures.parquet", *texts)]


def summary_json(summary: Summary) -> str:
    """The summary as JSON text, one figure per line."""
    first = {"schema_version": SCHEMA_VERSION, "run": summary.run, "precision": summary.precision}
    head = json.dumps(first, indent=1, allow_nan=False)
    rows = (json.dumps(row, allow_nan=False) for row in summary.records())
    return head[:-2] + ',\n "figures": [\n' + ",\n".join(rows) + "\n]}\n"


def model_card(plan: AuditPlan, summary: Summary) -> str:
    """A section for a model card, in Markdown: what was measured, what it says and what not."""
    model = _plain(f"Model {plan.model}. {sentences.headline(plan, summary)}")
    parts = ["## Bias: where a profession and a demographic overlap in cross-attention", model]
    for axis in plan.axes:
        parts.append(f"### {_plain(axis.capitalize())}")
        parts += map(_plain, sentences.first_screen(axis, plan, summary))
    for condition in plan.conditions[1:]:
        parts.append(f"### Condition {_plain(condition)}")
        parts += map(_plain, sentences.changes(condition, plan, summary))
    table = _means(plan, summary)
    cells = [
        " | ".join(_plain(str(cell)) for cell in row) for row in (table["head"], *table["rows"])
    ]
    rows = [cells[0], "|".join(["---"] * len(table["head"])), *cells[1:]]
    parts += ["### Figures", "\n".join(f"| {row} |" for row in rows), "### Limits"]
    parts.append("\n".join(f"- {_plain(text)}" for text in sentences.limits(plan, summary)))
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    # other people's text without what Markdown or HTML would act on
    flat = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
    return re.sub(r"([|*_\[\]#`])", r"\\\1", flat)


def _html(folder: Path, plan: AuditPlan, summary: Summary) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,  # names of professions and models are other people's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source = files(__package__).joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    path = folder / "environment.json"
    described = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    axes = [_Axis(folder, plan, summary, axis) for axis in plan.axes]
    return environment.from_string(source).render(
        model="the embedded model" if plan.model == TESTBED else plan.model,
        headline=sentences.headline(plan, summary),
        axes=axes,
        conditions=[_condition(name, axes, plan, summary) for name in plan.conditions[1:]],
        means=_means(plan, summary),
        failures=_failures(summary),
        limits=sentences.limits(plan, summary),
        settings=_flat(plan.model_dump(mode="json")),
        environment=_flat(described),
        colours=charts.MASK_COLOURS,
        baseline=plan.conditions[0],
    )


class _Axis:
    """What the report shows of one axis."""

    def __init__(self, folder: Path, plan: AuditPlan, summary: Summary, name: str) -> None:
        self.name, self.words = name, plan.axes[name]
        self._folder, self._plan, self._summary = folder, plan, summary
        self._rows = summary.find(condition=plan.conditions[0], axis=name, baseline="")
        self._main = where(self._rows, part="", control="")
        self._planted = summary.find(axis=name, quantity="planted")
        means = where(self._main, quantity="mean", scope="profession")
        first = (plan.measure, plan.setting)
        pairs = set(zip(means["measure"], means["setting"], strict=True))
        # the lead first, soft forms last; not the points of the curve, which no profession has
        self._measures = sorted(
            pairs, key=lambda pair: (pair != first, pair[0] == "soft_iou", pair)
        )
        leading = where(means, measure=plan.measure, setting=plan.setting)
        levels = leading.groupby("profession")["estimate"].mean()
        self.order = sorted(plan.professions, key=lambda profession: -levels.get(profession, -1.0))

    def answers(self) -> list[str]:
        return sentences.first_screen(self.name, self._plan, self._summary)

    def details(self) -> list[str]:
        return sentences.details(self.name, self._plan, self._summary)

    def strips(self, condition: str) -> charts.Strips | None:
        return charts.strips(self._folder, self._plan, self.name, condition, self.order)

    def _truth(self, measure: str) -> dict[str, pd.Series[float]]:
        own = where(self._planted, measure=measure)
        return {word: rows["estimate"] for word, rows in _by_word(own, self.words).items()}

    def charts(self) -> list[dict[str, str]]:
        """Every measure of every profession, with chance and what is planted."""
        shown = []
        for measure, setting in self._measures:
            own = where(self._main, measure=measure, setting=setting)
            means = where(own, quantity="mean").replace({"profession": {"": _MEAN}})
            level = where(own, quantity="chance")["estimate"].mean()
            text = f"{_title(measure, setting)}: mean and 95 % interval of each profession."
            ticks = self._truth("overlap") if measure == "containment" else {}
            if ticks:
                text += " Upright bars: the planted part of the profession's marker on the region."
            svg = charts.dots(
                [*self.order, _MEAN],
                _by_word(means, self.words),
                label=f"{sentences.measure_name(measure)} ({setting}), {self.name}",
                reference=None if pd.isna(level) else level,
                reference_label=f"chance {number(level, 2)}",
                ticks=ticks,
                rule_above=len(self.order),
            )
            shown.append({"svg": svg, "text": text})
        return shown

    def shares(self) -> str:
        """Shares of one word of two (they sum to one), of all words otherwise."""
        rows = where(self._main, quantity="share")
        read = [word for word in self.words if word in set(rows["word"])]
        shown = read[1:] if len(read) == 2 else read
        if not shown:
            return ""
        truth = self._truth("share")
        return charts.dots(
            self.order,
            _by_word(rows, shown),
            label=f"share of pictures read as {' / '.join(shown)} ({self.name})",
            ticks={word: truth[word] for word in shown if word in truth},
            first_colour=self.words.index(shown[0]),
        )

    def tables(self) -> list[Table]:
        """Every profession and word of each measure, with shares and what is planted if known."""
        index = pd.MultiIndex.from_product([self.order, self.words], names=["profession", "word"])
        beside = {"share, %": (where(self._main, quantity="share"), percent)}
        for name, measure in (("planted share, %", "share"), ("planted overlap", "overlap")):
            show = percent if measure == "share" else interval
            beside[name] = (where(self._planted, measure=measure), show)
        tables = []
        for measure, setting in self._measures:
            own = where(self._main, measure=measure, setting=setting, scope="profession")
            mean, corrected = (where(own, quantity=name) for name in ("mean", "corrected"))
            columns = {
                "profession": [profession for profession, _ in index],
                "word": [word for _, word in index],
                "n": _cells(mean, index, lambda row: number(row["n"], 0)),
                sentences.measure_name(measure): _cells(mean, index, lambda row: interval(row, 3)),
            }
            if len(corrected):
                above = sentences.above_chance(own)
                told = ["yes" if above.get(key[::-1], False) else "no" for key in index]
                columns |= {
                    "above chance": told,
                    "p (Holm)": _cells(mean, index, lambda row: p_value(row["p_adjusted"])),
                    "corrected": _cells(corrected, index, interval),
                }
                shown = {name: pair for name, pair in beside.items() if len(pair[0])}
                columns |= {name: _cells(rows, index, f) for name, (rows, f) in shown.items()}
            tables.append(_table(_title(measure, setting), columns))
        return tables

    def controls(self) -> list[dict[str, Any]]:
        """Per measure a chart and a table of the word beside its null and its control words."""
        shown = []
        for measure, setting in self._measures:
            own = where(self._rows, measure=measure, setting=setting, part="", scope="overall")
            kinds = {"": "the word itself"}
            for kind in own["control"].unique():
                kinds.setdefault(kind, sentences.control_name(kind, self._plan))
            own = own.assign(control=own["control"].map(kinds))
            changes = where(own, quantity="difference")
            if changes.empty:
                continue
            svg = charts.dots(
                list(kinds.values()),
                _by_word(where(own, quantity="mean"), self.words, "control"),
                label=f"controls: {sentences.measure_name(measure)} ({setting}), {self.name}",
                reference=where(own, quantity="chance")["estimate"].mean(),
            )
            caption = f"{_title(measure, setting)}: the word minus its control"
            shown.append({"svg": svg, "table": _figures(caption, changes)})
        return shown

    def curve(self) -> dict[str, str] | None:
        """Corrected IoU over the size of the regions."""
        areas = where(self._main, scope="overall", quantity="area")
        if areas.empty:
            return None
        points = where(self._main, scope="overall", measure="iou", quantity="corrected")
        svg = charts.lines(
            _by_word(points.assign(size=points["setting"].astype(float)), self.words, "size"),
            x_label="fraction of the pixels in each region",
            label=f"corrected IoU, {self.name}",
            reference=0.0,
        )
        told = "; ".join(f"{row['word']} {interval(row, 3)}" for _, row in areas.iterrows())
        return {"svg": svg, "text": f"Area under the curve: {told}."}

    def parts(self) -> list[dict[str, str]]:
        """Measures on parts of the maps: blocks, calls, layers, branches."""
        rows = where(self._rows[self._rows["part"] != ""], scope="overall")
        split = [part.partition(":") for part in rows["part"]]
        rows = rows.assign(kind=[kind for kind, *_ in split], name=[name for *_, name in split])
        shown = []
        for (kind, measure, setting), own in rows.groupby(["kind", "measure", "setting"]):
            label = f"{sentences.measure_name(measure)} ({setting}) of each {kind}, {self.name}"
            if kind == "step":
                series = _by_word(own.assign(name=own["name"].astype(int)), self.words, "name")
                svg = charts.lines(series, x_label="UNet call", label=label)
            else:
                # down blocks, mid block, up blocks: the order in which the UNet runs them
                names = sorted(set(own["name"]), key=lambda name: ("dmu".find(name[0]), name))
                svg = charts.dots(names, _by_word(own, self.words, "name"), label=label)
            shown.append({"svg": svg, "text": f"{label}: mean over professions, 95 % intervals."})
        return shown

    def ranks(self) -> Table | None:
        names = {"condition": self._plan.conditions[0], "axis": self.name, "quantity": "rank"}
        rows = self._summary.find(**names, baseline="planted overlap")
        caption = "Spearman's rank correlation with the planted overlap, over professions"
        return _figures(caption, rows) if len(rows) else None


def _condition(
    name: str, axes: Sequence[_Axis], plan: AuditPlan, summary: Summary
) -> dict[str, Any]:
    """What the report shows of a condition against the first one."""
    rows = summary.find(condition=name, baseline=plan.conditions[0])
    rows = where(rows, quantity=["difference", "share difference"])
    main = where(rows, measure=plan.measure, setting=plan.setting)
    changes = []
    for axis in axes:
        own = where(main, axis=axis.name).replace({"profession": {"": _MEAN}})
        svg = charts.dots(
            [*axis.order, _MEAN],
            _by_word(own, axis.words),
            label=f"change of {sentences.measure_name(plan.measure)} under {name}, {axis.name}",
            reference=0.0,
            reference_label="no change",
            rule_above=len(axis.order),
        )
        changes.append({"svg": svg if len(own) else "", "strips": axis.strips(name)})
    energy = summary.find(scope="run", condition=name, quantity="energy")
    energy = energy.assign(call=[int(part.partition(":")[2]) for part in energy["part"]])
    names = {"energy": "energy (mean SoftIoU)", "iou": "IoU of the same call's maps"}
    energy = energy.assign(word=energy["measure"].replace(names))
    ledger = [
        charts.lines(_by_word(energy, words, "call"), x_label="UNet call", label=label)
        for label, words in (("overlap", list(names.values())), ("norm", ["gradient norm"]))
        if len(energy)
    ]
    shown = {
        "Mean over professions": where(rows, scope="overall"),
        "Each profession": where(rows, scope="profession"),
        "The classifier's reading": summary.find(
            scope="run", quantity=["right", "score", "clip score"]
        ),
    }
    return {
        "name": name,
        "answers": sentences.changes(name, plan, summary),
        "axes": changes,
        "tables": [_figures(caption, own) for caption, own in shown.items() if len(own)],
        "ledger": ledger,
        "skipped": [
            f"{row['estimate']:.0f} calls of a picture ({row['part'].partition(':')[2]})"
            for _, row in summary.find(condition=name, quantity="skipped").iterrows()
        ],
    }


def _figures(caption: str, rows: pd.DataFrame) -> Table:
    """Rows of the figures table as they are, with the columns that tell them apart."""
    shown = {
        name: list(rows[name])
        for name in ("condition", "profession", "axis", "word", "quantity")
        if rows[name].nunique() > 1 or name == "word"
    }
    pairs = zip(rows["measure"], rows["setting"], strict=True)
    shown["measure"] = [_title(*pair) for pair in pairs]
    for name in ("control", "n"):
        if rows[name].astype(bool).any():
            shown[name] = list(rows[name])
    shown["figure"] = [interval(row, 3) for _, row in rows.iterrows()]
    for name, head in (("p", "p"), ("p_adjusted", "p (Holm)")):
        if rows[name].notna().any():
            shown[head] = [p_value(p) for p in rows[name]]
    return _table(caption, shown)


def _means(plan: AuditPlan, summary: Summary) -> Table:
    """The mean over professions of every word and measure, with its chance level."""
    names = {"scope": "overall", "condition": plan.conditions[0], "part": "", "control": ""}
    rows = summary.find(**names, baseline="", quantity=["mean", "chance"])
    return _figures("Mean over professions, 95 % intervals", rows)


def _title(measure: str, setting: str) -> str:
    """A measure and its setting as a caption."""
    name = sentences.measure_name(measure)
    regions = f", {sentences.regions(setting)}" if setting else ""
    return f"{name[:1].upper()}{name[1:]}{regions}"


def _by_word(
    rows: pd.DataFrame, words: Iterable[str], index: str = "profession"
) -> dict[str, pd.DataFrame]:
    """Word -> figures indexed by another column."""
    series = {word: where(rows, word=word).set_index(index) for word in words}
    return {word: own for word, own in series.items() if len(own)}


def _cells(rows: pd.DataFrame, index: pd.Index, show: Callable[[Any], str]) -> list[str]:
    """Cells of a table's column, one per entry of an index; a dash for what is missing."""
    own = rows.set_index(list(index.names)).reindex(index)
    return [show(row) for _, row in own.iterrows()]


def _table(caption: str, columns: Mapping[str, Sequence[Any]]) -> Table:
    """A table as the template shows it."""
    rows = list(zip(*columns.values(), strict=True))
    return {"caption": caption, "head": list(columns), "rows": rows}


def _failures(summary: Summary) -> Table | None:
    failures = summary.run["failures"]
    if not failures:
        return None
    caption = f"The first {len(failures)} of {summary.run['failed']} values that are in no figure"
    return _table(caption, {name: [row[name] for row in failures] for name in failures[0]})


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            rows.extend(_flat(value, f"{prefix}{name}."))
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((f"{prefix}{name}", shown))
    return rows
