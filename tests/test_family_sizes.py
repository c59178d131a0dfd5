"""Costs of every family, from configs: weights as the real layers have them, native sizes, and what a GPU gets."""

import pytest
from accelerate import init_empty_weights

from gensparse.engine import execute, plan
from gensparse.errors import ConfigError
from gensparse.families.checkpoints import CHECKPOINTS
from gensparse.families.published import PUBLISHED
from gensparse.families.sizes import SDXL, unet_sizes
from gensparse.models import REGISTRY
from gensparse.request import GenerateRequest

GIB = 1 << 30


@pytest.mark.parametrize("alias", PUBLISHED)
def test_weights_are_those_of_the_real_layers(alias: str) -> None:
    import diffusers

    config = {key: value for key, value in PUBLISHED[alias].items() if key != "_class_name"}
    if "pos_embed_max_size" in config:  # a table that is no weight, and slow to make
        config["pos_embed_max_size"] = 4
    with init_empty_weights():
        model = getattr(diffusers, PUBLISHED[alias]["_class_name"]).from_config(config)
    counted = sum(weight.numel() for weight in model.parameters())
    assert REGISTRY[alias].architecture.transformer_params == pytest.approx(counted, rel=0.04)


def test_sizes_of_sdxl_are_the_traced_ones() -> None:
    got = unet_sizes(PUBLISHED["sdxl"], {})
    assert got.attention_flops == SDXL.attention_flops
    assert got.linear_flops == pytest.approx(SDXL.linear_flops, rel=0.03)
    assert got.transformer_params == pytest.approx(SDXL.transformer_params, rel=0.001)
    assert got.values == pytest.approx(SDXL.values, rel=0.002)
    assert (got.level, got.width, got.layers, got.head_dim) == (1, 640, 19, 64)


@pytest.mark.parametrize(
    ("alias", "native", "multiple", "tokens"),
    [
        ("sdxl", 1024, 8, 4096),
        ("sdxl-turbo", 512, 8, 1024),
        ("sd1.5", 512, 8, 4096),
        ("sd3-medium", 1024, 16, 4096),
        ("sd3.5-large", 1024, 16, 4096),
        ("qwen-image", 1456, 16, 8281),
    ],
)
def test_native_sizes(alias: str, native: int, multiple: int, tokens: int) -> None:
    info = REGISTRY[alias]
    assert (info.native_size, info.architecture.multiple) == (native, multiple)
    assert info.architecture.tokens(native, native) == tokens
    assert info.guidance_kind == "cfg"


def planned(alias: str, size: str, vram: str, **more):
    job = GenerateRequest(
        prompt="x", model=alias, size=size, device="cuda", dtype="fp16", max_vram=vram, attention="dense", **more
    )
    return plan(job, time_it=False)


@pytest.mark.parametrize(
    ("alias", "vram", "offload", "quantize", "tile", "halves"),
    [
        ("flux.1-dev", "12GB", "group", "none", "512", False),
        ("flux.1-dev", "16GB", "model", "nf4", "768", False),
        ("flux.1-dev", "24GB", "model", "fp8", "1024", False),
        ("flux.1-dev", "80GB", "none", "none", "none", False),
        ("sdxl", "12GB", "model", "none", "512", True),
        ("sdxl", "16GB", "none", "none", "768", False),
        ("sdxl", "24GB", "none", "none", "1024", False),
        ("sdxl", "80GB", "none", "none", "none", False),
    ],
)
def test_the_table_of_gpus_at_4096(alias: str, vram: str, offload: str, quantize: str, tile: str, halves: bool) -> None:
    resolved, cost = planned(alias, "4096", vram)
    got = resolved.request
    assert (got.offload, got.quantize, got.tile) == (offload, quantize, tile)
    assert cost.memory.halves == halves
    assert cost.fits
    assert (cost.phases[0].name, cost.phases[-1].name) == ("prompt", "decode")


@pytest.mark.parametrize("alias", ["sdxl", "sd1.5", "sd3.5-large", "qwen-image"])
def test_what_does_not_fit_is_said_with_advice(alias: str) -> None:
    _, cost = planned(alias, "8192", "2GB")
    assert not cost.fits
    assert any("are available" in line for line in cost.advice)
    assert len(cost.why) > 2


@pytest.mark.parametrize(
    ("way", "stages"),
    [
        ("auto", [1024, 2048, 4096]),
        ("none", [4096]),
        ("hidiffusion", [4096]),
        ("freescale", [1024, 2048, 4096]),
        ("rectifiedhr", [1024, 2560, 4096]),
        ("demofusion", [1024, 2048, 3072, 4096]),
    ],
)
def test_every_way_has_a_cost(way: str, stages: list[int]) -> None:
    resolved, cost = planned("sdxl", "4096", "80GB", highres=way)
    assert [stage.height for stage in cost.stages] == stages
    plain = planned("sdxl", "4096", "80GB", highres="none")[1]
    if way == "demofusion":  # 49 windows and 16 dilated views
        native = cost.stages[0].linear_flops
        assert cost.stages[-1].linear_flops == pytest.approx(65 * native)
        assert cost.stages[-1].activation_bytes < 6 * GIB
        assert cost.total_flops > plain.total_flops
    assert resolved.request.highres == ("cascade" if way == "auto" else way)


def test_ways_of_other_families_are_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"freescale does not exist for FLUX.1.*auto, none, cascade, direct"):
        planned("flux.1-dev", "2048", "80GB", highres="freescale")
    with pytest.raises(ConfigError, match=r"direct does not exist for Stable Diffusion XL"):
        planned("sdxl", "2048", "80GB", highres="direct")
    job = GenerateRequest(prompt="x", model="sdxl", highres="hidiffusion", attention="clear")
    with pytest.raises(ConfigError, match="its own attention"):
        plan(job, time_it=False)


def test_guidance_counts_in_the_stages_in_which_it_acts() -> None:
    for alias, factor in (("sd3-medium", 2), ("qwen-image", 2), ("flux.1-schnell", 1)):
        guided = planned(alias, "2048", "80GB", guidance=4.0)[1].stages[-1]
        plain = planned(alias, "2048", "80GB", guidance=1.0)[1].stages[-1]
        assert guided.linear_flops == pytest.approx(factor * plain.linear_flops)


def test_every_row_is_complete() -> None:
    for row in CHECKPOINTS.values():
        assert {"native_size", "steps", "guidance", "max_sequence_length"} <= set(row.facts)
        assert row.levels in ("dynamic", "static", "steps")
        assert row.guides in ("all", "native")


def test_a_way_that_a_known_model_does_not_have_is_refused_before_any_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gensparse.models._download", lambda *_: pytest.fail("the hub was asked"))
    for model in ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0"):
        with pytest.raises(ConfigError, match="direct does not exist for Stable Diffusion XL"):
            execute(GenerateRequest(prompt="x", model=model, highres="direct"))


def test_procedures_are_planned_with_their_own_attention() -> None:
    cost = planned("flux.1-dev", "4096", "80GB", highres="clear:radius=8")[1]
    assert cost.stages[-1].attention == "dense"  # asked for
    job = GenerateRequest(prompt="x", model="flux.1-dev", size="4096", highres="clear:radius=8", device="cuda")
    assert plan(job, time_it=False)[1].stages[-1].attention == "clear:radius=8,proportional=true"
