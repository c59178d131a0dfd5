"""Methods: settings, their text and dict forms, and the patterns they give."""

import json
import math
from typing import Any

import numpy as np
import pytest

from gensparse import methods
from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods import (
    METHODS,
    PSA,
    AgentSD,
    BiFormer,
    Clear,
    ConsiStory,
    CosmosSparse,
    DoubleWindow,
    FreeCustom,
    FreeScale,
    FreeSwimWindow,
    HiLo,
    IsolationReposition,
    LongDistance,
    MagicFace,
    MasaCtrl,
    Method,
    MswMsa,
    Neighborhood,
    PrimeComposer,
    Proxy,
    Radial,
    ReferenceOnly,
    ScaleDiT,
    SlidingWindow,
    StoryDiffusion,
    StyleAligned,
    TokenFlow,
    as_method,
    parse_method,
)
from gensparse.methods.describe import method_text

EXAMPLES = [
    Clear(),
    Clear(radius=8, down_factor=4, proportional=True),
    Neighborhood(),
    Neighborhood(window=(12, 7), stride=(4, 1), dilation=2, causal=(True, False)),
    Neighborhood(window=5),
    SlidingWindow(),
    SlidingWindow(radius=(2, 5)),
    Proxy(),
    Proxy(window=(None, 3), alternate=False),
    FreeSwimWindow(),
    FreeSwimWindow(half=(1, 0), n0=None),
    DoubleWindow(),
    DoubleWindow(window=3),
    LongDistance(),
    LongDistance(group=(2, 3), interval=2),
    Neighborhood(window=(6, 5), stride=3, base=(20, None)),
    Neighborhood.preset("flux.1-dev"),
]
"""Methods whose pattern is a mask of every layout, in which a token always sees itself."""

CHOSEN = [
    PSA(),
    PSA(32, 64, (0.4, 0.5, 0.6, 0.8), "threshold", (0.7, 0.65, 0.6), "gilbert", "replicate", 16, 0.3, 7),
    BiFormer(),
    BiFormer(regions=(4, 5), top=2, own=False, per_head=True),
    AgentSD(),
    AgentSD(0.3, 0.8, (4, 2), 0.2, 0.5, 3, 8, 0.5, 0.0, 2, "normed", False, 3),
    Radial(),
    Radial(0.5, 64, False, 3, 2, "upstream", "half"),
    HiLo(),
    HiLo(window=(2, 3), alpha=0.25),
    HiLo(low_heads=(3, 0)),
    MswMsa(),
    MswMsa("down_blocks.1+up_blocks.1", draw="step", seed=7),
    CosmosSparse("14b"),
    Clear(weights="Huage001/CLEAR@main", down_factor=4),
    ScaleDiT(),
    FreeScale(),
    FreeScale("reference", "neighborhood:window=5x3,stride=2", False, 12, (1.1, 1.2, 0.6, 0.4), 64, 7),
    ScaleDiT((8, 4), 2, "3x3", True, (128, 64), "models/lora.safetensors"),
    FreeCustom(2, (3.0, 1.5), 0.5, 3, 0.8, False, 7, layers="10-15", halves=2),
    FreeCustom(weights=2.0, layers=4),
    StoryDiffusion(0.4, 1, 0.5, 1.0, 0.5, False, 3, layers="up_blocks"),
    StyleAligned(False, True, True, True, False, 0.5, 0.7, True, 0.25, halves=1),
    MasaCtrl(0, 0.9, True, layers="up_blocks.2+up_blocks.3"),
    ReferenceOnly(0.3, 0.5, False, 2, False, 1, None, 4),
    IsolationReposition(False, False, 0.0, -1.5, 0.4, 0.1, 30, 2, layers="isolated"),
    ConsiStory(1, 0.3, 5, 0.8, 0.2, 0.2, 0.0, 0.2, 0.5, 300, 1),
    MagicFace(3, (1.2, 4.0, 2.0), 0.4, 0.6, False, False, 5),
    TokenFlow(4, True, 10, 0, None, "up_blocks.1.attentions.1+up_blocks.2"),
    PrimeComposer(0.5, 0.25, 0.9, 1, "object", False, True, layers="10-15", halves=2),
]
"""Methods that choose at run time, see averages alone, or are for some models or calls only."""


