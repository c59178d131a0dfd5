"""The attention lab: every method and pattern has a picture that says what the mask says, or a reason why not."""

import time

import numpy as np
import pytest

from gensparse import patterns
from gensparse.app import lab
from gensparse.engine import plan as plan_request
from gensparse.errors import ConfigError
from gensparse.estimate import Rates
from gensparse.methods import METHODS, Clear, Proxy, parse_method
from gensparse.patterns.draw import EXTRA, QUERY, SEEN
from gensparse.plan import build_plan
from gensparse.request import GenerateRequest

RATES = Rates(linear=2e11, attention=1e11, decode=5e10)
# where methods show something that do not on FLUX: model, and pixels (height, width)
HOMES = {
    "cosmos_sparse": ("Cosmos", 480, 832),
    "freescale": ("sdxl", 1024, 1280),
    "freeswim_window": ("Wan", 480, 832),
    "hidiffusion": ("sdxl", 1024, 1280),
    "msw_msa": ("sdxl", 1024, 1280),
    "radial": ("Wan", 480, 832),
    "scale_dit": ("flux.1-dev", 1024, 1280),
}
DRAWN = {
    *("auto", "clear", "cosmos_sparse", "double_window", "freeswim_window", "hidiffusion", "hilo", "long_distance"),
    *("msw_msa", "neighborhood", "proxy", "radial", "scale_dit", "schedule", "sliding_window"),
}
NOT_DRAWN = {"agentsd": "operator", "biformer": "run time", "psa": "run time", "freescale": "operator"}
REASONS = ("operator", "run time", "pictures of a batch", "picture to text", "dense")


def look(model: str, name: str, height: int, width: int, values: dict | None = None, **more) -> lab.View:
    return lab.look(model, name, values or {}, height=height, width=width, **more)


def sees_of(view: lab.View, query: tuple[int, int, int], group: int = 0) -> np.ndarray:
    """Which own tokens and extra keys the query sees, by the definition of the pattern."""
    rule = view.pattern.bind(view.layout)
    number = view.layout.starts[view.layout.target] + int(np.ravel_multi_index(query, view.layout.grid))
    q, k = view.layout.coords(), rule.key_coords()
    one = type(q)(q.segment[[number]], q.position[[number]])
    return np.broadcast_to(rule.allowed(one, k, group), k.segment.shape)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_picture_or_says_why_not(name: str) -> None:
    model, height, width = HOMES.get(name, ("flux.1-dev", 2048, 1536))
    view = look(model, name, height, width, frames=17 if lab.lab_model(model).frames else None, layer=1)
    assert (view.pattern is not None) >= (name in DRAWN), view.why
    if view.pattern is None:
        assert any(word in view.why for word in REASONS), view.why
        assert NOT_DRAWN.get(name, "") in view.why
        with pytest.raises(ConfigError):
            lab.sight(view)
        return
    assert not view.why
    for group in range(max(1, len(view.groups))):
        drawing = lab.sight(view, (0, 1, 2), group)
        assert drawing.sees == sees_of(view, (0, 1, 2), group).sum()
        assert drawing.keys >= view.layout.tokens
    assert max(drawing.image.size) < 3000


@pytest.mark.parametrize("name", lab.PATTERNS)
def test_every_pattern_of_the_lab_is_drawn(name: str) -> None:
    layout_size = (272, 336)  # 17 x 21 tokens
    view = look("embedded", name, *layout_size, {"cells": "2x4", "near": "2x4"} if name == "Pyramid" else {})
    drawing = lab.sight(view, (0, 16, 20))
    assert drawing.sees == sees_of(view, (0, 16, 20)).sum() > 0
    assert lab.cost(view).density == build_plan(view.pattern, view.layout).density
    assert lab.about(name)


def test_every_pattern_is_in_the_lab_or_named_with_a_reason() -> None:
    made_for_use = {
        name
        for name in patterns.__all__
        if isinstance(getattr(patterns, name), type)
        and issubclass(getattr(patterns, name), patterns.Pattern | patterns.RoutedPattern)
        and name not in ("Pattern", "RoutedPattern")
    }
    assert made_for_use == {*lab.PATTERNS, *lab.NEED_MORE}


@pytest.mark.parametrize("key", lab.lab_models())
def test_every_model_has_tokens_and_a_picture(key: str) -> None:
    model = lab.lab_model(key)
    view = look(key, "sliding_window", *model.size, {"radius": "3"})
    assert view.layout.tokens <= lab.MAX_TOKENS
    assert lab.sight(view).sees == sees_of(view, lab.centre(view.layout.grid)).sum()
    rows = lab.cost(view, rates=RATES).rows
    assert any("work of attention" in row.what for row in rows) == (model.arch is not None)


