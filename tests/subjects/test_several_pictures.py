"""Subjects with several pictures or none: texts, references, regions that pictures share, pictures of a set."""

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image

from gensparse import Reference
from gensparse.errors import ConfigError
from gensparse.methods.isolation_run import Masks
from gensparse.pipelines import SD15CustomizePipeline, SDXLCustomizePipeline
from gensparse.subjects.cast import Concept, Subjects
from gensparse.subjects.masks import apart, last_wins
from gensparse.subjects.naming import Shown, mask_box, parse_prompts, parse_subject, subject_text
from gensparse.subjects.references import checked_references
from gensparse.testing.tiny import tiny_pipeline

SIZE = (40, 24)


def picture(seed: int, height: int = 30, width: int = 21) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def sd15():
    pipe = SD15CustomizePipeline.from_pipe(tiny_pipeline("sd15"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(pipe, prompt, seeds=3, steps=3, **more) -> torch.Tensor:
    given = (
        torch.Generator().manual_seed(seeds)
        if isinstance(seeds, int)
        else [torch.Generator().manual_seed(n) for n in seeds]
    )
    size = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": steps, "output_type": "pt"}
    return pipe(prompt, generator=given, **size, **more).images


# ---------------------------------------------------------------------------------------------------------------- texts
@pytest.mark.parametrize(
    ("text", "name", "shown"),
    [
        ("cat", "cat", ()),
        (" a cat =x.png", "a cat", (Shown("x.png"),)),
        ("cat=a.png@m.png,b.png", "cat", (Shown("a.png", "m.png"), Shown("b.png"))),
        ("cat=a,,b.png,c.png@0:0.5:1:1", "cat", (Shown("a,b.png"), Shown("c.png", "0:0.5:1:1"))),
    ],
)
def test_texts_of_subjects(text: str, name: str, shown: tuple[Shown, ...]) -> None:
    assert parse_subject(text) == (name, shown)
    assert parse_subject(subject_text(name, shown)) == (name, shown)


@pytest.mark.parametrize("shown", [(), (Shown("a@b,c.png"),), (Shown("x.png", "m,@.png"), Shown("y.png"))])
def test_texts_are_read_back_whatever_the_names_of_files(shown: tuple[Shown, ...]) -> None:
    assert parse_subject(subject_text("cat", shown)) == ("cat", shown)


@pytest.mark.parametrize("text", ["=a.png", "cat=", "cat=a.png,", "cat=@m.png", " ", "cat=a.png@0.5:0:0.5:1"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_subject(text)


def test_boxes_in_place_of_masks() -> None:
    assert mask_box("0.1:.25:1:0.75") == (0.1, 0.25, 1.0, 0.75)
    assert mask_box("a:b:c:d") is None
    assert mask_box(None) is None


def test_prompts_of_subjects() -> None:
    assert parse_prompts(["cat=a grey cat = mine"], ["cat", "dog"]) == {"cat": "a grey cat = mine"}
    for wrong in (["cat"], ["cat="], ["cow=a cow"], ["cat=a", "cat=b"]):
        with pytest.raises(ConfigError):
            parse_prompts(wrong, ["cat", "dog"])


# ----------------------------------------------------------------------------------------------------------- references
def test_every_picture_is_a_reference() -> None:
    cat = Reference("cat", [picture(0), picture(1)], mask=[(0, 0, 0.5, 1), None], region=(0, 0, 0.5, 1), prompt="grey")
    found = checked_references([cat, Reference("dog", picture(2))])
    assert [item.name for item in found] == ["cat", "cat", "dog"]
    assert [item.mask for item in found] == [(0.0, 0.0, 0.5, 1.0), None, None]
    assert {item.region for item in found[:2]} == {(0.0, 0.0, 0.5, 1.0)}
    assert {item.text for item in found[:2]} == {"grey"}
    mask = found[0].fitted((30, 21)).mask
    assert mask is not None
    assert mask[:, :10].all()
    assert not mask[:, 11:].any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"picture": []},
        {"picture": [picture(0), None]},
        {"picture": [picture(0)], "mask": [None, None]},
        {"picture": [picture(0)], "mask": "m.png"},
        {"picture": picture(0), "mask": (0, 0, 0, 1)},
        {"mask": (0, 0, 1, 1)},
    ],
    ids=["empty", "hole", "masks", "one mask", "box", "no picture"],
)
def test_other_pictures_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        Reference("cat", **wrong)


def test_too_many_pictures_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 8"):
        checked_references([Reference("cat", [picture(0)] * 5), Reference("dog", [picture(0)] * 4)])
    with pytest.raises(ConfigError, match="named 'cat'"):
        checked_references([Reference("cat", picture(0)), Reference("cat", picture(1))])


def test_pictures_of_one_subject_share_its_region() -> None:
    regions = torch.zeros(3, 5, 7, dtype=torch.bool)
    regions[0, :, :4] = regions[1, :, :4] = True
    regions[2, 2:, 3:] = True
    found = apart(regions, (0, 0, 1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[[0, 2]], last_wins(regions[[0, 2]]))
    assert torch.equal(apart(regions, (0, 1, 2)), last_wins(regions))
    groups = Masks(regions, found, (0, 0, 1)).groups.reshape(5, 7)
    assert set(groups[:2, :4].ravel()) == {1}
    assert set(groups[2:, 3:].ravel()) == {2}
    assert set(groups[:2, 4:].ravel()) == {0}
    named = Subjects(Concept("a"), Concept("b", subject="a"), Concept("c"))
    assert named.owners == (0, 0, 1)


@pytest.mark.parametrize("method", ["freecustom", "isolation", "magicface", "storydiffusion:start=0,gate=1.0"])
def test_pictures_of_a_subject_add_to_each_other(sd15, method: str) -> None:
    dog = Reference("dog", picture(9), region=(0.5, 0.3, 1, 1))

    def drawn(*pictures: int) -> torch.Tensor:
        cat = Reference("cat", [picture(seed) for seed in pictures], region=(0, 0, 0.6, 1))
        return made(sd15, "a cat and a dog", steps=2, subjects=[cat, dog], subject_method=method)

    one, two = drawn(0), drawn(0, 1)
    assert sd15.attention_report[0]["subjects"]["names"] == ["cat", "cat (2)", "dog"]
    assert torch.isfinite(two).all()
    assert not torch.equal(one, two)


def test_one_picture_in_a_list_is_that_picture(sd15) -> None:
    single, listed = Reference("cat", picture(0), mask=(0, 0, 0.5, 1)), Reference("cat", [picture(0)], [(0, 0, 0.5, 1)])
    a, b = (made(sd15, "a cat", steps=2, subjects=[item]) for item in (single, listed))
    assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------- by words
def test_a_region_of_everything_is_its_prompt(sd15) -> None:
    everywhere = Reference("cat", region=(0, 0, 1, 1), prompt="a grey cat")
    out = made(sd15, "a dog", subjects=[everywhere], subject_method="regional:base_weight=0.0")
    torch.testing.assert_close(out, made(sd15, "a grey cat"), rtol=0, atol=1e-4)
    assert not torch.equal(out, made(sd15, "a dog"))
    report = sd15.attention_report
    assert len(report) == 1


SET = ("a cat at sea", "a cat in the snow", "the cat")


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_pictures_of_a_set_see_each_other(name: str, sd15) -> None:
    pipe = sd15 if name == "sd15" else SDXLCustomizePipeline.from_pipe(tiny_pipeline("sdxl"))
    pipe.set_progress_bar_config(disable=True)
    cat = {"subjects": [Reference("cat")]}
    plain = made(pipe, list(SET), (1, 2, 3))
    out = made(pipe, list(SET), (1, 2, 3), **cat, subject_method="consistory")
    (report,) = pipe.attention_report
    assert report["subjects"]["names"] == ["cat"]
    assert torch.equal(out, made(pipe, list(SET), (1, 2, 3), **cat, subject_method="consistory"))
    assert all(not torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    nothing = "consistory:dropout=1.0,inject=0.0,blend=0.0,blend_end=0.0"
    unshared = made(pipe, list(SET), (1, 2, 3), **cat, subject_method=nothing)
    torch.testing.assert_close(unshared, plain, rtol=0, atol=2e-4)
    # pictures that are no anchors are seen by nobody
    other = made(pipe, [*SET[:2], "a cat asleep"], (1, 2, 9), **cat, subject_method="consistory")
    torch.testing.assert_close(other[:2], out[:2], rtol=0, atol=2e-4)
    assert not torch.allclose(other[2], out[2], atol=1e-3)


def test_both_runs_of_a_set_draw_the_same_noise(sd15) -> None:
    """Of a sampler that draws at every step: without a share to inject the second run is the only one."""
    pipe = SD15CustomizePipeline.from_pipe(sd15)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(sd15.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    steps: list[int] = []

    def count(_pipe, index, _t, tensors):
        steps.append(index)
        return {}

    given = {"subjects": [Reference("cat")], "callback_on_step_end": count}
    once = made(pipe, list(SET), (1, 2, 3), **given, subject_method="consistory:inject=0.0")
    assert steps == [0, 1, 2]
    twice = made(pipe, list(SET), (1, 2, 3), **given, subject_method="consistory:inject=1e-9")
    assert steps == [0, 1, 2] * 3
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "subjects", "method", "said"),
    [
        ("a cat", [Reference("cat")], "freecustom", "needs a picture of cat"),
        ("a cat", [Reference("cat")], "regional", "where cat is to be"),
        ("a cat", [Reference("cat", picture(0), region=(0, 0, 1, 1))], "regional", "has a picture"),
        ("a cat", [Reference("cat")], "consistory", "one is asked for"),
        (["a cat", "a dog"], [Reference("cat")], "consistory", "fewer than two of the 2 prompts say cat"),
        (["a cat", "cat"], [Reference("cat", region=(0, 0, 1, 1))], "consistory", "leaves places to the model"),
    ],
    ids=["picture", "box", "regional picture", "one", "unsaid", "placed"],
)
def test_what_methods_by_words_need(sd15, prompt, subjects, method: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made(sd15, prompt, subjects=subjects, subject_method=method)
