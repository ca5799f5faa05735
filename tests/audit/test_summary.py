"""The table of figures: recomputed by hand, and for measures that nobody has thought of yet."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from biasmap_fast.audit import AuditPlan, sentences
from biasmap_fast.audit.run import planted
from biasmap_fast.audit.statistics import FIXED_WIDTH
from biasmap_fast.audit.summary import summarise, unpacked, where

PLAIN = {"condition": "plain", "axis": "gender", "part": "", "control": "", "baseline": ""}


def pictures_of(plan, labels=None, status="ok"):
    """One row per picture; ``labels(condition, profession, seed)`` gives what is read."""
    read = labels or (lambda *picture: {})
    pictures = [
        {"condition": condition, "profession": profession, "seed": seed}
        for condition in plan.conditions
        for profession in plan.professions
        for seed in plan.seeds
    ]
    return pd.DataFrame(
        [
            row
            | {"labels": (own := read(*row.values())), "scores": {"gender": 0.9} if own else {}}
            | {"clip_score": np.nan, "status": status, "reason": None}
            for row in pictures
        ]
    )


def values_of(plan, value, **columns):
    """One value per picture and word; ``value(condition, profession, seed, word)`` gives it."""
    names = {"measure": "containment", "setting": "0.05 in 0.1", "part": "", "control": ""}
    rows = []
    for picture in pictures_of(plan)[["condition", "profession", "seed"]].to_dict("records"):
        for axis, words in plan.axes.items():
            for word in words:
                number = value(*picture.values(), word)
                status = "constant_map" if number is None else "ok"
                own = {"axis": axis, "word": word, "value": number, "status": status}
                rows.append({**picture, **names, **own, "chance": 0.1, "reason": None, **columns})
    return pd.DataFrame(rows).astype({"value": float})


def one(summary, **names):
    rows = summary.find(**names)
    assert len(rows) == 1, rows
    return rows.iloc[0]


@pytest.mark.parametrize(
    ("measure", "setting"),
    [("containment", "0.05 in 0.1"), ("iou", "0.3"), ("iou", "0.1"), ("soft_iou", "0.3")],
)
def test_means_of_a_profession_by_hand(first_edition, summary, measure, setting):
    rows = where(
        first_edition["measurements"], **{k: v for k, v in PLAIN.items() if k != "baseline"}
    )
    rows = where(rows, measure=measure, setting=setting)
    for (profession, word), own in rows.groupby(["profession", "word"]):
        names = PLAIN | {"measure": measure, "setting": setting}
        names |= {"profession": profession, "word": word}
        mean, x = one(summary, **names, quantity="mean"), own["value"]
        low, high = stats.t.interval(0.95, 4, loc=x.mean(), scale=stats.sem(x))
        assert mean["estimate"] == pytest.approx(x.mean())
        assert (mean["low"], mean["high"], mean["n"]) == pytest.approx((max(low, 0), high, 5))
        if measure == "soft_iou":
            assert np.isnan(mean["p"])
            assert summary.find(**names, quantity="corrected").empty
            continue
        chance = own["chance"].iloc[0]
        assert mean["p"] == pytest.approx(stats.ttest_1samp(x, chance).pvalue)
        corrected = one(summary, **names, quantity="corrected")
        assert corrected["estimate"] == pytest.approx((x.mean() - chance) / (1 - chance))


def test_holm_goes_over_all_professions_and_words(summary):
    rows = summary.find(
        **PLAIN, scope="profession", measure="iou", setting="0.3", quantity="mean"
    ).sort_values("p")
    assert len(rows) == 8
    expected = np.maximum.accumulate(np.minimum(1, rows["p"] * np.arange(8, 0, -1)))
    assert rows["p_adjusted"].tolist() == pytest.approx(expected.tolist())


def test_controls_are_compared_on_the_same_pictures(first_edition, summary):
    table = first_edition["measurements"]
    of = {"condition": "plain", "profession": "chef", "measure": "containment", "part": ""}
    pair = where(table, **of, control="", word="man").set_index("seed")["value"]
    other = where(table, **of, control="object").set_index("seed")["value"]
    names = {"condition": "plain", "profession": "chef", "measure": "containment", "word": "man"}
    difference = one(summary, **names, control="object", quantity="difference")
    assert difference["estimate"] == pytest.approx((pair - other).mean())
    assert summary.find(measure="containment", control="shuffled").empty
    # the swapped order is that of the word itself
    swapped = where(table, **of, control="swapped", word="man")["value"].mean()
    level = one(summary, **names, control="swapped", quantity="mean")
    assert level["estimate"] == pytest.approx(swapped)


def test_shuffled_null_is_that_of_the_masks(first_edition, summary):
    masks = where(
        first_edition["masks"], condition="plain", profession="chef", word="man", setting="0.3"
    )
    a, b = (unpacked(masks, side) for side in ("profession", "word"))
    iou = np.array([[(x & y).sum() / (x | y).sum() for y in b] for x in a])
    apart = iou[~np.eye(5, dtype=bool)].mean()
    names = {"condition": "plain", "profession": "chef", "word": "man", "setting": "0.3"}
    null = one(summary, **names, control="shuffled", quantity="mean")
    assert (null["estimate"], null["n"]) == pytest.approx((apart, 20))
    difference = one(summary, **names, control="shuffled", quantity="difference")
    assert difference["estimate"] == pytest.approx(np.diag(iou).mean() - apart)


def test_a_measure_that_nobody_knows_is_only_more_rows():
    plan = AuditPlan(professions=["doctor", "judge"], seeds=range(6), conditions=["plain", "other"],
                     interventions={"other": "prompt:{profession}"})  # fmt: skip
    rng = np.random.default_rng(0)
    rows = values_of(
        plan, lambda *picture: rng.uniform(0.3, 0.5), measure="effect_overlap", setting="otsu"
    )
    rows["chance"] = rng.uniform(0.05, 0.25, len(rows))  # picture by picture
    control = where(rows, word="man").assign(axis="", word="in", control="function", value=0.2)
    summary = summarise(plan, pictures_of(plan), pd.concat([rows, control]))
    names = {"condition": "other", "word": "woman", "measure": "effect_overlap"}
    own = where(rows, condition="other", word="woman", profession="judge")
    corrected = one(summary, **names, profession="judge", quantity="corrected")
    expected = ((own["value"] - own["chance"]) / (1 - own["chance"])).mean()
    assert corrected["estimate"] == pytest.approx(expected)
    mean = one(summary, **names, profession="judge", control="", quantity="mean")
    assert mean["p"] == pytest.approx(stats.ttest_rel(own["value"], own["chance"]).pvalue)
    chance = where(rows, condition="other", word="woman")["chance"].mean()
    assert one(summary, **names, quantity="chance")["estimate"] == pytest.approx(chance)
    changes = summary.find(**names, quantity="difference", scope="overall")
    assert sorted(zip(changes["baseline"], changes["control"], strict=True)) == [
        ("", "function"),
        ("plain", ""),
    ]


def test_a_change_counts_pictures_of_both_conditions_only():
    plan = AuditPlan(professions=["doctor", "judge"], seeds=range(4), conditions=["plain", "other"],
                     interventions={"other": "prompt:{profession}"})  # fmt: skip

    def value(condition, profession, seed, word):
        failed = condition == "other" and profession == "doctor"
        return None if failed else {"doctor": 0.2, "judge": 0.4}[profession]

    summary = summarise(plan, pictures_of(plan), values_of(plan, value))
    change = one(summary, scope="overall", baseline="plain", word="man", quantity="difference")
    assert (change["estimate"], change["n"]) == (0.0, 1)
    assert np.isnan(change["low"])
    assert summary.run["status"] == {"constant_map": 4, "ok": 12}
    assert (summary.run["measured"], summary.run["failed"]) == (12, 8)


def test_a_picture_measured_with_one_word_only_is_told():
    plan = AuditPlan(professions=["doctor"], seeds=range(3))
    rows = values_of(plan, lambda c, p, seed, word: None if (seed, word) == (1, "man") else 0.2)
    run = summarise(plan, pictures_of(plan), rows).run
    assert (run["planned"], run["drawn"], run["measured"], run["complete"]) == (3, 3, 3, True)
    assert run["measured_in_part"] == 1
    assert run["failures"][0] | {"seed": 1, "word": "man"} == run["failures"][0]


def test_shares_count_pictures_once_and_leave_out_what_nobody_read():
    plan = AuditPlan(professions=["doctor"], seeds=range(10))
    words = ["woman"] * 6 + ["man"] * 3 + [None]

    def labels(condition, profession, seed):
        return {"profession": "judge" if seed == 0 else "doctor", "gender": words[seed]}

    summary = summarise(plan, pictures_of(plan, labels), values_of(plan, lambda *picture: 0.2))
    share = one(summary, quantity="share", word="woman")
    assert (share["estimate"], share["n"]) == (pytest.approx(6 / 9), 9)
    assert one(summary, quantity="unread")["estimate"] == 1
    assert one(summary, quantity="right")["estimate"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("words", "known"),
    [(("woman",), ["woman"]), (("person", "woman"), ["woman"]), (("young", "old"), [])],
)
def test_pictures_read_as_a_word_that_the_axis_lacks_are_in_the_denominator(words, known):
    plan = AuditPlan(professions=["doctor"], seeds=range(8), axes={"axis": words},
                     conditions=["plain", "other"],
                     interventions={"other": "prompt:{profession}"})  # fmt: skip
    read = {"plain": ["woman"] * 3 + ["man"] * 5, "other": ["woman"] * 7 + ["man"]}
    pictures = pictures_of(
        plan, lambda condition, profession, seed: {"axis": read[condition][seed]}
    )
    summary = summarise(plan, pictures, values_of(plan, lambda *picture: 0.2))
    shares = summary.find(quantity="share")
    assert set(shares["word"]) == set(known)
    if known:
        assert shares["estimate"].tolist() == [7 / 8, 3 / 8]
        change = one(summary, quantity="share difference", scope="profession")
        assert change["estimate"] == pytest.approx(4 / 8)


def test_planted_truth_is_ranked_against_every_measure():
    plan = AuditPlan(seeds=range(4))
    truth = planted(plan)
    overlap = {row["profession"]: row["overlap"] for row in truth}
    rng = np.random.default_rng(0)
    signs = {"man": 1, "woman": -1}
    rows = values_of(
        plan, lambda c, p, s, w: signs[w] * 0.2 * overlap[p][w] + 0.4 + 0.01 * rng.random()
    )
    summary = summarise(plan, pictures_of(plan), rows, truth=truth)
    ranks = summary.find(quantity="rank", baseline="planted overlap").set_index("word")["estimate"]
    assert ranks["man"] > 0.9
    assert ranks["woman"] < -0.9
    assert len(summary.find(quantity="planted", measure="overlap", word="man")) == 20


def test_intervals_of_a_precision_say_so():
    plan = AuditPlan(professions=["doctor"], seeds=range(20), precision=0.1)
    rng = np.random.default_rng(0)
    rows = values_of(plan, lambda *picture: rng.uniform(0.2, 0.4))
    soft = rows.assign(measure="soft_iou", setting="0.3")
    states = [{"profession": "doctor", "seeds": 20, "half_width": 0.08, "reached": True}]
    precision = {"pictures": 20, "ended": True, "professions": states}
    summary = summarise(plan, pictures_of(plan), pd.concat([rows, soft]), precision=precision)
    lead = summary.find(measure="containment", quantity="mean", scope="profession")
    assert set(lead["method"]) == {FIXED_WIDTH}
    assert (lead["high"] - lead["estimate"]).tolist() == pytest.approx([0.1, 0.1])
    other = summary.find(measure="soft_iou", quantity="mean", scope="profession")
    assert set(other["method"]) == {"Student t over pictures; seeds drawn until precision 0.1"}
    assert one(summary, quantity="half-width")["n"] == 20


def test_the_ledger_becomes_medians_of_each_call_and_counts():
    plan = AuditPlan(professions=["doctor"], seeds=range(3), conditions=["plain", "guided"])
    ledger = pd.DataFrame(
        {
            "condition": "guided", "profession": "doctor", "seed": [0, 1, 2] * 2,
            "call": [0, 0, 0, 1, 1, 1], "energy": [0.1, 0.2, 0.4, 0.3, 0.3, 0.3],
            "iou": [[0.1, 0.3]] * 6, "gradient_norm": [1.0, 2.0, np.nan, 1.0, 1.0, 1.0],
            "applied": [True] * 5 + [False], "reason": [""] * 5 + ["start"],
        }
    )  # fmt: skip
    rows = values_of(plan, lambda *picture: 0.2)
    summary = summarise(plan, pictures_of(plan), rows, ledger=ledger)
    first = summary.find(quantity="energy", part="step:0").set_index("measure")["estimate"]
    assert first.to_dict() == pytest.approx({"energy": 0.2, "iou": 0.2, "gradient norm": 1.5})
    assert one(summary, quantity="skipped", part="skipped:start")["estimate"] == 1


def test_axes_may_share_words():
    axes = {"gender": ("man", "woman"), "again": ("woman", "man")}
    plan = AuditPlan(professions=["doctor", "judge"], seeds=range(4), axes=axes)
    rng = np.random.default_rng(0)
    rows = values_of(plan, lambda *picture: rng.uniform(0.2, 0.4))
    summary = summarise(plan, pictures_of(plan), rows)
    assert len(sentences.console(plan, summary)) == 1 + 2 * 3
    assert all(sentences.details(axis, plan, summary) for axis in axes)


def test_nothing_measured_is_a_summary_too():
    plan = AuditPlan(professions=["doctor"], seeds=[0])
    empty = values_of(plan, lambda *picture: 0.2).iloc[:0]
    summary = summarise(plan, pictures_of(plan).iloc[:0], empty)
    assert summary.figures.empty
    assert not summary.run["complete"]
    assert "Nothing was measured on this axis yet." in sentences.console(plan, summary)[1]
