"""As many pictures as needed: what is drawn next, and when drawing stops."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from biasmap_fast.audit import AuditError, AuditPlan, run, run_audit
from biasmap_fast.audit import rounds as rounds_module
from biasmap_fast.audit.folder import plan_hash, store
from biasmap_fast.audit.records import TABLES, chunks_of, hashes_path, part_path, read_part
from biasmap_fast.audit.rounds import asked, boundaries, figures
from biasmap_fast.audit.statistics import half_width, images_for

equal = pd.testing.assert_frame_equal


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
    """Pictures and measurements: profession -> word -> values of seeds in the plan's sequence."""
    rows = [
        {
            "condition": condition,
            "profession": profession,
            "seed": seed,
            "axis": "gender",
            "word": word,
            "measure": plan.measure,
            "setting": plan.setting,
            "part": "",
            "control": "",
            "status": "constant_map" if value is None else "ok",
            "value": value,
        }
        for profession, words in values.items()
        for word, of_word in words.items()
        for seed, value in zip(plan.sequence, of_word, strict=False)
    ]
    measurements = pd.DataFrame(rows)
    # nothing else that is measured decides
    other = measurements.assign(setting="0.5", value=[i % 2 for i in range(len(rows))])
    control = measurements.assign(control="person", value=[i % 2 for i in range(len(rows))])
    pictures = measurements[["condition", "profession", "seed"]].drop_duplicates()
    return pictures, pd.concat([measurements, other, control], ignore_index=True)


WIDE = [0.1, 0.9] * 10  # half-width 0.32 of ten, 0.20 of twenty
NARROW = [0.2, 0.3] * 10  # 0.12 of ten


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
    assert [u for chunk in first.chunks for u in chunk] == list(plan.pictures())
    assert (first.ended, first.rounds, first.professions) == (False, 1, {})
    tables = records(
        plan,
        {
            "doctor": {"man": NARROW[:10], "woman": NARROW[:10]},
            "pilot": {"man": NARROW[:10], "woman": WIDE[:10]},
            "judge": {"man": WIDE[:10], "woman": NARROW[:10]},
        },
    )
    second = asked(plan, *tables)
    assert second.chunks[: len(first.chunks)] == first.chunks
    assert second.last == len(first.chunks)
    drawn = [(u.profession, u.seed) for chunk in second.chunks[second.last :] for u in chunk]
    assert drawn == [("pilot", 10), ("pilot", 11), ("judge", 10), ("judge", 11)]
    states = second.professions
    assert [states[p].narrow for p in plan.professions] == [True, False, False]
    assert states["pilot"].half_width == pytest.approx(half_width(WIDE[:10]))
    # a picture is missing: the round is not whole, and nothing is decided
    pictures, measurements = tables
    missing = (pictures["profession"] == "judge") & (pictures["seed"] == 9)
    assert asked(plan, pictures[~missing], measurements).chunks == first.chunks
    assert asked(plan, pictures[::-1], measurements[::-1]) == second


def test_drawing_ends_at_the_most_seeds_and_says_who_is_not_there():
    plan = make_plan(max_seeds=12, fractions=[0.3, 0.1])
    tables = records(
        plan,
        {
            "doctor": {"man": NARROW[:10], "woman": NARROW[:10]},
            "pilot": {"man": NARROW[:12], "woman": WIDE[:12]},
            "judge": {"man": [None] * 10, "woman": NARROW[:10]},  # nothing to go by: it ends
        },
    )
    found = asked(plan, *tables)
    assert (found.ended, found.rounds, found.count) == (True, 2, 32)
    told = figures(plan, found)
    assert told["not_reached"] == ["pilot", "judge"]
    assert told["pictures"] == 32
    assert told["pictures_fixed"] is None  # the judge's spread is not known
    half_widths = [row["half_width"] for row in told["professions"]]
    assert half_widths[1:] == [pytest.approx(0.281, abs=1e-3), None]


