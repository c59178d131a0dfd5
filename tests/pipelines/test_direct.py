"""The size at once with stretched positions, on tiny FLUX and QwenImage pipelines whose native size is 32 pixels."""

import logging
import math

import pytest
import torch
from rope_formulas import frequencies
from rope_formulas import wave as rotation

from gensparse.errors import ConfigError
from gensparse.highres.stages import Stage
from gensparse.pipelines import FluxHighresPipeline, highres_class
from gensparse.testing.tiny import tiny_pipeline

NATIVE = 8  # tokens per side
MORE = {"flux": {"guidance_scale": 3.0}, "qwenimage": {"true_cfg_scale": 2.5, "negative_prompt": "a red thing"}}


@pytest.fixture(scope="module", params=MORE)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def stock(name):
    pipe = tiny_pipeline(name)
    config = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": NATIVE**2}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(stock):
    out = highres_class(stock).from_pipe(stock)
    out.set_progress_bar_config(disable=True)
    return out


@pytest.fixture
def call(name):
    def arguments(seed: int = 3, **more):
        generator = torch.Generator().manual_seed(seed)
        short = {"prompt": "a cat", "num_inference_steps": 4, "max_sequence_length": 16, "output_type": "pt"}
        return {**short, "generator": generator, **MORE[name], "highres": "direct", **more}

    return arguments


def wave(position: float, dim: int, tokens: int | None, time: float) -> list[complex]:
    """Rotation of an axis of so many tokens; without tokens the axis is not stretched."""
    return rotation(position, frequencies(dim, 10000.0, tokens or 1, NATIVE, time))


