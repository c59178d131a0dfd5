"""The size at once in diffusers' own pipelines, on tiny models whose native size is 8 x 8 tokens."""

import logging

import pytest
import torch
from rope_formulas import frequencies, wave

from gensparse.errors import ConfigError
from gensparse.pipelines import highres_class
from gensparse.pipelines.registry import highres_name
from gensparse.testing.tiny import tiny_call, tiny_pipeline

NATIVE = 8
FAMILIES = ("chroma", "flux2", "lumina2", "zimage", "hunyuanimage")
SHIFTED = ("chroma", "flux2", "zimage")  # their time shift grows with the picture
ALIKE = ("lumina2", "zimage")  # rows and columns have one scale


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def stock(name):
    pipe = tiny_pipeline(name)
    if name != "hunyuanimage":  # whose pipeline passes no shift
        config = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": NATIVE**2}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(stock):
    out = highres_class(stock).from_pipe(stock)
    out.set_progress_bar_config(disable=True)
    for limit in ("tokenizer_max_length", "tokenizer_2_max_length"):  # which the tiny HunyuanImage sets on itself
        if limit in stock.__dict__:
            setattr(out, limit, getattr(stock, limit))
    return out


@pytest.fixture
def plain(name, pipe):
    """Arguments of diffusers' pipeline for a picture of rows x columns tokens."""

    def arguments(rows: int, columns: int, **more):
        token = pipe.token_size
        own = {**tiny_call(name), "height": rows * token, "width": columns * token, "num_inference_steps": 2}
        return {**own, "generator": torch.Generator().manual_seed(3), **more}

    return arguments


@pytest.fixture
def call(pipe, plain):
    """The same with what is ours; dense."""

    def arguments(rows: int, columns: int, **more):
        own = {"native_size": NATIVE * pipe.token_size, "attention": "dense"}
        return plain(rows, columns, **{**own, **more})

    return arguments


def seen(pipe, arguments, look):
    """What `look(pipe)` gives after every call of the transformer."""
    found = []
    handle = pipe.transformer.register_forward_hook(lambda *_: found.append(look(pipe)))
    try:
        pipe(**arguments)
    finally:
        handle.remove()
    return found


def rotations(name: str, pipe, rows: int, columns: int) -> torch.Tensor:
    """Complex rotations [rows, columns, F] of the picture's tokens by rows and columns, as the model has them now."""
    model = pipe.transformer
    if name in ALIKE:
        tables = model.rope_embedder.freqs_cis
        shape = (rows, columns, -1)
        parts = (tables[1][:rows, None].expand(*shape), tables[2][None, :columns].expand(*shape))
        return torch.cat(parts, -1).to(torch.complex128)
    if name == "hunyuanimage":
        cos, sin = model.rope(torch.zeros(1, 4, rows, columns))
        return torch.complex(cos, sin)[:, ::2].reshape(rows, columns, -1).to(torch.complex128)
    own = model.pos_embed
    ids = torch.zeros(rows, columns, len(own.axes_dim))
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    cos, sin = own(ids.flatten(0, 1))
    first = own.axes_dim[0] // 2
    last = first + (own.axes_dim[1] + own.axes_dim[2]) // 2
    return torch.complex(cos, sin)[:, ::2][:, first:last].reshape(rows, columns, -1).to(torch.complex128)


def facts(name: str, pipe) -> tuple[tuple[int, int], float]:
    """Channels of rows and columns, and the base."""
    model = pipe.transformer
    if name in ALIKE:
        owner = model.rope_embedder
        dims = owner.axes_dim if name == "lumina2" else owner.axes_dims
        return tuple(dims[1:3]), owner.theta
    if name == "hunyuanimage":
        return tuple(model.config.rope_axes_dim), model.config.rope_theta
    theta = model.config.rope_theta if name == "flux2" else 10000
    return tuple(model.config.axes_dims_rope[1:3]), theta


# --- positions


@pytest.mark.parametrize("size", [(8, 8), (13, 4)])
def test_up_to_the_native_size_it_is_diffusers_to_the_bit(stock, pipe, plain, call, size):
    assert torch.equal(pipe(**call(*size)).images, stock(**plain(*size)).images)


@pytest.mark.parametrize(("size", "position"), [((19, 7), "auto"), ((16, 16), "ntk"), ((19, 7), "dy_yarn")])
def test_beyond_it_tables_are_the_papers(name, pipe, call, size, position):
    rule = "yarn" if position == "auto" else position
    dims, theta = facts(name, pipe)

    def look(p):
        time = float(p.scheduler.sigmas[p.scheduler.step_index or 0]) if rule == "dy_yarn" else 1.0
        axes = []
        for dim, side in zip(dims, size, strict=True):
            found = frequencies(dim, theta, max(size) if name in ALIKE else side, NATIVE, time, rule)
            axes.append(torch.tensor([wave(k, found) for k in range(side)], dtype=torch.complex128))
        shape = (*size, -1)
        expected = torch.cat([axes[0][:, None].expand(*shape), axes[1][None].expand(*shape)], -1)
        return float((rotations(name, p, *size) - expected).abs().max()), time

    found = seen(pipe, call(*size, position=position), look)
    assert max(error for error, _ in found) < 3e-6
    assert (len({time for _, time in found}) > 1) is (rule == "dy_yarn")


