"""The training loops of the embedded model: resumable, and the same from any interruption.

Every step draws from its own generator, seeded by (seed, stage, step), so nothing random is carried
from step to step and a checkpoint needs no generator's state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from biasmap_fast.files import writing
from biasmap_fast.testbed import Person, World, WorldConfig

from . import networks
from .population import caption, vocabulary

_LOG = logging.getLogger(__name__)
_CHECKPOINT_EVERY = 200
_NO_CAPTION = 0.1
_CALIBRATION = {"calibration_pictures"}
_SETTLE = {"settle_steps", "settle_batch", *_CALIBRATION}
# stage -> settings of what comes after it, which do not decide it
LATER = {
    "autoencoder": _SETTLE | {"unet_steps", "unet_batch", "autoencoder_sha256"},
    "unet": _SETTLE,
    "settle": _CALIBRATION,
}


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the weights, apart from threads and library versions."""

    seed: int = 0  # of initial weights, population, captions and noise
    world: WorldConfig = field(default_factory=WorldConfig)
    autoencoder_steps: int = 3600
    autoencoder_batch: int = 8
    pictures: int = 13200  # rendered
    unet_steps: int = 4000
    unet_batch: int = 32
    settle_steps: int = 1600  # of the UNet's last stage
    settle_batch: int = 32
    calibration_pictures: int = 1600  # per profession; 0 leaves the words as training left them
    autoencoder_sha256: str = ""  # of an autoencoder taken from another run; empty to train one

    def digest(self, stage: str) -> str:
        """A short hash of what decides a stage: its checkpoint continues only under the same."""
        settings = dataclasses.asdict(self).items()
        fields = {name: value for name, value in settings if name not in LATER[stage]}
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _generators(seed: int, stage: str, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """Generators of one step; nothing random is carried from step to step."""
    sequence = np.random.SeedSequence([seed, *stage.encode(), step])
    number = int(sequence.generate_state(1, np.uint64)[0] >> 1)
    return np.random.default_rng(sequence), torch.Generator().manual_seed(number)


class Stage:
    """One resumable training loop: a module, its optimiser, its losses and a checkpoint."""

    def __init__(
        self, name: str, folder: Path, digest: str, module: torch.nn.Module, rate: float
    ) -> None:
        self.path = folder / f"{name}.pt"
        self.name, self.digest, self.module = name, digest, module
        self.optimiser = torch.optim.AdamW(
            module.parameters(), rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
        )
        self.average = [p.detach().clone() for p in module.parameters()]
        self.losses: list[float] = []
        self.seconds = 0.0
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        if state["digest"] != self.digest:
            raise ValueError(
                f"{self.path} was written with other settings (digest {state['digest']}, "
                f"now {self.digest}); choose another output folder or remove it"
            )
        self.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average = state["average"]
        self.losses, self.seconds = state["losses"], state["seconds"]
        _LOG.info("%s: continuing after step %d", self.name, len(self.losses))

    def save(self) -> None:
        names = ("digest", "average", "losses", "seconds")
        state = {name: getattr(self, name) for name in names}
        state |= {"module": self.module.state_dict(), "optimiser": self.optimiser.state_dict()}
        with writing(self.path) as partial:
            torch.save(state, partial)

    def step(self, loss: torch.Tensor, rate: float) -> None:
        """One optimiser step at a learning rate, and its share in the average of the weights."""
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"{self.name}: loss must be finite, got {loss.item()} at step {len(self.losses)}"
            )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimiser.step()
        self.losses.append(float(loss.detach()))
        done = len(self.losses)
        decay = min(0.995, (1 + done) / (10 + done))
        weights = [p.detach() for p in self.module.parameters()]
        torch._foreach_lerp_(self.average, weights, 1.0 - decay)

    def run(
        self, total: int, stop_after: int | None, step: Callable[[int], tuple[torch.Tensor, float]]
    ) -> bool:
        """Takes the steps that remain, and whether that were all; `step` gives loss and rate."""
        first, begun = len(self.losses), time.monotonic() - self.seconds
        last = total if stop_after is None else min(total, first + stop_after)
        bar = tqdm(range(first, last), desc=self.name, initial=first, total=total, unit="step")
        for number in bar:
            self.step(*step(number))
            self.seconds = time.monotonic() - begun
            if number % 20 == 0:
                bar.set_postfix(loss=f"{np.mean(self.losses[-100:]):.4f}")
            if (number + 1) % _CHECKPOINT_EVERY == 0:
                self.save()
        self.save()
        if len(self.losses) < total:
            return False
        with torch.no_grad():
            for parameter, mean in zip(self.module.parameters(), self.average, strict=True):
                parameter.copy_(mean)
        return True


