"""Study: what an audit says where the truth is known, on the embedded model and its world.

    python -m studies.audit        # about an hour on one core; goes on if stopped

Five questions, one answer each in studies/results/audit.json:

* *coverage*: do the shares' Wilson intervals hold the planted shares at guidance 1 as often as they
  claim? (Blocks of 20 pictures; the model itself misses the planted shares a little, see "drawn".)
* *amplification*: is the amplification of the planted bias at guidance 3 found? (The pictures of
  guidance 3 against those of guidance 1, on the same seeds.)
* *no effect*: two halves of the same pictures stand as two conditions. How often does a test or an
  interval find a difference that cannot be there?
* *no bias, rendered*: pictures rendered of the world with every share 0.5, read by the same
  classifier. How often does an interval find a bias that was not planted?
* *no bias, trained*: the same of a model that is trained on a world in which every share is 0.5 and
  no marker touches the pixels that the demographic decides. Also: how often does the audit find
  that a profession lies inside a demographic word's place, where none does?

Where intervals of shares are counted (*coverage*, *no bias, trained*), every profession has seeds
of its own. With the same seeds for all, as in an audit, the same noise mostly draws the same word
for every profession, and the intervals are not independent trials.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL.Image import Image
from scipy import stats

from biasmap_fast import testbed
from biasmap_fast.audit import AuditPlan, AuditResult, Reading, run_audit
from biasmap_fast.audit.classifiers import reader_for_testbed
from biasmap_fast.audit.statistics import (
    crossed_mean_interval,
    crossed_sign_flip_test,
    mean_interval,
    share_difference,
    share_interval,
    sign_flip_test,
)
from biasmap_fast.testbed.classify import Classifier
from training.evaluate import share_test
from training.population import random_person
from training.stages import TrainSettings
from training.train import train, weight_hashes

from . import common
from .common import WORD, Labels, labels_of, plan_of

BLOCK = 20
STRIDE = 10_000  # between the first seeds of two professions


def own_seeds(plan: AuditPlan, folder: Path, seeds: int) -> Labels:
    """What audits read, one of each profession of a plan, whose seeds no other one has."""
    labels: Labels = {}
    for number, profession in enumerate(plan.professions, start=1):
        first = STRIDE * number
        one = {"professions": [profession], "seeds": range(first, first + seeds)}
        alone = plan_of(**{**plan.model_dump(), "controls": None, **one})
        labels |= labels_of(run_audit(alone, folder / profession, progress=False))
    return labels


def rate(hits: list[bool]) -> dict[str, Any]:
    """A rate with Wilson's interval over trials; dependent trials make it too narrow."""
    return share_interval(sum(hits), len(hits)).to_dict()


def held(labels: Labels, shares: Mapping[str, float]) -> list[bool]:
    """Whether the interval of every block of pictures holds its profession's share."""
    blocks = []
    for profession, own in labels.items():
        read = [own[seed] for seed in sorted(own)]
        starts = range(0, len(read) - BLOCK + 1, BLOCK)
        blocks += [covers(sum(read[i : i + BLOCK]), shares[profession]) for i in starts]
    return blocks


def covers(count: int, share: float) -> bool:
    """Whether Wilson's interval of a block holds a share."""
    figure = share_interval(count, BLOCK)
    return figure.low is not None and figure.high is not None and figure.low <= share <= figure.high


def coverage(labels: Labels, shares: Mapping[str, float]) -> dict[str, Any]:
    """Intervals of blocks of pictures that share no seed, and what was drawn in all."""
    return {
        "nominal": 0.95,
        "block": BLOCK,
        "exact": exact_coverage(shares),
        "covered": rate(held(labels, shares)),
        "drawn": drawn(labels, shares),
    }


def exact_coverage(shares: Mapping[str, float]) -> float:
    """What Wilson's interval of a block covers if every share is exactly as given."""
    n, given = range(BLOCK + 1), list(shares.values())
    chance = stats.binom.pmf(n, BLOCK, np.array(given)[:, None])
    holds = np.array([[covers(count, share) for count in n] for share in given])
    return float((chance * holds).sum(axis=1).mean())


