"""Engines against torch: what the graphs compute, what an export leaves, what a runtime refuses."""

from __future__ import annotations

import json
import shutil
import types

import pytest
import torch

import biasmap_fast as bm
from biasmap_fast import AttributionPrompt, engines
from biasmap_fast.concepts import tokenize
from biasmap_fast.engines import Gradient, Range, Shapes, errors, session
from biasmap_fast.engines import onnx as exporter
from biasmap_fast.engines.graph import AttributionGraph, attributed_layers
from biasmap_fast.engines.manifest import NAME, Manifest

DOCTOR = AttributionPrompt("a photo of a doctor and man", ("doctor", "man"))
WOMAN = AttributionPrompt("a woman in a photo", ("photo", "woman", "a"))
SHAPES = Shapes(batch=Range(1, 2, 63), height=Range(4, 16, 64), width=Range(4, 16, 64))
# Height and width as constants: an export of half the time, for what does not depend on them.
FIXED = Shapes(batch=Range(1, 2, 63), height=Range(16, 16, 16), width=Range(16, 16, 16))
# A UNet of one level fewer: enough where only the writing is tested.
SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "mid_block_type": None,
}


def mild(pipe):
    """Milder attention than the fixtures': theirs amplifies rounding past what is compared here.

    In SDXL's, torch's own float32 maps are 5e-3 off float64.
    """
    for name, weight in pipe.unet.named_parameters():
        if "attn2.to_q" in name or "attn2.to_k" in name:
            weight.data.div_(4.0)
    return pipe