@pytest.mark.parametrize("method", [*EXAMPLES, *CHOSEN], ids=repr)
def test_dict_round_trip_through_json_gives_an_equal_method(method: Method) -> None:
    data = json.loads(json.dumps(method.to_dict()))
    assert data["method"] == method.name
    assert data["version"] == 1
    assert Method.from_dict(data) == type(method).from_dict(data) == as_method(data) == method
    assert hash(Method.from_dict(data)) == hash(method)


@pytest.mark.parametrize("method", [*EXAMPLES, *CHOSEN], ids=repr)
def test_text_round_trip_gives_an_equal_method(method: Method) -> None:
    assert parse_method(method_text(method.to_dict())) == method


@pytest.mark.parametrize("cls", METHODS.values())
def test_presets_are_settings_of_their_method(cls: type[Method]) -> None:
    for name, settings in cls.presets.items():
        assert cls.preset(name) == cls(**settings) == parse_method(f"{cls.name}:preset={name}")
    with pytest.raises(ConfigError, match=r"unknown .* preset"):
        cls.preset("another model")


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("clear", Clear()),
        (" clear : radius=16 ", Clear(radius=16)),
        ("clear:radius=8,down_factor=4,proportional=true", Clear(8, 4, True)),
        ("neighborhood:window=80x80,stride=16x16", Neighborhood((80, 80), (16, 16))),
        ("neighborhood:window=7,causal=false", Neighborhood(window=7)),
        ("sliding_window:radius=2x5", SlidingWindow((2, 5))),
        ("neighborhood:preset=hunyuan_video-sta", Neighborhood((18, 24, 24), (6, 8, 8))),
        ("neighborhood:window=Nonex12x24,base=nonex44x80", Neighborhood((None, 12, 24), base=(None, 44, 80))),
        ("freeswim_window:preset=wan2.1-t2v-14b,n0=none", FreeSwimWindow((22, 40), None)),
        ("clear:preset=local_16_down_4,weights=Huage001/CLEAR", Clear(16, 4, weights="Huage001/CLEAR")),
        ("msw_msa:blocks=down_blocks.1+up_blocks.1,draw=step", MswMsa("down_blocks.1+up_blocks.1", "step")),
        ("radial:decay=0.5,sink=false,dense_steps=0.25,dense_layers=2", Radial(0.5, None, False, 0.25, 2)),
        ("radial:preset=wan2.1-t2v-14b-lightx2v,block=64", Radial(0.2, 64, True, 1, 1)),
        ("psa:ends=0.4x0.5x0.6x0.8,mode=threshold,caps=none", PSA(ends=(0.4, 0.5, 0.6, 0.8), mode="threshold")),
        ("psa:preset=wan2.1-t2v-1.3b,seed=3", PSA.preset("wan2.1-t2v-1.3b", seed=3)),
        ("proxy:window=nonex4x4,alternate=false", Proxy((None, 4, 4), False)),
        ("hilo:window=2,low_heads=0x3", HiLo(low_heads=(0, 3))),
        ("hilo:low_heads=3", HiLo(low_heads=(3,))),
        ("biformer:regions=4x5,top=2", BiFormer((4, 5), 2)),
        ("agentsd:cell=4x2,metric=normed,early_steps=8", AgentSD(cell=(4, 2), metric="normed", early_steps=8)),
        ("agentsd:preset=sdxl", AgentSD(max_downsample=2)),
        (
            "freescale:preset=sdxl-turbo,whole=fast,freeu=1.1x1.2x0.6x0.4",
            FreeScale.preset("sdxl-turbo", whole="fast", freeu=(1.1, 1.2, 0.6, 0.4)),
        ),
        (
            "freescale:whole=neighborhood:window=8x8;stride=4,dilated_steps=3",
            FreeScale(whole=Neighborhood((8, 8), 4), dilated_steps=3),
        ),
    ],
)
def test_text_form_is_read(text: str, method: Method) -> None:
    assert parse_method(text) == as_method(text) == method