def expected_tables(name: str, rows: int, cols: int, text: int, axes, time: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Complex tables of (picture, text): every token's rotation, axis by axis."""
    if name == "flux":
        places, start = [(0, y, x) for y in range(rows) for x in range(cols)], None
    else:
        places = [(0, y - (rows - rows // 2), x - (cols - cols // 2)) for y in range(rows) for x in range(cols)]
        start = max(rows // 2, cols // 2)
    texts = [(0, 0, 0) if start is None else (start + k,) * 3 for k in range(text)]

    def table(positions) -> torch.Tensor:
        lines = []
        for place in positions:
            sides = (None, rows, cols)
            lines.append([w for p, d, s in zip(place, axes, sides, strict=True) for w in wave(p, d, s, time)])
        return torch.tensor(lines, dtype=torch.complex128)

    return table(places), table(texts)


def tables_of(name: str, pipe, rows: int, cols: int, text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the module in place of the transformer's `pos_embed` gives, as complex numbers."""
    if name == "qwenimage":
        return pipe.transformer.pos_embed([[(1, rows, cols)]], max_txt_seq_len=text, device=torch.device("cpu"))
    ids = torch.cat([torch.zeros(text, 3), pipe._prepare_latent_image_ids(1, rows, cols, "cpu", torch.float32)])
    cos, sin = pipe.transformer.pos_embed(ids)
    both = torch.complex(cos[:, ::2], sin[:, ::2])
    return both[text:], both[:text]


@pytest.mark.parametrize("position", ["auto", "dy_yarn"])
@pytest.mark.parametrize("size", [(76, 60), (92, 28)])
def test_rotary_table_is_the_papers(name, pipe, call, size, position):
    rows, cols, seen = size[0] // 4, size[1] // 4, []

    def look(p, i, t, values):
        time = float(t) / 1000 if position == "dy_yarn" else 1.0
        axes = p.transformer.pos_embed.axes_dim
        for own, expected in zip(
            tables_of(name, p, rows, cols, 5), expected_tables(name, rows, cols, 5, axes, time), strict=True
        ):
            assert own.dtype == torch.complex64
            seen.append(float((own - expected).abs().max()))
        return values

    pipe(**call(height=size[0], width=size[1], position=position, attention="dense", callback_on_step_end=look))
    assert len(seen) == 8
    assert max(seen) < 2e-6


@pytest.mark.parametrize("size", [(32, 32), (24, 24), (60, 44), (128, 96)])
def test_mu_never_exceeds_the_schedulers(pipe, call, size):
    results = []
    pipe(**call(height=size[0], width=size[1], attention="dense", callback_on_stage_end=lambda p, r: results.append(r)))
    (result,) = results
    assert (result.height, result.width) == size
    assert len(result.sigmas) == 5
    config = pipe.scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    line = config.base_shift + slope * (size[0] * size[1] // 16 - config.base_image_seq_len)
    for given, shifted in zip((1.0, 0.75, 0.5, 0.25), result.sigmas, strict=False):
        if given < 1:
            mu = math.log(shifted / (1 - shifted) * (1 / given - 1))
            assert mu == pytest.approx(min(line, config.max_shift), abs=1e-5)
    assert (line > config.max_shift + 0.1) == (size[0] > 32)


@pytest.mark.parametrize("size", [(32, 32), (28, 20)])
def test_up_to_the_native_size_it_is_diffusers_to_the_bit(stock, pipe, call, size):
    more = {"height": size[0], "width": size[1]}
    plain = {k: v for k, v in call(**more).items() if k != "highres"}
    assert torch.equal(pipe(**call(**more)).images, stock(**plain).images)


def test_only_one_run_at_the_size_itself(pipe, call):
    pixels = []
    look = pipe.transformer.register_forward_pre_hook(
        lambda m, a, k: pixels.append(k["hidden_states"].shape[1]), with_kwargs=True
    )
    try:
        images = pipe(**call(height=76, width=60)).images
    finally:
        look.remove()
    assert images.shape == (1, 3, 76, 60)
    assert set(pixels) == {19 * 15}
    assert [(s.height, s.width, s.steps) for s in pipe.plan(76, 60, 4, highres="direct")] == [(76, 60, 4)]
    assert len(pipe.attention_report) == 1


def test_attention_is_sparse_from_the_first_step(pipe, call):
    more = {"height": 76, "width": 60}
    dense = pipe(**call(**more, attention="dense")).images
    assert pipe.attention_report[0]["method"] == "dense"
    sparse = pipe(**call(**more, attention="neighborhood:window=5x3")).images
    (report,) = pipe.attention_report
    assert report["sparse"] == 2
    assert report["calls"]["dense"] == {}
    assert not torch.equal(sparse, dense)
    kept = pipe(**call(**more, attention="neighborhood:window=5x3", dense_steps=4)).images
    assert torch.equal(kept, dense)
    whole = pipe(**call(**more, attention="neighborhood:window=99x99")).images
    torch.testing.assert_close(whole, dense, rtol=0, atol=1e-4)


def test_none_keeps_the_models_own_positions(pipe, call):
    more = {"height": 76, "width": 60, "attention": "dense"}
    plain = pipe(**call(**more, highres="none")).images
    assert torch.equal(pipe(**call(**more, position="base")).images, plain)
    assert not torch.equal(pipe(**call(**more)).images, plain)


def test_positions_and_attention_are_taken_out_again(pipe, call):
    own, seen = pipe.transformer.pos_embed, []

    def stop(p, i, t, values):
        seen.append(p.transformer.pos_embed is own)
        p._interrupt = i == 1
        return values

    pipe(**call(height=76, width=60, attention="neighborhood:window=5x3", callback_on_step_end=stop))
    assert seen == [False, False]
    assert pipe.transformer.pos_embed is own
    assert not pipe.transformer._forward_pre_hooks


def test_given_picture_is_redone_at_the_size(pipe, call):
    image = torch.rand(1, 3, 40, 30, generator=torch.Generator().manual_seed(9))
    weak, strong = (pipe(**call(height=76, width=60, image=image, strength=s)).images for s in (0.3, 1.0))
    assert weak.shape == (1, 3, 76, 60)
    assert not torch.equal(weak, strong)
    assert [(r["height"], r["width"]) for r in pipe.attention_report] == [(76, 60)]


def test_dype_is_chosen_knowingly(pipe, call, caplog):
    with caplog.at_level(logging.WARNING, logger="gensparse"):
        pipe(**call(height=76, width=60))
        assert not caplog.records
        pipe(**call(height=76, width=60, position="dy_yarn"))
    assert len(caplog.records) == 1
    assert "patent pending" in caplog.text


def test_stages_and_sizes_that_cannot_be_are_refused(pipe, call, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: pytest.fail("the model ran"))
    for wrong, match in (
        ({"height": 78}, "multiples of 4"),
        ({"stages": [Stage(32, 32, 4), Stage(76, 60, 2)]}, "at once"),
        ({"position": "stretch"}, "position"),
    ):
        with pytest.raises(ConfigError, match=match):
            pipe(**call(**{"height": 76, "width": 60, **wrong}))


def test_models_trained_on_close_ups_interpolate():
    stock = tiny_pipeline("flux")
    facts = {"native_size": 32, "position_ids": "centre-aligned scene units"}
    pipe = FluxHighresPipeline.from_pipe(stock, gensparse_config=facts)
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def look(p, i, t, values):
        table = p.transformer.pos_embed
        seen.append((table.rule, table.native_grid, table.grid))
        return values

    size = {"height": 80, "width": 56, "num_inference_steps": 2, "max_sequence_length": 16}
    pipe("a cat", **size, highres="direct", output_type="latent", callback_on_step_end=look)
    native = pipe.plan(80, 56)[0]
    assert set(seen) == {("interpolate", (native.height // 4, native.width // 4), (20, 14))}
