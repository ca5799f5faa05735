"""The audit: plan, run folder, statistics, report. Needs the extra ``audit``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classifiers import Reading
    from .conditions import ConditionError
    from .folder import AuditError
    from .plan import AuditPlan
    from .records import RecordError
    from .run import AuditResult, load_audit, render, run_audit, validate

_EXTRA = ("filelock", "jinja2", "matplotlib", "pandas", "pyarrow", "scipy", "yaml")
_EXPORTS = {
    "AuditError": "folder",
    "AuditPlan": "plan",
    "AuditResult": "run",
    "ConditionError": "conditions",
    "Reading": "classifiers",
    "RecordError": "records",
    "load_audit": "run",
    "render": "run",
    "run_audit": "run",
    "validate": "run",
}

__all__ = [
    "AuditError",
    "AuditPlan",
    "AuditResult",
    "ConditionError",
    "Reading",
    "RecordError",
    "load_audit",
    "render",
    "run_audit",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        raise ImportError(
            f'an audit needs {error.name}: pip install "biasmap-fast[audit]"', name=error.name
        ) from error
    # `validate` is a submodule too, which its import would put under this name
    globals()[name] = value
    return value
