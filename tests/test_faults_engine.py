"""Bad input and broken machines, as the attention engine meets them: rows 20 to 23 of the list of faults."""

import json
import logging
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_checks import menu, oracle, random_qkv, run, usable

from gensparse import attention, backends
from gensparse.attention import dispatch, sparse_attention
from gensparse.errors import BackendError, ConfigError, LayoutMismatchError
from gensparse.kernels import triton as triton_kernels
from gensparse.kernels.need import Need
from gensparse.layout import Layout
from gensparse.patterns import (
    Anchors,
    Blocks,
    Box,
    CrissCross,
    Disc,
    Grid,
    Halo,
    LongDistance,
    Neighborhood,
    PerHead,
    Pooled,
    Proxy,
    Pyramid,
    Radial,
    Stripes,
    Text,
    VaryingWindow,
)
from gensparse.plan import build_plan

PICTURE = Layout.image(11, 13, text=5)
PATTERNS = [
    Disc(3) | Text(),
    Blocks(4) | Text(),
    Neighborhood(3, dilation=2) | Text(),
    CrissCross() | Text(),
    PerHead((Disc(2), Box(3))) | Text(),
]
plain = pytest.mark.parametrize("pattern", PATTERNS, ids=repr)

# ------------------------------------------------------------------------------------------------------- 20: arguments
BAD = [0, -1, -(10**30), True, np.bool_(True), 1.5, math.nan, math.inf, "8", "", [], {}, b"8"]
MAKERS = {
    "Disc radius": Disc,
    "Box radius": Box,
    "Neighborhood window": Neighborhood,
    "Neighborhood stride": lambda v: Neighborhood(9, stride=v),
    "Neighborhood dilation": lambda v: Neighborhood(9, dilation=v),
    "Blocks window": Blocks,
    "Halo block": lambda v: Halo(v, 2),
    "Grid grid": Grid,
    "LongDistance group": lambda v: LongDistance(v, 2),
    "LongDistance interval": lambda v: LongDistance(2, v),
    "Stripes width": Stripes,
    "Pooled cells": Pooled,
    "Proxy window": Proxy,
    "Pyramid cells": lambda v: Pyramid(cells=(v,), near=(2,)),
    "VaryingWindow window": VaryingWindow,
    "Radial block": lambda v: Radial(block=v),
    "Anchors window": Anchors,
}


@pytest.mark.parametrize("value", BAD, ids=repr)
@pytest.mark.parametrize("name", MAKERS)
def test_fault_20_bad_numbers_are_named_with_their_range(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        MAKERS[name](value)
    assert isinstance(caught.value, ConfigError)
    assert repr(value) in str(caught.value)
    assert "pass" in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (Neighborhood(12), ("Neighborhood window=12", "axis H", "11 tokens")),
        (Neighborhood((5, 14)), ("Neighborhood window=14", "axis W", "13 tokens")),
        (Neighborhood(4, dilation=3), ("dilation 3", "axis H", "11 tokens")),
        (Blocks(12), ("Blocks window=12", "axis H")),
        (Halo((3, 15), 1), ("Halo block=15", "axis W")),
        (Grid(12), ("Grid grid=12", "axis H")),
        (Stripes(12), ("Stripes width=12", "axis H")),
        (Stripes(14, "vertical"), ("Stripes width=14", "axis W")),
        (Pooled((12, 2), weights="mean"), ("Pooled cells=12", "axis H")),
        (Disc(3) | Blocks(12), ("Blocks window=12", "axis H")),
    ],
    ids=repr,
)
def test_fault_20_what_is_longer_than_an_axis_raises_and_clamped_fits(pattern, words):
    layout = Layout.image(11, 13)
    with pytest.raises(ConfigError) as caught:
        build_plan(pattern, layout)
    assert all(word in str(caught.value) for word in (*words, "clamped"))
    build_plan(pattern.clamped(layout.grid), layout)


