"""What the README and the docstrings say is run, and its numbers come from committed files."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import biasmap_fast

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(biasmap_fast.__path__, "biasmap_fast.")
    if not module.name.endswith("._C")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_readme_tables_are_those_of_the_results():
    check = [sys.executable, "-m", "docs.build", "--check"]
    done = subprocess.run(check, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_readme_example_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    # the example as printed, with fewer steps than the pipeline's default of 50
    quick = code.replace(
        "num_images_per_prompt=4", "num_images_per_prompt=4, num_inference_steps=3"
    )
    assert quick != code
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(quick, "README.md", "exec"), {})
    assert "chance" in said.getvalue()
    assert (tmp_path / "doctor.png").stat().st_size > 0


def test_readme_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    help_text = subprocess.run(
        [sys.executable, "-m", "biasmap_fast", "audit", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
    ).stdout
    (command,) = re.findall(r"biasmap audit (--model.*?)```", README, re.DOTALL)
    for flag in re.findall(r"--[a-z-]+", command):
        assert flag in help_text, flag
