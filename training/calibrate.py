"""Moves the words of professions until the model draws the planted shares.

Training leaves the shares of a model about 0.04 from the planted ones, and more of it does not
help. One number per profession is wrong, and one vector per profession can mend it: the word's
embedding in the text encoder, which no other profession's prompts contain. It is moved along the
gradient of the *lean*, what the model expects of the demographic at the times that decide it. How
far is found by drawing pictures: stochastic approximation (Robbins and Monro, 1951), in rounds with
noise of their own.
"""

from __future__ import annotations

import json
import logging
import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from biasmap_fast.files import write_text
from biasmap_fast.testbed import World
from biasmap_fast.testbed.classify import PLAUSIBLE, Classifier

from .population import face_prompt, random_person
from .stages import encode_all, render_all

_LOG = logging.getLogger(__name__)
_ROUNDS = 8
_STEPS = 10  # 25 steps draw another demographic in 1 of 130 pictures
_BATCH = 50
_TIMES = (999, 900, 800)  # at later ones the latents show the demographic
_PERSONS = 32  # of each demographic
_LEAP = 0.1  # largest change of the lean in one step along its gradient
_RIGHT = 0.98  # of the pictures of a round must show the profession


@dataclass(frozen=True)
class CalibratedWord:
    """How one profession's word was moved."""

    # share of the second demographic in each round, before its move; None if the pictures began to
    # lose the profession, and the word was put halfway back
    drawn: list[float | None]
    leans: list[float]  # change of the lean since the beginning, after each round's move
    moved: float  # length of the whole move
    length: float  # of the embedding before

    def rounded(self) -> dict[str, Any]:
        return {
            "drawn": [None if share is None else round(share, 4) for share in self.drawn],
            "leans": [round(lean, 4) for lean in self.leans],
            "moved": round(self.moved, 4),
            "length": round(self.length, 4),
        }


