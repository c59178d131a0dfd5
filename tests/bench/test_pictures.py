"""What makes the pictures that are measured: contenders by their names, and each of their kinds at work."""

import numpy as np
import pytest

from gensparse.bench.pictures import Contender, Item, Maker, prompts
from gensparse.bench.quality import METHODS, UNET_METHODS, Options, is_slow, items, run_item
from gensparse.bench.store import Store
from gensparse.embedded.reader import Reader
from gensparse.errors import ConfigError

UNET = "embedded-unet"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("dense", ("cascade", "cascade", "dense")),
        ("auto", ("cascade", "cascade", "auto")),
        ("clear:radius=8", ("cascade", "cascade", "clear:radius=8")),
        ("freescale", ("cascade", "cascade", "freescale")),
        ("cascade", ("cascade", "cascade", "auto")),
        ("cascade:share=0.3+dense", ("cascade", "cascade:share=0.3", "dense")),
        ("direct", ("direct", "direct", "auto")),
        ("direct:position=ntk+clear:radius=4", ("direct", "direct:position=ntk", "clear:radius=4")),
        ("freescale+auto", ("freescale", "freescale", "auto")),
        ("stock", ("stock", "stock", "dense")),
        ("stock+clear:radius=4", ("stock", "stock", "clear:radius=4")),
    ],
)
def test_names_of_contenders(text, found):
    assert Contender.read(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "claer",
        "direct+claer",
        "dirct+dense",
        "direct:position=up",
        "stock:a=1",
        "+dense",
        "direct+",
        "hidiffusion:windows=maybe+auto",
        "",
    ],
)
def test_other_names_are_refused(text):
    with pytest.raises(ConfigError):
        Contender.read(text)


def test_a_way_that_the_model_has_not_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"demofusion is no way of .*direct"):
        Options(tmp_path / "run", contenders=("demofusion",))
    with pytest.raises(ConfigError, match="auto is no way of"):
        Options(tmp_path / "run", contenders=("auto+dense",))
    with pytest.raises(ConfigError, match=r"direct is no way of .*demofusion"):
        Options(tmp_path / "run", model=UNET, contenders=("direct",))
    assert not (tmp_path / "run").exists()


def test_usual_contenders_exist_for_their_models():
    for usual, model in ((METHODS, None), (UNET_METHODS, UNET)):
        for name in sum(usual.values(), ()):
            Contender.read(name).check(model)


def test_what_is_dense_at_once_is_measured_on_few_prompts_at_large_sizes(tmp_path):
    assert all(is_slow(name) for name in ("stock", "direct+dense", "none+dense"))
    assert not any(is_slow(name) for name in ("dense", "stock+clear:radius=8", "direct", "rendering", "bicubic"))
    options = Options(tmp_path, only="2048", contenders=("dense", "stock"))
    counts = [item.method for item in items(options)]
    assert (counts.count("dense"), counts.count("stock"), counts.count("rendering")) == (60, 6, 60)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (None, ("dense", "clear:radius=4", "cascade:share=0.5+dense", "direct+dense", "direct+clear:radius=4")),
        (None, ("stock", "stock+clear:radius=4")),
        (UNET, ("cascade+dense", "hidiffusion+auto", "rectifiedhr", "stock")),
    ],
    ids=["flux", "flux-stock", "unet"],
)
def test_every_kind_of_contender_makes_a_picture_of_its_own(tmp_path, model, names):
    store = Store(tmp_path)
    maker = Maker(Options(tmp_path, model=model, steps=4), store)
    pictures = {}
    for name in names:
        item = Item("512", name, prompts(1)[0])
        pictures[name] = np.asarray(maker(item), np.int16)
        use = maker.used[item.key]
        assert pictures[name].shape == (512, 512, 3)
        assert use.cpu_seconds > 0
        assert use.peak_bytes is None or use.peak_bytes > 2**27
    for first in names:
        for second in names:
            assert first == second or np.abs(pictures[first] - pictures[second]).max() > 2


def test_costs_are_kept_with_the_numbers(tmp_path):
    store = Store(tmp_path)
    maker = Maker(Options(tmp_path, steps=2, native=128), store)
    item = Item("native", "dense", prompts(1)[0])
    run_item(item, maker, Reader.load(), store, lambda text: None)
    row = store.rows[item.key]
    assert 0 < row["core_seconds"] < 600
    assert row["seconds"] > 0
