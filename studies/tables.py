"""What the pages show of the studies, as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.tables import read, table
from biasmap_fast.testbed import WEIGHTS, truth

RESULTS = Path(__file__).parent / "results"
TRAINING = WEIGHTS / "training.json"


def result(name: str) -> dict[str, Any]:
    return read(RESULTS / f"{name}.json")


def minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def ends(figures: dict[str, Any], digits: int = 2) -> str:
    """An interval's ends."""
    return f"[{figures['low']:.{digits}f}, {figures['high']:.{digits}f}]"


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
    models = []
    for training, audited in (
        (read(TRAINING), "audit"),
        *((result(f"testbed-seed-{n}"), f"audit-seed-{n}") for n in (1, 2)),
    ):
        again = result(audited)["coverage"]["drawn"]
        models.append(training["evaluation"] | {"before": before_moving(training), "again": again})
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
        "there, error of the shares beyond sampling": "{again[deviation of the model]:.3f}",
        "slope of drawn on planted shares, guidance 3": "{drawn[share_slope]:.2f}",
    }
    lines = [[name, *(form.format(**model) for model in models)] for name, form in rows.items()]
    return table(["", "seed 0, packaged", "seed 1", "seed 2"], lines)


def before_calibration(record: dict[str, Any]) -> str:
    """Says of a study of the embedded model if it was made on weights that are packaged no more."""
    if record["weights"] == read(TRAINING)["sha256"]:
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
    return minus(f"{value} [{low}, {high}]")


def points(figures: dict[str, Any]) -> str:
    """A change in points of 100 with its interval."""
    value, low, high = (f"{100 * figures[end]:+.1f}" for end in ("value", "low", "high"))
    return minus(f"{value} [{low}, {high}]")


def guidance() -> str:
    """What guidance moved, cell by cell; changes in percent of the plain pictures' value."""
    columns = {
        "energy": "energy",
        "IoU during, joint": "IoU during",
        "IoU after, joint": "IoU after",
        "IoU after, separate": "IoU after, one word a prompt",
        "true overlap": "true overlap",
        "plausibility": "plausibility",
    }
    record = result("guidance")
    lines = []
    for row in record["rows"]:
        figures = [row["measures"][name] for name in columns]
        plain = row["cell"] == "plain"
        cells = [f"{one['plain']:.3f}" if plain else change(one) for one in figures]
        right = f"{100 * row['profession_right']['value']:.1f} %"
        lines.append([row["cell"], str(row["seeds"] * record["professions"]), *cells, right])
    head = ["", "pictures", *columns.values(), "profession right"]
    return before_calibration(record) + table(head, lines)


def guidance_more() -> str:
    """Corrected IoU and demographic shares, in points of 100."""
    lines = []
    for row in result("guidance")["rows"]:
        plain, cells = row["cell"] == "plain", [row["cell"]]
        for when in ("during", "after"):
            figures = row["measures"][f"corrected IoU {when}, joint"]
            cells.append(minus(f"{100 * figures['value']:.1f}"))
            cells.append("" if plain else points(figures["change"]))
        lines.append([*cells, "" if plain else points(row["share_woman_change"])])
    head = ["corrected IoU during", "change", "corrected IoU after", "change", "P(woman), change"]
    return table(["", *head], lines)


def calibration() -> str:
    """Simulated rates of the audit's tests and intervals."""
    record = result("calibration")
    lines = [
        [
            row["name"],
            "" if row["nominal"] is None else f"{row['nominal']:.2f}",
            f"{row['rate']:.3f}",
            f"{row['standard_error']:.3f}",
        ]
        for row in record["rows"]
    ]
    said = f"`studies/calibration.py`, {record['trials']} trials a row:\n\n"
    return said + table(["", "nominal", "found", "standard error"], lines)


