"""biasmap_fast: attribution maps of concepts in text-to-image models, and their overlap.

The method is BiasMap (arXiv 2509.13496, KDD 2026). ``import biasmap_fast as bm`` needs torch only;
everything else is imported where it is used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops, presets, reference, testbed
    from .attribution import Recorder, attribute
    from .audit import AuditPlan, AuditResult, load_audit, run_audit
    from .concepts import AttributionPrompt
    from .energy import Energy
    from .engines import export_unet, load_engine
    from .guidance import Guidance, guide
    from .ledger import LedgerRow
    from .maps import AttributionMaps
    from .overlap import (
        block_iou,
        chance_iou,
        containment,
        corrected,
        iou,
        pairwise_iou,
        soft_containment,
        soft_iou,
        soft_topk,
    )
    from .probes import Probes, Swap, probe
    from .regions import EffectMaps, EffectOverlap, effect_overlap, otsu
    from .shares import Share, share

    __version__: str

# public name -> module that defines it; a name that is a module maps to itself
_EXPORTS = {
    "AttributionMaps": "maps",
    "AttributionPrompt": "concepts",
    "AuditPlan": "audit",
    "AuditResult": "audit",
    "EffectMaps": "regions",
    "EffectOverlap": "regions",
    "Energy": "energy",
    "Guidance": "guidance",
    "LedgerRow": "ledger",
    "Probes": "probes",
    "Recorder": "attribution",
    "Share": "shares",
    "Swap": "probes",
    "attribute": "attribution",
    "block_iou": "overlap",
    "chance_iou": "overlap",
    "containment": "overlap",
    "corrected": "overlap",
    "effect_overlap": "regions",
    "export_unet": "engines",
    "guide": "guidance",
    "iou": "overlap",
    "load_audit": "audit",
    "load_engine": "engines",
    "ops": "ops",
    "otsu": "regions",
    "pairwise_iou": "overlap",
    "presets": "presets",
    "probe": "probes",
    "reference": "reference",
    "run_audit": "audit",
    "share": "shares",
    "soft_containment": "overlap",
    "soft_iou": "overlap",
    "soft_topk": "overlap",
    "testbed": "testbed",
}

__all__ = [
    "AttributionMaps",
    "AttributionPrompt",
    "AuditPlan",
    "AuditResult",
    "EffectMaps",
    "EffectOverlap",
    "Energy",
    "Guidance",
    "LedgerRow",
    "Probes",
    "Recorder",
    "Share",
    "Swap",
    "__version__",
    "attribute",
    "block_iou",
    "chance_iou",
    "containment",
    "corrected",
    "effect_overlap",
    "export_unet",
    "guide",
    "iou",
    "load_audit",
    "load_engine",
    "ops",
    "otsu",
    "pairwise_iou",
    "presets",
    "probe",
    "reference",
    "run_audit",
    "share",
    "soft_containment",
    "soft_iou",
    "soft_topk",
    "testbed",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("biasmap-fast")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_EXPORTS[name]}", __name__)
    value = module if _EXPORTS[name] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
