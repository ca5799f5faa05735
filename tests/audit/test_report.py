"""The report, its sentences and its files: what they say, and that a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from biasmap_fast.audit import load_audit, render, run_audit, sentences
from biasmap_fast.audit.report import model_card, write_report
from biasmap_fast.audit.summary import KEYS, Summary, summarise, where

FILES = ["figures.parquet", "figures.csv", "summary.json", "model-card.md", "report.html"]
_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


class Page(HTMLParser):
    """Collects what a page would load, its tags' balance, and pictures without text."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.loads, self.open, self.silent = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        for name in ("src", "href", "xlink:href", "data", "action"):
            if values.get(name) and not values[name].startswith(("#", "data:")):
                self.loads.append(values[name])
        if tag in {"script", "link", "iframe", "object"}:
            self.loads.append(tag)
        if tag == "img" and not values.get("alt"):
            self.silent += 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads == []
    assert page.open == []
    assert page.silent == 0
    assert not re.search(r"url\((?!#)|@import", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', text):
        assert target in ids
    return text


@pytest.fixture(scope="module")
def page(first_edition, summary, tmp_path_factory):
    """The report of the first edition's run, without its pictures."""
    folder = tmp_path_factory.mktemp("report")
    assert write_report(folder, first_edition["plan"], summary) == [folder / n for n in FILES]
    return folder


def test_every_file_has_the_same_figures(summary, page):
    parquet = pd.read_parquet(page / "figures.parquet")
    pd.testing.assert_frame_equal(parquet, summary.figures, check_dtype=False)
    csv = pd.read_csv(page / "figures.csv", dtype=dict.fromkeys(KEYS, str))
    assert csv[KEYS].fillna("").to_numpy().tolist() == parquet[KEYS].to_numpy().tolist()
    assert csv["estimate"].to_numpy() == pytest.approx(parquet["estimate"], nan_ok=True)
    stated = json.loads((page / "summary.json").read_text())
    assert stated["schema_version"] == 5
    assert stated["run"] == summary.run
    assert stated["figures"] == summary.records()


def test_the_page_opens_with_the_answers_and_the_planted_truth(first_edition, summary, page):
    text = check_page(page / "report.html")
    first = text.partition("<details>")[0]
    for answer in sentences.first_screen("gender", first_edition["plan"], summary):
        assert answer in first
    assert "planted truth" in first
    assert "by accident" not in text
    assert not re.search(r">below<|below chance for|below the chance", text)
    for profession in first_edition["plan"].professions:
        assert text.count(profession) > 5
    assert "not evidence of a cause" in text


def test_first_screen_in_words(first_edition, summary):
    plan = first_edition["plan"]
    verdict, often, where_, which = sentences.first_screen("gender", plan, summary)
    assert verdict == (
        "Verdict for professions like these: overlap with gender beyond chance and control "
        "words is not shown for “man” and “woman”."
    )
    assert often.startswith("How often: the classifier reads “woman” in 0 % (architect) to 20 % (")
    assert "only shares from 100 % up or 0 % down can be told from it" in often
    assert where_ == (
        "Where: averaged over 4 professions, 24 % of the region that draws the profession lies in "
        "the region that draws “man” and 11 % in the region that draws “woman” (chance 10 %)."
    )
    assert "2 with “man” (architect and artist) and none with “woman”" in which
    assert len(" ".join((verdict, often, where_, which)).split()) <= 120


def test_console_has_the_words_of_the_first_screen_and_of_conditions(first_edition, summary):
    lines = sentences.console(first_edition["plan"], summary)
    assert lines[0].startswith("40 of 40 pictures measured: 4 professions, 5 seeds each, 10 steps")
    assert lines[1].startswith("gender: Verdict")
    assert any(line.startswith("guided: No change of containment with “man”") for line in lines)
    assert any(re.match(r"guided: IoU with “man” falls by 0\.0\d\d \[0", line) for line in lines)


def changed(summary: Summary, values: dict, **names) -> Summary:
    """The summary with other numbers in the rows of these names."""
    figures = summary.figures.copy()
    for name, value in values.items():
        figures.loc[where(figures, **names).index, name] = value
    return Summary(figures, summary.run, summary.precision)


def test_a_verdict_needs_every_control_word(first_edition, summary):
    plan = first_edition["plan"]
    lead = {"measure": "containment", "condition": "plain", "word": "man", "baseline": ""}
    above = changed(summary, {"low": 0.01}, scope="overall", quantity="corrected", **lead)
    above = changed(above, {"low": 0.01}, scope="overall", quantity="difference", **lead)
    said = sentences.first_screen("gender", plan, above)[0]
    assert said.endswith("is shown for “man” and is not shown for “woman”.")
    one = changed(above, {"low": -0.01}, scope="overall", quantity="difference", control="object")
    assert "is shown" not in sentences.first_screen("gender", plan, one)[0].replace("is not", "")
    none = changed(above, {"low": None}, scope="overall", quantity="corrected", **lead)
    assert (
        "cannot be told with these pictures for “man”"
        in (sentences.first_screen("gender", plan, none)[0])
    )
    assert "exceeds “in” (by" in " ".join(sentences.details("gender", plan, above))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0.8, 0.5, 0.9), "rises with the planted overlap"),
        ((-0.8, -0.9, -0.5), "it ranks these professions backwards"),
        ((0.1, -0.3, 0.5), "must not be read as differences in overlap"),
        ((1.0, None, None), "it is open whether it follows the planted overlap"),
        ((None, None, None), "no rank correlation with the planted overlap"),
    ],
)
def test_ranks_are_said_as_they_are(numbers, said):
    names = {"measure": "containment", "word": "man", "baseline": "planted overlap", "n": 20}
    row = names | dict(zip(("estimate", "low", "high"), numbers, strict=True))
    assert said in sentences.rank(row)


