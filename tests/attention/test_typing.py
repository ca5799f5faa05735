"""Types of the public functions, as mypy sees them in a user's file."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_user_code_type_checks(tmp_path):
    """What the documentation shows passes mypy's strict mode in a user's file."""
    api = pytest.importorskip("mypy.api")
    source = tmp_path / "user.py"
    source.write_text(
        """import torch
import biasmap_fast as bm

def measure(pipe: object) -> dict[str, torch.Tensor]:
    prompt = bm.AttributionPrompt("a photo of a doctor and woman", ("doctor", "woman"))
    with bm.attribute(pipe, prompt) as recorder:
        pass
    maps = recorder.maps()
    overlap: torch.Tensor = bm.iou(maps["doctor"], maps["woman"], fraction=0.3)
    chance: float = bm.chance_iou(0.3)
    energy = bm.Energy(pairs=[("doctor", "woman")], scale=100.0, layers=["up_blocks"])
    with bm.guide(pipe, [prompt, prompt], energy) as guidance:
        pass
    rows: list[bm.LedgerRow] = guidance.ledger
    with bm.attribute(pipe, [prompt, prompt], by=["block", "step"]) as several:
        pass
    every = {name: one["doctor"] for name, one in several.maps_by_prompt("step").items()}
    return every | {"corrected": bm.corrected(overlap, chance), "rows": torch.tensor(len(rows))}
""",
        encoding="utf-8",
    )
    config = tmp_path / "mypy.ini"
    # torch alone takes minutes to read
    config.write_text("[mypy]\nstrict = true\n[mypy-torch.*,numpy.*]\nfollow_imports = skip\n")
    said, errors, status = api.run(
        [f"--config-file={config}", f"--cache-dir={tmp_path / 'cache'}", str(source)]
    )
    assert status == 0, said + errors