def drawn(labels: Labels, shares: Mapping[str, float]) -> dict[str, Any]:
    """How far a model's own shares are from the given ones, beyond what sampling does.

    The squares of the differences, less their sampling variances, estimate the mean square of what
    the model itself misses.
    """
    given = np.array([shares[profession] for profession in labels])
    read = [np.array(list(own.values()), dtype=np.float64) for own in labels.values()]
    found = np.array([own.mean() for own in read])
    counts = np.array([len(own) for own in read])
    sampling = given * (1.0 - given) / counts
    square = float(((found - given) ** 2 - found * (1.0 - found) / (counts - 1)).mean())
    return {
        "pictures": int(counts.sum()),
        "mean difference": float((found - given).mean()),
        "standard error": float(np.sqrt(sampling.sum()) / len(given)),
        "chi_square_p": share_test(
            [int(own.sum()) for own in read], counts.tolist(), given.tolist()
        ),
        "deviation of the model": max(0.0, square) ** 0.5,
        "shares": dict(zip(labels, found.tolist(), strict=True)),
    }


def amplification(plain: Labels, guided: Labels, shares: dict[str, float]) -> dict[str, Any]:
    """Slopes of drawn over planted shares, and the move away from 0.5 on the same seeds."""
    planted = np.array([shares[p] for p in plain])
    slopes = {}
    for name, labels in (("guidance 1", plain), ("guidance 3", guided)):
        drawn = [float(np.mean(list(labels[p].values()))) for p in plain]
        fit = stats.linregress(planted, drawn)
        reach = stats.t.ppf(0.975, len(drawn) - 2) * fit.stderr
        low, high = float(fit.slope - reach), float(fit.slope + reach)
        slopes[name] = {"value": float(fit.slope), "low": low, "high": high, "n": len(drawn)}
    moves = {
        p: {
            seed: np.sign(shares[p] - 0.5) * (float(guided[p][seed]) - float(own[seed]))
            for seed in own
            if seed in guided[p]
        }
        for p, own in plain.items()
    }
    matrix = pd.DataFrame(moves).T.to_numpy()
    return {
        "slopes": slopes,
        "move towards the planted majority": crossed_mean_interval(matrix, lowest=-1.0).to_dict(),
        "p": crossed_sign_flip_test(matrix),
    }


def no_effect(result: AuditResult, labels: Labels, splits: int) -> dict[str, Any]:
    """Random halves of the seeds, paired, as if they were two conditions."""
    values_of = common.values_of(result)
    iou = {pair: {seed: one for seed, (_, one) in own.items()} for pair, own in values_of.items()}
    seeds = np.array(result.plan.seeds)
    tests, t_intervals, share_intervals, overall = [], [], [], []
    for split in range(splits):
        order = np.random.default_rng([split, 20]).permutation(seeds)
        half = len(order) // 2
        pairs = list(zip(order[:half].tolist(), order[half : 2 * half].tolist(), strict=True))
        changes: dict[str, dict[str, dict[int, float]]] = {}
        for (profession, word), own in iou.items():
            change = {a: own[b] - own[a] for a, b in pairs if a in own and b in own}
            changes.setdefault(word, {})[profession] = change
            figure = mean_interval(list(change.values()), lowest=-1.0)
            if figure.low is not None and figure.high is not None:
                t_intervals.append(not figure.low <= 0.0 <= figure.high)
            p = sign_flip_test(list(change.values()))
            tests.append(p is not None and p <= 0.05)
        for values in changes.values():
            p = crossed_sign_flip_test(pd.DataFrame(values).T.to_numpy())
            overall.append(p is not None and p <= 0.05)
        for own_labels in labels.values():
            both = [(own_labels[a], own_labels[b]) for a, b in pairs if {a, b} <= own_labels.keys()]
            share = share_difference(both)
            if share.low is not None and share.high is not None:
                share_intervals.append(not share.low <= 0.0 <= share.high)
    return {
        "nominal": 0.05,
        "splits": splits,
        "sign-flip test of a profession": rate(tests),
        "t interval of a profession leaves 0": rate(t_intervals),
        "sign-flip test over professions": rate(overall),
        "Newcombe interval of a Risk Difference leaves 0": rate(share_intervals),
    }


