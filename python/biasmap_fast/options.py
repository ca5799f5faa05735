"""Command-line options made from the settings' own definitions, and what their texts mean."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, get_origin

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel

Options = Mapping[str, tuple[Any, str]]
"""Setting -> type of its option on the command line, and the option's name."""


def from_settings(
    *groups: tuple[type[BaseModel], Options],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command one option per setting, in place of its ``**settings``.

    The settings' descriptions and defaults are the help texts. An option that is not given is not
    handed over, so that the default stays in one place.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        first = len([p for p in parameters if p.default is p.empty])
        names = [name for _, options in groups for name in options]
        parameters[first:first] = [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=None,
                annotation=Annotated[
                    kind | None, typer.Option(flag, help=_help(model, name, kind))
                ],
            )
            for model, options in groups
            for name, (kind, flag) in options.items()
        ]

        def run(**values: Any) -> None:
            settings = {name: values.pop(name) for name in names}
            given = {name: value for name, value in settings.items() if value is not None}
            command(**values, **given)

        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _help(model: type[BaseModel], name: str, kind: Any) -> str:
    field = model.model_fields[name]
    text = " ".join((field.description or "").split())
    if get_origin(kind) is list:
        text = f"Repeatable. {text}"
    if "[default:" in text or field.default is None or field.default_factory or kind is bool:
        return text
    default = field.default
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} [default: {shown}]"


def seeds(text: str) -> list[int]:
    """Returns the seeds of a count, a range or a list.

    Example:
        >>> seeds("3"), seeds("5-7"), seeds("1,9")
        ([0, 1, 2], [5, 6, 7], [1, 9])
    """
    text = text.replace(" ", "")
    if re.fullmatch(r"\d+", text) and int(text) > 0:
        return list(range(int(text)))
    if match := re.fullmatch(r"(\d+)-(\d+)", text):
        first, last = int(match[1]), int(match[2])
        if first <= last:
            return list(range(first, last + 1))
    elif re.fullmatch(r"\d+(,\d+)+,?|\d+,", text):
        return [int(part) for part in text.split(",") if part]
    raise typer.BadParameter(
        f"expected a count ('20'), a range ('5-24') or a list ('1,7,9'), got {text!r}",
        param_hint="--seeds",
    )


def fractions(text: str) -> tuple[float, ...]:
    """Returns the fractions in a text with commas; that they are two, the plan checks.

    Example:
        >>> fractions("0.05, 0.1")
        (0.05, 0.1)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"expected two fractions ('0.05,0.1'), got {text!r}", param_hint="--containment"
        ) from None


def pair(text: str) -> tuple[str, str]:
    """Returns the two concepts of ``"doctor,woman"``."""
    words = [word.strip() for word in text.split(",")]
    if len(words) != 2 or not all(words):
        raise ValueError(f"--pair must be two concepts, 'doctor,woman', got {text!r}")
    return words[0], words[1]
