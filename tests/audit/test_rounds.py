"""As many images as needed: what is drawn next, when drawing stops, and what is then said."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
from biasmap_fast.audit.inference import chance_test
from pydantic import ValidationError
from scipy import stats

from biasmap_fast import testbed
from biasmap_fast.audit import AuditError, AuditPlan, run, run_audit, validate, work
from biasmap_fast.audit import rounds as rounds_module
from biasmap_fast.audit.plan import explain
from biasmap_fast.audit.records import part_path, read_part, read_records, to_table, write_part
from biasmap_fast.audit.rounds import asked, boundaries, figures
from biasmap_fast.audit.sentences import headline, limits, precision
from biasmap_fast.audit.statistics import (
    FIXED_WIDTH,
    NOT_REACHED,
    half_width,
    images_for,
    mean_interval,
)

WEIGHTS = (testbed.WEIGHTS / "model_index.json").is_file()


def make_plan(**changes):
    settings = {
        "model": "tiny",
        "professions": ["doctor", "pilot", "judge"],
        "axes": ["gender"],
        "seeds": range(10),
        "precision": 0.15,
        "max_seeds": 20,
        "batch_size": 4,
        "device": "cpu",
    }
    return AuditPlan(**(settings | changes))


def records(plan, values, condition="plain"):
    """Rows of pictures: profession -> word -> values of seeds in the plan's sequence."""
    return [
        {
            "condition": condition,
            "semantic": profession,
            "seed": seed,
            "axis": "gender",
            "demographic": word,
            "percentile": q,
            "status": "error" if value is None else "ok",
            "containment": value,
            "iou": value,
        }
        for profession, words in values.items()
        for word, own in words.items()
        for seed, value in zip(plan.sequence, own, strict=False)
        for q in plan.percentiles
    ]


WIDE = [0.1, 0.9] * 10  # half-width 0.32 of ten, 0.20 of twenty
NARROW = [0.2, 0.3] * 10  # 0.12 of ten


# --- plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"precision": 0}, "precision: .*greater than 0, got 0"),
        ({"precision": 0.5}, "precision: .*less than 0.5, got 0.5"),
        ({"precision": math.nan}, "precision: .*got nan"),
        ({"precision": "fine"}, "precision: .*valid number.*got 'fine'"),
        ({"precision": None}, "`max_seeds` belongs to a precision, got 20 and no precision"),
        ({"seeds": range(9)}, "they are the first round, .*: expected at least 10, got 9"),
        ({"max_seeds": 9}, "max_seeds: expected at least the first round's 10, got 9"),
        ({"seeds": [2**63 - 9, *range(9)]}, r"between 0 and 2\*\*63 - 1, the last round would"),
    ],
)
def test_plan_says_what_is_wrong(changes, expected):
    with pytest.raises(ValidationError) as error:
        make_plan(**changes)
    assert re.search(expected, explain(error.value)), explain(error.value)


@pytest.mark.parametrize(
    ("precision", "first", "most"), [(0.02, 50, 1000), (0.1, 20, 200), (0.03, 34, 680)]
)
def test_the_first_round_follows_from_the_precision(precision, first, most, tmp_path):
    plan = AuditPlan(precision=precision)
    assert (plan.seeds, plan.max_seeds) == (tuple(range(first)), most)
    assert len(plan.sequence) == most
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    assert AuditPlan.from_yaml(tmp_path / "plan.yaml") == plan


def test_further_seeds_follow_the_greatest():
    plan = make_plan(seeds=[7, 3, *range(20, 28)], max_seeds=13)
    assert plan.sequence == (7, 3, *range(20, 28), 28, 29, 30)
    assert AuditPlan(seeds=[4, 2]).sequence == (4, 2)


# --- decision --------------------------------------------------------------------------------


def test_boundaries_grow_by_a_fifth_and_end():
    assert list(boundaries(10, 20)) == [10, 12, 15, 18, 20]
    assert list(boundaries(2, 5)) == [2, 3, 4, 5]
    assert list(boundaries(7, 7)) == [7]
    assert all(b <= math.ceil(1.2 * a) for a, b in itertools.pairwise(boundaries(50, 5000)))


def test_half_widths_by_hand():
    # two values, variance 0.02, and 1 / 8 for the spread that may be small by accident
    assert half_width([0.2, 0.4]) == pytest.approx(12.706 * math.sqrt(0.145 / 2), rel=1e-4)
    assert half_width([0.3]) is None
    assert half_width([0.0] * 150) == 0.02
    n = images_for(0.16, 0.02)
    widths = [stats.t.ppf(0.975, m - 1) * 0.16 / math.sqrt(m) for m in (n - 1, n)]
    assert widths[1] <= 0.02 < widths[0]