def no_bias() -> str:
    """What an audit claims of a model without bias."""
    record = result("audit")["no bias, trained"]
    shares = record["shares"]
    wrong = shares["found a bias"]
    said = (
        f"Shares: Wilson's interval leaves 0.5 for {wrong['value']:.3f} {ends(wrong, 3)} of "
        f"{wrong['n']} blocks of {shares['block']} pictures, where it would for "
        f"{shares['exact']:.3f} if every share were exactly 0.5. {deviation(shares['drawn'])} In "
        "an audit, where all professions have the same seeds, they all show the same word on "
        f"{record['seeds on which all professions agree']} of {record['seeds']}.\n\n"
    )
    kinds = ("above", "above_holm", "above chance and every control", "below")
    lines = []
    for measure, name in (("containment", "containment"), ("iou", "IoU")):
        for row in record[measure]:
            mean = row["mean over professions"]
            cells = [f"{mean['value']:.3f} {ends(mean, 3)}", f"{row['chance']:.3f}"]
            cells += [f"{row[kind]} of {row['professions']}" for kind in kinds]
            lines.append([f"{name}, “{row['word']}”", *cells])
    head = ["mean over professions", "chance", "professions above it", "after Holm"]
    return said + table(["", *head, "above every control too", "below chance"], lines)


def deviation(drawn: dict[str, Any]) -> str:
    """How far a model's shares are from what was planted."""
    return (
        f"Of {drawn['pictures']} pictures the shares differ from the planted ones by "
        f"{drawn['mean difference']:+.3f} on average (standard error "
        f"{drawn['standard error']:.3f}), and by "
        f"{drawn['deviation of the model']:.3f} beyond sampling (root mean square; "
        f"chi-square p = {drawn['chi_square_p']:.2g})."
    )


def audit() -> str:
    """What an audit finds of the embedded model, whose bias is planted."""
    record = result("audit")
    coverage, none, amplified = (record[n] for n in ("coverage", "no effect", "amplification"))
    covered = coverage["covered"]
    move = amplified["move towards the planted majority"]
    lines = [
        [
            f"Wilson interval holds the planted share, blocks of {coverage['block']} pictures",
            f"{coverage['exact']:.3f}",
            f"{covered['value']:.3f} {ends(covered, 3)} of {covered['n']}",
        ],
        *(
            [f"slope of drawn on planted shares, {name}", "", f"{one['value']:.2f} {ends(one)}"]
            for name, one in amplified["slopes"].items()
        ),
        [
            "move towards the planted majority from guidance 1 to 3, same seeds",
            "",
            f"{move['value']:.2f} {ends(move)}",
        ],
    ]
    for name, rate in none.items():
        if isinstance(rate, dict):
            value = f"{rate['value']:.3f} {ends(rate, 3)} of {rate['n']}"
            lines.append([f"no effect (random halves): {name}", f"{none['nominal']:.2f}", value])
    return f"{table(['', 'nominal', 'found'], lines)}\n\n{deviation(coverage['drawn'])}"


def precision() -> str:
    """What a precision saved, and how often its intervals covered."""
    record = result("precision")
    pool, real, over = record["pool"], record["audit"], record["mean over professions"]

    def rate(figures: dict[str, float]) -> str:
        return f"{figures['value']:.3f}"

    audits = [
        [
            f"{row['precision']:g}",
            f"{row['images_fixed']}",
            f"{row['images']:.0f}",
            f"{100 * row['share']:.0f} %",
            f"{100 * row['share_without_the_widest']:.0f} %",
            *(rate(row["covered"][name]) for name in ("fixed width", "fixed", "iou")),
        ]
        for row in pool
    ]
    known = [
        [
            row["name"],
            f"{row['precision']:g}",
            f"{row['images_fixed']}",
            f"{row['images']:.0f}",
            minus(f"{row['bias']:+.4f}"),
            *(rate(row["covered"][name]) for name in ("fixed width", "without the term", "fixed")),
        ]
        for row in record["distributions"]
    ]
    head = ["precision", "images, fixed", "with `--precision`"]
    error = max(one["standard_error"] for row in pool for one in row["covered"].values())
    least = min(row["covered_least"]["fixed width"] for row in pool)
    return "\n\n".join(
        [
            f"{before_calibration(record)}`studies/precision.py`, {record['trials'] // 4} audits a "
            f"row, of 20 professions and two words, drawn from {record['pool_seeds']} pictures of "
            "each profession. The fixed design has one number of seeds for all, the smallest that "
            "makes every interval as narrow:",
            table(
                [
                    *(*head, "of fixed", "without the widest", "covers"),
                    *("t of the fixed design covers", "IoU covers"),
                ],
                audits,
                left=0,
            ),
            f"Standard errors of the rates are {error:.3f} and less. The worst covered of the "
            f"pairs of profession and word, at any precision, has {least:.3f}. Student's t covers "
            "less because three professions' containment is near 0 in almost every picture and "
            "seldom more: most samples show too small a spread, or none and so no interval.",
            f"One real audit, precision {real['target']:g}: {real['images']} images in "
            f"{real['rounds']} rounds, {min(p['seeds'] for p in real['professions'])} to "
            f"{max(p['seeds'] for p in real['professions'])} of a profession, where a fixed number "
            f"takes {real['images_fixed']} ({100 * (1 - real['saved']):.0f} %).",
            f"Values of known mean, {record['trials']} trials a row:",
            table(
                [
                    *("", *head, "bias", "covers"),
                    *("without the term", "t of the fixed number covers"),
                ],
                known,
            ),
            "The mean over professions, where these have different numbers of seeds (precision "
            f"{over['precision']:g}), covers {rate(over['covered']['ragged'])}, with the same "
            f"number {rate(over['covered']['all seeds'])}.",
        ]
    )


