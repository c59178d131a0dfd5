"""Estimates against counted numbers, and advice that holds."""

import pytest

from gensparse.engine.resolve import attention_density
from gensparse.estimate import (
    GIB,
    Rates,
    StageShape,
    calibrate,
    decode_bytes,
    decode_flops,
    estimate,
    format_bytes,
    format_seconds,
    time_class,
)
from gensparse.methods import METHODS
from gensparse.models import REGISTRY, Architecture

FLUX = Architecture()


def flux(size: int, **options: object):
    values = {"n_text": 512, "dtype": "bf16", **options}
    return estimate(FLUX, [StageShape(size, size, 28)], **values)


def test_attention_work_is_the_published_count() -> None:
    # CLEAR (arXiv 2412.16112): 53.6 TFLOP of dense attention per layer at 4096, 0.26 at 1024
    for size, tflop in ((1024, 0.26), (4096, 53.6)):
        stage = flux(size).stages[0]
        assert stage.attention_flops / FLUX.layers / 1e12 == pytest.approx(tflop, rel=0.01)


def test_linear_work_at_4096_is_the_known_total() -> None:
    assert flux(4096).stages[0].linear_flops == pytest.approx(0.85e15, rel=0.02)  # 24 d^2 per token and layer


@pytest.mark.parametrize(("size", "gib"), [(1024, 0.46), (2048, 1.66), (4096, 6.5), (8192, 25.8)])
def test_activations_match_the_traces(size: int, gib: float) -> None:
    assert flux(size).stages[0].activation_bytes / GIB == pytest.approx(gib, rel=0.05)


def test_weights_match_the_published_sizes() -> None:
    assert flux(1024).weight_bytes / GIB == pytest.approx(22.2 + 9.1, rel=0.03)


def test_untiled_decode_of_a_megapixel_is_the_traced_one() -> None:
    assert decode_bytes(FLUX, 1024, 1024, 2) / GIB == pytest.approx(1.5, rel=0.05)
    assert decode_bytes(FLUX, 8192, 8192, 2) < 3 * GIB  # by tiles


def test_guidance_doubles_the_stage_it_runs_in() -> None:
    once = estimate(FLUX, [StageShape(512, 512, 4)], n_text=16, dtype="fp32")
    twice = estimate(FLUX, [StageShape(512, 512, 4, passes=2)], n_text=16, dtype="fp32")
    assert twice.stages[0].linear_flops == 2 * once.stages[0].linear_flops
    assert twice.peak_bytes == once.peak_bytes


def test_density_scales_attention_only() -> None:
    dense = estimate(FLUX, [StageShape(512, 512, 4)], n_text=16, dtype="fp32").stages[0]
    sparse = estimate(FLUX, [StageShape(512, 512, 4, "clear", 0.25)], n_text=16, dtype="fp32").stages[0]
    assert sparse.attention_flops == pytest.approx(0.25 * dense.attention_flops)
    assert sparse.linear_flops == dense.linear_flops


@pytest.mark.parametrize("size", [2048, 4096, 8192])
@pytest.mark.parametrize("gib", [4, 12, 24, 40])
def test_advice_is_true(size: int, gib: int) -> None:
    got = flux(size, limit_bytes=gib * GIB, dtype="fp32")
    assert got.fits == (not got.advice)
    for line in got.advice:
        if line.startswith("--offload"):
            assert flux(size, limit_bytes=gib * GIB, dtype="fp32", offload=line.split()[1]).fits
        if line.startswith("--size"):
            assert flux(int(line.split()[1]), limit_bytes=gib * GIB, dtype="fp32").fits


def test_offload_is_no_advice_for_a_cpu() -> None:
    lines = flux(4096, limit_bytes=24 * GIB, can_offload=False).advice
    assert lines
    assert not [line for line in lines if "offload" in line]


def test_offload_leaves_less_on_the_device() -> None:
    peaks = [flux(2048, offload=choice).peak_bytes for choice in ("none", "model", "group", "sequential")]
    assert peaks[0] > peaks[1] > peaks[2] >= peaks[3]


def test_time_adds_up() -> None:
    rates = Rates(linear=1e12, attention=5e11, decode=1e11)
    stages = [StageShape(256, 256, 20, passes=2), StageShape(512, 512, 10)]
    got = estimate(FLUX, stages, n_text=32, dtype="fp32", rates=rates)
    parts = sum((s.seconds or 0) + (s.enter_seconds or 0) for s in got.stages)
    assert got.seconds == pytest.approx(parts + (got.decode_seconds or 0))
    assert got.stages[0].enter_seconds == 0
    entered = decode_flops(FLUX) * (256**2 + 512**2) / rates.decode
    assert got.stages[1].enter_seconds == pytest.approx(entered)


def test_given_picture_is_encoded_first() -> None:
    got = estimate(FLUX, [StageShape(512, 512, 4)], n_text=32, dtype="fp32", from_picture=True)
    assert got.stages[0].enter_flops == decode_flops(FLUX) * 512**2


def test_without_rates_there_is_no_time() -> None:
    got = flux(1024)
    assert (got.seconds, got.time_class) == (None, None)
    assert got.to_dict()["fits"] is True


@pytest.mark.parametrize(
    ("seconds", "word", "text"),
    [
        (0.04, "seconds", "0.0 s"),
        (9.96, "seconds", "10 s"),
        (59, "under a minute", "59 s"),
        (125, "minutes", "2 min 05 s"),
        (7800, "hours", "2 h 10 min"),
        (1e6, "days", "277 h 46 min"),
    ],
)
def test_times_in_words(seconds: float, word: str, text: str) -> None:
    assert time_class(seconds) == word
    assert format_seconds(seconds) == text


def test_bytes_in_words() -> None:
    assert (format_bytes(3 * GIB / 2), format_bytes(5 << 20)) == ("1.5 GiB", "5 MiB")


def test_calibration_gives_speeds_and_is_kept() -> None:
    rates = calibrate("cpu", "fp32", 64, 16)
    assert min(rates.linear, rates.attention, rates.decode) > 1e6
    assert calibrate("cpu", "fp32", 64, 16) is rates


def test_embedded_model_fits_a_laptop_at_4096() -> None:
    stages = [StageShape(4096, 4096, 7, "neighborhood", 0.005)]
    got = estimate(REGISTRY["embedded"].architecture, stages, n_text=32, dtype="fp32")
    assert got.peak_bytes < 6 * GIB


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_density_to_estimate_with(name: str) -> None:
    """Also those that choose at run time, compute in their own way, or stay dense in early steps or on pictures."""
    info = REGISTRY["flux.1-schnell"]
    density = attention_density(name, 256, 192, info)
    assert 0 < density <= 1
    if name in ("radial", "msw_msa"):
        assert density == 1.0
    if name in ("proxy", "agentsd", "biformer"):
        assert density < 1