def test_a_profession_stops_when_all_of_its_words_are_narrow():
    plan = make_plan()
    first = asked(plan)
    assert [u for chunk in first.chunks for u in chunk] == list(plan.units())
    assert (first.ended, first.rounds, first.professions) == (False, 1, {})
    rows = records(
        plan,
        {
            "doctor": {"man": NARROW[:10], "woman": NARROW[:10]},
            "pilot": {"man": NARROW[:10], "woman": WIDE[:10]},
            "judge": {"man": WIDE[:10], "woman": NARROW[:10]},
        },
    )
    second = asked(plan, rows)
    assert second.chunks[: len(first.chunks)] == first.chunks
    assert second.last == len(first.chunks)
    drawn = [(u.profession, u.seed) for chunk in second.chunks[second.last :] for u in chunk]
    assert drawn == [("pilot", 10), ("pilot", 11), ("judge", 10), ("judge", 11)]
    states = second.professions
    assert [states[p].narrow for p in plan.professions] == [True, False, False]
    assert states["pilot"].half_width == pytest.approx(half_width(WIDE[:10]))
    assert precision(figures(plan, second)).endswith("±0.15. So far 1 profession came to that.")
    # a picture is missing: the round is not whole, and nothing is decided
    short = [row for row in rows if (row["semantic"], row["seed"]) != ("judge", 9)]
    assert asked(plan, short).chunks == first.chunks
    assert asked(plan, rows[::-1]) == second


def test_drawing_ends_at_the_most_seeds_and_says_who_is_not_there():
    plan = make_plan(max_seeds=12, percentiles=[70, 90])
    rows = records(
        plan,
        {
            "doctor": {"man": NARROW[:10], "woman": NARROW[:10]},
            "pilot": {"man": NARROW[:12], "woman": WIDE[:12]},
            "judge": {"man": [None] * 10, "woman": NARROW[:10]},  # nothing to go by: it ends
        },
    )
    found = asked(plan, rows)
    assert (found.ended, found.rounds, found.pictures) == (True, 2, 32)
    told = figures(plan, found)
    assert told["not_reached"] == ["pilot", "judge"]
    assert told["images"] == 32
    assert told["images_fixed"] is None  # the judge's spread is not known
    text = precision(told)
    assert "Not reached by pilot (±0.281) and judge (nothing measured)." in text
    assert "would have taken" not in text


def test_the_saving_is_that_of_the_profession_that_needs_most():
    plan = make_plan(max_seeds=20)
    less = [0.3, 0.5] * 5
    rows = records(
        plan,
        {
            "doctor": {"man": NARROW[:10], "woman": NARROW[:10]},
            "pilot": {"man": [0.2, 0.5] * 6, "woman": NARROW[:12]},
            "judge": {"man": less, "woman": less},
        },
    )
    found = asked(plan, rows)
    told = figures(plan, found)
    assert [row["seeds"] for row in told["professions"]] == [10, 12, 10]
    assert told["images"] == 32
    needed = images_for(np.std([0.2, 0.5] * 6, ddof=1), 0.15)
    assert told["images_fixed"] == 3 * needed
    assert told["saved"] == pytest.approx(1 - 32 / (3 * needed))
    assert told["worst_half_width"] == pytest.approx(half_width(less))


def test_values_that_are_alike_need_the_rule_of_three():
    plan = make_plan(professions=["doctor"], max_seeds=40)
    for flat in ([0.0] * 40, [0.0, 1e-9, 4e-4, 0.0] * 10):
        rows = records(plan, {"doctor": {"man": flat[:18], "woman": flat[:18]}})
        assert not asked(plan, rows).ended
        rows = records(plan, {"doctor": {"man": flat[:22], "woman": flat[:22]}})
        found = asked(plan, rows)  # 3 / 0.15, and to the end of the round
        assert (found.ended, found.rounds, found.professions["doctor"].narrow) == (True, 5, True)


def test_iou_is_judged_where_it_is_the_measure():
    plan = make_plan(professions=["doctor"], measure="iou", percentiles=[70, 90])
    rows = records(plan, {"doctor": {"man": NARROW[:10], "woman": NARROW[:10]}})
    for row in rows:
        row["containment"] = None
        if row["percentile"] == 90:
            row["iou"] = WIDE[row["seed"]]
    assert asked(plan, rows).ended


