"""What the texts of a plan mean: conditions, templates, professions and axes.

A condition other than "plain" and "guided" is an intervention, one of

- ``prompt:TEMPLATE``: other words, drawn by the same pipeline and, where they fit, in the same
  batches;
- ``lora:PATH`` or ``lora:PATH@WEIGHT``: the plan's model with a LoRA (file, folder or hub id);
- ``model:ID`` or ``model:ID@REVISION``: another checkpoint (directory or hub id);
- ``module:function`` or ``file.py:function``: any pipeline, or any change of one.

A function that has a parameter without a default receives the plan's model, loaded anew for this
condition alone, so that it may change it in place. It returns a pipeline, or a context manager
inside which the pipeline that it received draws (or the pipeline that ``__enter__`` gives). The
pipeline is called like diffusers' text-to-image pipelines: a list of prompts, one CPU generator
per picture, and ``output_type="np"``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import string
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from .. import presets

_KINDS = ("prompt", "lora", "model")


class ConditionError(RuntimeError):
    """A condition's pipeline cannot be made."""


def parse(text: str) -> tuple[str, str]:
    """Splits an intervention into its kind and its target.

    Returns:
        ``"prompt"``, ``"lora"``, ``"model"`` or ``"function"``, and what follows.

    Example:
        >>> parse("lora:styles/fair.safetensors"), parse("mine.factories:fair")
        (('lora', 'styles/fair.safetensors'), ('function', 'mine.factories:fair'))
    """
    kind, separator, target = text.partition(":")
    if separator and target.strip():
        if kind in _KINDS:
            return kind, target
        module, _, name = text.rpartition(":")
        is_module = all(part.isidentifier() for part in module.split("."))
        if name.isidentifier() and (module.endswith(".py") or is_module):
            return "function", text
    raise ValueError(
        "an intervention is 'prompt:TEMPLATE', 'lora:PATH', 'model:ID' or 'module:function', got "
        f"{text!r}"
    )


