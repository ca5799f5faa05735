"""``biasmap scan``: shares of a list of professions, written as they come."""

from __future__ import annotations

import csv
import json

import pytest
from typer.testing import CliRunner

import biasmap_fast as bm
from biasmap_fast import scan as scanning
from biasmap_fast.cli import app
from biasmap_fast.scan import ScanError, scan

PROFESSIONS = ["architect", "nurse"]  # planted shares of women: 0.2 and 0.8


@pytest.fixture(scope="module")
def pipe():
    return bm.testbed.pipeline()


def plan(**changes):
    return bm.AuditPlan(**({"professions": PROFESSIONS} | changes))


def test_shares_are_those_of_share_and_follow_the_planted_ones(pipe, tmp_path):
    rows = scan(pipe, plan(), tmp_path, draws=8, progress=False)
    by_word = {(row["profession"], row["word"]): row["share"] for row in rows}
    words = {word: f"A photo of the face of a nurse and {word}" for word in ("man", "woman")}
    nurse = bm.share(pipe, "A photo of the face of a nurse", words, draws=8, num_inference_steps=25)
    assert by_word["nurse", "woman"] == nurse["woman"]
    assert by_word["nurse", "woman"] > 0.5 > by_word["architect", "woman"]
    with (tmp_path / "scan.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(row["share"]) for row in written] == [row["share"] for row in rows]


def test_a_stopped_scan_goes_on_with_the_next_profession(pipe, tmp_path, monkeypatch):
    whole = scan(pipe, plan(), tmp_path / "whole", draws=4, progress=False)
    real = scanning.share

    def stops(pipe, prompt, *args, **options):
        if "nurse" in prompt:
            raise KeyboardInterrupt
        return real(pipe, prompt, *args, **options)

    monkeypatch.setattr(scanning, "share", stops)
    with pytest.raises(KeyboardInterrupt):
        scan(pipe, plan(), tmp_path / "cut", draws=4, progress=False)
    assert len(json.loads((tmp_path / "cut/scan.json").read_text())["shares"]) == 2
    drawn = []
    monkeypatch.setattr(scanning, "share", lambda *a, **o: drawn.append(a[1]) or real(*a, **o))
    assert scan(pipe, plan(), tmp_path / "cut", draws=4, progress=False) == whole
    assert drawn == ["A photo of the face of a nurse"]
    with pytest.raises(ScanError, match=r"other settings \(draws, steps\): choose another folder"):
        scan(pipe, plan(steps=9), tmp_path / "cut", draws=5, progress=False)


def test_words_that_change_nothing_have_no_share(pipe, tmp_path):
    # tokenizers of CLIP lower the case: both are one word
    axes = {"nothing": ("man", "MAN"), "gender": ("man", "woman")}
    rows = scan(pipe, plan(professions=["nurse"], axes=axes), tmp_path, draws=4, progress=False)
    assert [row["share"] is None for row in rows] == [True, True, False, False]
    assert rows[0]["status"] == "the words do not change the prediction: there is no share"
    assert "nurse, nothing: no share: the words do not change" in "\n".join(scanning.lines(rows))


def test_the_command_prints_the_furthest_from_equal_first(tmp_path):
    args = ["scan", "--professions", "doctor,nurse", "--draws", "4", "--no-progress"]
    result = CliRunner().invoke(app, [*args, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.stdout.index("nurse, gender: man ") < result.stdout.index("doctor, gender: man ")
    rows = json.loads(CliRunner().invoke(app, [*args, "--out", str(tmp_path), "--json"]).stdout)
    assert {row["draws"] for row in rows} == {4}
    failed = CliRunner().invoke(app, [*args[:-3], "--draws", "5", "--out", str(tmp_path)])
    assert failed.exit_code == 1
    assert "holds a scan with other settings (draws)" in failed.stderr