def test_every_condition_must_be_narrow():
    plan = make_plan(professions=["doctor"], conditions=["plain", "short=prompt:{profession}"])
    rows = records(plan, {"doctor": {"man": NARROW[:10], "woman": NARROW[:10]}})
    assert not asked(plan, rows).professions
    rows += records(plan, {"doctor": {"man": NARROW[:10], "woman": WIDE[:10]}}, "short")
    found = asked(plan, rows)
    more = [(u.condition, u.seed) for chunk in found.chunks[found.last :] for u in chunk]
    assert more == [("plain", 10), ("plain", 11), ("short", 10), ("short", 11)]


# --- intervals -------------------------------------------------------------------------------


def test_intervals_have_the_fixed_width_and_their_test_agrees():
    x = np.random.default_rng(3).beta(4, 9, 60)
    figure = mean_interval(x, precision=0.06)
    assert figure.method == FIXED_WIDTH
    assert (figure.low, figure.high) == pytest.approx((x.mean() - 0.06, x.mean() + 0.06))
    for chance in np.linspace(0.2, 0.45, 40):
        outside = not figure.low <= chance <= figure.high
        assert (chance_test(x, chance, 0.06) < 0.05) == outside
    # not reached: what was, and it says so
    wide = mean_interval(x, precision=0.01)
    reach = half_width(x)
    assert (wide.low, wide.high) == pytest.approx((x.mean() - reach, x.mean() + reach))
    assert wide.low < mean_interval(x).low
    assert wide.method == NOT_REACHED
    assert chance_test(x, wide.high, 0.01) == pytest.approx(0.05)


def test_values_that_do_not_vary_have_an_interval():
    figure = mean_interval([0.5] * 50, precision=0.05)
    assert (figure.low, figure.high) == pytest.approx((0.44, 0.56))
    assert figure.method == NOT_REACHED
    figure = mean_interval([0.5] * 60, precision=0.05)
    assert (figure.low, figure.high) == pytest.approx((0.45, 0.55))
    assert figure.method == FIXED_WIDTH
    assert mean_interval([0.5] * 60).low is None


@pytest.mark.parametrize(
    ("name", "draw", "truth"),
    [
        ("normal", lambda rng, shape: rng.normal(0.4, 0.15, shape), 0.4),
        ("beta(8, 30)", lambda rng, shape: rng.beta(8, 30, shape), 8 / 38),
    ],
)
@pytest.mark.parametrize("precision", [0.03, 0.05])
def test_the_rule_covers(name, draw, truth, precision):
    """At length: studies/precision.py."""
    ends = np.array(list(boundaries(math.ceil(1 / precision), 400)))
    x = draw(np.random.default_rng(5), (1500, 400))
    hits = 0
    for row in x:
        count = next(n for n in ends if half_width(row[:n]) <= precision)
        hits += abs(row[:count].mean() - truth) <= precision
    assert hits / 1500 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 1500)


# --- runs ------------------------------------------------------------------------------------

