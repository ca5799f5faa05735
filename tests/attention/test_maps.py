"""Attribution maps as a value: indexing, parts, files, overlays."""

from __future__ import annotations

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import AttributionMaps


@pytest.fixture
def maps():
    values = torch.rand(3, 2, 8, 6, generator=torch.Generator().manual_seed(0))
    parts = {"up_blocks.0": values / 4, "down_blocks.0": values * 3 / 4}
    return AttributionMaps(
        values, ("doctor", "man"), "a doctor and man", "uncond", ("x", "y"), "block", parts
    )


def test_indexing(maps):
    assert torch.equal(maps["man"], maps.values[:, 1])
    assert len(maps) == 3
    with pytest.raises(KeyError, match=r"no concept 'nurse'; there are \['doctor', 'man'\]"):
        maps["nurse"]


def test_parts_are_those_recorded(maps):
    assert list(maps.by_block) == ["up_blocks.0", "down_blocks.0"]
    with pytest.raises(ValueError, match="recorded by='block'; record with by='step'"):
        _ = maps.by_step


def test_block_iou(maps):
    found = bm.block_iou(maps, "doctor", "man", fraction=0.5)
    assert list(found) == ["up_blocks.0", "down_blocks.0"]
    expected = bm.iou(maps["doctor"], maps["man"], fraction=0.5)  # parts are scaled copies
    assert all(torch.equal(values, expected) for values in found.values())
    with pytest.raises(KeyError, match="no concept 'nurse'"):
        bm.block_iou(maps, "doctor", "nurse")
    with pytest.raises(ValueError, match="recorded by='total'; record with by='block'"):
        bm.block_iou(AttributionMaps(maps.values, maps.concepts), "doctor", "man")


def test_shape_is_checked():
    with pytest.raises(ValueError, match=r"must be \[B, 1, H, W\].*got \[3, 2, 4, 4\]"):
        AttributionMaps(torch.zeros(3, 2, 4, 4), ("doctor",))


def test_save_and_load(maps, tmp_path):
    path = tmp_path / "maps.safetensors"
    maps.save(path)
    back = AttributionMaps.load(path)
    assert torch.equal(back.values, maps.values)
    assert list(back.parts) == list(maps.parts)
    assert all(torch.equal(back.parts[name], part) for name, part in maps.parts.items())
    for field in ("concepts", "prompt", "branch", "layers", "by"):
        assert getattr(back, field) == getattr(maps, field)
    assert [file.name for file in tmp_path.iterdir()] == ["maps.safetensors"]


def test_load_refuses_other_files(maps, tmp_path):
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="holds no attribution maps: expected the format"):
        AttributionMaps.load(other)
    maps.save(other)
    other.write_bytes(other.read_bytes()[:-40])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        AttributionMaps.load(other)
    with pytest.raises(FileNotFoundError):
        AttributionMaps.load(tmp_path / "none.safetensors")


def test_save_into_a_missing_folder_leaves_nothing(maps, tmp_path):
    with pytest.raises(OSError, match="No such file or directory"):
        maps.save(tmp_path / "missing" / "maps.safetensors")
    assert not list(tmp_path.iterdir())


def test_resize_and_to(maps):
    resized = maps.resize((16, 12)).to("cpu")
    assert resized.values.shape == (3, 2, 16, 12)
    assert resized.by_block["up_blocks.0"].shape == (3, 2, 16, 12)


def test_overlay():
    import numpy as np
    from PIL import Image

    values = torch.zeros(1, 1, 8, 8)
    values[..., :4, :] = 2.0
    maps = AttributionMaps(values, ("doctor",))
    grey = Image.new("RGB", (64, 64), (100, 100, 100))
    shown = np.asarray(maps.overlay(grey, "doctor"))
    assert (shown[-8:] == 100).all()  # cold: untouched
    assert shown[:8, :, 0].min() > 180  # hot: bright
    assert shown[:8, :, 2].max() < 200
    dimmer = np.asarray(maps.overlay(grey, "doctor", value_range=(0.0, 4.0)))
    assert dimmer[:8, :, 0].max() < shown[:8, :, 0].min()


def test_overlay_of_many(maps):
    import numpy as np
    from PIL import Image

    pictures = [Image.new("L", (24, 32), 10 * i) for i in range(3)]
    shown = maps.overlay(pictures, "man")
    assert [picture.size for picture in shown] == [(24, 32)] * 3
    one = maps.overlay(pictures[1], "man", index=1)
    assert one.tobytes() == shown[1].tobytes()
    with pytest.raises(ValueError, match="one picture for 3 maps: say which"):
        maps.overlay(pictures[0], "man")
    with pytest.raises(ValueError, match="expected 3 pictures for the maps, got 2"):
        maps.overlay(pictures[:2], "man")
    with pytest.raises(ValueError, match="between 0 and 1, got 3"):
        maps.overlay(pictures, "man", strength=3)
    with pytest.raises(ValueError, match="`index` must be one of 3 maps, got 3"):
        maps.overlay(pictures[0], "man", index=3)
    with pytest.raises(TypeError, match="a picture of Pillow, got ndarray"):
        maps.overlay(np.asarray(pictures[0]), "man", index=0)


def test_overlay_of_a_constant_and_a_broken_map():
    from PIL import Image

    grey = Image.new("RGB", (8, 8), (9, 9, 9))
    constant = AttributionMaps(torch.ones(1, 1, 4, 4), ("doctor",))
    assert constant.overlay(grey, "doctor").tobytes() == grey.tobytes()
    broken = AttributionMaps(torch.full((1, 1, 4, 4), torch.nan), ("doctor",))
    with pytest.raises(ValueError, match="NaN or infinite"):
        broken.overlay(grey, "doctor")