@pytest.fixture(scope="session")
def sd_folder(make_sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "sd"
    bm.export_unet(make_sd(), folder, shapes=SHAPES)
    return folder


@pytest.fixture(scope="session")
def gradient_folder(make_sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "gradient"
    sizes = Gradient(16, 16, tokens=24, attribution_tokens=14, concepts=3)
    pipe = mild(make_sd(unet_config=SMALL))
    bm.export_unet(pipe, folder, shapes=FIXED, gradients=[sizes])
    return folder


@pytest.fixture(scope="session")
def program(make_sd, tmp_path_factory):
    """A UNet and its translation to ONNX, which takes most of an export's time."""
    unet = make_sd(unet_config=SMALL).unet
    made = []
    translate = torch.onnx.export

    def keep(*args, **kwargs):
        made.append(translate(*args, **kwargs))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", keep)
        bm.export_unet(unet, tmp_path_factory.mktemp("once") / "e", shapes=FIXED)
    return unet, made[0]


@pytest.fixture
def small_pipe(make_sd):
    return mild(make_sd(unet_config=SMALL))


def draw(pipe, seeds=(1, 2), **options):
    settings = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "np"}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    prompts = ["a photo of a doctor"] * len(seeds)
    return pipe(prompts, generator=generators, **(settings | options)).images


def assert_near(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert exporter.relative(found, expected) < tolerance


def graph_of(unet, maps="reduced"):
    return AttributionGraph(unet, attributed_layers(unet, None), maps).eval()


def run(engine, graph, sizes, seed):
    """The same random inputs through the engine's file and through torch."""
    given = exporter.example_inputs(graph.inputs, sizes, "float32", seed)
    with torch.no_grad():
        expected = graph(*given)
    names = [each.name for each in graph.inputs]
    found = engine._session.run(dict(zip(names, given, strict=True)), sizes)
    return found, dict(zip((each.name for each in graph.outputs), expected, strict=True))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("size", [(4, 4), (16, 16), (20, 12), (8, 64)])
@pytest.mark.parametrize(
    ("tokens", "prompts", "attribution_tokens", "concepts"),
    [(1, 1, 3, 1), (20, 2, 13, 5), (77, 3, 77, 2)],
)
def test_grid(sd_folder, sd_pipe, batch, size, tokens, prompts, attribution_tokens, concepts):
    engine = bm.load_engine(sd_folder)
    sizes = {
        "batch": batch,
        "height": size[0],
        "width": size[1],
        "tokens": tokens,
        "prompts": prompts,
        "attribution_tokens": attribution_tokens,
        "concepts": concepts,
    }
    found, expected = run(engine, graph_of(sd_pipe.unet.requires_grad_(False)), sizes, batch)
    assert found["maps"].shape == (batch, prompts, 4, concepts, *size)
    for name, values in expected.items():
        assert_near(found[name], values)


@pytest.mark.parametrize("maps", ["reduced", "probabilities"])
def test_padding_counts_nothing_whatever_is_in_it(small_pipe, maps):
    graph = graph_of(small_pipe.unet, maps)
    sizes = {
        "batch": 2, "height": 16, "width": 16, "tokens": 7, "prompts": 2,
        "attribution_tokens": 9, "concepts": 3,
    }  # fmt: skip
    given = dict(
        zip(
            (each.name for each in graph.inputs),
            exporter.example_inputs(graph.inputs, sizes, "float32", 5),
            strict=True,
        )
    )
    given["attribution_mask"][:, 6:] = 0.0
    given["attribution_hidden_states"][:, 6:] *= 1e4  # scores far beyond those of the tokens
    padded = graph(*given.values())[1:]
    given["attribution_hidden_states"] = given["attribution_hidden_states"][:, :6]
    for name in given.keys() & {"attribution_mask", "concept_weights"}:
        given[name] = given[name][..., :6]
    for found, expected in zip(padded, graph(*given.values())[1:], strict=True):
        if maps == "probabilities":
            assert not found[:, :, :, 6:].any()
            found = found[:, :, :, :6]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("by", ["total", "block", "step", ("step", "block")])
@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_recorder_on_an_engine(sd_folder, sd_pipe, by, branch):
    def record():
        with bm.attribute(sd_pipe, [DOCTOR, WOMAN], by=by, branch=branch) as recorder:
            pictures = draw(sd_pipe)
        return torch.as_tensor(pictures), recorder.maps_by_prompt()

    pictures, expected = record()
    sd_pipe.unet = bm.load_engine(sd_folder, unet=sd_pipe.unet)
    again, found = record()
    assert_near(again, pictures)
    for name, maps in expected.items():
        assert_near(found[name].values, maps.values)
        assert found[name].layers == maps.layers
        assert list(found[name].parts) == list(maps.parts)
        for part, values in maps.parts.items():
            assert_near(found[name].parts[part], values)


def test_nested_recorders_and_no_recorder(sd_folder, sd_pipe):
    sd_pipe.unet = bm.load_engine(sd_folder)
    alone = draw(sd_pipe)
    with bm.attribute(sd_pipe, DOCTOR) as outer, bm.attribute(sd_pipe, WOMAN) as inner:
        pictures = draw(sd_pipe)
    assert_near(torch.as_tensor(pictures), torch.as_tensor(alone))
    assert outer.maps().concepts == DOCTOR.concepts
    assert inner.maps().concepts == WOMAN.concepts
    with bm.attribute(sd_pipe, WOMAN) as recorder:
        draw(sd_pipe)
    assert_near(inner.maps().values, recorder.maps().values)
    assert not sd_pipe.unet._listeners


def test_layers_must_be_whole_blocks(sd_folder, sd_pipe):
    selection = ("up_blocks.1", "down_blocks")
    with bm.attribute(sd_pipe, DOCTOR, layers=selection) as recorder:
        draw(sd_pipe)
    expected = recorder.maps()
    sd_pipe.unet = bm.load_engine(sd_folder)
    with bm.attribute(sd_pipe, DOCTOR, layers=selection) as recorder:
        draw(sd_pipe)
    assert_near(recorder.maps().values, expected.values)
    assert recorder.layers == expected.layers
    for layers, by, message in (
        (("up_blocks.1.attentions.0",), "total", "must name all or none of them"),
        (("mid_block",), "total", "no layer that matches.*mid_block"),
        (None, "head", "`by` must be of"),
        (None, ("block", "layer"), "`by` must be of"),
    ):
        with pytest.raises(ValueError, match=message):
            bm.attribute(sd_pipe, DOCTOR, layers=layers, by=by)


def test_sdxl(sdxl_pipe, tmp_path):
    unet = mild(sdxl_pipe).unet.requires_grad_(False)
    folder = tmp_path / "sdxl"
    with bm.attribute(sdxl_pipe, [DOCTOR, WOMAN], by="block") as recorder:
        pictures = torch.as_tensor(draw(sdxl_pipe, num_inference_steps=1))
    expected = recorder.maps_by_prompt()
    bm.export_unet(sdxl_pipe, folder, shapes=SHAPES)
    sdxl_pipe.unet = bm.load_engine(folder, unet=sdxl_pipe.unet)
    with bm.attribute(sdxl_pipe, [DOCTOR, WOMAN], by="block") as recorder:
        # One step: in this random model, from sigma 14, rounding errors grow with every step.
        assert_near(torch.as_tensor(draw(sdxl_pipe, num_inference_steps=1)), pictures, 1e-2)
    for name, maps in recorder.maps_by_prompt().items():
        assert_near(maps.values, expected[name].values)
    names = ("batch", "height", "width", "tokens", "prompts", "attribution_tokens", "concepts")
    grid = [
        (3, 20, 8, 5, 2, 9, 4), (1, 4, 4, 1, 1, 3, 1), (2, 16, 64, 77, 3, 77, 2),
        (5, 12, 12, 20, 1, 12, 5), (1, 64, 64, 9, 2, 7, 3),
    ]  # fmt: skip
    for seed, values in enumerate(grid):
        sizes = dict(zip(names, values, strict=True))
        found, right = run(sdxl_pipe.unet, graph_of(unet), sizes, seed)
        batch, height, width, _, prompts, _, concepts = values
        # the largest attention is halved once
        expected_shape = (batch, prompts, 2, concepts, height // 2, width // 2)
        assert found["maps"].shape == expected_shape
        for name, tensor in right.items():
            assert_near(found[name], tensor)
    with pytest.raises(errors.WrongModelError, match=r"added_cond_kwargs\['text_embeds'\]"):
        sdxl_pipe.unet(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 5, 80))


def test_probabilities(small_pipe, tmp_path):
    with bm.attribute(small_pipe, [DOCTOR, WOMAN], by="layer") as recorder:
        draw(small_pipe)
    expected = recorder.maps_by_prompt()
    bm.export_unet(small_pipe, tmp_path / "p", shapes=FIXED, maps="probabilities")
    small_pipe.unet = bm.load_engine(tmp_path / "p")
    with bm.attribute(small_pipe, [DOCTOR, WOMAN], by="layer") as recorder:
        draw(small_pipe)
    for name, maps in recorder.maps_by_prompt().items():
        assert list(maps.by_layer) == list(expected[name].by_layer)
        for layer, values in maps.by_layer.items():
            assert_near(values, expected[name].by_layer[layer])


def test_without_maps(small_pipe, tmp_path):
    pictures = draw(small_pipe)
    bm.export_unet(small_pipe, tmp_path / "n", shapes=FIXED, maps="none", opset=23)
    small_pipe.unet = bm.load_engine(tmp_path / "n")
    assert small_pipe.unet.manifest.graph.opset == 23
    assert_near(torch.as_tensor(draw(small_pipe)), torch.as_tensor(pictures))
    with pytest.raises(errors.EngineError, match="gives no maps: export it with maps='reduced'"):
        bm.attribute(small_pipe, DOCTOR)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(small_pipe, tmp_path, dtype):
    unet = small_pipe.unet
    runs = dtype == "float16"  # ONNX Runtime's CPU has no convolution of bfloat16
    bm.export_unet(small_pipe, tmp_path / "h", shapes=FIXED, dtype=dtype, verify=runs)
    assert unet.dtype == torch.float32
    manifest = Manifest.read(tmp_path / "h")
    assert manifest.dtype == dtype
    assert bool(manifest.graph.unverified) is not runs
    import onnx

    graph = onnx.load(tmp_path / "h" / "unet.onnx", load_external_data=False).graph
    kinds = {one.name: one.type.tensor_type.elem_type for one in graph.value_info}
    softmaxes = [kinds[node.output[0]] for node in graph.node if node.op_type == "Softmax"]
    assert softmaxes
    assert set(softmaxes) == {onnx.TensorProto.FLOAT}
    norms = ("LayerNormalization", "InstanceNormalization")
    normed = [kinds[node.output[0]] for node in graph.node if node.op_type in norms]
    assert set(normed) == {onnx.TensorProto.FLOAT}
    if not runs:
        return
    small_pipe.to(torch.float16)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).half()
    with torch.no_grad():
        expected = unet(latents, 7, states).sample
    small_pipe.unet = bm.load_engine(tmp_path / "h", unet=unet)
    found = small_pipe.unet(latents, 7, states).sample
    assert found.dtype == torch.float16
    assert_near(found.float(), expected.float(), 2e-2)


class TestGradient:
    @pytest.mark.parametrize("prompts", [DOCTOR, [WOMAN, DOCTOR]])
    def test_guidance(self, gradient_folder, small_pipe, prompts):
        """The whole of guidance, over steps, with one prompt and with one an image."""

        def guided():
            with bm.guide(small_pipe, prompts, bm.Energy(scale=1.0)) as guidance:
                pictures = draw(small_pipe)
            return torch.as_tensor(pictures), guidance.ledger

        pictures, expected = guided()
        small_pipe.unet = bm.load_engine(gradient_folder, unet=small_pipe.unet)
        again, found = guided()
        assert len(found) == len(expected) == 6
        for row, right in zip(found, expected, strict=True):
            assert row.applied
            assert (row.call, row.image, row.timestep) == (right.call, right.image, right.timestep)
            # a gradient's rounding is in the next call's latents, and masks are sharp
            near = 1e-4 if row.call == 0 else 1e-2
            assert row.energy == pytest.approx(right.energy, rel=near)
            assert row.soft_iou == pytest.approx(right.soft_iou, rel=near)
            assert row.gradient_norm == pytest.approx(right.gradient_norm, rel=10 * near)
        assert float((again - pictures).abs().max()) < 1e-3

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("images", [1, 3])
    def test_gradient_equals_autograd(self, gradient_folder, small_pipe, seed, images):
        engine = bm.load_engine(gradient_folder)
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(images, 4, 16, 16, generator=generator)
        text = torch.randn(images, 24, 32, generator=generator)
        states = 2 * torch.randn(9, 32, generator=generator)
        weights = torch.zeros(2, 9)
        weights[0, 4] = weights[1, 6:8] = 1.0
        found = engine.energy_gradient(
            (latents, 500, text), {}, [(states, weights)], [(0, 1)], [1.0],
            fraction=0.3, temperature=0.01,
        )  # fmt: skip
        graph = graph_of(small_pipe.unet.requires_grad_(False))
        leaf = latents.clone().requires_grad_()
        times, mask = torch.full((images,), 500.0), torch.ones(1, 9)
        noise, maps = graph(leaf, times, text, states[None], mask, weights[None])
        total = maps.sum(2)[:, 0].flatten(2)  # [B, K, N]
        energy = bm.reference.soft_iou(total, torch.tensor([[0, 1]]), 0.3, 0.01)[:, 0]
        (expected,) = torch.autograd.grad(energy.sum(), leaf)
        assert_near(found.prediction, noise.detach())
        assert_near(found.energy, energy.detach())
        error = (found.gradient - expected).flatten(1).norm(dim=1)
        assert float((error / expected.flatten(1).norm(dim=1)).max()) < 1e-4

    def test_measuring_and_recording_while_guiding(self, gradient_folder, small_pipe):
        def both(scale):
            with (
                bm.guide(small_pipe, DOCTOR, bm.Energy(scale=scale)) as guidance,
                bm.attribute(small_pipe, WOMAN, by="block") as recorder,
            ):
                draw(small_pipe)
            return guidance.ledger, recorder.maps()

        expected = [both(scale) for scale in (0.0, 1.0)]
        small_pipe.unet = bm.load_engine(gradient_folder)
        for scale, (ledger, maps) in zip((0.0, 1.0), expected, strict=True):
            rows, found = both(scale)
            assert [row.reason for row in rows] == [row.reason for row in ledger]
            assert [row.energy for row in rows] == pytest.approx(
                [row.energy for row in ledger], rel=1e-2
            )
            assert_near(found.values, maps.values, 1e-3)

    def test_other_shapes_and_options_are_refused(self, gradient_folder, sd_folder, small_pipe):
        small_pipe.unet = bm.load_engine(gradient_folder)
        with (
            pytest.raises(errors.EngineError, match="no gradient graph for latents of 16 x 24"),
            bm.guide(small_pipe, DOCTOR),
        ):
            draw(small_pipe, width=48)
        with (
            pytest.raises(errors.EngineError, match="fraction 0.2.*there are: 16 x 16 with frac"),
            bm.guide(small_pipe, DOCTOR, bm.Energy(fraction=0.2)),
        ):
            draw(small_pipe)
        with pytest.raises(ValueError, match="accumulate=True needs the torch UNet"):
            bm.guide(small_pipe, DOCTOR, bm.Energy(accumulate=True))
        with pytest.raises(ValueError, match="containment= needs the torch UNet"):
            bm.guide(small_pipe, DOCTOR, bm.Energy(containment=(0.05, 0.1)))
        with pytest.raises(ValueError, match="layers of an engine's energy are fixed"):
            bm.guide(small_pipe, DOCTOR, bm.Energy(layers=("up_blocks",)))
        engine, masks = small_pipe.unet, {"fraction": 0.3, "temperature": 0.01}
        tokens = {prompt: tokenize(prompt, small_pipe.tokenizer) for prompt in (DOCTOR, WOMAN)}
        engine.check_gradient((16, 16), [tokens[DOCTOR]], **masks)
        with pytest.raises(
            errors.ShapeError, match=r"at most {'prompts': 1}, and {'prompts': 2} are needed"
        ):
            engine.check_gradient((16, 16), list(tokens.values()), **masks)
        long = AttributionPrompt("a photo of a doctor and man in a zzz", ("doctor", "man"))
        with (
            pytest.raises(errors.ShapeError, match="fixed sizes.*got {'attribution_tokens'"),
            bm.guide(small_pipe, long),
        ):
            draw(small_pipe)


class TestFolder:
    """What is written, and when; the tracing is done once."""

    @pytest.fixture
    def export(self, program, monkeypatch):
        unet, translated = program
        monkeypatch.setattr(torch.export, "export", lambda *a, **k: None)
        monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: translated)
        monkeypatch.setattr(translated, "rename_axes", lambda names: None)
        return lambda out, **options: bm.export_unet(unet, out, shapes=FIXED, **options)

    def test_interruption_at_any_step_leaves_nothing(self, export, tmp_path):
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

    def test_what_a_killed_export_leaves_does_not_load(self, export, tmp_path):
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

    def test_wrong_results_get_no_folder(self, export, program, tmp_path):
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
        assert manifest.graph.unverified == "verification was turned off"

    def test_an_existing_folder_is_kept(self, export, tmp_path):
        (tmp_path / "e").mkdir()
        with pytest.raises(errors.ExportError, match="e exists: give a new folder"):
            export(tmp_path / "e")

    def test_manifest(self, export, tmp_path):
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

    def test_damaged_folders(self, export, tmp_path):
        export(tmp_path / "e")

        def damaged(change):
            folder = tmp_path / "d"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tmp_path / "e", folder)
            change(folder)
            return folder

        def other_format(folder):
            text = (folder / NAME).read_text()
            (folder / NAME).write_text(text.replace('"format": 1', '"format": 9'))

        def cut(folder):
            data = folder / "unet.onnx.data"
            data.write_bytes(data.read_bytes()[:-1])

        def other_weights(folder):
            data = folder / "unet.onnx.data"
            data.write_bytes(bytes(data.stat().st_size))

        for change, message in (
            (other_format, "of format 9, this version reads 1: export it again"),
            (lambda folder: (folder / NAME).write_text("{"), "is not valid JSON"),
            (lambda folder: (folder / NAME).write_text('{"format": 1}'), "is damaged"),
            (lambda folder: (folder / "unet.onnx").unlink(), "lacks unet.onnx"),
            (lambda folder: (folder / "unet.onnx").write_bytes(b""), "SHA-256 differs"),
            (lambda folder: (folder / "unet.onnx.data").unlink(), "lacks unet.onnx.data"),
            (cut, "must have .* bytes"),
            (other_weights, "does not hold the weights that were exported"),
        ):
            with pytest.raises(errors.ManifestError, match=message):
                bm.load_engine(damaged(change))
        with pytest.raises(errors.ManifestError, match="does not exist"):
            bm.load_engine(tmp_path / "none")


