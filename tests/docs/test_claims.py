"""Every number about speed or memory in README.md and docs/ is rendered from a row of results.

A number in prose stands between ``<!-- = name -->`` and ``<!-- /= -->``, a table between
``<!-- name -->`` and ``<!-- /name -->``; `docs.build` makes both anew from the committed results.
What is left is searched for numbers with a unit of time, size or speed, and for numbers in
sentences that speak of cost. Each that is none of ours to measure is listed here, with the reason.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from benchmarks import figures
from benchmarks.harness import RESULTS, newest
from benchmarks.tables import HEADLINE, run
from docs import build

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "export/README.md", *sorted((ROOT / "docs").glob("*.md"))]

UNIT = r"(?:x(?! ?\d)|ms|us|s|seconds?|minutes?|hours?|[KMG]i?B|GB/s|times|images/s|pictures/s)\b"
NUMBER = r"(?<![\w.-])\d[\d.,]*"
SPELLED = r"\b(?:two|three|four|five|six|eight|ten|twenty|fifty|hundred)"
COST = r"\b(?:time|fast|faster|slow|slower|speed|memory|throughput|peak|overhead|costs?)\b"

# a part of the sentence -> why it needs no row
NOT_OURS = {
    "one call of SD 1.5's UNet at 64 x 64 takes N s": "a version",
    "Stable Diffusion 1.x, SDXL, LCM": "a version",
    "small random UNet's of the SD 1.x": "a version",
    "Stable Diffusion 1.x, 2.x": "a version",
    "SD 1.x, SDXL, img2img": "a version",
    "under ten minutes on two CPU cores": "a promise to the reader, not a comparison",
    "within eight minutes": "the limit that gpu.py sets itself",
    "about three hours of one core": "how long a study takes, to plan by",
    "about 50 minutes on one idle core": "how long a study takes, to plan by",
    "1.55 times as wide": "of an interval, not of speed",
    "trained five times as long": "of a training, not of its speed",
    "more than 5 %": "the rule of a regression",
    "up by more than 5 %": "the rule of a regression",
}


def prose(text: str) -> str:
    """A page without what is generated, and without code."""
    for pattern in (
        r"<!-- ([^/=\s][^>]*?) -->.*?<!-- /\1 -->",
        r"```.*?```",
        r"`[^`\n]*`",
        r"\]\([^)]*\)",
    ):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    return re.sub(r"<!-- = [\w ]+ -->.*?<!-- /= -->", "N", text, flags=re.DOTALL)


def claims(text: str) -> list[str]:
    """Sentences with a number about speed or memory."""
    found = []
    for sentence in re.split(r"(?<=[.:;])\s+|\n\n|\n(?=[|*-] )", prose(text)):
        flat = " ".join(sentence.split())
        united = re.search(rf"{NUMBER} ?{UNIT}|{SPELLED} (?:times as|seconds|minutes|hours)", flat)
        of_cost = re.search(COST, flat) and re.search(r"\d ?%|\b\d+\.\d", flat)
        if united or of_cost:
            found.append(flat)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_number_without_a_row(page):
    loose = [
        each
        for each in claims(page.read_text(encoding="utf-8"))
        if not any(known in each for known in NOT_OURS)
    ]
    assert loose == []


def test_the_list_of_exceptions_has_no_dead_entry():
    every = [each for page in PAGES for each in claims(page.read_text(encoding="utf-8"))]
    assert [known for known in NOT_OURS if not any(known in each for each in every)] == []


@pytest.mark.parametrize(
    "sentence",
    [
        "It is 3.4x faster.",
        "One call takes 33 ms.",
        "It keeps 43 KB an image.",
        "That is 1.85 times as fast.",
        "It is ten times as fast.",
        "The recorder costs 0.3 % of a step.",
        "Peak memory falls to 0.48 of it.",
        "| ours | 12.5 ms |",
        "60,000 images take 3 hours.",
    ],
)
def test_a_claim_is_found(sentence):
    text = "# Title\n\nWords before. " + sentence + "\n"
    assert claims(text), sentence
    assert not claims(f"<!-- table -->\n{sentence}\n<!-- /table -->")


def test_a_number_that_is_changed_is_noticed():
    changed = 0
    for page in build.TABLES:
        text = page.read_text(encoding="utf-8")
        assert build.rendered(page) == text, f"{page.name}: run `make docs`"
        spans = re.finditer(r"<!-- = [\w ]+ -->(.*?)<!-- /= -->", text, re.DOTALL)
        for span in spans:
            start, end = span.span(1)
            other = text[:start] + "9" + text[start:end] + text[end:]
            assert build.rendered(page, other) != other
            assert build.rendered(page, other) == text
            changed += 1
    assert changed >= 10
    page = ROOT / "docs/benchmarks.md"
    text = page.read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- headline -->\n(.*?)<!-- /headline -->", text, re.DOTALL)
    for digit in re.finditer(r"\d", block):
        i = text.index(block) + digit.start()
        other = text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :]
        assert build.rendered(page, other) == text


def test_headline_is_what_the_rows_say():
    """Computed here from the file alone, for every line of the README's table."""
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- headline -->\n(.*?)\n<!-- /headline -->", text, re.DOTALL)
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in block.split("\n")[2:]
    ]
    path = newest(RESULTS / "amd-epyc")
    rows = {
        (row["part"], row["group"], row["name"]): row
        for row in json.loads(path.read_text())["rows"]
    }
    assert len(lines) == len(HEADLINE)
    for (words, (part, group, ours), theirs), cells in zip(HEADLINE, lines, strict=True):
        assert cells[0] == words
        pair = [rows.get((part, group, name)) for name in (ours, theirs)]
        if any(row is None or row["status"] != "ok" for row in pair):
            assert cells[1] == "not measured"
            continue
        medians = [statistics.median(row["times_ms"]) for row in pair]
        of_rounds = np.divide(*(row["times_ms"] for row in reversed(pair)))
        said = [float(each.replace(",", "")) for each in re.findall(r"[\d.,]+", cells[3])]
        expected = [statistics.median(of_rounds), min(of_rounds), max(of_rounds)]
        assert said == pytest.approx(expected, rel=0.01)
        for cell, median in zip(cells[1:3], medians, strict=True):
            value, unit = cell.split()
            milliseconds = float(value.replace(",", "")) * {"ms": 1.0, "s": 1e3}[unit]
            assert milliseconds == pytest.approx(median, rel=0.01)


def test_figures_are_of_the_newest_run():
    record = run()
    for path, (_, part) in figures.FIGURES.items():
        assert not figures.stale(path, record, part), "run `make docs`"
        other = {**record, "date": "2000-01-01"}
        assert figures.stale(path, other, part) == path.exists()
