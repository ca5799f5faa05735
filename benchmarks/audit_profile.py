"""What of an audit's time the networks take, what the maps, and what the audit's own loop.

    python -m benchmarks.audit_profile [--part testbed|sd15]

``testbed`` audits the embedded model, ``sd15`` one picture of two steps at the shapes of SD 1.5
with random weights (9 GiB of memory, minutes; its text encoder and decoder are small ones, and the
picture is not decoded, so that nothing makes the network's share look larger than it is). Every
part has the processor time of the drawing thread, exclusive of what it calls: on a busy machine
that is what it cost, without the time it waited for a core. One thread. Files are written in
another thread, whose processor time stands apart.

- network: forward passes of UNet, text encoders and decoder, without what hooks add to them
- maps: attention of the attribution prompts, in hooks of the UNet
- sampler: the rest of diffusers' pipeline call (scheduler, noise, guidance, checks)
- classifier: reads profession and demographic in the pictures (testbed)
- overlaps: masks, IoU, SoftIoU, by block
- records: the rest of measuring a chunk: rows, tables, pictures to bytes
- start: once a run: versions, and SHA-256 of the weights
- loop: the rest of the run: handing over, waiting for the disk
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import biasmap_fast as bm
from biasmap_fast import attribution
from biasmap_fast.audit import chunk, folder, report, run, worker

from .guidance import build
from .harness import save


class Clock:
    """Exclusive processor time by name: what is timed inside counts there alone."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self._inside: list[float] = []
        self._thread = threading.get_ident()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            nested = threading.get_ident() == self._thread  # in the writer's nothing is
            begun = time.thread_time()
            self._inside += [0.0] * nested
            try:
                return function(*args, **kwargs)
            finally:
                took = time.thread_time() - begun
                inner = self._inside.pop() if nested else 0.0
                self.cpu[name] = self.cpu.get(name, 0.0) + took - inner
                if nested and self._inside:
                    self._inside[-1] += took

        return run


@contextmanager
def watched(clock: Clock, pipe: Any) -> Iterator[None]:
    """Times the parts of an audit of ``pipe`` inside the block."""
    networks = [(pipe.unet, "forward"), (pipe.text_encoder, "forward"), (pipe.vae, "decode")]
    places: list[tuple[Any, str, str]] = [(each, name, "network") for each, name in networks]
    places += [
        (attribution.Recorder, "_receive", "maps"),
        (chunk, "measured", "overlaps"),
        (chunk, "_readings", "classifier"),
        (chunk, "draw", "sampler"),
        (worker, "measure_chunk", "records"),
        (folder, "store", "writing, in the background"),
        (worker.Worker, "describe", "start"),
        (run, "_measure", "loop"),
    ]
    with mock.patch.object(report, "write_report", return_value=None):
        patches = [
            mock.patch.object(place, name, clock.timed(what, getattr(place, name)))
            for place, name, what in places
        ]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def profile(pipe: Any, plan: bm.AuditPlan) -> dict[str, Any]:
    clock = Clock()
    with tempfile.TemporaryDirectory() as out, watched(clock, pipe):
        result = bm.run_audit(plan, Path(out) / "run", pipe=pipe, progress=False)
    status = result.summary.run["status"]
    background = clock.cpu.pop("writing, in the background")
    total = sum(clock.cpu.values())
    shares = {name: seconds / total for name, seconds in sorted(clock.cpu.items())}
    own = sum(shares.get(name, 0.0) for name in ("overlaps", "records", "loop"))
    return {
        "pictures": len(list(plan.pictures())),
        "status": status,
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "guidance_scale": plan.guidance_scale,
        "cpu_seconds": {name: round(each, 3) for name, each in sorted(clock.cpu.items())},
        "background_cpu_seconds": round(background, 3),
        "share": {name: round(each, 5) for name, each in shares.items()},
        "share_of_all_but_the_networks": round(1 - shares["network"], 5),
        # of what grows with the pictures
        "share_without_the_start": round(1 - shares["network"] / (1 - shares["start"]), 5),
        "share_of_the_audits_own_code": round(own / (1 - shares["start"]), 5),
    }


def testbed(options: argparse.Namespace) -> dict[str, Any]:
    settings: dict[str, Any] = {"seeds": range(options.seeds), "steps": options.steps or 25}
    warm: dict[str, Any] = {"professions": ["doctor"], "seeds": [0], "steps": 2}
    pipe = bm.testbed.pipeline()
    with tempfile.TemporaryDirectory() as out:  # what is imported and set up once
        bm.run_audit(bm.AuditPlan(**warm), Path(out) / "run", pipe=pipe, progress=False)
    return profile(pipe, bm.AuditPlan(**settings))


def sd15(options: argparse.Namespace) -> dict[str, Any]:
    pipe = build(320)
    pipe.unet.requires_grad_(False)
    settings: dict[str, Any] = {
        "model": "random weights, SD 1.5's shapes",
        "professions": ["doctor"],
        "seeds": [0],
        "steps": options.steps or 2,
        "batch_size": 1,
        "save_pictures": "none",
        "save_maps": "none",
        "device": "cpu",
    }
    plan = bm.AuditPlan(**settings)
    return profile(pipe, plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=("testbed", "sd15"), default="testbed")
    parser.add_argument("--seeds", type=int, default=20, help="of the testbed's 20 professions")
    parser.add_argument("--steps", type=int, help="default 25, and 2 at SD 1.5's shapes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = testbed(options) if options.part == "testbed" else sd15(options)
    save(f"audit-profile-{options.part}", table)
    sys.exit(set(table["status"]) != {"ok"})


if __name__ == "__main__":
    main()
