from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent


def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


families = _load("probe_families", _HERE / "families.py")
shared = _load("shared_conftest", _HERE.parent / "conftest.py")


class Clip:
    """CLIP text encoders of any width over the tests' tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encoder(self, width, seed, projection=False):
        return shared.text_encoder(self.tokenizer, width, seed, projection)


@pytest.fixture
def family(tokenizer, request):
    """``family("flux")``: a pipeline that is built anew."""

    def build(name):
        if name in ("sd_pipe", "sdxl_pipe"):
            built = families.Family(request.getfixturevalue(name))
        else:
            built = families.FAMILIES[name](Clip(tokenizer))
        built.pipe.set_progress_bar_config(disable=True)
        # small differences of predictions are compared, which float32 rounds differently in
        # batches of different sizes
        built.pipe.to(torch.float64)
        return built

    return build