def make(
    text: str, load: Callable[[str | None, str | None], Any], stack: ExitStack, *, folder: str
) -> Any:
    """Makes the pipeline of an intervention.

    Args:
        text: The intervention, of another kind than ``prompt``.
        load: Loads a model and revision anew; with ``None`` the plan's model.
        stack: Holds a user's context manager open.
        folder: Where modules are looked for beside ``sys.path``: the user's working directory.
    """
    kind, target = parse(text)
    if kind == "model":
        name, _, revision = target.partition("@") if not Path(target).is_dir() else (target, "", "")
        return load(name, revision or None)
    if kind == "lora":
        return _with_lora(load(None, None), target)
    function = find(target, folder)
    given = load(None, None) if _takes_pipeline(function) else None
    try:
        made = function() if given is None else function(given)
        if isinstance(made, AbstractContextManager):
            inside = stack.enter_context(made)
            made = inside if _draws(inside) else given
            if made is None:
                raise ConditionError(
                    f"{target} returned a context manager that gives no pipeline, and takes none: "
                    "expected a function of the pipeline, or a context manager that gives one"
                )
    except ConditionError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise ConditionError(
            f"{target} raised {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if not _draws(made):
        raise ConditionError(
            f"{target} must return a pipeline with a UNet or a context manager, got "
            f"{type(made).__name__}"
        )
    return made


def find(target: str, folder: str) -> Callable[..., Any]:
    """Returns the function that ``module:function`` or ``file.py:function`` names."""
    path, _, name = target.rpartition(":")
    try:
        module = _file_module(path, folder) if path.endswith(".py") else _module(path, folder)
    except Exception as error:  # whatever a user's module raises
        raise ConditionError(
            f"the module of {target!r} cannot be imported from {folder}: "
            f"{type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise ConditionError(f"{path} has no function {name!r}; it has {sorted(names)}")
    return function  # type: ignore[no-any-return]


def source_of(text: str, folder: str) -> bytes | None:
    """Returns the source file of an intervention's function, or ``None`` if there is none."""
    kind, target = parse(text)
    if kind != "function":
        return None
    try:
        # a decorator's file says nothing about the function that it decorates
        function = inspect.unwrap(find(target, folder))
        return Path(inspect.getsourcefile(function) or "").read_bytes()
    except (OSError, TypeError):
        return None


def _takes_pipeline(function: Callable[..., Any]) -> bool:
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


# --- words and templates of a plan -----------------------------------------------------------


def professions_of(given: Any, *, testbed: bool) -> Any:
    """Professions as a plan keeps them, from a list's name, words with commas, or nothing."""
    if given is None or given == () or given == "testbed":
        if testbed:
            from .. import testbed as bed

            return tuple(row.profession for row in bed.truth())
        given = "biasmap"
    if not isinstance(given, str):
        return given
    if given in presets.PROFESSIONS:
        return tuple(presets.PROFESSIONS[given])
    words = tuple(word.strip() for word in given.split(",") if word.strip())
    if "," in given or not words:
        return words
    raise ValueError(
        f"professions: expected a list of words or one of the lists {sorted(presets.PROFESSIONS)}, "
        f"got {given!r}; write {given + ','!r} for that one profession"
    )


def axes_of(given: Any) -> Any:
    """Axis -> words, from the name of an axis, ``"name=word,word"``, or a list of them."""
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, (list, tuple)):
        return given
    axes: dict[str, tuple[str, ...]] = {}
    for entry in given:
        name, explicit, words = str(entry).partition("=")
        if name in axes:
            raise ValueError(f"axes: expected each axis once, got {name!r} more than once")
        if explicit and name.strip():
            axes[name] = tuple(word.strip() for word in words.split(",") if word.strip())
        elif name in presets.AXES:
            axes[name] = tuple(presets.AXES[name].words)
        else:
            raise ValueError(
                f"axes: expected one of {sorted(presets.AXES)} or 'name=word,word', got {entry!r}"
            )
    return axes


def split_conditions(
    given: Any, interventions: dict[str, str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names of conditions, and the interventions with those that stood after ``name=``."""
    names, interventions = [], dict(interventions)
    for entry in (given,) if isinstance(given, str) else given:
        name, explicit, text = str(entry).partition("=")
        names.append(name)
        if explicit and interventions.setdefault(name, text) != text:
            raise ValueError(
                f"conditions: {name!r} is given twice, {interventions[name]!r} and {text!r}"
            )
    return tuple(names), interventions


def default_controls(template: Any, professions: Any, *, testbed: bool) -> dict[str, Any]:
    """The default controls, without words that the attribution prompt has anyway."""
    texts = " ".join([template] if isinstance(template, str) else map(str, template))
    present = re.findall(r"\w+", texts.lower())
    # the embedded model knows few words; a coat is in all of its pictures, whoever wears it
    words = {**presets.CONTROL_WORDS, **({"object": "coat"} if testbed else {})}
    named = professions if isinstance(professions, (list, tuple)) else ()
    return {
        "words": {kind: word for kind, word in words.items() if word not in present},
        "synonyms": {
            profession: other
            for profession, other in presets.SYNONYMS.items()
            if profession in named and other not in named and not testbed
        },
    }


def check_template(
    template: str, required: tuple[str, ...] = (), one_of: tuple[str, ...] = ()
) -> str:
    """Checks that a template has the required fields, one of ``one_of``, and nothing else."""
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"the template {template!r} cannot be read: {error}") from error
    names = {name for name, _, _ in fields}
    # a width ("{profession:>300000000}") could fill the memory
    plain = all(not spec and not conversion for _, spec, conversion in fields)
    complete = names.issuperset(required) and (not one_of or names.intersection(one_of))
    if not plain or not complete or names.difference(required, one_of):
        wanted = [f"{{{name}}}" for name in required]
        if one_of:
            wanted.append(" or ".join(f"{{{name}}}" for name in one_of))
        raise ValueError(
            f"a template needs {' and '.join(wanted)} and nothing else in braces, got {template!r}"
        )
    for article in ("a ", "an "):
        if f" {article}{{profession}}" in f" {template.lower()}":
            raise ValueError(
                f"{{profession}} brings its article: write {{profession}} without "
                f"{article.strip()!r}, got {template!r}"
            )
    return template


def check_once(text: str, concept: str) -> None:
    """Refuses a concept that its attribution prompt has twice: the map would mix both."""
    words = re.findall(r"\w+", text.lower())
    wanted = re.findall(r"\w+", concept.lower())
    starts = range(len(words) - len(wanted) + 1)
    count = sum(words[i : i + len(wanted)] == wanted for i in starts)
    if count != 1:
        raise ValueError(
            f"expected the concept {concept!r} once in the attribution prompt {text!r}, got it "
            f"{count} times; choose other words"
        )