class TestRefusals:
    def test_wrong_model(self, sd_folder, sd_pipe, make_sd):
        with pytest.raises(errors.WrongModelError, match="different: block_out_channels"):
            bm.load_engine(
                sd_folder, unet=make_sd(unet_config={"block_out_channels": (8, 8, 8)}).unet
            )
        with torch.no_grad():
            sd_pipe.unet.conv_in.bias[0] += 1e-3
        with pytest.raises(errors.WrongModelError, match="other weights"):
            bm.load_engine(sd_folder, unet=sd_pipe.unet)
        wide = make_sd(text_width=48)
        wide.unet = bm.load_engine(sd_folder)
        with (
            pytest.raises(errors.WrongModelError, match="width 32, the pipeline's text.*gives 48"),
            bm.attribute(wide, DOCTOR),
        ):
            pass
        with pytest.raises(errors.WrongModelError, match="text states of width 32"):
            draw(wide)

    @pytest.mark.parametrize(
        ("sample", "states", "message"),
        [
            ((1, 4, 18, 16), (1, 5, 32), "height of 4 to 64 in steps of 4, got 18"),
            ((1, 4, 16, 68), (1, 5, 32), "width of 4 to 64 in steps of 4, got 68"),
            ((64, 4, 4, 4), (64, 5, 32), "batch of 1 to 63, got 64"),
            ((2, 4, 16, 16), (1, 5, 32), "`encoder_hidden_states` must have the batch of `sample`"),
        ],
    )
    def test_shapes(self, sd_folder, sample, states, message):
        engine = bm.load_engine(sd_folder)
        with pytest.raises(errors.ShapeError, match=message):
            engine(torch.zeros(sample), 1, torch.zeros(states))

    def test_inputs_that_no_engine_has(self, sd_folder):
        engine = bm.load_engine(sd_folder)
        given = torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 5, 32)
        with pytest.raises(
            errors.EngineError, match="no input for `mid_block_additional_residual`"
        ):
            engine(*given, mid_block_additional_residual=torch.zeros(1))
        with pytest.raises(errors.EngineError, match="no input for `cross_attention_kwargs`"):
            engine(*given, cross_attention_kwargs={"scale": 0.5})
        (found,) = engine(*given, cross_attention_kwargs={}, return_dict=False)
        assert torch.equal(found, engine(*given).sample)

    def test_devices(self, sd_folder, monkeypatch):
        if "onnxruntime" in session._DISTRIBUTIONS and not torch.cuda.is_available():
            with pytest.raises(errors.DeviceError, match="no CUDAExecutionProvider.*onnx-gpu"):
                bm.load_engine(sd_folder, device="cuda")
        with pytest.raises(errors.DeviceError, match="run on cpu and cuda, got meta"):
            bm.load_engine(sd_folder, device="meta")
        engine = bm.load_engine(sd_folder)
        with pytest.raises(errors.EngineError, match="runs on cpu, got latents on meta"):
            engine(torch.zeros(1, 4, 16, 16, device="meta"), 1, torch.zeros(1, 5, 32))
        with pytest.raises(ValueError, match="`backend` must be"):
            bm.load_engine(sd_folder, backend="openvino")

    def test_a_silent_fallback_is_an_error(self, sd_folder, monkeypatch):
        """As onnxruntime-gpu behaves without a GPU: CUDA is listed, the session runs on the CPU."""
        import onnxruntime

        class Fallen:
            def __init__(self, *args, **kwargs):
                pass

            def get_providers(self):
                return ["CPUExecutionProvider"]

        listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
        monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
        with pytest.raises(errors.DeviceError, match="cannot use cuda:0: it offers CPUExecutio"):
            bm.load_engine(sd_folder, device="cuda")

    def test_two_runtimes(self, sd_folder, monkeypatch):
        monkeypatch.setattr(session, "_is_installed", lambda name: "directml" not in name)
        with pytest.raises(errors.EngineError, match="onnxruntime and onnxruntime-gpu.*both inst"):
            bm.load_engine(sd_folder)

    def test_missing_extras(self, sd_folder, sd_pipe, tmp_path, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(errors.MissingExtraError, match=r"biasmap-fast\[onnx\]"):
            bm.load_engine(sd_folder)
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(ImportError, match=r"extra `onnx`.*biasmap-fast\[onnx\]"):
            bm.export_unet(sd_pipe, tmp_path / "e")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"format": "openvino"}, "`format` must be one of"),
            ({"dtype": "int8"}, "`dtype` must be one of"),
            ({"maps": "all"}, "`maps` must be one of"),
            ({"opset": 9}, "`opset` must be one of"),
            ({"shapes": "sd9"}, "`shapes` must be a Shapes or one of"),
            ({"maps": "none", "gradients": [Gradient(16, 16)]}, "need maps='reduced'"),
            ({"gradients": [Gradient(18, 16)]}, "multiples of 4, got 18 x 16"),
        ],
    )
    def test_bad_options(self, sd_pipe, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            bm.export_unet(sd_pipe, tmp_path / "e", **options)
        assert not list(tmp_path.iterdir())

    def test_unsupported_unets(self, sd_pipe, make_sd, tmp_path):
        with pytest.raises(errors.UnsupportedUNetError, match="expected a UNet2DConditionModel"):
            bm.export_unet(
                types.SimpleNamespace(unet=torch.nn.Linear(2, 2)), tmp_path / "e", dtype="float32"
            )
        pipe = make_sd(unet_config={"time_cond_proj_dim": 8})
        with pytest.raises(errors.UnsupportedUNetError, match="no input for time_cond_proj_dim=8"):
            bm.export_unet(pipe, tmp_path / "e")
        with pytest.raises(ValueError, match="no cross-attention layer matches"):
            bm.export_unet(sd_pipe, tmp_path / "e", layers=["up_blocks.9"])


def test_shapes():
    assert Range(4, 16, 64, 4) == Shapes(height=Range(3, 15, 66)).on_grid(4).height
    with pytest.raises(ValueError, match="at most 63"):
        Shapes(batch=Range(1, 1, 64))
    with pytest.raises(ValueError, match="1 <= low <= best <= high"):
        Range(4, 2, 8)
    with pytest.raises(ValueError, match="no multiple of 8 lies between"):
        Shapes(height=Range(9, 10, 11)).on_grid(8)
    for shapes in engines.PRESETS.values():
        assert Shapes.from_json(shapes.to_json()) == shapes


def test_dry_run_sizes(sd_pipe):
    found = exporter.sizes(sd_pipe, dtype="float16", shapes=SHAPES)
    assert found["weights"] == 2 * sum(p.numel() for p in sd_pipe.unet.parameters())
    assert found["maps"] == 4 * 2 * 16 * 16 * 4
    # 3 layers at 16 x 16 and 3 at 8 x 8, 2 heads each
    assert found["probabilities"] == (3 * 256 + 3 * 64) * 2 * 77 * 4