def test_the_saving_is_that_of_the_profession_that_needs_most():
    plan = make_plan(max_seeds=20)
    less = [0.3, 0.5] * 5
    tables = records(
        plan,
        {
            "doctor": {"man": NARROW[:10], "woman": NARROW[:10]},
            "pilot": {"man": [0.2, 0.5] * 6, "woman": NARROW[:12]},
            "judge": {"man": less, "woman": less},
        },
    )
    found = asked(plan, *tables)
    told = figures(plan, found)
    assert [row["seeds"] for row in told["professions"]] == [10, 12, 10]
    assert told["pictures"] == 32
    needed = images_for(np.std([0.2, 0.5] * 6, ddof=1), 0.15)
    assert told["pictures_fixed"] == 3 * needed
    assert told["saved"] == pytest.approx(1 - 32 / (3 * needed))
    assert told["worst_half_width"] == pytest.approx(half_width(less))


def test_values_that_are_alike_need_the_rule_of_three():
    plan = make_plan(professions=["doctor"], max_seeds=40)
    for flat in ([0.0] * 40, [0.0, 1e-9, 4e-4, 0.0] * 10):
        tables = records(plan, {"doctor": {"man": flat[:18], "woman": flat[:18]}})
        assert not asked(plan, *tables).ended
        tables = records(plan, {"doctor": {"man": flat[:22], "woman": flat[:22]}})
        found = asked(plan, *tables)  # 3 / 0.15, and to the end of the round
        assert (found.ended, found.rounds, found.professions["doctor"].narrow) == (True, 5, True)


def test_iou_is_judged_if_it_is_the_measure():
    plan = make_plan(professions=["doctor"], measure="iou", fractions=[0.3, 0.1])
    pictures, measurements = records(plan, {"doctor": {"man": NARROW[:10], "woman": NARROW[:10]}})
    assert asked(plan, pictures, measurements).ended
    wide = measurements.assign(measure="containment", value=[i % 2 for i in measurements.index])
    both = pd.concat([measurements, wide])
    assert asked(plan, pictures, both).ended
    assert not asked(plan, pictures, wide.assign(measure="iou")).ended


def test_every_condition_must_be_narrow():
    plan = make_plan(professions=["doctor"], conditions=["plain", "short=prompt:{profession}"])
    plain = records(plan, {"doctor": {"man": NARROW[:10], "woman": NARROW[:10]}})
    assert not asked(plan, *plain).professions
    short = records(plan, {"doctor": {"man": NARROW[:10], "woman": WIDE[:10]}}, "short")
    found = asked(plan, *map(pd.concat, zip(plain, short, strict=True)))
    more = [(u.condition, u.seed) for chunk in found.chunks[found.last :] for u in chunk]
    assert more == [("plain", 10), ("plain", 11), ("short", 10), ("short", 11)]


@pytest.mark.parametrize(
    ("name", "draw", "truth"),
    [
        ("normal", lambda rng, shape: rng.normal(0.4, 0.15, shape), 0.4),
        ("beta(8, 30)", lambda rng, shape: rng.beta(8, 30, shape), 8 / 38),
    ],
)
@pytest.mark.parametrize("precision", [0.03, 0.05])
def test_the_rule_covers(name, draw, truth, precision):
    """At length: benchmarks/study_precision.py."""
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
    "controls": None,
    "sweeps": (),
    "save_pictures": "none",
    "save_maps": "none",
    "batch_size": 4,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    plan = AuditPlan(**SMALL)
    return run_audit(plan, tmp_path_factory.mktemp("precision") / "run", progress=False)


@pytest.fixture
def copy(undisturbed, tmp_path):
    return shutil.copytree(undisturbed.folder, tmp_path / "run")


