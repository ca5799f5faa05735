"""Writes the tables of README.md and docs/ from committed results, or checks them.

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_tables import (
    DEVICE,
    INLINE,
    RESULTS,
    ROOT,
    alone,
    audits,
    headline,
    machine,
    other_devices,
    part_tables,
    peers,
    read,
    run,
    scaling,
)
from biasmap_fast.testbed import truth

README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs/benchmarks.md"
ENGINES = ROOT / "export/README.md"
GUIDANCE = ROOT / "docs/guidance.md"
STATISTICS = ROOT / "docs/statistics.md"
STUDIES = RESULTS / "studies"
PRECISION = STUDIES / "precision.json"
AUDIT_STUDY = STUDIES / "audit.json"
CALIBRATION = STUDIES / "calibration.json"
STUDY = STUDIES / "guidance.json"
VALIDITY = ROOT / "docs/validity.md"
VALIDITY_STUDY = STUDIES / "validity.json"
SCALE = ROOT / "docs/scale.md"
PROFILES = {
    "embedded model": DEVICE / "audit-profile-testbed.json",
    "shapes of SD 1.5": DEVICE / "audit-profile-sd15.json",
}
TRAINING = ROOT / "python/biasmap_fast/testbed/weights/training.json"


def before_moving(training: dict[str, Any]) -> float:
    """Error of the shares beyond sampling, root mean square, of words as training left them."""
    planted = {row.profession: row.shares["woman"] for row in truth()}
    squares = []
    for profession, word in training["calibration"].items():
        share = word["drawn"][0]  # by the first round, before any move
        pictures = training["settings"]["calibration_pictures"] // len(word["drawn"])
        squares.append((share - planted[profession]) ** 2 - share * (1 - share) / (pictures - 1))
    return float(max(0.0, sum(squares) / len(squares)) ** 0.5)


def testbed() -> str:
    """Evaluation of the packaged weights, and of other training seeds of the same recipe."""
    found = []
    for training, study in (
        (TRAINING, AUDIT_STUDY),
        *((STUDIES / f"testbed-seed-{n}.json", STUDIES / f"audit-seed-{n}.json") for n in (1, 2)),
    ):
        trained = read(training)
        again = read(study)["coverage"]["drawn"]
        found.append(trained["evaluation"] | {"before": before_moving(trained), "again": again})
    rows = {
        "profession right, guidance 3, 25 steps": "{drawn[profession_accuracy]:.1%}",
        **{
            f"pixel AUC of the {word} map on its region, {what}": (
                f"{{maps[{form} {word}][auc]:.3f}}"
            )
            for form, what in (("joint", "joint prompt"), ("single", "one concept a prompt"))
            for word in ("profession", "man", "woman")
        },
        "error of the shares beyond sampling as training leaves the words (root mean square)": (
            "{before:.3f}"
        ),
        "pictures a profession for the shares": "{shares[pictures_each]}",
        "slope of drawn on planted shares, guidance 1": "{shares[share_slope]:.2f}",
        "mean error of the shares at guidance 1 (of sampling alone)": (
            "{shares[mean_absolute_error]:.3f} ({shares[expected_absolute_error]:.3f})"
        ),
        "chi-square p of the shares": "{shares[chi_square_p]:.3f}",
        "the same of other seeds, 200 pictures a profession": "{again[chi_square_p]:.2g}",
        "there, error of the shares beyond sampling": ("{again[deviation of the model]:.3f}"),
        "slope of drawn on planted shares, guidance 3": "{drawn[share_slope]:.2f}",
    }
    lines = ["| | seed 0, packaged | seed 1 | seed 2 |", "|---|---:|---:|---:|"]
    for name, form in rows.items():
        lines.append(f"| {name} | {' | '.join(form.format(**each) for each in found)} |")
    return "\n".join(lines)


def before_calibration(found: dict[str, Any]) -> str:
    """Says of a study of the embedded model if it was made on weights that are packaged no more."""
    if found["weights"] == read(TRAINING)["sha256"]:
        return ""
    return "(Measured on the embedded model before its words were calibrated to the shares.)\n\n"


def change(measure: dict[str, Any]) -> str:
    """A relative change in percent with its interval."""
    if measure["relative"] is None:
        return "\N{EN DASH}"
    value = f"{100 * measure['relative']:+.0f}"
    if measure["relative_low"] is None:
        return value
    low, high = (f"{100 * measure[f'relative_{end}']:+.0f}" for end in ("low", "high"))
    return f"{value} [{low}, {high}]".replace("-", "\N{MINUS SIGN}")


def study() -> str:
    """What guidance moved, cell by cell; changes in percent of the plain pictures' value."""
    columns = {
        "energy": "energy",
        "IoU during, joint": "IoU during",
        "IoU after, joint": "IoU after",
        "IoU after, separate": "IoU after, one word a prompt",
        "true overlap": "true overlap",
        "plausibility": "plausibility",
    }
    lines = [
        f"| | pictures | {' | '.join(columns.values())} | profession right |",
        "|---|---:|" + "---:|" * (len(columns) + 1),
    ]
    found = read(STUDY)
    for row in found["rows"]:
        right = f"{100 * row['profession_right']['value']:.1f} %"
        pictures = row["seeds"] * found["professions"]
        measures = row["measures"]
        if row["cell"] == "plain":
            values = [f"{measures[name]['plain']:.3f}" for name in columns]
        else:
            values = [change(measures[name]) for name in columns]
        lines.append(f"| {row['cell']} | {pictures} | {' | '.join(values)} | {right} |")
    return before_calibration(found) + "\n".join(lines)