@pytest.mark.parametrize("window", [1, 2, 4, 10, 11])
def test_fault_20_odd_and_even_windows_work(window):
    """An even window has one key more before its query than after it."""
    mask = Neighborhood((window, 1)).dense_mask(Layout.image(11, 3))[0]
    assert (mask.sum(1) == window).all()
    for pattern in (Blocks(window), Halo(window, 1), Grid(window)):
        assert pattern.clamped((1, 11, 3)).dense_mask(Layout.image(11, 3)).diagonal(axis1=1, axis2=2).all()


@pytest.mark.parametrize("make", [Disc, Box, lambda v: Halo(3, v)], ids=["Disc", "Box", "Halo"])
def test_fault_20_huge_radii_are_the_whole_picture(make):
    plan = build_plan(make(10**30), Layout.image(7, 5))
    assert plan.density == 1


ARGUMENTS = {
    "scale": [math.nan, math.inf, -math.inf, "0.1", True, [1.0], torch.ones(2)],
    "key_bias": [
        torch.zeros(148),
        torch.zeros(1, 148),
        torch.zeros(1, 1, 147),
        torch.zeros(1, 1, 149),
        torch.zeros(1, 3, 148),
        torch.zeros(3, 1, 148),
        torch.ones(1, 1, 148, dtype=torch.bool),
        torch.zeros(1, 1, 148, dtype=torch.int64),
    ],
    "groups": [
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(1, 3, dtype=torch.int64),
        torch.zeros(3, 4, dtype=torch.int64),
        torch.zeros(1, 4),
        torch.zeros(1, 4, dtype=torch.bool),
        torch.full((1, 4), 2),
        torch.full((2, 1), -1),
        None,
    ],
}


@pytest.mark.parametrize("backend", [None, "halo", "plan_loop", "reference"])
@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in ARGUMENTS.items() for v in values], ids=str)
def test_fault_20_arguments_of_a_call_are_named_on_every_backend_alike(name, value, backend):
    plan = build_plan(PerHead((Disc(2), Box(2))), PICTURE)
    q, k, v = random_qkv(PICTURE, batch=2, heads=4)
    options = {"groups": torch.zeros(1, 4, dtype=torch.int64), name: value}
    with pytest.raises(ConfigError, match=name):
        sparse_attention(q, k, v, plan, backend=backend, **options)


@pytest.mark.parametrize("backend", [0, "", "Halo", "cuda", ["halo"], True], ids=repr)
def test_fault_20_backends_that_do_not_exist_are_named(backend):
    plan = build_plan(Disc(3), PICTURE)
    with pytest.raises(BackendError, match="use one of partition"):
        sparse_attention(*random_qkv(PICTURE), plan, backend=backend)


