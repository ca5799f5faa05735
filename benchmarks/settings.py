"""What a run of the benchmarks was asked for, and the peers that the user gave."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Peer:
    """Somebody else's tool, unmodified; ``load`` None where it cannot be had, and ``reason``."""

    name: str
    version: str = ""
    reason: str = ""
    load: Any = None

    @property
    def status(self) -> str:
        return "ok" if self.load is not None else self.reason


@dataclass
class Settings:
    device: torch.device
    scratch: Path  # for engines and runs
    quick: bool = False
    ovam: Peer = field(default_factory=lambda: Peer("OVAM", reason="skipped: no --ovam DIR"))
    daam: Peer = field(default_factory=lambda: Peer("DAAM", reason="skipped: no --daam DIR"))

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """As people run it: float16 on a GPU."""
        return torch.float16 if self.gpu else torch.float32

    def rounds(self, wanted: int) -> int:
        return min(2, wanted) if self.quick else wanted


def _commit(folder: Path) -> str:
    """The commit of a checkout, or nothing of a folder that is none."""
    command = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
    inside = (folder / ".git").exists()
    done = subprocess.run(command, capture_output=True, text=True) if inside else None
    return f" ({done.stdout.strip()})" if done and done.returncode == 0 else ""


def find_ovam(folder: Path | None) -> Peer:
    """The hooker of a checkout of github.com/vpulab/ovam."""
    peer = Peer("OVAM", reason="skipped: no --ovam DIR")
    if folder is None:
        return peer
    if not (folder / "ovam/stable_diffusion").is_dir():
        raise SystemExit(f"--ovam must be a checkout with ovam/stable_diffusion, got {folder}")
    sys.path.append(str(folder))
    try:
        peer.load = importlib.import_module("ovam.stable_diffusion").StableDiffusionHooker
        peer.version = f"{importlib.import_module('ovam').__version__}{_commit(folder)}"
    except Exception as error:  # it is not ours to mend
        peer.load, peer.reason = None, f"cannot: import fails, {type(error).__name__}: {error}"
    return peer


def find_daam(folder: Path | None) -> Peer:
    """DAAM, installed or in a folder of ``pip install --no-deps --target``.

    It pins diffusers 0.21.2 and transformers 4.30.2; here it has to run beside those of today, so
    the folder comes last on the path.
    """
    peer = Peer("DAAM")
    if folder is not None:
        sys.path.append(str(folder))
    try:
        module = importlib.import_module("daam")
        peer.load, peer.version = module.trace, module.__version__
    except Exception as error:  # it is not ours to mend
        absent = isinstance(error, ModuleNotFoundError) and error.name == "daam"
        said = f"cannot: import fails, {type(error).__name__}: {error}"
        peer.reason = "skipped: no --daam DIR" if absent and folder is None else said
    return peer
