"""The ledger of guidance: what was done to every image in every UNet call, and why not."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .files import writing

NO_SCALE = "scale is 0"
NO_SIGNAL = "no signal left at this timestep (alpha_bar is 0)"
NOT_FINITE = "gradient is not finite"
PUBLISHED_RULE = "gradient norm >= 1 (clip='skip')"


@dataclass(frozen=True)
class LedgerRow:
    """What guidance did to one image in one UNet call.

    Attributes:
        call: UNet call of the run, from 0.
        timestep: Timestep of the call.
        image: Index in the batch.
        energy: Weighted mean of the pairs' SoftIoU; NaN if it was not computed.
        pairs: The image's concept pairs.
        soft_iou: SoftIoU of each pair.
        iou: Hard IoU of each pair, of masks that keep the same fraction of the pixels.
        gradient_norm: L2 norm of dE/dz_t before clipping, the largest of the inner steps; NaN if no
            gradient was taken.
        clip_factor: Factor of the gradient, 1 if it was not clipped; the smallest of the inner
            steps.
        applied: Whether the prediction was changed.
        reason: Why it was not; empty if it was.
    """

    call: int
    timestep: float
    image: int
    energy: float
    pairs: tuple[tuple[str, str], ...]
    soft_iou: tuple[float, ...]
    iou: tuple[float, ...]
    gradient_norm: float
    clip_factor: float
    applied: bool
    reason: str


@dataclass(frozen=True)
class Entry:
    """One guided call, still on the device: reading it earlier would stall the GPU."""

    call: int
    timestep: float
    alpha_bar: float
    pairs: tuple[tuple[tuple[str, str], ...], ...]  # an entry an image
    soft_iou: torch.Tensor  # [B, P]; NaN beyond an image's own pairs
    iou: torch.Tensor  # [B, P]
    energy: torch.Tensor  # [B]
    norm: torch.Tensor  # [B]; NaN where no gradient was taken
    factor: torch.Tensor  # [B]; 0 where the gradient is not applied

    def rows(self, *, scaled: bool) -> list[LedgerRow]:
        """One row per image; ``scaled`` says whether the energy's scale is other than 0."""
        columns = zip(
            self.pairs,
            self.soft_iou.tolist(),
            self.iou.tolist(),
            self.energy.tolist(),
            self.norm.tolist(),
            self.factor.tolist(),
            strict=True,
        )
        rows = []
        for image, (pairs, soft, hard, energy, norm, factor) in enumerate(columns):
            reason = self._reason(norm, factor) if scaled else NO_SCALE
            rows.append(
                LedgerRow(
                    call=self.call,
                    timestep=self.timestep,
                    image=image,
                    energy=energy,
                    pairs=pairs,
                    soft_iou=tuple(soft[: len(pairs)]),
                    iou=tuple(hard[: len(pairs)]),
                    gradient_norm=norm,
                    clip_factor=factor,
                    applied=not reason,
                    reason=reason,
                )
            )
        return rows

    def _reason(self, norm: float, factor: float) -> str:
        if self.alpha_bar <= 0.0:
            return NO_SIGNAL
        if not math.isfinite(norm):
            return NOT_FINITE
        return PUBLISHED_RULE if factor == 0.0 else ""


def check_skipped(rows: Sequence[LedgerRow]) -> None:
    """Refuses a run in which more than half of an image's guided calls were skipped."""
    rows = [row for row in rows if row.reason != NO_SCALE]
    for image in sorted({row.image for row in rows}):
        of_image = [row for row in rows if row.image == image]
        skipped = [row.reason for row in of_image if not row.applied]
        if 2 * len(skipped) > len(of_image):
            raise RuntimeError(
                f"guidance of image {image} was skipped in {len(skipped)} of {len(of_image)} calls "
                f"({skipped[0]}): the picture is hardly a guided one. See `ledger`, or pass "
                "strict=False"
            )


def write_csv(rows: Sequence[LedgerRow], path: str | Path) -> None:
    """Writes rows as CSV, complete or not at all; ";" stands between an image's pairs."""
    names = [field.name for field in fields(LedgerRow)]
    with writing(Path(path)) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([_cell(getattr(row, name)) for name in names] for row in rows)


def _cell(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    return ";".join("+".join(one) if isinstance(one, tuple) else repr(one) for one in value)