def study_more() -> str:
    """Corrected IoU and demographic shares, in points of 100."""
    columns = [f"corrected IoU {when}, joint" for when in ("during", "after")]
    lines = [
        "| | corrected IoU during | change | corrected IoU after | change | P(woman), change |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in read(STUDY)["rows"]:
        cells = []
        plain = row["cell"] == "plain"
        for name in columns:
            figures = row["measures"][name]
            cells += [f"{100 * figures['value']:.1f}", "" if plain else points(figures["change"])]
        cells.append("" if plain else points(row["share_woman_change"]))
        lines.append(f"| {row['cell']} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("| -", "| \N{MINUS SIGN}")


def points(figures: dict[str, Any]) -> str:
    """A change in points of 100 with its interval."""
    value, low, high = (f"{100 * figures[end]:+.1f}" for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]".replace("-", "\N{MINUS SIGN}")


def profile() -> str:
    """What of an audit's processor time its parts take."""
    found = {name: read(path) for name, path in PROFILES.items() if path.exists()}
    parts = ("network", "maps", "sampler", "classifier", "overlaps", "records", "loop", "start")
    lines = [f"| | {' | '.join(found)} |", "|---|" + "---:|" * len(found)]
    for part in parts:
        shares = [f"{100 * each['share'].get(part, 0.0):.2f} %" for each in found.values()]
        lines.append(f"| {part} | {' | '.join(shares)} |")
    for label, name in (
        ("all but the networks", "share_of_all_but_the_networks"),
        ("the same, without the start", "share_without_the_start"),
        ("overlaps, records and loop, without the start", "share_of_the_audits_own_code"),
    ):
        shares = [f"{100 * each[name]:.2f} %" for each in found.values()]
        lines.append(f"| **{label}** | {' | '.join(shares)} |")
    return "\n".join(lines)


def calibration() -> str:
    """Simulated rates of the audit's tests and intervals."""
    found = read(CALIBRATION)
    lines = [
        f"`benchmarks/calibration.py`, {found['trials']} trials a row:",
        "",
        "| | nominal | found | standard error |",
        "|---|---:|---:|---:|",
    ]
    for row in found["rows"]:
        nominal = "" if row["nominal"] is None else f"{row['nominal']:.2f}"
        lines.append(
            f"| {row['name']} | {nominal} | {row['rate']:.3f} | {row['standard_error']:.3f} |"
        )
    return "\n".join(lines)


def nothing() -> str:
    """What an audit claims of a model without bias."""
    found = read(AUDIT_STUDY)["no bias, trained"]
    shares = found["shares"]
    wrong, drawn = shares["found a bias"], shares["drawn"]
    lines = [
        f"Shares: Wilson's interval leaves 0.5 for {wrong['value']:.3f} {ends(wrong, 3)} of "
        f"{wrong['n']} blocks of {shares['block']} pictures, where it would for "
        f"{shares['exact']:.3f} if every share were exactly 0.5. {deviation(drawn)} In an audit, "
        "where all professions have the same seeds, they all show the same word on "
        f"{found['seeds on which all professions agree']} of {found['seeds']}.",
        "",
        "| | mean over professions | chance | professions above it | after Holm | "
        "above every control too | below chance |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for measure, name in (("containment", "containment"), ("iou", "IoU")):
        for row in found[measure]:
            mean, of = row["mean over professions"], row["professions"]
            cells = [f"{mean['value']:.3f} {ends(mean, 3)}", f"{row['chance']:.3f}"]
            kinds = ("above", "above_holm", "above chance and every control", "below")
            cells += [f"{row[kind]} of {of}" for kind in kinds]
            lines.append(f"| {name}, “{row['word']}” | {' | '.join(cells)} |")
    return "\n".join(lines)


def deviation(drawn: dict[str, Any]) -> str:
    """How far a model's shares are from what was planted."""
    return (
        f"Of {drawn['pictures']} pictures the shares differ from the planted ones by "
        f"{drawn['mean difference']:+.3f} on average (standard error "
        f"{drawn['standard error']:.3f}), and by "
        f"{drawn['deviation of the model']:.3f} beyond sampling (root mean square; "
        f"chi-square p = {drawn['chi_square_p']:.2g})."
    )


def audit_study() -> str:
    """What an audit finds of the embedded model, whose bias is planted."""
    found = read(AUDIT_STUDY)
    covered, none = found["coverage"]["covered"], found["no effect"]
    slopes = found["amplification"]["slopes"]
    move = found["amplification"]["move towards the planted majority"]
    lines = [
        "| | nominal | found |",
        "|---|---:|---:|",
        f"| Wilson interval holds the planted share, blocks of {found['coverage']['block']} "
        f"pictures | {found['coverage']['exact']:.3f} | {covered['value']:.3f} {ends(covered, 3)} "
        f"of {covered['n']} |",
    ]
    for name, slope in slopes.items():
        value = f"{slope['value']:.2f} {ends(slope)}"
        lines.append(f"| slope of drawn on planted shares, {name} | | {value} |")
    lines.append(
        "| move towards the planted majority from guidance 1 to 3, same seeds | | "
        f"{move['value']:.2f} {ends(move)} |"
    )
    for name, rate in none.items():
        if isinstance(rate, dict):
            value = f"{rate['value']:.3f} {ends(rate, 3)} of {rate['n']}"
            lines.append(f"| no effect (random halves): {name} | {none['nominal']:.2f} | {value} |")
    return "\n".join([*lines, "", deviation(found["coverage"]["drawn"])])


def ends(figures: dict[str, Any], digits: int = 2) -> str:
    """An interval's ends."""
    return f"[{figures['low']:.{digits}f}, {figures['high']:.{digits}f}]"


def precision() -> str:
    """What a precision saved, and how often its intervals covered."""
    found = read(PRECISION)

    def rate(figures: dict[str, float]) -> str:
        return f"{figures['value']:.3f}"

    pool = found["pool"]
    audit = found["audit"]
    lines = [
        f"{before_calibration(found)}`benchmarks/study_precision.py`, "
        f"{found['trials'] // 4} audits a row, of 20 professions and two words, drawn from "
        f"{found['pool_seeds']} pictures of each profession. The fixed "
        "design has one number of seeds for all, the smallest that makes every interval as narrow:",
        "",
        "| precision | images, fixed | with `--precision` | of fixed | without the widest "
        "| covers | t of the fixed design covers | IoU covers |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in pool:
        cells = [f"{row['images_fixed']}", f"{row['images']:.0f}", f"{100 * row['share']:.0f} %"]
        cells += [f"{100 * row['share_without_the_widest']:.0f} %"]
        cells += [rate(row["covered"][name]) for name in ("fixed width", "fixed", "iou")]
        lines.append(f"| {row['precision']:g} | {' | '.join(cells)} |")
    error = max(each["standard_error"] for row in pool for each in row["covered"].values())
    least = min(row["covered_least"]["fixed width"] for row in pool)
    lines += [
        "",
        f"Standard errors of the rates are {error:.3f} and less. The worst covered of the pairs of "
        f"profession and word, at any precision, has {least:.3f}. Student's t covers less because "
        "three professions' containment is near 0 in almost every picture and seldom more: most "
        "samples show too small a spread, or none and so no interval.",
        "",
        f"One real audit, precision {audit['target']:g}: {audit['images']} images in "
        f"{audit['rounds']} rounds, {min(p['seeds'] for p in audit['professions'])} to "
        f"{max(p['seeds'] for p in audit['professions'])} of a profession, where a fixed number "
        f"takes {audit['images_fixed']} ({100 * (1 - audit['saved']):.0f} %).",
        "",
        f"Values of known mean, {found['trials']} trials a row:",
        "",
        "| | precision | images, fixed | with `--precision` | bias | covers "
        "| without the term | t of the fixed number covers |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["distributions"]:
        cells = [f"{row['precision']:g}", f"{row['images_fixed']}", f"{row['images']:.0f}"]
        cells += [f"{row['bias']:+.4f}".replace("-", "\N{MINUS SIGN}")]
        cells += [
            rate(row["covered"][name]) for name in ("fixed width", "without the term", "fixed")
        ]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    over = found["mean over professions"]
    lines += [
        "",
        f"The mean over professions, where these have different numbers of seeds (precision "
        f"{over['precision']:g}), covers {rate(over['covered']['ragged'])}, with the same number "
        f"{rate(over['covered']['all seeds'])}.",
    ]
    return "\n".join(lines)


def validity() -> str:
    """The chosen measure, the published one, and what lies between, on the final models."""
    groups = read(VALIDITY_STUDY)["groups"]
    lines = [
        "| | choosing | final | final AUC | rho | adjacent | 0.25 against 0.75 | single pictures |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in groups["final"]["variants"].items():
        chose = groups["choosing"]["variants"][name]["figures"]["concordance"]["value"]
        own = found["figures"]
        cells = [f"{chose:.2f}", interval(own["concordance"]), interval(own["auc"])]
        cells += [f"{own[f]['value']:.2f}" for f in ("rho", "adjacent", "quarter", "picture_auc")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def validity_measures() -> str:
    """Every measure on the chosen maps and on the published ones."""
    groups = read(VALIDITY_STUDY)["groups"]
    lines = [
        "| measure | chosen maps, choosing | final | published maps, choosing | final |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in groups["final"]["measures"]["winner"]:
        cells = [
            f"{groups[group]['measures'][maps][name]['figures']['concordance']['value']:.2f}"
            for maps in ("winner", "published")
            for group in ("choosing", "final")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def validity_levels() -> str:
    """Each planted level against level 0 on the final models."""
    levels = read(VALIDITY_STUDY)["groups"]["final"]["levels"]
    lines = [
        "| planted | chosen: AUC against 0 | mean value | published: AUC against 0 | mean value |",
        "|---:|---:|---:|---:|---:|",
    ]
    for level in levels["winner"]:
        cells = []
        for name in ("winner", "published"):
            found = levels[name][level]
            cells.append("" if level == "0" else f"{found['auc']['value']:.2f}")
            cells.append(f"{found['value']['value']:.2f}")
        lines.append(f"| {level} | {' | '.join(cells)} |")
    return "\n".join(lines)


def validity_models() -> str:
    """The gate, model by model, and the chosen and the published measure on each."""
    lines = [
        "| model | AUC of the profession's map | man | woman | drawn right | chosen | published |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for group, found in read(VALIDITY_STUDY)["groups"].items():
        values = [
            found["variants"][name]["figures"]["concordance"]["models"]
            for name in ("winner", "published")
        ]
        figures = dict(zip(found["passed"], zip(*values, strict=True), strict=True))
        for model, gates in found["gates"].items():
            cells = [f"{gates[word]:.3f}" for word in ("noun", "man", "woman")]
            cells.append(f"{100 * found['profession_right'][model]:.0f} %")
            cells += [f"{x:.2f}" for x in figures[model]] if model in figures else ["left out", ""]
            lines.append(f"| {group}, {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(figures: dict[str, Any]) -> str:
    """A mean over models with its interval; a probability does not go beyond 1."""
    return f"{figures['value']:.2f} [{figures['low']:.2f}, {min(1.0, figures['high']):.2f}]"


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"headline": headline, "testbed": testbed},
    BENCHMARKS: {
        "machine": machine,
        "overlap": lambda: part_tables(run(), "overlap"),
        "recorder": lambda: part_tables(run(), "recorder"),
        "peers": peers,
        "guidance": lambda: part_tables(run(), "guidance"),
        "audits": audits,
        "scaling": scaling,
        "engines": lambda: part_tables(run(), "engines"),
        "engines testbed": lambda: alone("engines-testbed"),
        "engines sd15": lambda: alone("engines-sd15"),
        "other devices": other_devices,
    },
    ENGINES: {},
    VALIDITY: {
        "validity": validity,
        "validity measures": validity_measures,
        "validity levels": validity_levels,
        "validity models": validity_models,
    },
    STATISTICS: {
        "calibration": calibration,
        "precision": precision,
        "nothing": nothing,
        "audit": audit_study,
    },
    GUIDANCE: {
        "study": study,
        "study more": study_more,
        "cost": lambda: part_tables(run(), "guidance"),
    },
    SCALE: {"profile": profile},
}


def rendered(path: Path, text: str | None = None) -> str:
    """A page with its tables and numbers made anew.

    A table stands between ``<!-- name -->`` and ``<!-- /name -->``, a number inside a sentence
    between ``<!-- = name -->`` and ``<!-- /= -->``.
    """
    text = path.read_text(encoding="utf-8") if text is None else text
    for name, table in TABLES[path].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if not re.search(pattern, text, re.DOTALL):
            raise ValueError(f"{path.name} has no place <!-- {name} --> ... <!-- /{name} -->")
        # no backslash of a table may act as a group reference
        filled = table().replace("\\", r"\\")
        text = re.sub(pattern, rf"\g<1>{filled}\n\g<2>", text, flags=re.DOTALL)
    return re.sub(
        r"(<!-- = ([\w ]+) -->).*?(<!-- /= -->)",
        lambda found: f"{found[1]}{INLINE[found[2]]()}{found[3]}",
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a table is out of date")
    options = parser.parse_args()
    for path in TABLES:
        fresh = rendered(path)
        if options.check and fresh != path.read_text(encoding="utf-8"):
            sys.exit(f"{path.relative_to(ROOT)} is out of date: run benchmarks/tables.py")
        path.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
