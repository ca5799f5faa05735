"""What the commands share: settings checked, pipelines loaded, errors in one line."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

logger = logging.getLogger(__name__)


def show(values: dict[str, Any], as_json: bool) -> None:
    """Prints values, and mappings among them, as lines or as JSON."""
    if as_json:
        typer.echo(json.dumps(values, indent=1))
        return
    for name, value in values.items():
        if not isinstance(value, dict):
            shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            typer.echo(f"{name}: {shown}")
            continue
        typer.echo(f"{name}:")
        for key, entry in value.items():
            typer.echo(f"  {key}: {'not installed' if entry is None else entry}")


def plan(settings: dict[str, Any], config: Path | None) -> Any:
    """Returns the plan of a file's settings and of those of the command, which come first."""
    from .audit.plan import AuditPlan, read_settings

    stored = {} if config is None else read_settings(config)
    if "energy" in settings:  # --scale alone leaves the file's other settings of it as they are
        settings["energy"] = {**(stored.get("energy") or {}), **settings["energy"]}
    return checked(AuditPlan, {**stored, **settings})


def checked(model: Any, settings: dict[str, Any]) -> Any:
    """Returns the settings as a model; what is wrong with them in one line."""
    from pydantic import ValidationError

    from .audit.plan import explain

    try:
        return model(**settings)
    except ValidationError as error:
        raise ValueError(explain(error)) from error


def pipeline(settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the pipeline that settings name, and its arguments and those of attribution."""
    from .audit.plan import AuditPlan
    from .pipelines import load_pipeline

    plan = checked(AuditPlan, settings)
    pipe = load_pipeline(plan.model, revision=plan.revision, dtype=plan.dtype, device=plan.device)
    return pipe, {
        "branch": plan.branch,
        "num_inference_steps": plan.steps,
        "guidance_scale": plan.guidance_scale,
    }


@contextmanager
def clear_errors(
    verbose: bool, interrupted: str = "the same command goes on where it stopped"
) -> Iterator[None]:
    """Errors that a user can mend become one line on stderr and exit status 1."""
    # What libraries have to say is theirs, short of a warning: an export's would be 500 lines.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="biasmap: %(message)s")
    logging.getLogger("biasmap_fast").setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"biasmap: interrupted; {interrupted}", err=True)
        raise typer.Exit(130) from None
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not type(error).__module__.startswith(
            "biasmap_fast"
        ):
            raise
        logger.debug("traceback", exc_info=True)
        typer.echo(f"biasmap: error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None
