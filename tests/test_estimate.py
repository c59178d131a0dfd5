"""Estimates against counted numbers, and advice that holds."""

from dataclasses import replace

import pytest

from gensparse.engine import ladder
from gensparse.engine.resolve import attention_density
from gensparse.estimate import (
    GIB,
    Memory,
    Rates,
    StageShape,
    calibrate,
    decode_bytes,
    decode_flops,
    estimate,
    format_bytes,
    format_seconds,
    stored_bytes,
    time_class,
)
from gensparse.methods import METHODS
from gensparse.models import REGISTRY, SDXL, Architecture

FLUX = Architecture()


def flux(size: int, **options: object):
    memory = Memory(**{k: options.pop(k) for k in ("offload", "quantize", "tile", "chunk") if k in options})
    values = {"n_text": 512, "dtype": "bf16", "memory": memory, **options}
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
    assert decode_bytes(FLUX, 8192, 8192, 2, on_host=True) < 3 * GIB  # by tiles


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


# ---------------------------------------------------------------------------------------------------------- the ladder
HIGHRES = {"flux": (FLUX, [StageShape(4096, 4096, 10)], 512, "bf16")}
HIGHRES["sdxl"] = (SDXL, [StageShape(4096, 4096, 10, passes=2)], 77, "fp16")
GPUS = (12, 16, 24, 80)


def rung(model: str, gb: float, *, offload="auto", quantize="auto", installed=("fp8", "nf4"), size=None, **options):
    """The choice for a GPU of `gb` GB."""
    arch, shapes, n_text, dtype = HIGHRES[model]
    shapes = shapes if size is None else [replace(shapes[0], height=size, width=size)]
    limit = int(gb * 1e9)

    def cost(memory: Memory):
        return estimate(arch, shapes, n_text=n_text, dtype=dtype, memory=memory, limit_bytes=limit)

    def tile(item):
        resident = item.weight_bytes if item.memory.offload == "none" else 0
        return ladder.pick_tile(arch, shapes[0].height, shapes[0].width, 2, limit, resident)

    steps = list(ladder.rungs(arch, offload, quantize, gpu=True, quantizers=installed))
    return ladder.choose(cost, steps, tile=tile, **options)


@pytest.mark.parametrize(
    ("model", "gb", "memory"),
    [
        ("flux", 12, Memory("group", "none", "512", 0)),
        ("flux", 16, Memory("model", "nf4", "768", 0)),
        ("flux", 24, Memory("model", "fp8", "1024", 4096)),
        ("flux", 80, Memory("none", "none", "none", 0)),
        ("sdxl", 12, Memory("model", "none", "512", 0, halves=True)),
        ("sdxl", 16, Memory("none", "none", "768", 0)),
        ("sdxl", 24, Memory("none", "none", "1024", 0)),
        ("sdxl", 80, Memory("none", "none", "none", 0)),
    ],
    ids=str,
)
def test_every_gpu_gets_its_rung_at_4096(model: str, gb: int, memory: Memory) -> None:
    got = rung(model, gb)
    assert got.memory == memory
    assert got.fits
    assert max(phase.peak_bytes for phase in got.phases) == got.peak_bytes
    assert bool(got.why) == (memory.offload != "none")


def test_8192_fits_the_largest_gpu_by_tiles_and_no_small_one() -> None:
    assert rung("flux", 80, size=8192).memory == Memory("none", "none", "1024", 0)
    got = rung("flux", 24, size=8192)
    assert not got.fits
    assert any(line.startswith("--size") for line in got.advice)
    assert len(got.why) == 2 * len(ladder.LADDER)


def test_without_the_package_the_next_rung_is_taken() -> None:
    assert rung("flux", 16, installed=("fp8",)).memory == Memory("group", "none", "768", 0)


@pytest.mark.parametrize("gb", GPUS)
@pytest.mark.parametrize(
    ("fixed", "want"),
    [({"offload": "model"}, "offload"), ({"quantize": "none"}, "quantize"), ({"quantize": "int8"}, "quantize")],
)
def test_what_is_asked_for_stays(gb: int, fixed: dict, want: str) -> None:
    assert getattr(rung("flux", gb, **fixed).memory, want) == fixed[want]


def test_chunks_that_are_asked_for_stay() -> None:
    assert rung("flux", 80, chunk=100).memory.chunk == 100
    assert rung("flux", 24, chunk=0).memory.chunk == 0


def test_weights_that_wait_need_main_memory() -> None:
    assert rung("flux", 12, host_bytes=40 * GIB).memory.quantize == "none"
    assert rung("flux", 12, host_bytes=26 * GIB).memory == Memory("group", "fp8", "512", 0)  # 23 GiB wait
    got = rung("flux", 12, host_bytes=8 * GIB)
    assert not got.fits
    assert "main memory" in got.advice[0]


def test_chunks_and_guidance_in_halves_match_the_traces() -> None:
    assert flux(4096).stages[0].chunked_bytes / GIB == pytest.approx(5.0, rel=0.05)
    assert flux(8192).stages[0].chunked_bytes / GIB == pytest.approx(19.8, rel=0.05)
    for halves, gib in ((False, 4.9), (True, 2.46)):
        got = estimate(
            SDXL, [StageShape(4096, 4096, 1, passes=2)], n_text=77, dtype="fp16", memory=Memory(halves=halves)
        )
        assert got.stages[0].activation_bytes / GIB == pytest.approx(gib, rel=0.02)
    once = estimate(SDXL, [StageShape(1024, 1024, 1)], n_text=0, dtype="fp16").stages[0]
    assert (once.linear_flops + once.attention_flops) / 1e12 == pytest.approx(6.76, rel=0.02)  # counted on the layers


@pytest.mark.parametrize(("quantize", "gib"), [("none", 22.2), ("fp8", 14.1), ("int8", 11.1), ("nf4", 6.2)])
def test_stored_weights(quantize: str, gib: float) -> None:
    assert stored_bytes(FLUX, 2, quantize) / GIB == pytest.approx(gib, rel=0.03)


@pytest.mark.parametrize(("tile", "gib"), [("none", 24.0), ("feather:1024", 1.5), ("feather:512", 0.375)])
def test_decoding_follows_the_tiles(tile: str, gib: float) -> None:
    assert decode_bytes(FLUX, 4096, 4096, 2, tile, on_host=True) / GIB == pytest.approx(gib, rel=0.02)


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