SMALL = {
    "professions": ["doctor", "firefighter"],  # the least and the most spread but for constants
    "precision": 0.08,
    "seeds": range(13),
    "max_seeds": 19,
    "steps": 4,
    "curve": False,
    "save_pictures": "none",
    "save_maps": "none",
    "batch_size": 4,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    if not WEIGHTS:
        pytest.skip("the testbed's weights are not in this checkout")
    return run_audit(
        AuditPlan(**SMALL), tmp_path_factory.mktemp("precision") / "run", progress=False
    )


def test_an_audit_draws_as_many_as_needed_and_says_so(undisturbed):
    plan, summary = undisturbed.plan, undisturbed.summary
    found = summary["precision"]
    seeds = {row["semantic"]: row["seeds"] for row in found["professions"]}
    assert seeds == {"doctor": 16, "firefighter": 19}
    assert found["not_reached"] == ["firefighter"]
    assert summary["run"]["complete"]
    assert summary["run"]["images_drawn"] == summary["run"]["images_planned"] == 35
    by = {(r["semantic"], r["demographic"]): r for r in summary["containment"]["professions"]}
    own = by["doctor", "man"]["containment"]
    assert own["method"] == FIXED_WIDTH
    assert own["high"] - own["value"] == pytest.approx(0.08)
    worst = max(
        row["containment"]["high"] - row["containment"]["value"]
        for row in by.values()
        if row["semantic"] == "firefighter"
    )
    assert worst == pytest.approx(found["worst_half_width"])
    # every other interval says how many images it has, and why
    iou = summary["professions"][0]["iou"]
    assert iou["method"] == "Student t over images; seeds drawn until precision 0.08"
    said = headline(plan, summary)
    assert "35 of 35 pictures measured: 2 professions, 16 to 19 seeds each" in said
    assert re.search(r"Not reached by firefighter \(±0\.\d{3}\)\.", said)
    assert any("takes the number of seeds as given" in text for text in limits(plan, summary))
    page = undisturbed.report.read_text(encoding="utf-8")
    assert "of fixed width, ±0.08" in page
    assert "Seeds were drawn in rounds until the 95 % interval" in page
    assert validate(undisturbed.folder) == []
    json.dumps(summary, allow_nan=False)


def test_a_run_killed_between_and_inside_rounds_ends_with_the_same_records(
    undisturbed, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    plan, real, done = undisturbed.plan, work.measure_chunk, []
    first = len(plan.chunks())
    monkeypatch.setattr(run, "write_report", lambda *args: None)
    for last in (first - 1, first, first + 1):  # inside round 1, at its end, inside round 2

        def measure(*args, last=last):
            if len(done) == last:
                raise Killed
            done.append(1)
            return real(*args)

        monkeypatch.setattr(work, "measure_chunk", measure)
        with pytest.raises(Killed):
            run_audit(plan, tmp_path, progress=False)
        unfinished = run.load_audit(tmp_path).summary
        assert not unfinished["run"]["complete"]
        assert unfinished["precision"]["images_fixed"] is None
    monkeypatch.setattr(work, "measure_chunk", real)
    resumed = run_audit(plan, tmp_path, progress=False)
    assert resumed.records.equals(undisturbed.records)
    assert resumed.summary == undisturbed.summary
    names = [sorted(p.name for p in (f / "records").iterdir()) for f in (tmp_path, resumed.folder)]
    assert names[0] == names[1]
    assert validate(tmp_path) == []


def copied(result, folder):
    shutil.copytree(result.folder, folder)
    return folder


def test_validation_sees_a_round_that_the_records_do_not_ask_for(undisturbed, tmp_path):
    folder = copied(undisturbed, tmp_path / "run")
    path = part_path(folder, 0)
    table = read_part(path)
    # pictures of the doctor that differ much: a second round would have followed
    spread = [float(i % 2) for i in range(table.num_rows)]
    place = table.schema.get_field_index("containment")
    write_part(folder, 0, table.set_column(place, table.schema.field(place), [spread]))
    text = "\n".join(validate(folder))
    assert "SHA-256" in text
    assert "the plan has" in text or "summary.json" in text
    with pytest.raises(AuditError, match="holds other pictures than the earlier rounds ask for"):
        run_audit(undisturbed.plan, folder, progress=False)


def test_a_chunk_of_an_earlier_round_is_measured_again_where_it_is_gone(undisturbed, tmp_path):
    folder = copied(undisturbed, tmp_path / "run")
    part_path(folder, 1).unlink()
    again = run_audit(undisturbed.plan, folder, progress=False)
    assert again.records.equals(undisturbed.records)
    assert validate(folder) == []


def test_failed_pictures_are_drawn_again_in_the_last_round_only(
    undisturbed, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(run, "write_report", lambda *args: None)
    folder = copied(undisturbed, tmp_path / "run")
    last = len(list((folder / "records").iterdir())) - 1
    for index in (0, last):
        table = read_part(part_path(folder, index))
        rows = [row | {"status": "error", "reason": "test"} for row in table.to_pylist()[:2]]
        for row in rows:
            row |= dict.fromkeys(("iou", "corrected", "soft_iou", "containment"))
        rows += table.to_pylist()[2:]
        write_part(folder, index, to_table(rows))
    drawn = []
    real = work.measure_chunk
    monkeypatch.setattr(work, "measure_chunk", lambda *args: drawn.append(args[2]) or real(*args))
    run_audit(undisturbed.plan, folder, progress=False, retry_failed=True)
    assert len(drawn) == 1
    assert {u.profession for u in drawn[0]} == {"firefighter"}
    assert "chunks [0] have pictures that failed, and are not measured again" in caplog.text
    assert "error" in read_records(folder)["status"].to_pylist()


def test_fixed_seeds_do_not_read_records(monkeypatch):
    monkeypatch.setattr(run, "read_records", lambda folder: pytest.fail("read"))
    plan = AuditPlan(model="tiny", professions=["doctor"], seeds=[0, 1], device="cpu")
    found = rounds_module.asked(plan)
    assert found.chunks == plan.chunks()
    assert found.ended
    assert figures(plan, found) is None
