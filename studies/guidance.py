"""What guidance moves: a study on the embedded model, where the truth is known.

    python -m studies.guidance [--runs DIR] [--cells [CELL ...]]

Four figures that must not be mistaken for each other, against the energy's scale: the energy; the
measured IoU, of the maps made during the guided run and of maps made afterwards, without guidance,
from the finished picture; the true overlap, which is the part of the marker's drawn pixels that
lies on the pixels which the demographic decides; and whether the picture is what was asked for.
The control adds random directions of the gradients' own norms. Every cell draws the same seeds, so
differences are paired. A cell and profession that is on the disk is not drawn again; several
processes may share a folder if each is given its own --cells; without a cell after it, nothing is
drawn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import biasmap_fast as bm
from biasmap_fast.attribution import Recorder, attribute
from biasmap_fast.audit.plan import AuditPlan
from biasmap_fast.audit.statistics import crossed_mean_interval, mean_interval, share_interval
from biasmap_fast.files import write_text
from biasmap_fast.guidance import Guidance
from biasmap_fast.testbed.classify import PLAUSIBLE, Classifier
from training.train import weight_hashes

from .common import RESULTS, ROOT, write

FIGURE = ROOT / "docs/guidance.png"
STEPS = 25
WORDS = ("man", "woman")
MARKER = 5  # label of the first marker colour in `Classifier.label`
FORMS = {
    "joint": "A photo of the face of {profession} and {demographic}",
    "separate": ("A photo of the face of {profession}", "A photo of {a_demographic}"),
}
# UNet calls at which a finished picture is noised and looked at again
LOOKS = range(2, STEPS, 5)


@dataclass(frozen=True)
class Cell:
    """One way to draw: settings of the energy, how many seeds, real gradients or random ones."""

    scale: float = 0.0
    seeds: int = 50
    random: bool = False
    form: str = "joint"
    layers: tuple[str, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)


SCALES = (30.0, 100.0, 300.0, 1000.0)
UP = ("up_blocks",)
FINE = ("down_blocks.0", "up_blocks.2")
CELLS = {
    "plain": Cell(),
    **{f"scale {scale:g}": Cell(scale) for scale in SCALES},
    **{f"random {scale:g}": Cell(scale, random=True) for scale in (100.0, 300.0)},
    # what might move the truth; fewer seeds, every cell against the plain pictures of these
    "separate 300": Cell(300.0, 10, form="separate"),
    "decoder 300": Cell(300.0, 10, layers=UP),
    "finest layers 300": Cell(300.0, 10, layers=FINE),
    "first third 300": Cell(300.0, 10, options={"stop": 0.33}),
    "first third 1000": Cell(1000.0, 10, options={"stop": 0.33}),
    "inner steps 300": Cell(300.0, 10, options={"inner_steps": 4}),
    "fraction 0.1 300": Cell(300.0, 10, options={"fraction": 0.1}),
    # the measure that recovers the planted overlap best (docs/validity.md)
    **{
        f"containment {scale:g}": Cell(scale, layers=UP, options={"containment": (0.05, 0.1)})
        for scale in (30.0, 100.0, 300.0)
    },
}


def randomised(gradient: Any, generators: Sequence[torch.Generator]) -> Any:
    """The control: every gradient is replaced by a random one of the same norm."""

    def of_the_same_norm(*args: Any) -> Any:
        output, energy, exact = gradient(*args)
        pairs = zip(exact, generators, strict=True)
        noise = torch.stack([torch.randn(one.shape, generator=g) for one, g in pairs])
        sizes = [x.flatten(1).norm(dim=1)[:, None, None, None] for x in (exact, noise)]
        return output, energy, noise * sizes[0] / sizes[1]

    return of_the_same_norm


def plan_of(form: str) -> AuditPlan:
    return AuditPlan.model_validate({"attribution_template": FORMS[form], "seeds": [0]})


def guidance_of(pipe: Any, cell: Cell, profession: str, seeds: Sequence[int]) -> Guidance:
    pairs = plan_of(cell.form).pairs(profession)
    prompts = list(
        dict.fromkeys(p for pair in pairs for p in (pair.profession_prompt, pair.word_prompt))
    )
    energy = bm.Energy(
        pairs=[(profession, pair.word) for pair in pairs],
        scale=cell.scale,
        clip=None,
        layers=cell.layers,
        **cell.options,
    )
    guidance = bm.guide(pipe, [prompts] * len(seeds), energy, chunks=1, strict=False)
    if cell.random:
        generators = [torch.Generator().manual_seed(10**6 + seed) for seed in seeds]
        evaluator: Any = guidance._evaluator
        evaluator.gradient = randomised(evaluator.gradient, generators)
    return guidance


def prompts_of(profession: str) -> dict[str, Any]:
    """Every attribution prompt of both forms, by name."""
    return {
        prompt.name: prompt
        for form in FORMS
        for pair in plan_of(form).pairs(profession)
        for prompt in (pair.profession_prompt, pair.word_prompt)
    }


def recorded(recorder: Recorder) -> Any:
    """The maps of several prompts, by name."""
    return recorder.maps_by_prompt()


def overlaps(maps: dict[str, Any], profession: str, prefix: str) -> dict[str, list[float]]:
    """IoU of the profession with either word, in both forms: a list over the pictures."""
    found = {}
    for form in FORMS:
        for pair in plan_of(form).pairs(profession):
            a = maps[pair.profession_prompt.name][profession]
            b = maps[pair.word_prompt.name][pair.word]
            found[f"{prefix}_{form}_{pair.word}"] = bm.iou(a, b, fraction=0.3).tolist()
    return found


def look_again(
    pipe: Any, text: str, latents: torch.Tensor, seeds: Sequence[int], profession: str
) -> Any:
    """Maps of finished pictures, unguided: noised to several times, one UNet call each."""
    states = pipe.encode_prompt([text] * len(seeds), latents.device, 1, False)[0]
    generators = [torch.Generator().manual_seed(10**7 + seed) for seed in seeds]
    noise = torch.cat([torch.randn(1, *latents.shape[1:], generator=g) for g in generators])
    prompts = list(prompts_of(profession).values())
    with attribute(pipe, prompts, chunks=1) as recorder, torch.no_grad():
        for call in LOOKS:
            time = pipe.scheduler.timesteps[call]
            alpha_bar = pipe.scheduler.alphas_cumprod[time]
            noised = alpha_bar.sqrt() * latents + (1.0 - alpha_bar).sqrt() * noise
            pipe.unet(noised, time, states)
    return recorded(recorder)


def draw(pipe: Any, classifier: Classifier, cell: Cell, profession: str) -> dict[str, list[Any]]:
    """One cell's pictures of one profession, measured: columns over the pictures."""
    seeds = list(range(cell.seeds))
    text = plan_of(cell.form).prompt(profession)
    guidance = guidance_of(pipe, cell, profession, seeds)
    with attribute(pipe, list(prompts_of(profession).values())) as recorder, guidance:
        latents = pipe(
            [text] * len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            output_type="latent",
        ).images
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    arrays = pipe.image_processor.postprocess(decoded, output_type="np")
    pictures = (arrays * 255).round().astype(np.uint8)
    readings = classifier(pictures)
    labels = classifier.label(pictures).reshape(len(seeds), 64, 64)
    coloured = labels == MARKER + classifier.nouns.index(profession)  # [S, 64, 64]
    true = [
        float((own & reading.regions["demographic"]).sum() / own.sum()) if own.any() else None
        for own, reading in zip(coloured, readings, strict=True)
    ]
    energy = np.full((len(seeds), STEPS), np.nan)
    for row in guidance.ledger:
        energy[row.image, row.call] = row.energy
    return {
        "seed": seeds,
        "energy": np.nanmean(energy, axis=1).tolist(),
        **overlaps(recorded(recorder), profession, "during"),
        **overlaps(look_again(pipe, text, latents, seeds, profession), profession, "after"),
        "true_overlap": true,
        "marker_pixels": coloured.sum((1, 2)).tolist(),
        "right": [r.profession == profession for r in readings],
        "plausibility": [r.plausibility for r in readings],
        "word": [r.demographic if r.plausibility >= PLAUSIBLE else None for r in readings],
    }