def test_an_audit_draws_as_many_as_needed_and_says_so(undisturbed):
    plan = undisturbed.plan
    found = figures(plan, asked(plan, undisturbed.pictures, undisturbed.measurements))
    seeds = {row["profession"]: row["seeds"] for row in found["professions"]}
    assert seeds == {"doctor": 16, "firefighter": 19}
    assert found["not_reached"] == ["firefighter"]
    assert (found["ended"], found["pictures"], len(undisturbed.pictures)) == (True, 35, 35)
    json.dumps(found, allow_nan=False)


@pytest.mark.usefixtures("quick")
def test_a_run_stopped_between_and_inside_rounds_ends_with_the_same_records(
    undisturbed, tmp_path, monkeypatch
):
    plan, first = undisturbed.plan, len(undisturbed.plan.chunks())
    real, drawn = run.Worker.measure, []
    for last in (first - 1, first, first + 1):  # inside round 1, at its end, inside round 2

        def measure(worker, pictures, last=last):
            if len(drawn) == last:
                raise KeyboardInterrupt
            drawn.append(pictures)
            return real(worker, pictures)

        monkeypatch.setattr(run.Worker, "measure", measure)
        with pytest.raises(KeyboardInterrupt):
            run_audit(plan, tmp_path, progress=False)
    monkeypatch.setattr(run.Worker, "measure", real)
    resumed = run_audit(plan, tmp_path, progress=False)
    equal(resumed.measurements, undisturbed.measurements)
    equal(resumed.pictures, undisturbed.pictures)
    names = [sorted(p.name for p in (f / "pictures").iterdir()) for f in (tmp_path, resumed.folder)]
    assert names[0] == names[1]


def change(folder, index, **columns):
    """Stores a chunk again with other values, and hashes that fit."""
    from biasmap_fast.audit.chunk import Chunk

    tables = {name: read_part(folder, name, index) for name in TABLES}
    for name, table in tables.items():
        for column, values in columns.items():
            if column in table.column_names:
                field = table.schema.field(column)
                place = table.schema.get_field_index(column)
                tables[name] = table = table.set_column(place, field, [values(table.num_rows)])
    hashes_path(folder, index).unlink()
    store(folder, index, Chunk(tables, {}, {}), plan_hash(folder))


@pytest.mark.usefixtures("quick")
def test_records_that_ask_for_other_rounds_are_refused(undisturbed, copy):
    # values of the doctor that differ much: a second round of another kind would have followed
    change(copy, 0, value=lambda count: [float(i % 2) for i in range(count)])
    change(copy, 1, value=lambda count: [float(i % 2) for i in range(count)])
    with pytest.raises(AuditError, match="holds other pictures than the plan and the earlier"):
        run_audit(undisturbed.plan, copy, progress=False)


@pytest.mark.usefixtures("quick")
def test_a_chunk_of_an_earlier_round_is_measured_again_if_it_is_gone(undisturbed, copy):
    part_path(copy, "pictures", 1).unlink()
    again = run_audit(undisturbed.plan, copy, progress=False)
    equal(again.measurements, undisturbed.measurements)


@pytest.mark.usefixtures("quick")
def test_failed_pictures_are_drawn_again_in_the_last_round_only(undisturbed, copy, stops, caplog):
    last = chunks_of(copy)[-1]
    for index in (0, last):
        change(copy, index, status=lambda count: ["error", *["ok"] * (count - 1)])
    drawn = stops(9)
    result = run_audit(undisturbed.plan, copy, progress=False, retry_failed=True)
    assert len(drawn) == 1
    assert {picture.profession for picture in drawn[0]} == {"firefighter"}
    assert "chunks [0] have pictures that failed, and are not measured again" in caplog.text
    assert Counter(result.pictures["status"]) == {"ok": 34, "error": 1}


def test_fixed_seeds_do_not_read_records(monkeypatch):
    monkeypatch.setattr(run, "read", lambda folder, name: pytest.fail("read"))
    plan = AuditPlan(model="tiny", professions=["doctor"], seeds=[0, 1], device="cpu")
    found = rounds_module.asked(plan)
    assert found.chunks == plan.chunks()
    assert found.ended
    assert figures(plan, found) is None
