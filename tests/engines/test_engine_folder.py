"""What an export leaves and when, and what of a folder is refused; the tracing is done once."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast.engines import Range, errors
from biasmap_fast.engines.manifest import NAME, Manifest


@pytest.fixture
def export(program, fixed, monkeypatch):
    unet, translated = program
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: None)
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: translated)
    monkeypatch.setattr(translated, "rename_axes", lambda names: None)
    return lambda out, **options: bm.export_unet(unet, out, shapes=fixed, **options)


def test_interruption_at_any_step_leaves_nothing(export, tmp_path):
    steps = []
    export(tmp_path / "whole", progress=steps.append)
    assert steps[-1] == "name the folder"
    assert len(steps) == 6
    for place in range(len(steps)):
        seen = []

        def stop(step, seen=seen, place=place):
            seen.append(step)
            if len(seen) > place:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export(tmp_path / "part", progress=stop)
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    bm.load_engine(tmp_path / "whole")


def test_what_a_killed_export_leaves_does_not_load(export, tmp_path):
    """As after SIGKILL: the temporary folder as it is before each step."""
    left = []

    def keep(step):
        for path in tmp_path.glob(".e.*.partial"):
            left.append(shutil.copytree(path, tmp_path / f"left{len(left)}"))

    export(tmp_path / "e", progress=keep)
    assert len(left) == 6
    for folder in left[:-1]:
        with pytest.raises(errors.ManifestError, match="has no manifest.json"):
            bm.load_engine(folder)
    bm.load_engine(left[-1])  # complete, but for its name


def test_wrong_results_get_no_folder(export, program, tmp_path):
    unet, _ = program
    right = unet.conv_out.bias
    try:
        unet.conv_out.bias = torch.nn.Parameter(right.detach() + 1.0, requires_grad=False)
        with pytest.raises(errors.ParityError, match="unet.onnx differs from torch by"):
            export(tmp_path / "e")
        assert not list(tmp_path.iterdir())
        manifest = export(tmp_path / "e", verify=False)
    finally:
        unet.conv_out.bias = right
    assert manifest.graph.parity == {}


def test_an_existing_folder_is_kept(export, tmp_path):
    (tmp_path / "e").mkdir()
    with pytest.raises(errors.ExportError, match="e exists: give a new folder"):
        export(tmp_path / "e")


def test_manifest(export, tmp_path):
    export(tmp_path / "e")
    manifest = Manifest.read(tmp_path / "e")
    assert manifest.graph.opset == 20
    assert manifest.graph.parity["maps"] < 1e-4
    assert manifest.shapes.height == Range(16, 16, 16, 2)
    assert manifest.shapes.batch == Range(1, 2, 63)
    assert manifest.versions["torch"] == torch.__version__
    assert [layer.level for layer in manifest.layers] == [0, 0, 0]
    values = json.loads((tmp_path / "e" / NAME).read_text())
    assert values["graph"]["inputs"][0]["shape"] == ["batch", 4, "height", "width"]
    manifest.write(tmp_path)
    assert (tmp_path / NAME).read_bytes() == (tmp_path / "e" / NAME).read_bytes()


def test_damaged_folders(export, tmp_path):
    export(tmp_path / "e")

    def damaged(change):
        folder = tmp_path / "d"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "e", folder)
        change(folder)
        return folder

    def manifest_with(text, other):
        def change(folder):
            before = (folder / NAME).read_text()
            assert text in before
            (folder / NAME).write_text(before.replace(text, other))

        return change

    def cut(folder):
        data = folder / "unet.onnx.data"
        data.write_bytes(data.read_bytes()[:-1])

    def other_weights(folder):
        data = folder / "unet.onnx.data"
        data.write_bytes(bytes(data.stat().st_size))

    for change, message in (
        (
            manifest_with('"format": 2', '"format": 9'),
            "of format 9, this version reads 2: export it again",
        ),
        (lambda folder: (folder / NAME).write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / NAME).write_text('{"format": 2}'), "is damaged at dtype"),
        (lambda folder: (folder / "unet.onnx").unlink(), "lacks unet.onnx"),
        (lambda folder: (folder / "unet.onnx").write_bytes(b""), "SHA-256 differs"),
        (lambda folder: (folder / "unet.onnx.data").unlink(), "lacks unet.onnx.data"),
        (cut, "unet.onnx.data is not the file that was exported: its SHA-256 differs"),
        (other_weights, "unet.onnx.data is not the file that was exported"),
        (manifest_with('"file": "unet.onnx"', '"file": "../e/unet.onnx"'), "damaged at graph.file"),
        (manifest_with('"opset"', '"data": "", "opset"'), "damaged at graph.data"),
        (manifest_with('"height",', '"depth",'), "damaged at graph.inputs.0.shape"),
        (manifest_with('"cross_attention_dim": 32', '"cross_attention_dim": 33'), "`config` was"),
    ):
        with pytest.raises(errors.ManifestError, match=message):
            bm.load_engine(damaged(change))
    with pytest.raises(errors.ManifestError, match="does not exist"):
        bm.load_engine(tmp_path / "none")


def test_a_flipped_bit_anywhere_is_refused(export, tmp_path):
    export(tmp_path / "e")
    generator = torch.Generator().manual_seed(0)
    for name in ("unet.onnx", "unet.onnx.data"):
        path = tmp_path / "e" / name
        data = bytearray(path.read_bytes())
        positions = torch.randint(len(data), (25,), generator=generator).tolist()
        for position in [0, len(data) - 1, *positions]:
            data[position] ^= 1
            path.write_bytes(data)
            with pytest.raises(errors.ManifestError, match=f"{name} is not the file"):
                Manifest.read(tmp_path / "e")
            data[position] ^= 1
        path.write_bytes(data)
    Manifest.read(tmp_path / "e")


def test_nothing_of_this_machine_is_in_the_file(export, tmp_path):
    export(tmp_path / "e")
    data = (tmp_path / "e" / "unet.onnx").read_bytes()
    assert b"stack_trace" not in data
    assert b".py" not in data
