"""Whole audits: the published recipe against `run_audit`, for the same table of findings.

The published scripts have one demographic axis each. A script goes through professions and seeds
one picture at a time and generates twice: the baseline, and the picture steered by the energy of
its axis; it makes the maps from every step's kept hidden states, resizes them to 512 x 512 and
takes the IoU of two masks. Both axes and both conditions are four generations per picture.
`run_audit` draws the two conditions once, in batches, and measures both axes on the same pictures.
`Published` is written from the description; none of the scripts' code is copied, and it is spared
what is not their method: semantic guidance, saving of pictures. Energies are not the same function
(row-wise unrolled masks of one axis, against exact ones of both), so the guided pictures differ.

A time is that of a finding: one picture under one condition measured on one axis, everything
included, the report too. The error is that of the plain condition's findings, which are the same in
both. The second axis has two other words of the model's vocabulary. One thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

import biasmap_fast as bm
from biasmap_fast import presets
from biasmap_fast.attribution import AttributionCache
from biasmap_fast.audit.summary import where
from biasmap_fast.maps import resize
from biasmap_fast.reference import concept_map
from biasmap_fast.unet import cross_attention_layers

from .guidance import RowwiseEnergy, watched
from .harness import Entry, Group
from .settings import Settings

AXES: dict[str, tuple[str, ...]] = {"gender": ("man", "woman"), "other": ("lawyer", "nurse")}
PROFESSIONS = bm.testbed.PROFESSIONS
GUIDANCE = 3.0


class Published:
    """The recipe of the published scripts, one picture at a time."""

    def __init__(self, pipe: Any, steps: int) -> None:
        self.pipe, self.steps = pipe, steps
        self.layers = cross_attention_layers(pipe, None)

    def prompts(self, profession: str, axis: str) -> list[bm.AttributionPrompt]:
        noun = presets.with_article(profession)
        return [
            bm.AttributionPrompt(f"A photo of the face of {noun} and {word}", (profession, word))
            for word in AXES[axis]
        ]

    def finding(self, profession: str, seed: int, axis: str, steered: bool) -> list[float]:
        """IoU of the profession's and each word's map, of one generation."""
        states: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in self.layers}
        prompts = self.prompts(profession, axis)

        def keep(layer: Any, hidden: torch.Tensor, _: torch.Tensor) -> None:
            states[layer.name].append(hidden[:1].detach())  # a view: the whole batch stays

        with watched(self.layers, keep):
            self.draw(profession, seed, prompts if steered else [])
        return [self.overlap(states, prompt) for prompt in prompts]

    def draw(self, profession: str, seed: int, prompts: list[bm.AttributionPrompt]) -> torch.Tensor:
        """One picture, steered by the mean energy of ``prompts`` where there are some."""
        pipe, scheduler = self.pipe, self.pipe.scheduler
        scheduler.set_timesteps(self.steps)
        text = f"A photo of the face of {presets.with_article(profession)}"
        with torch.no_grad():
            prompt, negative = pipe.encode_prompt(text, pipe.device, 1, True)
        embeddings = torch.cat([negative, prompt])
        size = pipe.unet.config.sample_size
        latents = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed))
        latents = latents.to(pipe.device) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            noise, gradient = self.step(latents, timestep, embeddings, prompts)
            unconditional, conditional = noise.chunk(2)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            if gradient is not None and gradient.norm() < 1:  # the scripts' rule
                alpha_bar = scheduler.alphas_cumprod[int(timestep)]
                guided = guided + presets.PAPER.scale * (1 - alpha_bar).sqrt() * gradient
            latents = scheduler.step(guided, timestep, latents).prev_sample
        with torch.no_grad():
            picture: torch.Tensor = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        return picture

    def step(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        embeddings: torch.Tensor,
        prompts: list[bm.AttributionPrompt],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prediction of both chunks, and the energy's gradient with respect to the latents."""
        unet, scheduler = self.pipe.unet, self.pipe.scheduler
        if not prompts:
            with torch.no_grad():
                given = scheduler.scale_model_input(latents, timestep).repeat(2, 1, 1, 1)
                return unet(given, timestep, embeddings).sample, None
        z = latents.detach().requires_grad_()
        given = scheduler.scale_model_input(z, timestep).repeat(2, 1, 1, 1)
        # Its scripts have one prompt; ours has a word a prompt, which costs them the maps alone.
        energies = RowwiseEnergy(self.pipe, prompts[0])
        with energies.watch():
            prediction = unet(given, timestep, embeddings).sample
        (gradient,) = torch.autograd.grad(energies(), z)
        return prediction.detach(), gradient

    @torch.no_grad()
    def overlap(self, states: dict[str, list[torch.Tensor]], prompt: bm.AttributionPrompt) -> float:
        """Maps from the kept states, layer by layer and step by step, and their IoU."""
        keys = AttributionCache().keys(self.pipe, (prompt,), self.layers, apart=True)
        size = self.pipe.unet.config.sample_size
        total = torch.zeros(1, 2, size, size, device=self.pipe.device)
        for layer in self.layers:
            for kept in states[layer.name]:
                query = layer.split_heads(layer.module.to_q(kept))
                side = int(query.shape[2] ** 0.5)
                maps = concept_map(query, keys.by_layer[layer.name][0], keys.weights[0])
                total += resize(maps.view(1, 2, side, side), (size, size))
        large = resize(total, (presets.PAPER.size, presets.PAPER.size))[0].cpu().numpy()
        first, second = (one > np.percentile(one, presets.PAPER.percentile) for one in large)
        either = np.logical_or(first, second).sum()
        return float(np.logical_and(first, second).sum() / either) if either else 0.0

    def audit(self, professions: tuple[str, ...], seeds: range) -> np.ndarray:
        """The whole table, ``[axes, conditions, pictures, words]``."""
        return np.array(
            [
                [
                    [self.finding(p, s, axis, steered) for p in professions for s in seeds]
                    for steered in (False, True)
                ]
                for axis in AXES
            ]
        )