@pytest.mark.parametrize("name", METHODS)
def test_names_are_those_of_class_file_and_registry(name: str) -> None:
    cls = METHODS[name]
    assert cls.name == name
    assert cls.__module__ == f"gensparse.methods.{name}"
    assert getattr(methods, cls.__name__) is cls
    assert parse_method(name) == cls()


@pytest.mark.parametrize("value", [0, -3, True, 2.5, math.nan, "4", None])
@pytest.mark.parametrize(
    ("cls", "setting"),
    [
        (Clear, "radius"),
        (Clear, "down_factor"),
        (SlidingWindow, "radius"),
        (Neighborhood, "stride"),
        (Neighborhood, "dilation"),
        (DoubleWindow, "window"),
        (LongDistance, "group"),
        (LongDistance, "interval"),
    ],
)
def test_bad_numbers_are_refused_with_setting_and_value(cls: type[Method], setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{setting}={value!r}"):
        cls(**{setting: value})


@pytest.mark.parametrize("value", [0, -3, True, 2.5, "4", (3, 0), (1, 2, 3, 4), ()])
def test_bad_windows_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="window"):
        Neighborhood(window=value)


def test_stride_above_the_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="stride"):
        Neighborhood(window=4, stride=5)


@pytest.mark.parametrize("value", [1, "true", None])
def test_bad_flags_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="proportional"):
        Clear(proportional=value)
    with pytest.raises(ConfigError, match="causal"):
        Neighborhood(causal=value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("claer", "did you mean clear"),
        ("", "unknown method"),
        ("clear:raduis=3", "did you mean radius"),
        ("clear:radius", "not a setting"),
        ("clear:radius=", "not a setting"),
        ("clear:radius=1,radius=2", "only once"),
        ("clear:method=neighborhood", "only once"),
        ("clear:version=2", "only once"),
        ("clear:radius=abc", "radius='abc'"),
        ("clear:radius=1.5", "radius=1.5"),
        ("clear:radius=-2", "radius=-2"),
        ("neighborhood:window=8xabc", "window"),
    ],
)
def test_bad_text_is_refused_with_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_method(text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "clear", "version": 2}, "version=2"),
        ({"method": "clear", "colour": 1}, "colour"),
        ({"method": ["clear"]}, "unknown method"),
        ({"radius": 3}, "unknown method"),
    ],
)
def test_bad_dicts_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Method.from_dict(data)


def test_a_class_reads_only_its_own_method() -> None:
    assert Clear.from_dict({"radius": 3}) == Clear(3)
    with pytest.raises(ConfigError, match="is not Clear"):
        Clear.from_dict({"method": "neighborhood"})


@pytest.mark.parametrize("thing", [None, 3, Clear, ("clear",)])
def test_other_things_are_no_methods(thing: Any) -> None:
    with pytest.raises(ConfigError, match="is not a method"):
        as_method(thing)


