"""The audit: plan, run folder, statistics, report. Needs the extra ``audit``."""

from __future__ import annotations

_EXTRA = ("filelock", "jinja2", "matplotlib", "pandas", "pyarrow", "pydantic", "scipy", "yaml")

try:
    from .classifiers import Reading
    from .conditions import ConditionError
    from .folder import AuditError
    from .plan import AuditPlan
    from .records import RecordError
    from .run import AuditResult, load_audit, render, run_audit, validate
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in _EXTRA:
        raise
    raise ImportError(
        f'an audit needs {error.name}: pip install "biasmap-fast[audit]"', name=error.name
    ) from error

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