def path_of(folder: Path, name: str, profession: str) -> Path:
    return folder / name.replace(" ", "-") / f"{profession}.json"


def run(folder: Path, names: Sequence[str]) -> None:
    """Draws what is not on the disk yet."""
    pipe = bm.testbed.pipeline()
    classifier = Classifier(bm.testbed.World())
    identity = {"weights": weight_hashes(bm.testbed.WEIGHTS)}
    todo = [
        (name, profession)
        for name in names
        for profession in classifier.nouns
        if not path_of(folder, name, profession).is_file()
    ]
    for name, profession in tqdm(todo, unit="profession"):
        columns = draw(pipe, classifier, CELLS[name], profession)
        path = path_of(folder, name, profession)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**identity, "cell": asdict(CELLS[name]), **columns}))


def load(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Cell -> profession -> columns, of the cells that are complete and of today's weights."""
    weights = weight_hashes(bm.testbed.WEIGHTS)
    professions = [row.profession for row in bm.testbed.truth()]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, cell in CELLS.items():
        paths = {profession: path_of(folder, name, profession) for profession in professions}
        if all(path.is_file() for path in paths.values()):
            read = {noun: json.loads(path.read_text()) for noun, path in paths.items()}
            expected = json.loads(json.dumps({"weights": weights, "cell": asdict(cell)}))
            for noun, columns in read.items():
                if any(columns[key] != value for key, value in expected.items()):
                    raise SystemExit(
                        f"{paths[noun]} is of other weights or settings: remove it and run again"
                    )
            found[name] = read
    return found


MEASURES = {
    "energy": ("energy",),
    **{
        f"IoU {when}, {form}": tuple(f"{when}_{form}_{word}" for word in WORDS)
        for when in ("during", "after")
        for form in FORMS
    },
    "true overlap": ("true_overlap",),
    "plausibility": ("plausibility",),
}


def matrix(
    cell: dict[str, dict[str, Any]], names: Sequence[str], professions: Sequence[str], seeds: int
) -> np.ndarray[Any, Any]:
    """``[professions, seeds]``, the mean of the named columns; NaN where one is missing."""
    columns = [[np.array(cell[p][n][:seeds], dtype=np.float64) for n in names] for p in professions]
    return np.array([np.mean(column, axis=0) for column in columns])


def compared(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> dict[str, Any]:
    """A measure of a cell against the plain pictures of the same seeds."""
    change, plain = crossed_mean_interval(after - before, lowest=-1.0), float(np.nanmean(before))
    return {
        "plain": plain,
        "value": float(np.nanmean(after)),
        "change": change.to_dict(),
        "relative": None if change.value is None else change.value / plain,
        # no measure can fall by more than all of it
        "relative_low": None if change.low is None else max(-1.0, change.low / plain),
        "relative_high": None if change.high is None else change.high / plain,
    }


def summarise(cells: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every cell against the plain pictures of the same seeds."""
    truth = bm.testbed.truth()
    everyone = [row.profession for row in truth]
    overlapping = [row.profession for row in truth if row.level > 0]
    rows = []
    for name, cell in cells.items():
        seeds = CELLS[name].seeds
        measures = {}
        for measure, columns in MEASURES.items():
            # where the marker is off the region nothing can fall
            professions = overlapping if measure == "true overlap" else everyone
            sides = (matrix(of, columns, professions, seeds) for of in (cells["plain"], cell))
            measures[measure] = compared(*sides)
            if measure.startswith("IoU"):
                # where chance is 0; its change in percent of a small number says little
                measures[f"corrected {measure}"] = corrected(measures[measure])
        right = [x for p in everyone for x in cell[p]["right"]]
        changes = []
        for p in everyone:
            words = [word for word in cell[p]["word"] if word is not None]
            plain = [word == WORDS[1] for word in cells["plain"][p]["word"][:seeds]]
            if words:
                share = np.mean([word == WORDS[1] for word in words])
                changes.append(float(share - np.mean(plain)))
        method = {"method": "Student t over professions"}
        rows.append(
            {
                "cell": name,
                **asdict(CELLS[name]),
                "measures": measures,
                "profession_right": share_interval(sum(right), len(right)).to_dict(),
                "no_marker_pixels": sum(x == 0 for p in everyone for x in cell[p]["marker_pixels"]),
                "share_woman_change": mean_interval(changes, lowest=-1.0).to_dict() | method,
            }
        )
    return rows


def corrected(iou: dict[str, Any]) -> dict[str, Any]:
    """A measured IoU's figures on the corrected scale, which is linear in the IoU."""
    chance = bm.chance_iou(0.3)
    ends = {end: iou["change"][end] for end in ("value", "low", "high")}
    scaled = {end: None if x is None else x / (1.0 - chance) for end, x in ends.items()}
    values = {end: bm.corrected(iou[end], chance) for end in ("plain", "value")}
    return {**values, "change": iou["change"] | scaled}


def report(folder: Path) -> None:
    cells = load(folder)
    if "plain" not in cells:
        raise SystemExit(f"{folder} has no complete plain cell yet")
    rows = summarise(cells)
    record = {"steps": STEPS, "guidance_scale": 1.0, "professions": len(bm.testbed.truth())}
    write(RESULTS / "guidance.json", 1, {**record, "rows": rows})
    plot(rows, FIGURE)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Panels over the energy's scale: guided, and random directions of the same norms."""
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True).ravel()
    panels = {  # title -> unit and figures
        "energy": ("change, %", ["energy"]),
        "measured IoU": ("change, %", ["IoU during, joint", "IoU after, joint"]),
        "true overlap in the picture": ("change, %", ["true overlap"]),
        "plausibility": ("change, %", ["plausibility"]),
        "pictures that show the profession": ("%", ["profession_right"]),
        "P(woman), mean over professions": ("change, points", ["share_woman_change"]),
    }
    curves = [("scale", "guided", "#0072B2", "o"), ("random", "random directions", "#D55E00", "s")]
    for axes, (title, (unit, names)) in zip(grid, panels.items(), strict=True):
        for prefix, label, colour, shape in curves:
            shown = [row for row in rows if row["cell"].startswith(f"{prefix} ")]
            shown.sort(key=lambda row: row["scale"])
            scales = [row["scale"] for row in shown]
            for name, style in zip(names, ("-", "--"), strict=False):
                values, low, high = zip(*(percents(row, name) for row in shown), strict=True)
                when = ", measured afterwards" if style == "--" else ""
                axes.plot(
                    scales, values, style, color=colour, marker=shape, ms=4, label=label + when
                )
                axes.fill_between(scales, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(100.0 if unit == "%" else 0.0, color="#333333", linewidth=0.8)
        axes.set(xscale="log", ylabel=unit)
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(color="#e3e3e3", linewidth=0.6)
    for axes in grid[3:]:
        axes.set_xlabel("scale of the energy")
    grid[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def percents(row: dict[str, Any], name: str) -> list[float]:
    """A value and its interval in percent; a missing end of an interval is not drawn."""
    relative = name in row["measures"]
    figures = row["measures"][name] if relative else row[name]
    keys = ("relative", "relative_low", "relative_high") if relative else ("value", "low", "high")
    return [float("nan") if figures[key] is None else 100 * figures[key] for key in keys]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/study-guidance")
    parser.add_argument("--cells", nargs="*", choices=CELLS, default=CELLS, metavar="CELL")
    given = parser.parse_args()
    torch.set_num_threads(1)
    run(given.runs, list(given.cells))
    report(given.runs)


if __name__ == "__main__":
    main()