GRIDS = [(5, 7), (1, 1), (1, 6), (9, 1), (3, 3)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", [*EXAMPLES, Clear(100), Neighborhood(7, 3, 2), SlidingWindow(300)], ids=repr)
def test_windows_are_clamped_to_any_grid_and_text_sees_and_is_seen(method: Method, grid: tuple[int, int]) -> None:
    layout = Layout.image(*grid, text=3)
    mask = method.pattern(layout).dense_mask(layout)
    assert mask[:, :, :3].all()
    assert mask[:, :3, : layout.tokens].all()
    own = np.arange(layout.tokens)
    assert mask[:, own, own].all()


@pytest.mark.parametrize("method", [Clear(100), Neighborhood(100), SlidingWindow(100)], ids=repr)
def test_window_over_the_grid_is_dense(method: Method) -> None:
    layout = Layout.image(5, 7, text=3)
    assert method.pattern(layout).dense_mask(layout).all()


def test_clear_is_a_strict_disc_and_sliding_window_a_closed_box() -> None:
    layout = Layout.image(9, 9)
    rows, columns = np.indices((9, 9)).reshape(2, -1)
    dy, dx = np.subtract.outer(rows, rows), np.subtract.outer(columns, columns)
    assert (Clear(3).pattern(layout).dense_mask(layout)[0] == (dy**2 + dx**2 < 9)).all()
    box = SlidingWindow((2, 3)).pattern(layout).dense_mask(layout)[0]
    assert (box == ((abs(dy) <= 2) & (abs(dx) <= 3))).all()


def test_neighborhood_rows_have_a_constant_number_of_keys() -> None:
    layout = Layout.image(8, 9)
    mask = Neighborhood(window=(3, 5)).pattern(layout).dense_mask(layout)[0]
    assert (mask.sum(1) == 15).all()


def test_clear_with_pooling_adds_cells_that_only_the_picture_sees() -> None:
    layout = Layout.image(8, 12, text=3)
    mask = Clear(radius=2, down_factor=4).pattern(layout).dense_mask(layout)[0]
    assert mask.shape == (99, 99 + 6)
    assert mask[3:, 99:].all()
    assert not mask[:3, 99:].any()


@pytest.mark.parametrize(("down_factor", "factor"), [(1, 1), (4, 10)])
def test_proportional_gain_follows_the_published_formula(down_factor: int, factor: int) -> None:
    layout, head_dim = Layout.image(128, 64, text=512), 128
    gain = Clear(16, down_factor, True).logit_gain(layout, 4096)
    published = math.sqrt(math.log(factor * (512 + 128 * 64)) / math.log(64**2 + 512) / head_dim)
    assert gain / math.sqrt(head_dim) == pytest.approx(published, rel=1e-12)
    assert Clear(16, down_factor).logit_gain(layout, 4096) == 1.0


def test_proportional_without_a_known_training_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="training size"):
        Clear(proportional=True).logit_gain(Layout.image(4, 4), None)


@pytest.mark.parametrize("method", EXAMPLES, ids=repr)
def test_reference_pictures_are_a_reason_to_stay_dense_unless_the_method_has_a_rule(method: Method) -> None:
    edit = Layout.joint((1, 4, 4), text=2, references=[(1, 2, 2), (1, 4, 4)])
    assert method.why_not(Layout.image(4, 4, text=2)) is None
    if method.edits:
        assert method.why_not(edit) is None
        mask = method.pattern(edit).dense_mask(edit)[0, :, : edit.tokens]
        assert mask.any(axis=1).all(), "a reference that sees nothing"
        assert mask[2:18, 18:22].all(), "a reference of another grid is seen wholly"
    else:
        assert "reference" in (method.why_not(edit) or "")


@pytest.mark.parametrize(
    ("method", "same"),
    [
        (Neighborhood(window=(3, 5)), Neighborhood(window=(None, 3, 5))),
        (
            Neighborhood((4, 5), (2, 1), (1, 1), (True, False)),
            Neighborhood((None, 4, 5), (1, 2, 1), 1, (False, True, False)),
        ),
        (Neighborhood(window=(4, 4), base=(8, 8)), Neighborhood(window=(None, 4, 4), base=(None, 8, 8))),
        (SlidingWindow((1, 2)), SlidingWindow((5, 1, 2))),
    ],
    ids=repr,
)
def test_windows_given_for_pictures_span_all_frames_of_clips(method: Method, same: Method) -> None:
    layout = Layout.video(5, 6, 7, text=3)
    assert (method.pattern(layout).dense_mask(layout) == same.pattern(layout).dense_mask(layout)).all()