# --------------------------------------------------------------------------------------------------------- 21: tensors
@plain
@pytest.mark.parametrize("dim", [1, 3, 72, 257, 320])
def test_fault_21_any_head_dimension(pattern, dim):
    plan = build_plan(pattern, PICTURE)
    q, k, v = random_qkv(PICTURE, dim=dim)
    want, _ = oracle(q, k, v, pattern, PICTURE, groups=menu(plan, 1, 2))
    for name in usable(plan, q):
        out, _ = run(name, q, k, v, plan=plan, groups=menu(plan, 1, 2))
        torch.testing.assert_close(out.double(), want, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("heads", [(6, 4), (2, 4), (3, 2), (4, 3)], ids=str)
def test_fault_21_heads_that_do_not_divide_are_named(heads):
    plan = build_plan(Disc(3), PICTURE)
    q = torch.randn(1, PICTURE.tokens, heads[0], 8)
    k = torch.randn(1, PICTURE.tokens, heads[1], 8)
    with pytest.raises(LayoutMismatchError, match=f"{heads[0]} query heads are no multiple of {heads[1]}"):
        sparse_attention(q, k, k, plan)


@plain
def test_fault_21_grouped_heads(pattern):
    plan = build_plan(pattern, PICTURE)
    q, k, v = random_qkv(PICTURE, batch=2, heads=6)
    k, v = k[:, :, :2], v[:, :, :2]
    groups = menu(plan, 2, 6)
    want, want_lse = oracle(q, k, v, pattern, PICTURE, groups=groups)
    for name in usable(plan, q):
        out, lse = run(name, q, k, v, plan=plan, groups=groups)
        torch.testing.assert_close(out.double(), want, atol=3e-6, rtol=1e-5)
        torch.testing.assert_close(lse.double(), want_lse, atol=3e-6, rtol=1e-5)


def test_fault_21_one_token():
    for layout in (Layout.image(1, 1), Layout.image(1, 1, text=1)):
        plan = build_plan(Disc(1) | Text(), layout)
        q, k, v = random_qkv(layout)
        want, _ = oracle(q, k, v, Disc(1) | Text(), layout)
        for name in usable(plan, q):
            torch.testing.assert_close(run(name, q, k, v, plan=plan)[0].double(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("empty", "word"), [(0, "sample"), (2, "head"), (3, "channel")])
def test_fault_21_empty_tensors_are_named(empty, word):
    q, k, v = (x.narrow(empty, 0, 0) for x in random_qkv(PICTURE))
    with pytest.raises(LayoutMismatchError, match=f"at least one .*{word}"):
        sparse_attention(q, k, v, build_plan(Disc(3), PICTURE))


def test_fault_21_tensors_of_other_kinds_are_named():
    plan = build_plan(Disc(3), PICTURE)
    q, k, v = random_qkv(PICTURE)
    for bad in ((q, k.bfloat16(), v), (q.int(), k.int(), v.int()), (q.cfloat(), k.cfloat(), v.cfloat())):
        with pytest.raises(ConfigError, match="floating-point tensors of one dtype on one device"):
            sparse_attention(*bad, plan)
    with pytest.raises(ConfigError, match="one device"):
        sparse_attention(q.to("meta"), k, v, plan)
    with pytest.raises(ConfigError, match="pass torch tensors"):
        sparse_attention(q.numpy(), k, v, plan)


def test_fault_21_rows_without_a_key_are_zero_on_every_backend():
    layout = Layout.image(9, 7, text=4)
    plan = build_plan(Disc(3), layout)
    q, k, v = random_qkv(layout)
    for name in usable(plan, q):
        out, lse = run(name, q, k, v, plan=plan)
        assert torch.equal(out[:, :4], torch.zeros_like(out[:, :4]))
        assert torch.isneginf(lse[:, :4]).all()
        assert torch.isfinite(out).all()


@plain
def test_fault_21_strides_do_not_matter(pattern):
    """Packed, transposed, expanded, reversed and sliced views."""
    plan = build_plan(pattern, PICTURE)
    groups = menu(plan, 2, 4)
    packed = torch.randn(2, PICTURE.tokens, 3, 4, 16)
    views = {
        "packed": [packed[:, :, i, :, 3:11] for i in range(3)],
        "heads first": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in packed.unbind(2)],
        "channels first": [x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for x in packed.unbind(2)],
        "one sample": [x[:1].expand(2, -1, -1, -1) for x in packed.unbind(2)],
        "one head": [x[:, :, :1].expand(-1, -1, 4, -1) for x in packed.unbind(2)],
        "every other": [x[..., ::2] for x in packed.unbind(2)],
        "one token": [
            packed[:, :, 0],
            *(x[:, :1].expand(-1, PICTURE.tokens, -1, -1) for x in packed[:, :, 1:].unbind(2)),
        ],
    }
    for tensors in views.values():
        before = [x.clone() for x in tensors]
        want, _ = oracle(*tensors, pattern, PICTURE, groups=groups)
        for name in usable(plan, tensors[0]):
            out, _ = run(name, *tensors, plan=plan, groups=groups)
            torch.testing.assert_close(out.double(), want, atol=3e-6, rtol=1e-5)
        assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True)), "arguments stay as they are"