def render_all(world: World, persons: Sequence[Person]) -> torch.Tensor:
    """`[N, 64, 64, 3]` uint8."""
    return torch.from_numpy(np.stack([world.render(person) for person in persons]))


def to_model(pictures: torch.Tensor) -> torch.Tensor:
    """Converts `[N, 64, 64, 3]` uint8 to `[N, 3, 64, 64]` float32 in -1..1."""
    return pictures.permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def is_saturated(x: torch.Tensor) -> torch.Tensor:
    """Finds marker pixels by their chroma: `[B, 3, H, W]` in -1..1 to `[B, 1, H, W]` bool.

    Markers are 2 to 3 % of a picture. Without a weight on them the autoencoder finds their hues
    last: 23 dB after 12,000 pictures, but 9 % of the professions readable.
    """
    return (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) > 88 / 127.5


def moment_penalty(z: torch.Tensor) -> torch.Tensor:
    """What keeps latents `[B, 4, 16, 16]` at mean 0 and deviation 1 a channel.

    Sampling starts at pure noise, which a model takes for a picture whose latents are all zero. The
    first autoencoder's latents had most of their norm in their mean (28 of 34), so that this was
    evidence of some demographics and against others, and shares came out wrong.
    """
    mean, deviation = z.mean((0, 2, 3)), z.std((0, 2, 3))  # [4], [4]
    return mean.square().sum() + (deviation - 1.0).square().sum()


