"""What `--highres` takes: names and settings as data, the same in the pipelines and in the table."""

import pytest

from gensparse.errors import ConfigError
from gensparse.families.checkpoints import CHECKPOINTS
from gensparse.highres.rope import RULES
from gensparse.highres.ways import AUTO, POSITIONS, WAYS, parse_way
from gensparse.models import REGISTRY
from gensparse.request import GenerateRequest


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        ("auto", "auto", {}),
        ("cascade", "cascade", {}),
        (" cascade : alpha = 1x0.5 , low_pass=dwt ", "cascade", {"alpha": (1.0, 0.5), "low_pass": "dwt"}),
        ("freescale:cosine_scale=1,jitter=false", "freescale", {"cosine_scale": 1.0, "jitter": False}),
        ("demofusion:view_batch=4,scales=3x1x1", "demofusion", {"view_batch": 4, "scales": (3.0, 1.0, 1.0)}),
        ("direct:position=yarn", "direct", {"position": "yarn"}),
        ("none", "none", {}),
    ],
)
def test_text_is_read(text: str, name: str, settings: dict) -> None:
    asked = parse_way(text)
    assert (asked.name, dict(asked.settings)) == (name, settings)
    assert parse_way(asked.text) == asked


def test_settings_of_a_method_are_left_to_it() -> None:
    asked = parse_way("hidiffusion:windows=false")
    assert (asked.name, asked.settings, asked.rest) == ("hidiffusion", {}, "windows=false")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cascad", "did you mean cascade"),
        ("", "known"),
        (7, "give NAME"),
        (None, "give NAME"),
        ("auto:alpha=1", "unknown"),
        ("cascade:beat=1", "it has share, alpha"),
        ("none:alpha=1", "it has none"),
        ("cascade:alpha=2", "numbers from 0 to 1"),
        ("cascade:alpha", "another form"),
        ("cascade:alpha=1,alpha=1", "once"),
        ("freescale:jitter=maybe", "true or false"),
        ("demofusion:view_batch=1.5", "whole number from 1 to 1024"),
        ("demofusion:scales=1x2", "3 numbers"),
        ("direct:position=north", "auto or base"),
        ("freescale:cosine_scale=nan", "number"),
        ("x" * 2000, "give NAME"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_anything_else_is_refused_by_name(text: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_way(text)
    with pytest.raises(ConfigError):
        GenerateRequest(prompt="x", highres=text)


def test_the_table_names_only_ways_that_exist() -> None:
    for row in CHECKPOINTS.values():
        assert row.auto in row.ways
        assert set(row.ways) <= set(WAYS)
    assert set(WAYS) == {name for row in CHECKPOINTS.values() for name in row.ways}
    assert {info.family for info in REGISTRY.values()} <= set(CHECKPOINTS)
    assert AUTO not in WAYS


def test_positions_are_those_of_the_rotary_rules() -> None:
    assert set(POSITIONS) == {"auto", *RULES}


def test_pipelines_know_what_the_table_says() -> None:
    from gensparse import pipelines
    from gensparse.pipelines.flux_ways import WAYS as OF_FLUX
    from gensparse.pipelines.unet_ways import WAYS as OF_UNETS
    from gensparse.pipelines.unet_ways import as_way

    for row in CHECKPOINTS.values():
        cls = getattr(pipelines, row.highres)
        known = set(OF_UNETS) if row.levels == "steps" else set(cls._ways)
        known |= set(OF_FLUX) if row.family == "flux" else set()
        known -= {"freescale", "hidiffusion"} if row.denoiser == "transformer" else set()  # for convolutions
        assert set(row.ways) == known, row.family
    assert as_way("freescale:fusion=reference,freeu=false").method.fusion == "reference"
    assert as_way("freescale:freeu=false").freeu is None
    assert as_way("cascade:alpha=0.25").settings.alpha == (0.25,)
    assert as_way("rectifiedhr:count=3").recipe.count == 3
    assert as_way("hidiffusion:windows=false").method.windows is False
    with pytest.raises(ConfigError, match="own attention"):
        as_way("hidiffusion").attention("clear", native=False)
