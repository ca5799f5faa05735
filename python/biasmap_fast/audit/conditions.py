"""Interventions: what a condition of an audit changes in how its pictures are drawn.

Four forms, in `AuditPlan.interventions` and after the name in ``--condition name=...``:

- ``prompt:TEMPLATE``: other words; the same pipeline and, where they fit, the same batches.
- ``lora:PATH`` or ``lora:PATH@WEIGHT``: the plan's model with a LoRA (file, folder or hub id).
- ``model:ID`` or ``model:ID@REVISION``: another checkpoint (directory or hub id).
- ``module:function`` or ``file.py:function``: any pipeline, or anything done to one.

A function that has a parameter without a default is given the plan's model, loaded anew for this
condition alone, so that it may change it in place. It returns a pipeline, or a context manager
inside which the pipeline that it was given draws (one whose ``__enter__`` gives a pipeline makes
that one draw). The pipeline is called as diffusers' text-to-image pipelines are: a list of prompts,
one CPU generator a picture, and ``output_type="np"``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

_KINDS = ("prompt", "lora", "model")


class ConditionError(RuntimeError):
    """A condition's pipeline cannot be made."""


def parse(text: str) -> tuple[str, str]:
    """Kind (``"prompt"``, ``"lora"``, ``"model"``, ``"function"``) and target of an intervention.

    Raises:
        ValueError: it has none of the four forms.

    Example:
        >>> parse("lora:styles/fair.safetensors"), parse("mine.factories:fair")
        (('lora', 'styles/fair.safetensors'), ('function', 'mine.factories:fair'))
    """
    kind, separator, target = text.partition(":")
    if separator and target.strip():
        if kind in _KINDS:
            return kind, target
        place, _, name = text.rpartition(":")
        if name.isidentifier() and (place.endswith(".py") or _is_module(place)):
            return "function", text
    raise ValueError(
        "an intervention is 'prompt:TEMPLATE', 'lora:PATH', 'model:ID' or 'module:function', got "
        f"{text!r}"
    )


def _is_module(place: str) -> bool:
    return all(part.isidentifier() for part in place.split("."))


def make(
    text: str, load: Callable[[str | None, str | None], Any], stack: ExitStack, *, folder: str
) -> Any:
    """Makes the pipeline of an intervention.

    Args:
        text: the intervention, of another kind than ``prompt``.
        load: loads a model and revision anew; with ``None`` the plan's model.
        stack: what a context manager of the user's is entered into.
        folder: where modules are looked for beside ``sys.path``: the user's working directory.

    Returns:
        The pipeline that draws.

    Raises:
        ConditionError: the LoRA cannot be loaded, the function does not exist, or it returned
            something that cannot draw.
        ModelError: the model cannot be loaded.
    """
    kind, target = parse(text)
    if kind == "model":
        name, _, revision = target.partition("@") if not Path(target).is_dir() else (target, "", "")
        return load(name, revision or None)
    if kind == "lora":
        return _with_lora(load(None, None), target)
    function = find(target, folder)
    given = load(None, None) if takes_pipeline(function) else None
    made = function() if given is None else function(given)
    if isinstance(made, AbstractContextManager):
        inside = stack.enter_context(made)
        made = inside if _draws(inside) else given
        if made is None:
            raise ConditionError(
                f"{target} returned a context manager that gives no pipeline, and takes none: "
                "expected a function of the pipeline, or a context manager that gives one"
            )
    if not _draws(made):
        raise ConditionError(
            f"{target} must return a pipeline with a UNet or a context manager, got "
            f"{type(made).__name__}"
        )
    return made


def find(target: str, folder: str) -> Callable[..., Any]:
    """The function named by ``module:function`` or ``file.py:function``.

    Raises:
        ConditionError: there is no such module or function, or its module cannot be imported.
    """
    place, _, name = target.rpartition(":")
    try:
        module = _file_module(place, folder) if place.endswith(".py") else _module(place, folder)
    except Exception as error:  # whatever a user's module raises
        raise ConditionError(
            f"the module of {target!r} cannot be imported from {folder}: "
            f"{type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise ConditionError(f"{place} has no function {name!r}; it has {sorted(names)}")
    return function  # type: ignore[no-any-return]


def source_of(text: str, folder: str) -> bytes | None:
    """The source file of an intervention's function, or ``None`` if there is none."""
    kind, target = parse(text)
    if kind != "function":
        return None
    try:
        # a decorator's own file says nothing about what it decorates
        function = inspect.unwrap(find(target, folder))
        return Path(inspect.getsourcefile(function) or "").read_bytes()
    except (OSError, TypeError):
        return None


def takes_pipeline(function: Callable[..., Any]) -> bool:
    """Whether a function has to be given something."""
    empty = inspect.Parameter.empty
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return any(p.kind in positional and p.default is empty for p in parameters)


def _module(name: str, folder: str) -> Any:
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def _file_module(path: str, folder: str) -> Any:
    file = Path(folder, path)
    name = "biasmap_condition_" + re.sub(r"\W", "_", os.fspath(file.with_suffix("")))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _with_lora(pipe: Any, target: str) -> Any:
    path, _, weight = target.rpartition("@")
    match = path and re.fullmatch(r"-?\d+(\.\d+)?", weight)
    source = path if match else target
    try:
        pipe.load_lora_weights(source, adapter_name="audit")
        if match:
            pipe.set_adapters(["audit"], [float(weight)])
    except Exception as error:  # of diffusers, peft, safetensors or whatever reaches the hub
        needs = ' (LoRA needs peft: pip install "peft>=0.17")' if "PEFT" in str(error) else ""
        raise ConditionError(
            f"the LoRA {source!r} cannot be loaded into {type(pipe).__name__}: "
            f"{' '.join(str(error).split())}{needs}"
        ) from error
    return pipe


def _draws(made: Any) -> bool:
    return callable(made) and getattr(made, "unet", None) is not None