def test_settings_are_read_as_on_the_command_line() -> None:
    assert lab.attention_text("clear", {"radius": "8"}) == "clear:radius=8"
    assert lab.attention_text("clear", {"radius": "16", "down_factor": ""}) == "clear"
    assert lab.attention_text("neighborhood", {"window": "(24, 32)"}) == "neighborhood:window=24x32"
    assert lab.attention_text("schedule", {"": "0=dense;0.5=clear:radius=4"}) == "schedule:0=dense;0.5=clear:radius=4"
    assert lab.pattern_of("Neighborhood", {"window": "5, 7", "dilation": "2"}) == patterns.Neighborhood((5, 7), 1, 2)
    with pytest.raises(ConfigError, match="radius"):
        lab.attention_text("clear", {"radius": "0"})
    with pytest.raises(ConfigError, match="method or pattern"):
        lab.settings_of("Text")


@pytest.mark.parametrize("name", [*METHODS, *lab.PATTERNS])
def test_settings_are_offered_with_words_and_defaults(name: str) -> None:
    for item in lab.settings_of(name):
        assert item.value, item
        assert item.info or name in lab.PATTERNS, item
        if name != "freecustom":  # whose weights are numbers
            assert (item.name, item.value) not in (("weights", "none"), ("profile", "none"))
    if name in METHODS:
        assert parse_method(lab.attention_text(name, {})) == METHODS[name]()
        for model, own in lab.presets_of(name).items():
            assert parse_method(lab.attention_text(name, own)) == METHODS[name].preset(model)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("schedule", {"": "0=auto:profile=/etc/passwd"}),
        ("schedule", {"": "0=dense;0.5=clear:weights=owner/name"}),
        ("schedule", {"": "0=regional:regions=/etc/passwd"}),
        ("regional", {"background": "x,regions=/etc/passwd"}),
    ],
)
def test_no_file_is_read(name: str, values: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("subjects.areas.Regions.read", "methods.profile.Profile.load"):
        monkeypatch.setattr(f"gensparse.{place}", lambda path: pytest.fail("a file was opened"))
    with pytest.raises(ConfigError, match="reads no files"):
        look("embedded", name, 512, 512, values)


@pytest.mark.parametrize(
    "sizes",
    [
        {"height": 8}, {"width": 8193}, {"height": 512.0}, {"width": True}, {"text": -1}, {"text": 4097},
        {"layer": 99}, {"layer": -1},
    ],
)  # fmt: skip
def test_sizes_out_of_range_are_refused(sizes: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(sizes))):
        lab.look("embedded", "clear", {}, **({"height": 512, "width": 512} | sizes))


def test_too_many_tokens_are_refused_before_they_are_made() -> None:
    with pytest.raises(ConfigError, match="choose a smaller size"):
        look("sd1.5", "clear", 8192, 8192)


