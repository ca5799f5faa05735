"""Shares and effect overlap on the embedded model, against what was planted.

    python studies/probes.py                     # about ten minutes on one core; resumes
    python studies/probes.py --draws 16 --pictures 4 --output elsewhere.json

For each profession: (a) its share of the second word from 64 draws of noise, at the first, second
and fourth of 25 denoiser calls without guidance; (b) Otsu overlap of its effect map with that of
the demographic words, over pictures at guidance 3 and calls 6, 12 and 18. Beside (b) stand, in
place of the demographic map: a blob at the centre, the mean demographic map of the other
professions, and the effect of words without a demographic ("a photo of" against none). The world
has one axis, so there is no wrong axis to compare with.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

import biasmap_fast as bm
from biasmap_fast.presets import with_article
from biasmap_fast.testbed.palette import COAT_WORDS

STEPS = 25
CALLS = (1, 2, 4)  # denoiser calls after which shares are read
COATS = COAT_WORDS[:2]
GUIDANCE = [1.0, 3.0]
DEFAULT = Path(__file__).parent / "results" / "probes.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--output", type=Path, default=DEFAULT)
    given = parser.parse_args()
    settings = {
        "model": "testbed", "steps": STEPS, "draws": given.draws, "pictures": given.pictures,
        "guidance": GUIDANCE, "torch": torch.__version__, "biasmap_fast": bm.__version__,
    }  # fmt: skip
    known = json.loads(given.output.read_text()) if given.output.exists() else {}
    rows = known.get("rows", {}) if known.get("settings") == settings else {}
    if rows and "results" in known:
        print(json.dumps(known["results"], indent=1))
        return
    pipe, truth = bm.testbed.pipeline(), bm.testbed.truth()
    for number, row in enumerate(truth):
        if row.profession not in rows:
            start = time.perf_counter()
            rows[row.profession] = {
                "planted_share": row.shares[truth.words[1]],
                "planted_overlap": float(np.mean(list(row.overlap.values()))),
                **shares(pipe, row.profession, truth.words, given.draws, 1000 * number),
                **maps(pipe, row.profession, truth.words, given.pictures, 1000 * number),
                "seconds": round(time.perf_counter() - start, 1),
            }
            write(given.output, {"settings": settings, "rows": rows})
            print(row.profession, rows[row.profession]["share"], flush=True)
    results = {"shares": share_results(rows)} | {
        f"overlap at guidance {scale:g}": overlap_results(rows, scale) for scale in GUIDANCE
    }
    for row in rows.values():
        del row["maps"]  # kept for resuming only
    write(given.output, {"settings": settings, "results": results, "rows": rows})
    print(json.dumps(results, indent=1))


def prompts(profession: str, words: tuple[str, str]) -> tuple[str, dict[str, str]]:
    text = f"a photo of {with_article(profession)}"
    return text, {word: f"{text} and {word}" for word in words}


def shares(pipe: Any, profession: str, words: Any, draws: int, seed: int) -> dict[str, Any]:
    """The share of the second word: at pure noise, and its posterior after further calls."""
    text, groups = prompts(profession, words)
    estimate = bm.share(pipe, text, groups, draws=draws, seed=seed, num_inference_steps=STEPS)

    def stop(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step + 1 >= max(CALLS)
        return values

    found = []
    for first in range(0, draws, 16):
        count = min(16, draws - first)
        calls = [(call - 1 + 0.5) / STEPS for call in CALLS]
        with bm.probe(pipe, [bm.Swap("gender", groups)], calls=calls) as probes:
            pipe(
                text, num_images_per_prompt=count, num_inference_steps=STEPS, guidance_scale=1.0,
                generator=[torch.Generator().manual_seed(seed + first + i) for i in range(count)],
                output_type="latent", callback_on_step_end=stop,
            )  # fmt: skip
        found.append(probes.shares("gender")[..., 1])
    posterior = torch.cat(found, 1).mean(1).tolist()
    return {
        "share": estimate[words[1]],
        "interval": estimate.intervals[words[1]],
        "posterior": dict(zip(map(str, CALLS), posterior, strict=True)),
    }


def maps(pipe: Any, profession: str, words: Any, pictures: int, seed: int) -> dict[str, Any]:
    """Mean effect maps over calls of every picture, as lists."""
    text, groups = prompts(profession, words)
    plain = text.removeprefix("a photo of ")
    swaps = [
        bm.Swap("profession", {profession: text, "person": "a photo of a person"}),
        bm.Swap("gender", groups),
        bm.Swap("function", {"long": text, "short": plain}),
        bm.Swap("coat", {c: f"{text} in a {c} coat" for c in COATS}),
    ]
    found = {}
    for scale in GUIDANCE:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(pictures)]
        with bm.probe(pipe, swaps) as probes:
            pipe(
                text, num_images_per_prompt=pictures, num_inference_steps=STEPS,
                guidance_scale=scale, generator=generators, output_type="latent",
            )  # fmt: skip
        effects = probes.effects()
        found[f"{scale:g}"] = {
            name: effects[name].mul(1e3).round().int().tolist() for name in effects.names
        }
    return {"maps": found}


def share_results(rows: dict[str, Any]) -> dict[str, Any]:
    planted = np.array([row["planted_share"] for row in rows.values()])
    estimates = {"share": [row["share"] for row in rows.values()]}
    for call in map(str, CALLS):
        estimates[f"posterior after {call}"] = [r["posterior"][call] for r in rows.values()]
    return {
        name: {
            "rank correlation": float(stats.spearmanr(planted, values)[0]),
            "slope": float(np.polyfit(planted, values, 1)[0]),
            "rmse": float(np.sqrt(np.mean((planted - np.array(values)) ** 2))),
        }
        for name, values in estimates.items()
    }


def overlap_results(rows: dict[str, Any], scale: float) -> dict[str, Any]:
    planted = np.array([row["planted_overlap"] for row in rows.values()])
    effects = [
        {name: torch.tensor(m) / 1e3 for name, m in row["maps"][f"{scale:g}"].items()}
        for row in rows.values()
    ]
    size = effects[0]["gender"].shape
    down, across = (torch.arange(n) - (n - 1) / 2 for n in size[1:])
    distance = down[:, None].square() + across.square()
    blob = torch.exp(-distance / (2 * (size[1] / 16 * 3) ** 2)).expand(size)
    sums = torch.stack([maps["gender"].mean(0) for maps in effects])
    others = (sums.sum(0) - sums) / (len(sums) - 1)
    kinds: dict[str, Any] = {
        "effect maps": lambda i: effects[i]["gender"],
        "centre blob": lambda i: blob,
        "mean map of the others": lambda i: others[i].expand(size),
        "wrong axis (coat)": lambda i: effects[i]["coat"],
        "function word": lambda i: effects[i]["function"],
    }
    results = {}
    for kind, pick in kinds.items():
        found = [bm.effect_overlap(e["profession"], pick(i)) for i, e in enumerate(effects)]
        for measure in ("value", "corrected", "iou", "bhattacharyya"):
            values = np.array([float(getattr(overlap, measure).mean()) for overlap in found])
            results[f"{kind}, {measure}"] = {
                "rank correlation": float(stats.spearmanr(planted, values)[0]),
                "concordance": concordance(planted, values),
                "mean by planted level": {
                    f"{level:.1f}": float(values[np.round(planted, 1) == level].mean())
                    for level in sorted(set(np.round(planted, 1)))
                },
            }
        results[f"{kind}, value"]["mean chance"] = float(
            np.mean([float(overlap.chance.mean()) for overlap in found])
        )
    return results


def concordance(truth: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> float:
    """Part of the pairs of different truth that are in the right order; ties count half."""
    right = total = 0.0
    for i in range(len(truth)):
        for j in range(i):
            if abs(truth[i] - truth[j]) > 1e-6:
                order = np.sign(values[i] - values[j]) * np.sign(truth[i] - truth[j])
                right, total = right + (1 + order) / 2, total + 1
    return right / total


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
