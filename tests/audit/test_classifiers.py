"""Readers of pictures: CLIP zero-shot with random weights, and functions of others."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from biasmap_fast.audit import AuditPlan, Reading, run_audit
from biasmap_fast.audit.chunk import _reading_row
from biasmap_fast.audit.classifiers import reader_for
from biasmap_fast.audit.conditions import ConditionError
from biasmap_fast.pipelines import ModelError


def plan_of(classifier):
    return AuditPlan(
        model="tiny",
        professions=["doctor", "judge", "nurse"],
        axes=["gender", "build=tall,short,wide"],
        classifier=classifier,
        device="cpu",
    )


@pytest.fixture(scope="session")
def clip(tokenizer, tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = text | {"image_size": 32, "patch_size": 8}
    for name in ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id"):
        vision.pop(name)
    vision.pop("pad_token_id")
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model.eval(), tokenizer


def pictures(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (48, 40, 3), np.uint8)) for _ in range(count)]


def test_clip_takes_the_nearest_text_of_each_axis(clip):
    folder, model, tokenizer = clip
    plan = plan_of(f"clip:{folder}")
    read = reader_for(plan)
    readings = read(pictures(3))
    ids = [
        tokenizer(f"a photo of a {word}", return_tensors="pt") for word in ("tall", "short", "wide")
    ]
    with torch.no_grad():
        texts = torch.cat([model.text_projection(model.text_model(**one)[1]) for one in ids])
        vision = model.vision_model(pixel_values=read._pixels(pictures(3)))
        images = model.visual_projection(vision[1])
        cosine = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=-1)
        expected = (cosine * model.logit_scale.exp()).softmax(-1)
    for reading, row in zip(readings, expected, strict=True):
        word, score = reading.by_axis["build"]
        assert word == ("tall", "short", "wide")[int(row.argmax())]
        assert score == pytest.approx(float(row.max()), abs=1e-5)
        assert reading.profession in plan.professions
        assert reading.by_axis["gender"][0] in ("man", "woman")
    row = {name: dict(values) for name, values in _reading_row(readings[0], plan).items()}
    assert (row["labels"]["build"], row["scores"]["build"]) == readings[0].by_axis["build"]
    assert row["labels"]["profession"] == readings[0].profession


def test_clip_score_is_the_cosine_of_picture_and_text(clip):
    folder, model, tokenizer = clip
    read = reader_for(plan_of(f"clip:{folder}"))
    texts = ["a photo of a tall doctor", "a judge", "a photo of a tall doctor"]
    with torch.no_grad():
        features = [
            model.text_projection(model.text_model(**tokenizer(text, return_tensors="pt"))[1])
            for text in texts
        ]
        vision = model.vision_model(pixel_values=read._pixels(pictures(3)))
        images = model.visual_projection(vision[1])
        cosine = torch.nn.functional.cosine_similarity(images, torch.cat(features), dim=-1)
    assert read.scores(pictures(3), texts) == pytest.approx((100 * cosine).clamp(min=0), abs=1e-4)
    assert len(read.scores(pictures(1), ["a tall doctor " * 20])) == 1  # cut, as CLIP's own


@pytest.mark.usefixtures("quick")
def test_an_audit_with_clip_has_its_score(clip, tiny, tiny_plan, tmp_path):
    folder, *_ = clip
    conditions = ["plain", "short=prompt:{profession}"]
    plan = tiny_plan(conditions=conditions, classifier=f"clip:{folder}", save_pictures="all")
    pictures = run_audit(plan, tmp_path, pipe=tiny, progress=False).pictures
    assert pictures["clip_score"].between(0, 100).all()
    read = reader_for(plan)
    row = pictures[(pictures["condition"] == "short") & (pictures["seed"] == 1)].iloc[0]
    picture = Image.open(tmp_path / "pictures" / "000-doctor-1-short.png")
    # with the first condition's prompt, whatever drew the picture
    assert row["clip_score"] == pytest.approx(read.scores([picture], ["a photo of a doctor"])[0])
    assert row["labels"]["profession"] in plan.professions
    assert row["scores"]["gender"] == pytest.approx(read([picture])[0].by_axis["gender"][1])


def test_clip_sees_the_centre_of_the_picture(clip):
    folder, *_ = clip
    read = reader_for(plan_of(f"clip:{folder}"))
    wide = Image.new("RGB", (120, 40), "blue")
    wide.paste(Image.new("RGB", (44, 40), "red"), (38, 0))
    pixels = read._pixels([wide])
    assert pixels.shape == (1, 3, 32, 32)
    red = read._pixels([Image.new("RGB", (32, 32), "red")])
    assert torch.allclose(pixels, red, atol=0.05)


def test_a_function_of_others(monkeypatch):
    def own(found):
        return [Reading("judge", "tall", 0.9) for _ in found]

    module = SimpleNamespace(read=own, short=lambda found: [])
    monkeypatch.setitem(sys.modules, "mine", module)
    assert reader_for(plan_of("mine:read"))(pictures(2)) == [Reading("judge", "tall", 0.9)] * 2
    with pytest.raises(TypeError, match=r"mine:short must return one Reading per picture, got 0"):
        reader_for(plan_of("mine:short"))(pictures(2))
    with pytest.raises(ConditionError, match=r"mine has no function 'nothing'; it has \['read', "):
        reader_for(plan_of("mine:nothing"))


def test_a_function_in_a_file_of_the_working_directory(tmp_path):
    source = """from biasmap_fast.audit import Reading
def read(found):
    return [Reading("judge", "tall", 0.9) for _ in found]
"""
    (tmp_path / "readers_of_mine.py").write_text(source)
    read = reader_for(plan_of("readers_of_mine.py:read"), str(tmp_path))
    assert read(pictures(2)) == [Reading("judge", "tall", 0.9)] * 2
    with pytest.raises(ConditionError, match=r"'nowhere.py:read' cannot be imported from"):
        reader_for(plan_of("nowhere.py:read"), str(tmp_path))


def test_readers_that_cannot_be(tmp_path):
    assert reader_for(plan_of("none")) is None
    with pytest.raises(ModelError, match="cannot be loaded as CLIP"):
        reader_for(plan_of(f"clip:{tmp_path}"))