def test_none_keeps_the_models_own_positions(name, stock, pipe, plain, call):
    images = pipe(**call(16, 11, highres="none")).images
    assert torch.equal(pipe(**call(16, 11, position="base")).images, images)
    assert not torch.equal(pipe(**call(16, 11)).images, images)
    assert torch.equal(stock(**plain(16, 11)).images, images) is (name not in SHIFTED)


# --- time


def test_the_time_shift_stops_at_the_native_sizes(name, stock, pipe, plain, call):
    own = pipe.scheduler
    before = {k: v for k, v in own.__dict__.items() if not isinstance(v, torch.Tensor)}

    def look(p):
        return p.scheduler.sigmas.tolist()

    native, large = (seen(pipe, call(*size), look)[0] for size in ((8, 8), (21, 13)))
    assert native == large
    assert pipe.scheduler is own
    assert {k: v for k, v in own.__dict__.items() if not isinstance(v, torch.Tensor)} == before
    stock(**plain(21, 13))
    grown = stock.scheduler.sigmas.tolist()
    assert (grown != native) is (name in SHIFTED)
    assert grown[-2] >= native[-2]


# --- attention, and what is left behind


def test_attention_is_sparse_from_the_first_step(name, pipe, call):
    dense = pipe(**call(17, 9)).images
    assert pipe.attention_report[0]["method"] == "dense"
    assert (pipe.attention_report[0]["height"], pipe.attention_report[0]["width"]) == tuple(
        side * pipe.token_size for side in (17, 9)
    )
    sparse = pipe(**call(17, 9, attention="neighborhood:window=5x3")).images
    (report,) = pipe.attention_report
    assert report["sparse"] >= 2
    assert report["calls"]["dense"] == {}
    assert not torch.equal(sparse, dense)


def test_everything_is_taken_out_again_also_after_an_error(pipe, call, monkeypatch):
    owner, attribute = pipe._rotary.place(pipe.transformer)
    pipe(**call(8, 8))
    own, scheduler = getattr(owner, attribute), pipe.scheduler
    changed = []

    def fail(*_):
        changed.append(getattr(owner, attribute) is not own)
        raise RuntimeError("stop here")

    handle = pipe.transformer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        pipe(**call(16, 11, attention="neighborhood:window=5x3"))
    handle.remove()
    assert changed == [True]
    assert getattr(owner, attribute) is own
    assert pipe.scheduler is scheduler
    assert not pipe.transformer._forward_pre_hooks


def test_dype_is_chosen_knowingly(pipe, call, caplog):
    with caplog.at_level(logging.WARNING, logger="gensparse"):
        pipe(**call(9, 9))
        assert "patent pending" not in caplog.text
        pipe(**call(9, 9, position="dy_ntk"))
    assert caplog.text.count("patent pending") == 1


# --- arguments


def test_what_cannot_be_is_refused_before_the_first_step(pipe, call, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: pytest.fail("the model ran"))
    for wrong, match in (
        ({"highres": "cascade"}, "has no stages; choose direct or none"),
        ({"position": "ntk10"}, "stages of FLUX.1"),
        ({"position": "stretch"}, "position rule"),
        ({"height": 16 * pipe.token_size + 1}, f"multiples of {pipe.token_size}"),
        ({"native_size": pipe.token_size // 2}, f"multiples of {pipe.token_size}"),
        ({"attention": "nothing"}, "nothing"),
    ):
        with pytest.raises(ConfigError, match=match):
            pipe(**call(16, 16, **wrong))
    with pytest.raises(TypeError, match="strength"):
        pipe(**call(16, 16, strength=0.5))


def test_the_native_size_is_the_configs_unless_it_is_given(name, stock):
    assert highres_class(stock).__name__ == highres_name(stock)
    pipe = highres_class(stock).from_pipe(stock)
    assert pipe.native_size % pipe.token_size == 0
    if name != "hunyuanimage" and name != "lumina2":  # those say it in the transformer
        assert pipe.native_size == NATIVE * pipe.token_size


def test_families_with_nothing_to_stretch_say_why():
    for name, words in (("cogview4", "shares of the picture"), ("auraflow", "learned table"), ("sana", "no positions")):
        with pytest.raises(ConfigError, match=words):
            highres_class(tiny_pipeline(name))
    flux2 = tiny_pipeline("flux2")
    klein = type("Flux2KleinPipeline", (type(flux2),), {})(**flux2.components)
    assert highres_name(klein) == "Flux2KleinDirectPipeline"