def test_fault_21_offsets_beyond_31_bits():
    """Tokens of a view lie more than 2^31 elements apart; only the pages it touches are ever used."""
    layout = Layout.image(5, 7)
    step = (1 << 31) // (layout.tokens - 2)
    base = torch.empty(step * (layout.tokens - 1) + 8, dtype=torch.float16)
    far = base.as_strided((1, layout.tokens, 1, 8), (0, step, 8, 1))
    far.copy_(torch.randn(far.shape))
    assert (layout.tokens - 1) * step > 1 << 31
    plan = build_plan(Disc(3), layout)
    near = far.contiguous()
    for name in usable(plan, near):
        out = sparse_attention(far, far, far, plan, backend=name)
        torch.testing.assert_close(out, sparse_attention(near, near, near, plan, backend=name), rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------- 22: values
@plain
def test_fault_22_logits_beyond_fp16_stay_finite(pattern):
    """Logits of +-700,000 overflow fp16; lse and output stay those of fp64."""
    plan = build_plan(pattern, PICTURE)
    groups = menu(plan, 1, 2)
    q, k, v = random_qkv(PICTURE, dim=64, dtype=torch.float16)
    q, k = (x.sign() * 300 + x for x in (q, k))
    want, want_lse = oracle(q, k, v, pattern, PICTURE, groups=groups)
    assert want_lse.abs().max() > 65504
    for name in usable(plan, q):
        out, lse = run(name, q, k, v, plan=plan, groups=groups)
        assert torch.isfinite(out).all()
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-2)
        torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fault_22_hidden_keys_never_count(dtype):
    """A bias of -inf on a key equals its absence, even if it holds the largest logit, or hides everything."""
    plan = build_plan(Disc(3) | Text(), PICTURE)
    q, k, v = random_qkv(PICTURE, dim=64, dtype=dtype)
    bias = torch.zeros(1, 1, PICTURE.tokens)
    bias[..., 40:90] = -torch.inf
    loud = k.clone()
    loud[:, 40:90] *= 100
    for name in usable(plan, q):
        out, lse = run(name, q, loud, v, plan=plan, key_bias=bias)
        quiet, quiet_lse = run(name, q, k, v, plan=plan, key_bias=bias)
        assert torch.isfinite(out).all()
        torch.testing.assert_close(out, quiet, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, quiet_lse, rtol=1e-2, atol=1e-2)
        nothing, none = run(name, q, k, v, plan=plan, key_bias=torch.full_like(bias, -torch.inf))
        assert not nothing.any()
        assert torch.isneginf(none).all()