def plan(settings: Settings, pictures: int, batch: int, steps: int, **kwargs: Any) -> bm.AuditPlan:
    """An audit of ``pictures`` a condition, of the table above and nothing else."""
    professions = PROFESSIONS[: min(8, pictures)]
    given: dict[str, Any] = {
        "professions": professions,
        "axes": AXES,
        "seeds": range(pictures // len(professions)),
        "steps": steps,
        "guidance_scale": GUIDANCE,
        "batch_size": batch,
        "conditions": ("plain", "guided"),
        "controls": None,
        "sweeps": (),
        "curve": False,
        "measure": "iou",
        "evaluation_size": presets.PAPER.size,
        "branch": "uncond",
        "classifier": "none",
        "save_pictures": "none",
        "save_maps": "none",
        "device": str(settings.device),
    }
    return bm.AuditPlan(**given | kwargs)


def audit(settings: Settings, pipe: Any, planned: bm.AuditPlan) -> Callable[[], Any]:
    """The whole of it: run folder, records, report."""

    def run() -> Any:
        out = settings.scratch / f"audit-{time.monotonic_ns()}"
        return bm.run_audit(planned, out, pipe=pipe, progress=False)

    return run


def iou_of(result: Any) -> dict[tuple[str, int, str, str, str], float]:
    """(condition, seed, profession, axis, word) -> IoU: all that timing reads of records."""
    key = ["condition", "seed", "profession", "axis", "word"]
    rows = where(result.measurements, measure="iou", setting="0.3", part="", control="")
    values: dict[tuple[str, int, str, str, str], float] = rows.set_index(key)["value"].to_dict()
    return values


def plain_findings(result: Any, professions: tuple[str, ...]) -> np.ndarray:
    """IoU under ``plain`` of the first seed's pictures, ``[axes, pictures, words]``."""
    values = iou_of(result)
    return np.array(
        [
            [[values["plain", 0, p, axis, word] for word in words] for p in professions]
            for axis, words in AXES.items()
        ]
    )


def against_published(settings: Settings, batches: tuple[int, ...], pictures: int) -> list[Entry]:
    pipe = bm.testbed.pipeline(device=settings.device)
    steps, few = (2, 1) if settings.quick else (10, 4)
    published = Published(bm.testbed.pipeline(device=settings.device), steps)
    some = PROFESSIONS[:few]
    tables: list[np.ndarray] = []

    def recipe() -> None:
        tables.append(published.audit(some, range(1)))

    def error(result: Any) -> float:
        return float(np.abs(plain_findings(result, some) - tables[0][:, 0]).max())

    name = "published recipe, one picture at a time"
    found = [Entry(name, recipe, calls=few * 4, note=f"{few} pictures")]
    for batch in batches:
        drawn = min(pictures, max(8, 4 * batch))
        planned = plan(settings, drawn, batch, steps)
        found.append(
            Entry(
                f"run_audit, batch {batch}", audit(settings, pipe, planned), error,
                calls=drawn * 4, note=f"{drawn} pictures", ours=True, tolerance=0.01,
                x=float(batch),
            )
        )  # fmt: skip
    return found


def scaling(settings: Settings, over: str, values: tuple[int, ...]) -> list[Entry]:
    """Plain audits that differ in one number; a time is that of the whole audit."""
    pipe = bm.testbed.pipeline(device=settings.device)

    def planned(value: int) -> bm.AuditPlan:
        given: dict[str, Any] = {"pictures": 8, "batch": 8, "steps": 5, "conditions": ("plain",)}
        axes = {"words": PROFESSIONS[8 : 8 + value]}
        given |= {"axes": axes} if over == "concepts" else {over: value}
        return plan(settings, **given)

    return [
        Entry(f"{value} {over}", audit(settings, pipe, planned(value)), ours=True, x=float(value))
        for value in values
    ]


def controls(settings: Settings) -> list[Entry]:
    """An audit of one axis without what is measured beside it, and with the defaults."""
    pipe = bm.testbed.pipeline(device=settings.device)
    one: dict[str, Any] = {"axes": ["gender"], "conditions": ("plain",), "evaluation_size": None}
    bare = plan(settings, 8, 8, 2 if settings.quick else 10, **one)
    same = ["professions", "seeds", "steps", "guidance_scale", "classifier", "device"]
    same += ["save_pictures", "save_maps"]
    defaults = bm.AuditPlan(**{name: getattr(bare, name) for name in same})
    return [
        Entry("IoU alone", audit(settings, pipe, bare), ours=True),
        Entry("containment, controls and curves", audit(settings, pipe, defaults), ours=True),
    ]


def groups(settings: Settings) -> list[Group]:
    quick = settings.quick
    batches, pictures, steps = ((1, 4, 8), 8, 2) if quick else ((1, 8, 64), 64, 10)
    found = [
        Group(
            "audits", "against the published recipe",
            f"embedded model, two axes, plain and guided, {steps} steps; time of a finding",
            lambda: against_published(settings, batches, pictures), settings.rounds(2), 125.0,
            warm_up="run_audit, batch 1", slope="batch size",
        ),
        Group(
            "audits", "what the defaults measure beside IoU",
            f"embedded model, one axis, 8 pictures, {steps} steps; a whole audit",
            lambda: controls(settings), settings.rounds(3), 30.0,
        ),
    ]  # fmt: skip
    series = {"pictures": (4, 8, 16), "concepts": (2, 4, 8)}
    for over, values in {**series, "steps": (2, 4, 8) if quick else (4, 8, 16)}.items():
        workload = "embedded model, plain, one axis, 8 pictures, 5 steps, batch 8, one of them "
        setup = partial(scaling, settings, over, values)
        found.append(
            Group(
                "audits", f"scaling with {over}", workload + "varied; time of a whole audit", setup,
                settings.rounds(3), 22.0, warm_up=f"{values[0]} {over}", slope=over,
            )
        )  # fmt: skip
    return found