def test_a_click_finds_the_token_that_is_drawn_there() -> None:
    for model, size, frames in (("embedded", (272, 336), None), ("Wan", (96, 160), 21)):
        view = look(model, "sliding_window", *size, {"radius": "1"}, frames=frames)
        grid = view.layout.grid
        for query in ((0, 0, 0), tuple(n - 1 for n in grid), lab.centre(grid)):
            pixels = np.asarray(lab.sight(view, query).image)
            rows, columns = np.nonzero((pixels == np.array(QUERY)).all(-1))
            middle = (int(columns.min() + columns.max()) // 2, int(rows.min() + rows.max()) // 2)
            assert lab.token_under(grid, *middle) == query
    assert lab.token_under((1, 17, 21), 0, 0) is None
    assert lab.token_under((1, 17, 21), 5000, 5000) is None


def test_pictures_of_4096_pixels_are_fast_and_never_square_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gensparse.patterns.base.DENSE_MASK_LIMIT", 1)  # nobody makes a mask of all pairs
    for name in ("clear", "neighborhood", "proxy"):
        view = look("flux.1-dev", name, 4096, 4096)
        assert view.layout.grid == (1, 256, 256)
        start = time.process_time()
        lab.sight(view, (0, 200, 13))
        assert time.process_time() - start < 10  # far above what it takes; a mask of all pairs takes minutes
    assert lab.sight(look("flux.1-dev", "clear", 8192, 8192)).sees == 793 + 512


def test_extra_keys_are_drawn_and_counted() -> None:
    view = look("embedded", "clear", 512, 512, {"radius": "3", "down_factor": "4"})
    colours = np.asarray(lab.sight(view).image).reshape(-1, 3)
    assert (colours == np.array(EXTRA)).all(-1).any()
    assert (colours == np.array(SEEN)).all(-1).any()
    found = lab.cost(view)
    assert found.keys == found.tokens + 64
    assert "64 extra keys" in found.rows[0].sparse


def test_menus_name_the_heads_that_take_each_entry() -> None:
    view = look("flux.1-dev", "double_window", 512, 512)
    assert view.groups == ("1 of 2 (heads 0-11 of 24)", "2 of 2 (heads 12-23 of 24)")
    assert look("embedded", "Proxy", 512, 512).groups == ()


def test_layers_and_moments_choose_what_acts() -> None:
    even, odd = (look("flux.1-dev", "proxy", 512, 512, layer=layer).pattern for layer in (0, 1))
    assert even != odd
    values = {"": "0=dense;0.5=clear:radius=4"}
    assert "dense" in look("embedded", "schedule", 512, 512, values, moment=0.0).why
    late = look("embedded", "schedule", 512, 512, values, moment=1.0)
    assert late.acting == Clear(radius=4)
    assert look("embedded", "radial", 512, 512).why.startswith("It runs dense here")


def test_auto_is_what_generate_takes() -> None:
    small = look("embedded", "auto", 256, 256)
    assert small.pattern is None
    assert "dense" in small.why
    large = look("embedded", "auto", 1024, 1024)
    assert large.acting == parse_method("clear:radius=8")
    assert "clear:radius=8" in " ".join(large.notes)
    measured = look("embedded", "auto", 1536, 1536, {"error": "0.3", "dense_below": "0"}, layer=1)
    assert measured.pattern is not None
    assert len(measured.groups) > 1 or measured.layout.tokens


@pytest.mark.parametrize("attention", ["clear:radius=8", "neighborhood:window=24x24", "hilo:window=4"])
def test_costs_are_those_of_the_plan_command(attention: str) -> None:
    request = GenerateRequest(model="embedded", size="1024x768", attention=attention, steps=1, highres="none")
    resolved, whole = plan_request(request.replace(prompt="-"), time_it=False)
    stage = whole.stages[-1]
    name, _, rest = attention.partition(":")
    view = look("embedded", name, 768, 1024, dict([rest.split("=")]))
    found = lab.cost(view, rates=RATES, dtype=resolved.dtype)
    assert found.tokens == stage.tokens
    assert found.density == pytest.approx(stage.density)
    by_name = {row.what: row for row in found.rows}
    assert by_name["work of attention, all layers"].sparse == f"{stage.attention_flops / 1e12:.3g} TFLOP"
    total = (stage.attention_flops + stage.linear_flops) / 1e12
    assert by_name["work of one call of the model"].sparse == f"{total:.3g} TFLOP"
    assert by_name["time of attention"].source == "derived from measured speed"
    assert "Measured" in found.notes[0]
    assert 0 < found.density <= found.visited <= 1.5
    assert np.prod(found.q_tile) <= 128
    assert np.prod(found.k_tile) <= 64


def test_without_sizes_of_a_model_only_counts_are_given() -> None:
    found = lab.cost(look("HunyuanImage", "clear", 2048, 2048), rates=RATES)
    assert {row.source for row in found.rows} == {"counted"}
    assert "known of" in found.notes[0]
    assert lab.cost(look("embedded", "radial", 512, 512)) is None


def test_chosen_at_run_time_has_numbers_without_a_picture() -> None:
    found = lab.cost(look("embedded", "biformer", 1024, 1024), rates=RATES)
    assert 0 < found.density < 1
    assert found.q_tile is None


COPIED = ("clear", "proxy", "double_window", "scale_dit", "radial", "Pyramid", "Box", "schedule")


@pytest.mark.parametrize("name", COPIED)
def test_copied_python_runs_and_is_the_same_pattern(name: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    model, height, width = HOMES.get(name, ("flux.1-dev", 512, 768))
    view = look(model, name, height, width, frames=9 if model == "Wan" else None, layer=1, moment=1.0)
    code = lab.python_code(view, (0, 3, 5))
    names: dict = {}
    if view.attention:
        head, _, drawing = code.partition("\n\nfrom gensparse import")
        applied = {}
        stand_in = type("Handle", (), {"remove": lambda self: None})
        monkeypatch.setattr("gensparse.attach.apply", lambda pipe, method: applied.update(m=method) or stand_in())
        exec(head, {"pipe": None})
        assert applied["m"] == parse_method(view.attention)
        code = "from gensparse import" + drawing
    exec(code, names)
    assert names["pattern"] == view.pattern
    assert names["layout"] == view.layout
    assert (tmp_path / "sight.png").stat().st_size
    assert "density" in capsys.readouterr().out


def test_the_profile_of_the_embedded_model_is_charted() -> None:
    model = lab.lab_model("embedded")
    profile = lab.profile_of(model)
    grids = lab.grid_names(profile)
    points = lab.chart(profile, grids[0])
    entry = profile.grids[0]
    assert len(points) == len(entry.layers) * len(entry.windows)
    assert points[0] == {
        "layer": "00 double 0",
        "window": "3 x 3",
        "value": pytest.approx(np.mean([head[0] for head in entry.layers[0].kept])),
    }
    assert lab.chart(profile, error=True) != lab.chart(profile)
    assert lab.profile_of(lab.lab_model("flux.1-dev")) is None


def test_layouts_of_other_segments_are_written_as_python(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    view = look("AuraFlow", "clear", 512, 512)
    code, names = lab.python_code(view), {}
    exec(code[code.index("from gensparse import") :], names)
    assert names["layout"] == view.layout == look("AuraFlow", "clear", 512, 512).layout


def test_proxy_is_the_method_and_the_pattern() -> None:
    assert look("embedded", "proxy", 512, 512, layer=0).acting == Proxy()
    assert lab.is_pattern("Proxy")
    assert not lab.is_pattern("proxy")