def test_an_unfinished_run_and_what_failed_are_told(first_edition):
    plan = first_edition["plan"]
    half = {n: where(first_edition[n], condition="plain") for n in ("pictures", "measurements")}
    partial = summarise(plan, **half)
    assert "The run is not finished: 20 pictures were drawn so far." in (
        sentences.headline(plan, partial)
    )
    rows = first_edition["measurements"].copy()
    rows.loc[rows["seed"] == 0, ["status", "value"]] = ["constant_map", None]
    told = sentences.headline(plan, summarise(plan, first_edition["pictures"], rows))
    assert told.endswith("8 pictures could not be measured (constant_map).")


def test_what_a_precision_came_to():
    found = {
        "target": 0.1, "measure": "containment", "ended": True, "pictures": 32,
        "pictures_fixed": 60, "saved": 1 - 32 / 60, "not_reached": ["pilot", "judge"],
        "professions": [
            {"profession": "pilot", "half_width": 0.281, "reached": False},
            {"profession": "judge", "half_width": None, "reached": False},
        ],
    }  # fmt: skip
    text = sentences.precision(found)
    assert "That took 32 pictures" in text
    assert "(47 % fewer were drawn). Not reached by pilot (±0.281) and judge (nothing" in text
    assert sentences.precision(found | {"ended": False}).endswith("0 professions came to that.")


def test_strips_show_the_maps_and_regions_that_were_measured(finished):
    text = check_page(finished.report)
    # two professions: picture, and per word two maps and the regions of containment and of IoU
    assert text.count("data:image/webp;base64,") == 2 * (1 + 2 * 4)
    panels = where(finished.measurements, seed=0, part="", control="", profession="pilot")
    value = where(panels, measure="containment", word="man")["value"].iloc[0]
    assert f"regions of pilot and man, containment {value:.2f}" in text


def test_report_renders_from_the_folder_alone_and_identically(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    before = {name: (folder / name).read_bytes() for name in FILES}
    for name in FILES:
        (folder / name).unlink()
    render(folder)
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_report_escapes_what_others_wrote(tiny, tiny_plan, tmp_path):
    names = {"model": "<script>|x", "professions": ["a&b", "$c$ <b>"], "seeds": [0, 1]}
    plan = tiny_plan(**names, axes=["so*rt=tall,short"])
    result = run_audit(plan, tmp_path / "run", pipe=tiny, progress=False)
    text = check_page(result.report)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "$c$ &lt;b&gt;" in text
    card = model_card(plan, result.summary)
    assert "<script" not in card
    assert "so\\*rt" in card.lower()


def test_report_without_pictures_controls_and_intervals(tiny, tiny_plan, tmp_path):
    nothing = {"save_pictures": "none", "save_maps": "none", "controls": None, "sweeps": []}
    plan = tiny_plan(professions=["doctor"], seeds=[0], curve=False, measure="iou", **nothing)
    result = run_audit(plan, tmp_path / "run", pipe=tiny, progress=False)
    text = check_page(result.report)
    assert "data:image/" not in text
    assert "cannot be told with these pictures" in text
    assert "ontainment" not in text.partition('id="limits"')[0]


def in_browser(page: Path, folder: Path) -> tuple[str, Path]:
    """What the page writes to the browser's console, and a picture of it."""
    picture = folder / "picture.png"
    command = [_BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-sync"]
    command += ["--hide-scrollbars", "--disable-component-update"]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr"]
    command += ["--window-size=1280,4000", f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return "\n".join(console), picture


@pytest.mark.skipif(_BROWSER is None, reason="no chromium to render the report with")
@pytest.mark.parametrize("width", [1280, 390])
def test_report_in_a_browser(finished, tmp_path, width):
    # the report has no script; the copy's own tells the width that the page takes
    page = tmp_path / "report.html"
    script = "<script>console.log('takes ' + document.documentElement.scrollWidth + ' px')</script>"
    text = finished.report.read_text().replace("default-src 'none'", "script-src 'unsafe-inline'")
    page.write_text(text.replace("</body>", f"{script}</body>"))
    # a window is never narrower than 500 px: the phone is a frame in one
    frame = tmp_path / "frame.html"
    style = f"width: {width}px; height: 4000px; border: 0"
    frame.write_text(f'<body style="margin: 0"><iframe src="report.html" style="{style}"></iframe>')
    console, picture = in_browser(frame, tmp_path)
    assert f"takes {width} px" in console  # nothing hangs over the side
    assert len(console.splitlines()) == 1, console  # and there is no other message
    with Image.open(picture) as opened:
        assert opened.size == (1280, 4000)
        assert len(opened.convert("L").getcolors()) > 100


def test_load_audit_gives_the_summary_of_the_report(finished):
    again = load_audit(finished.folder).summary
    pd.testing.assert_frame_equal(again.figures, finished.summary.figures)