@plain
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_fault_22_one_broken_token_stays_in_its_rows(pattern, poison):
    """In a query only its own row, in a key or a value only the rows that see it; the log-sum-exp likewise."""
    plan = build_plan(pattern, PICTURE)
    q, k, v = random_qkv(PICTURE)
    groups = menu(plan, 1, 2)
    mask = torch.from_numpy(pattern.dense_mask(PICTURE))
    mask = mask[groups[0]] if groups is not None else mask.expand(2, -1, -1)
    own = torch.arange(PICTURE.tokens) == 60
    for number, touched in ((0, own.expand(2, -1)), (1, mask[:, :, 60]), (2, mask[:, :, 60])):
        tensors = [q, k, v]
        tensors[number] = tensors[number].clone()
        tensors[number][:, 60, :, 3] = poison
        for name in usable(plan, q):
            clean, clean_lse = run(name, q, k, v, plan=plan, groups=groups)
            with np.errstate(all="ignore"):
                out, lse = sparse_attention(*tensors, plan, backend=name, groups=groups, return_lse=True)
            out, clean = out[0].transpose(0, 1), clean[0].transpose(0, 1)
            torch.testing.assert_close(out[~touched], clean[~touched], atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(lse[0].T[~touched], clean_lse[0].T[~touched], atol=2e-6, rtol=1e-5)
            if number:
                assert torch.isnan(out[touched]).all()


# ---------------------------------------------------------------------------------------------------------- 23: machine
def isolated(code: str, tmp_path: Path, **environment: str) -> str:
    """Output of Python code in a fresh process."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CONFIG_HOME": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_TRITON = """
import importlib.metadata, logging, sys
sys.modules["triton"] = None
real = importlib.metadata.version
def version(name):
    if "triton" in name:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
"""


def test_fault_23_without_triton_calls_run_and_say_once_why(tmp_path):
    code = f"""{WITHOUT_TRITON}
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
import torch
from gensparse import Layout, build_plan, sparse_attention
from gensparse.patterns import Disc, Text
layout = Layout.image(9, 9, text=3)
plan = build_plan(Disc(3) | Text(), layout)
q = torch.randn(1, 84, 2, 8)
for _ in range(3):
    assert torch.isfinite(sparse_attention(q, q, q, plan)).all()
"""
    said = [line for line in isolated(code, tmp_path).splitlines() if "runs on" in line]
    assert len(said) == 1
    assert "runs on halo" in said[0]
    assert "Can't run triton" in said[0]


def test_fault_23_env_says_why_each_backend_does_not_run(tmp_path):
    code = f"""{WITHOUT_TRITON}
from gensparse.cli import main
for words in (["env"], ["env", "--json"]):
    try:
        main(words)
    except SystemExit as stop:
        assert not stop.code
    print("----", flush=True)
"""
    text, answer, _ = isolated(code, tmp_path).split("----")
    facts = json.loads(answer)
    assert facts["triton"] == "not installed"
    assert list(facts["backends"]) == list(attention.BACKENDS)
    assert facts["backends"]["triton"] != "ready"
    for name, reason in facts["backends"].items():
        assert reason == "ready" or reason.startswith(f"Can't run {name}; ")
        assert re.search(rf"^{name} +{re.escape(reason)}$", text, re.MULTILINE)


def test_fault_23_backends_of_this_machine():
    answers = backends("cpu")
    assert list(answers) == list(attention.BACKENDS)
    assert all(answers[name] is None for name in ("partition", "halo", "plan_loop", "reference"))
    assert "CPU" in answers["triton"] or triton_kernels.interpreted()
    assert backends() == backends("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("installed", "arch", "device", "words"),
    [
        (None, "sm_90", "cuda", "not installed: pip install triton"),
        ((2, 1), "sm_90", "cuda", "version 2.1 is installed and"),
        ((3, 7), "sm_75", "cuda", "sm_75 and sm_80"),
        ((3, 7), "mps", "mps", "'mps'"),
        ((3, 7), "cpu", "cpu", "on the CPU"),
        ((3, 7), "sm_90", "cuda", None),
        ((3, 7), "gfx942", "cuda", None),
    ],
    ids=str,
)
def test_fault_23_triton_refuses_machines_it_does_not_run_on(installed, arch, device, words, monkeypatch):
    monkeypatch.setattr(triton_kernels, "installed", lambda: installed)
    monkeypatch.setattr(triton_kernels, "interpreted", lambda: False)
    need = Need(torch.bfloat16, device, 128, queries=4608, keys=4608, density=0.3, arch=arch)
    reason = triton_kernels.why_not(need)
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize(("installed", "arch"), [(None, "sm_90"), ((3, 7), "sm_75")], ids=str)
def test_fault_23_a_gpu_without_kernels_gets_one_warning(installed, arch, monkeypatch, caplog):
    monkeypatch.setattr(triton_kernels, "installed", lambda: installed)
    dispatch.announce.cache_clear()
    plan = build_plan(Disc(3) | Text(), PICTURE)
    q = random_qkv(PICTURE)[0]
    need = replace(dispatch.need_of(q, q, q, plan, None, False), device="cuda", arch=arch)
    with caplog.at_level(logging.INFO, "gensparse"):
        assert [dispatch.choose_backend(plan, need) for _ in range(3)] == ["halo"] * 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "Can't run triton" in record.getMessage()


def test_fault_23_an_explicit_backend_says_why_and_never_falls_back(monkeypatch, caplog):
    monkeypatch.setattr(triton_kernels, "interpreted", lambda: False)
    plan = build_plan(Disc(3) | Text(), PICTURE)
    with caplog.at_level(logging.INFO, "gensparse"), pytest.raises(BackendError, match="Can't run triton; the tensors"):
        sparse_attention(*random_qkv(PICTURE), plan, backend="triton")
    assert not [record for record in caplog.records if "runs on" in record.getMessage()]