# less training than the packaged model's: half an hour of a core
UNBIASED = TrainSettings(
    seed=20,
    world=testbed.WorldConfig(levels=(0.0,) * 5, shares=(0.5,) * 4),
    pictures=6600,
    unet_steps=1600,
    settle_steps=800,
    calibration_pictures=0,
)


@functools.cache
def unbiased_reader() -> Callable[[Sequence[Image]], Sequence[Reading]]:
    return reader_for_testbed(Classifier(testbed.World(UNBIASED.world)))


def read_unbiased(pictures: list[Image]) -> Sequence[Reading]:
    """The audit's classifier of the world without bias."""
    return unbiased_reader()(pictures)


def unbiased_plan(folder: Path, seeds: int) -> AuditPlan:
    """An audit with the default controls of the model without bias, which is trained if missing."""
    model = folder / "no-bias-model"
    if not (model / "training.json").is_file():
        train(UNBIASED, model)
    default = AuditPlan.model_validate({})  # words that a model of the embedded kind knows
    known = {name: getattr(default, name) for name in ("professions", "axes", "controls")}
    reader = "studies.audit:read_unbiased"
    plan = {"model": str(model), "classifier": reader, "guidance_scale": 1.0}
    return plan_of(**plan, **known, seeds=range(seeds))


def no_bias_trained(result: AuditResult, labels: Labels) -> dict[str, Any]:
    shares = dict.fromkeys(labels, 0.5)
    together = labels_of(result)
    words = np.array([list(own.values()) for own in together.values()], dtype=np.float64)
    return {
        "seeds": len(result.plan.seeds),
        "weights": weight_hashes(Path(result.plan.model)),
        "professions right": common.professions_right(result),
        "shares": {
            "nominal": 0.05,
            "block": BLOCK,
            "exact": 1.0 - exact_coverage(shares),
            "found a bias": rate([not holds for holds in held(labels, shares)]),
            "drawn": drawn(labels, shares),
        },
        # of the audit, where all professions have the same seeds
        "seeds on which all professions agree": int((np.ptp(words, axis=0) == 0).sum()),
        "containment": common.above_chance(result, "containment"),
        "iou": common.above_chance(result, "iou"),
    }


def no_bias(repeats: int) -> dict[str, Any]:
    """Rendered pictures of every profession, either word with probability a half."""
    world = testbed.World()
    rng = np.random.default_rng(20)
    wrong = []
    for _ in range(repeats):
        for profession in testbed.PROFESSIONS:
            words = [testbed.AXES["gender"][int(rng.random() < 0.5)] for _ in range(BLOCK)]
            pictures = [world.render(random_person(world, rng, profession, word)) for word in words]
            read = [one.demographic == WORD for one in testbed.classify(np.stack(pictures))]
            wrong.append(not covers(sum(read), 0.5))
    exact = 1.0 - exact_coverage({"any": 0.5})
    return {"nominal": 0.05, "exact": exact, "pictures": BLOCK, "found a bias": rate(wrong)}


def main() -> None:
    given = common.options(__doc__, "audit", seeds=40, own_seeds=200, splits=25, repeats=5)
    torch.set_num_threads(1)
    results = {
        scale: run_audit(
            plan_of(seeds=range(given.seeds), guidance_scale=scale),
            given.runs / f"guidance-{scale:g}",
        )
        for scale in (1.0, 3.0)
    }
    labels = {scale: labels_of(result) for scale, result in results.items()}
    shares = {row.profession: row.shares[WORD] for row in testbed.truth()}
    own = own_seeds(results[1.0].plan, given.runs / "own-seeds", given.own_seeds)
    unbiased = unbiased_plan(given.runs, given.seeds)
    own_unbiased = own_seeds(unbiased, given.runs / "no-bias-own-seeds", given.own_seeds)
    record = {
        "seeds": given.seeds,
        "own_seeds": given.own_seeds,
        "coverage": coverage(own, shares),
        "amplification": amplification(labels[1.0], labels[3.0], shares),
        "no effect": no_effect(results[1.0], labels[1.0], given.splits),
        "no bias, rendered": no_bias(given.repeats),
        "no bias, trained": no_bias_trained(
            run_audit(unbiased, given.runs / "no-bias"), own_unbiased
        ),
    }
    common.write(given.out, 2, record)


if __name__ == "__main__":
    main()