def interval(figures: dict[str, Any]) -> str:
    """A mean over models with its interval; a probability does not go beyond 1."""
    return f"{figures['value']:.2f} [{figures['low']:.2f}, {min(1.0, figures['high']):.2f}]"


def validity() -> str:
    """The chosen measure, the published one, and what lies between, on the final models."""
    groups = result("validity")["groups"]
    lines = []
    for name, variant in groups["final"]["variants"].items():
        chose = groups["choosing"]["variants"][name]["figures"]["concordance"]["value"]
        final = variant["figures"]
        cells = [f"{chose:.2f}", interval(final["concordance"]), interval(final["auc"])]
        cells += [f"{final[f]['value']:.2f}" for f in ("rho", "adjacent", "quarter", "picture_auc")]
        lines.append([name, *cells])
    head = ["choosing", "final", "final AUC", "rho", "adjacent", "0.25 against 0.75"]
    return table(["", *head, "single pictures"], lines)


def validity_measures() -> str:
    """Every measure on the chosen maps and on the published ones."""
    groups = result("validity")["groups"]
    lines = [
        [
            name,
            *(
                f"{groups[group]['measures'][maps][name]['figures']['concordance']['value']:.2f}"
                for maps in ("winner", "published")
                for group in ("choosing", "final")
            ),
        ]
        for name in groups["final"]["measures"]["winner"]
    ]
    head = ["chosen maps, choosing", "final", "published maps, choosing", "final"]
    return table(["measure", *head], lines)


def validity_levels() -> str:
    """Each planted level against level 0 on the final models."""
    levels = result("validity")["groups"]["final"]["levels"]
    lines = []
    for level in levels["winner"]:
        cells = [level]
        for name in ("winner", "published"):
            figures = levels[name][level]
            cells.append("" if level == "0" else f"{figures['auc']['value']:.2f}")
            cells.append(f"{figures['value']['value']:.2f}")
        lines.append(cells)
    head = ["chosen: AUC against 0", "mean value", "published: AUC against 0", "mean value"]
    return table(["planted", *head], lines, left=0)


def validity_models() -> str:
    """The gate, model by model, and the chosen and the published measure on each."""
    lines = []
    for group, record in result("validity")["groups"].items():
        values = [
            record["variants"][name]["figures"]["concordance"]["models"]
            for name in ("winner", "published")
        ]
        figures = dict(zip(record["passed"], zip(*values, strict=True), strict=True))
        for model, gates in record["gates"].items():
            cells = [f"{gates[word]:.3f}" for word in ("noun", "man", "woman")]
            cells.append(f"{100 * record['profession_right'][model]:.0f} %")
            cells += [f"{x:.2f}" for x in figures[model]] if model in figures else ["left out", ""]
            lines.append([f"{group}, {model}", *cells])
    head = ["AUC of the profession's map", "man", "woman", "drawn right", "chosen", "published"]
    return table(["model", *head], lines)