class _Lean:
    """The model's lean to the second demographic, as a function of a word's embedding.

    The predicted clean latents, projected on the difference of the two demographics' mean latents:
    0 where the model expects the first, 1 where it expects the second. Persons and noise are fixed.
    """

    def __init__(self, pipe: Any, world: World, noun: str, seed: int) -> None:
        rng = np.random.default_rng([seed, *noun.encode()])
        persons = [
            random_person(world, rng, noun, word) for word in world.words for _ in range(_PERSONS)
        ]
        z = encode_all(pipe.vae, render_all(world, persons))  # [2N, 4, 16, 16]
        difference = z[_PERSONS:].mean(0) - z[:_PERSONS].mean(0)
        self.axis = difference / difference.square().sum()  # [4, 16, 16]
        noise = torch.Generator().manual_seed(seed)
        alphas = pipe.scheduler.alphas_cumprod
        self.inputs = []
        for time in _TIMES:
            signal, sigma = alphas[time].sqrt(), (1.0 - alphas[time]).sqrt()
            noisy = signal * z + sigma * torch.randn(z.shape, generator=noise)
            self.inputs.append((torch.full((len(z),), time), noisy, signal, sigma))
        self.ids = pipe.tokenizer(
            face_prompt(noun), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        self.pipe, self.table, self.row = pipe, *word_embedding(pipe, noun)
        self.start = self.table[self.row].clone()

    def __call__(self) -> tuple[float, torch.Tensor]:
        """The lean and its gradient `[width]` with respect to the word's embedding."""
        total, gradient = 0.0, torch.zeros_like(self.table[self.row])
        self.table.requires_grad_(True)
        try:
            for time, noisy, signal, sigma in self.inputs:
                context = self.pipe.text_encoder(self.ids)[0].expand(len(noisy), -1, -1)
                velocity = self.pipe.unet(noisy, time, context).sample
                clean = signal * noisy - sigma * velocity
                lean = (clean * self.axis).sum((1, 2, 3)).mean() / len(self.inputs)
                gradient += torch.autograd.grad(lean, self.table)[0][self.row]
                total += float(lean.detach())
        finally:
            self.table.requires_grad_(False)
        return total, gradient

    def reach(self, wanted: float, tries: int = 12) -> float:
        """Moves the word until the lean is as wanted (to 0.001); returns the lean."""
        value, gradient = self()
        for _ in range(tries):
            left = wanted - value
            if abs(left) < 1e-3:
                break
            step = max(-_LEAP, min(_LEAP, left)) / gradient.square().sum()
            # the gradient holds near where it was taken: an eighth of the word at a time
            longest = self.table[self.row].norm() / 8.0 / gradient.norm()
            self.table[self.row] += max(-longest, min(longest, step)) * gradient
            value, gradient = self()
        return value

    def halfway_back(self) -> float:
        """Moves the word half of the way to where it was at first; returns the lean there."""
        self.table[self.row] = (self.table[self.row] + self.start) / 2.0
        return self()[0]


def word_embedding(pipe: Any, noun: str) -> tuple[torch.Tensor, int]:
    """The table of embeddings `[tokens, width]`, made writable, and the word's row in it."""
    ids = pipe.tokenizer(noun, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{noun!r} must be one token, got {ids}")
    table: torch.Tensor = pipe.text_encoder.get_input_embeddings().weight
    return table.requires_grad_(False), ids[0]


def drawn_share(pipe: Any, classifier: Classifier, noun: str, noise: torch.Tensor) -> float | None:
    """Share of the second demographic in pictures drawn at guidance 1 from `[N, 4, 16, 16]`.

    Among the plausible pictures; None if more than 2 % do not show the profession.
    """
    women, right = [], []
    for part in torch.split(noise, _BATCH):
        images = pipe(
            face_prompt(noun),
            num_images_per_prompt=len(part),
            num_inference_steps=_STEPS,
            guidance_scale=1.0,
            latents=part,
            output_type="np",
        ).images
        readings = classifier(images)
        right += [r.profession == noun for r in readings]
        plausible = [r for r in readings if r.plausibility >= PLAUSIBLE]
        women += [r.demographic == classifier.world.words[1] for r in plausible]
    if not women:
        raise ValueError(f"{noun!r}: some of {len(noise)} pictures must be plausible, got none")
    return float(np.mean(women)) if np.mean(right) >= _RIGHT else None


def calibrate_word(
    pipe: Any, world: World, noun: str, *, pictures: int, seed: int
) -> CalibratedWord:
    """Moves one profession's word, in place.

    The lean and the share are near to each other, so after round k the lean is moved by the share
    that is missing, divided by k - 1 from the third round on: the mean of what all rounds say. Far
    from where it was a word means no profession any more; it is then put halfway back. The rounds
    share the pictures; `pipe` is float32 on the CPU.
    """
    table, row = word_embedding(pipe, noun)
    before = table[row].clone()
    lean = _Lean(pipe, world, noun, seed)
    start, _ = lean()
    reached = start
    drawn: list[float | None] = []
    leans: list[float] = []
    classifier = Classifier(world)
    noise = torch.Generator().manual_seed(
        int(np.random.SeedSequence([seed, *noun.encode(), 11]).generate_state(1)[0])
    )
    for number in range(1, _ROUNDS + 1):
        z = torch.randn((pictures // _ROUNDS, 4, 16, 16), generator=noise)
        share = drawn_share(pipe, classifier, noun, z)
        if share is None:
            reached = lean.halfway_back()
        else:
            missing = world.markers[noun].share - share
            reached = lean.reach(reached + missing / max(1, number - 1))
        drawn.append(share)
        leans.append(reached - start)
    moved = table[row] - before
    return CalibratedWord(drawn, leans, float(moved.norm()), float(before.norm()))


def calibrate(
    pipe: Any, world: World, *, pictures: int, seed: int, folder: Path, processes: int = 1
) -> dict[str, CalibratedWord]:
    """Moves the words of all professions, in place; a run that was killed continues.

    Words do not depend on each other, nor on the number of processes, each of which has one thread
    and a copy of the pipeline. Finished words are kept in `folder`, one file each.
    """
    if pictures < _ROUNDS:
        raise ValueError(f"`pictures` must be at least {_ROUNDS}, got {pictures}")
    job = _Job(pipe, world, pictures, seed, folder)
    threads = torch.get_num_threads()
    bar = partial(tqdm, total=len(world.markers), desc="calibrate", unit="profession")
    if processes == 1:
        torch.set_num_threads(1)
        try:
            return dict(bar(map(job.word, world.markers)))
        finally:
            torch.set_num_threads(threads)
    copy = pickle.dumps(job)  # by value: torch would share the memory of the tensors
    with ProcessPoolExecutor(
        min(processes, len(world.markers)),
        get_context("spawn"),
        initializer=_begin,
        initargs=(copy,),
    ) as pool:
        list(bar(pool.map(_word, world.markers)))
    return dict(map(job.word, world.markers))  # all are done: into this pipeline


@dataclass(frozen=True)
class _Job:
    pipe: Any
    world: World
    pictures: int
    seed: int
    folder: Path

    def word(self, noun: str) -> tuple[str, CalibratedWord]:
        """Moves one word, or takes the move from its file."""
        table, row = word_embedding(self.pipe, noun)
        key = {"pictures": self.pictures, "seed": self.seed, "start": table[row].tolist()}
        path = self.folder / f"word-{noun}.json"
        if path.exists() and (kept := json.loads(path.read_text()))["key"] == key:
            table[row] = torch.tensor(kept["embedding"])
            return noun, CalibratedWord(**kept["word"])
        word = calibrate_word(self.pipe, self.world, noun, pictures=self.pictures, seed=self.seed)
        done = {"key": key, "embedding": table[row].tolist(), "word": asdict(word)}
        write_text(path, json.dumps(done))
        _LOG.info("%s: %s", noun, word)
        return noun, word


_jobs: list[_Job] = []  # of a process that calibrates for another


def _begin(job: bytes) -> None:
    torch.set_num_threads(1)
    _jobs.append(pickle.loads(job))


def _word(noun: str) -> None:
    _jobs[-1].word(noun)