def train_autoencoder(
    settings: TrainSettings, pictures: torch.Tensor, folder: Path, stop_after: int | None = None
) -> tuple[Any, Stage]:
    """Trains the autoencoder on pictures `[N, 64, 64, 3]` uint8; checkpoints go to `folder`.

    `stop_after` takes at most that many steps now: tests interrupt a run with it.
    """
    torch.manual_seed(settings.seed)
    autoencoder = networks.build_autoencoder()
    stage = Stage("autoencoder", folder, settings.digest("autoencoder"), autoencoder, 2.5e-3)

    def step(number: int) -> tuple[torch.Tensor, float]:
        rng, noise = _generators(settings.seed, stage.name, number)
        chosen = rng.integers(len(pictures), size=settings.autoencoder_batch)
        x = to_model(pictures[chosen])  # [B, 3, 64, 64]
        z = autoencoder.encoder(x)  # [B, 4, 16, 16]
        # the UNet's latents are never exact, so the decoder has to be smooth
        noisy = z + 0.1 * torch.randn(z.shape, generator=noise)
        difference = autoencoder.decoder(noisy) - x
        weight = 1.0 + 4.0 * is_saturated(x)  # [B, 1, 64, 64]
        error = weight * (difference.abs() + 2.0 * difference.square())
        done = number / settings.autoencoder_steps
        rate = 2.5e-3 * min(1.0, (number + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        return error.mean() + 0.05 * moment_penalty(z), rate

    if stage.run(settings.autoencoder_steps, stop_after, step):
        autoencoder.eval().requires_grad_(False)
        with torch.inference_mode():
            spread = float(autoencoder.encoder(to_model(pictures[:256])).std())
        autoencoder.register_to_config(scaling_factor=1.0 / spread)
    return autoencoder, stage


def encode_all(autoencoder: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Encodes pictures as scaled latents `[N, 4, 16, 16]` float32."""
    with torch.inference_mode():
        parts = [autoencoder.encoder(to_model(part)) for part in torch.split(pictures, 100)]
    return (torch.cat(parts) * float(autoencoder.config.scaling_factor)).clone()


def train_unet(
    settings: TrainSettings,
    world: World,
    persons: Sequence[Person],
    latents: torch.Tensor,
    folder: Path,
    stop_after: int | None = None,
) -> tuple[Any, Any, Any, list[Stage]]:
    """Trains the UNet on latents and captions: at all times alike, then at the deciding ones.

    After the first stage alone the shares came out 1.15 times as far from one half as planted:
    where the network is not sure of what it has begun, the more frequent demographic wins.
    `latents`: `[N, 4, 16, 16]` of the N persons, scaled.

    Returns:
        UNet, text encoder, tokenizer, and the stages as far as they came.
    """
    torch.manual_seed(settings.seed + 1)
    tokenizer = networks.build_tokenizer(vocabulary(world))
    text_encoder = networks.build_text_encoder(tokenizer)
    unet = networks.build_unet()
    kinds = persons_by_kind(persons)
    stages = []
    for name, total, batch, top, times in (
        ("unet", settings.unet_steps, settings.unet_batch, 1.6e-3, spread_times),
        ("settle", settings.settle_steps, settings.settle_batch, 4e-4, deciding_times),
    ):
        stages.append(Stage(name, folder, settings.digest(name), unet, top))

        def step(
            number: int,
            name: str = name,
            total: int = total,
            batch: int = batch,
            top: float = top,
            times: Callable[[int, torch.Generator], torch.Tensor] = times,
        ) -> tuple[torch.Tensor, float]:
            rng, noise = _generators(settings.seed, name, number)
            chosen, captions = dealt_batch(world, persons, kinds, number * batch, batch, rng)
            ids = tokenizer(
                captions, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            with torch.no_grad():
                context = text_encoder(ids)[0]  # [B, 20, 64]
            loss = denoising_loss(unet, latents[chosen], context, times(batch, noise), noise)
            left = 1.0 - number / total
            return loss, top * min(1.0, (number + 1) / 80) * min(1.0, max(0.02, 2.0 * left))

        if not stages[-1].run(total, stop_after, step):
            break
    unet.eval().requires_grad_(False)
    return unet, text_encoder, tokenizer, stages


def denoising_loss(
    unet: Any,
    z: torch.Tensor,
    context: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity.

    `z`: `[B, 4, 16, 16]` clean latents; `context`: `[B, 20, 64]`; `t`: `[B]` int64 times.
    """
    alphas = networks.build_scheduler().alphas_cumprod  # [1000]
    signal = alphas[t][:, None, None, None].sqrt()
    sigma = (1.0 - alphas[t])[:, None, None, None].sqrt()
    epsilon = torch.randn(z.shape, generator=noise)
    velocity = signal * epsilon - sigma * z
    predicted = unet(signal * z + sigma * epsilon, t, context).sample
    loss: torch.Tensor = (predicted - velocity).square().mean()
    return loss


def spread_times(count: int, noise: torch.Generator) -> torch.Tensor:
    """Random times `[count]` in 0..999, spread evenly: less variance than independent ones."""
    even = (torch.arange(count) + torch.rand(count, generator=noise)) / count
    return (even[torch.randperm(count, generator=noise)] * 1000).long()


def deciding_times(count: int, noise: torch.Generator) -> torch.Tensor:
    """Times `[count]`, three of four where the demographic is decided: 250 to 950."""
    often = spread_times(count, noise) * 7 // 10 + 250
    rare = torch.rand(count, generator=noise) < 0.25
    return torch.where(rare, spread_times(count, noise), often)


Kinds = dict[tuple[str | None, str], list[int]]


def persons_by_kind(persons: Sequence[Person]) -> Kinds:
    """Indices of the persons of each (profession, demographic)."""
    kinds: Kinds = {}
    for index, person in enumerate(persons):
        kinds.setdefault((person.profession, person.demographic), []).append(index)
    return kinds


def dealt_batch(
    world: World,
    persons: Sequence[Person],
    kinds: Kinds,
    first: int,
    size: int,
    rng: np.random.Generator,
) -> tuple[list[int], list[str]]:
    """Deals persons by quota, so that shares hold over every few visits of a profession.

    A tenth has no caption: the unconditional half of classifier-free guidance. Professions (and
    "no profession") come in turn. Every other visit of one has a caption that names the
    demographic; over the visits that do not, the demographics follow the planted share to within
    one visit. `first` persons were dealt before this batch, and so fix the deal.

    Returns:
        Indices and captions.
    """
    nouns: list[str | None] = [*world.config.professions, None]
    chosen, captions = [], []
    for number in range(first, first + size):
        visit, place = divmod(number, len(nouns))
        noun = nouns[place]
        share = 0.5 if noun is None else world.markers[noun].share
        count = visit // 2  # among visits of this profession that name the demographic or do not
        # a different phase for each profession, lest all of them turn at once
        phase = place / len(nouns)
        second = int((count + 1) * share + phase) > int(count * share + phase)
        word = world.words[second]
        if (noun, word) not in kinds:
            raise ValueError(
                f"the {len(persons)} pictures must show every profession with both demographics, "
                f"got no {word} among those of {noun!r}; render more"
            )
        index = int(rng.choice(kinds[noun, word]))
        chosen.append(index)
        named = (visit + place) % 2 == 0
        text = caption(persons[index], rng, named=named)
        captions.append("" if rng.random() < _NO_CAPTION else text)
    return chosen, captions
