"""The ahead-of-time gate on shipped configs, and planted builds that it must refuse."""

import re
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from gensparse.bench import aot
from gensparse.bench.aot import Build, Reading, gate, loop_spills, shipped_builds
from gensparse.errors import BackendError
from gensparse.kernels.triton import interpreted
from gensparse.kernels.triton.tune import ARCHS, DIMS, Case, Config, padded_dim, shipped_config

pytestmark = pytest.mark.skipif(interpreted(), reason="interpreted kernels cannot be compiled")

# kernel, architecture, dtype, head dimension, bias: every kernel, architecture and dtype, padded and native dimensions
COVERING = [
    ("forward", "sm_80", "bfloat16", 128, True),
    ("forward", "sm_80", "float16", 40, False),
    ("forward", "sm_89", "float16", 64, True),
    ("forward", "sm_90", "bfloat16", 128, True),
    ("forward", "sm_90", "bfloat16", 128, False),
    ("forward", "sm_90", "float16", 64, True),
    ("forward", "sm_90", "bfloat16", 256, True),
    ("forward", "sm_90", "float32", 128, False),
    ("forward", "sm_100", "bfloat16", 128, True),
    ("forward", "sm_120", "bfloat16", 128, False),
    ("forward", "gfx942", "bfloat16", 128, True),
    ("forward", "gfx942", "float16", 40, False),
    ("dq", "sm_80", "bfloat16", 128, True),
    ("dq", "sm_90", "float16", 128, True),
    ("dq", "sm_90", "bfloat16", 40, False),
    ("dq", "sm_100", "bfloat16", 128, False),
    ("dq", "gfx942", "float16", 64, True),
    ("dkv", "sm_80", "bfloat16", 64, True),
    ("dkv", "sm_90", "bfloat16", 128, True),
    ("dkv", "sm_90", "float32", 64, False),
    ("dkv", "sm_100", "float16", 128, False),
    ("dkv", "sm_120", "bfloat16", 64, False),
    ("dkv", "gfx942", "bfloat16", 128, True),
]
HELPING = [(kernel, arch) for kernel in aot.HELPERS for arch in ("sm_80", "sm_90", "gfx942")]


def shipped(kernel: str, arch: str, dtype: str, dim: int, bias: bool) -> Build:
    case = Case(kernel, arch, dtype, padded_dim(dim), True, bias, 128, 64)
    return Build(kernel, arch, dtype, dim, shipped_config(case), bias)


@pytest.mark.parametrize("case", COVERING, ids=lambda case: "-".join(map(str, case)))
def test_shipped_configs_pass_the_gate(case):
    result = gate(shipped(*case))
    assert not result.problems
    reading = result.reading
    assert 0 < reading.shared <= aot.MACHINES[case[1]].shared
    assert reading.registers > 32, "nothing was read"
    assert reading.loop_spills == 0
    if case[2] != "float32":
        assert reading.tensor or case[3] > aot.WIDE_DIM


@pytest.mark.parametrize(("arch", "dim", "bias"), [("sm_90", 128, True), ("sm_100", 64, False)])
def test_boxes_are_loaded_by_descriptor(arch, dim, bias):
    """No shipped table names them, because no GPU has shown that they are faster."""
    result = gate(Build("forward", arch, "bfloat16", dim, Config(128, 64, 8 if dim == 128 else 4, 3, "boxes"), bias))
    assert not result.problems
    assert result.reading.descriptors >= 4, "keys and values, full and partial tiles"
    assert result.reading.tensor


@pytest.mark.parametrize(("kernel", "arch"), HELPING)
def test_helpers_pass_the_gate(kernel, arch):
    result = gate(Build(kernel, arch, "bfloat16", 40, Config(16, 32, 4, 1), bias=True))
    assert not result.problems
    assert result.reading.registers > 8


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (Build("forward", "sm_90", "bfloat16", 128, Config(128, 64, 4, 3), True), "spills in a loop"),
        (Build("forward", "sm_89", "bfloat16", 256, Config(64, 64, 8, 3)), "bytes of shared memory, 101376 exist"),
        (Build("forward", "sm_90", "bfloat16", 64, Config(32, 32, 4, 2)), "no HGMMA"),
        (Build("forward", "sm_90", "bfloat16", 64, Config(128, 64, 3, 2)), "does not compile"),
        (Build("forward", "sm_80", "bfloat16", 16, Config(64, 64, 4, 2, "boxes")), "no load by descriptor"),
    ],
    ids=["spills", "shared memory", "no tensor cores", "three warps", "boxes without descriptors"],
)
def test_planted_configs_are_refused(build, problem):
    assert any(problem in found for found in gate(build).problems)


def test_known_cells_fail_and_are_named_so():
    """Once a config passes, the cell leaves the list."""
    for kernel, dtype, dim in aot.KNOWN:
        result = gate(shipped(kernel, "sm_90", dtype, dim, True))
        assert result.problems
        assert result.passes
        assert result.verdict.startswith("known: ")
    other = aot.Result(shipped("dkv", "sm_90", "float32", 256, True), Reading(stack=100), ("100 bytes of stack",))
    assert not other.passes
    assert other.verdict == "100 bytes of stack"


def test_each_limit_has_its_sentence():
    build = Build("forward", "sm_90", "bfloat16", 128, Config(128, 64, 8, 3))
    good = Reading(registers=200, shared=1 << 16, tensor=12)
    assert not list(aot._problems(build, good))
    amd = replace(build, arch="gfx942")
    for change, target, words in [
        ({"registers": 256}, build, "256 registers"),
        ({"stack": 65}, build, "65 bytes of stack, 64 allowed"),
        ({"stack": 4}, amd, "4 bytes of stack, 0 allowed"),
        ({"loop_spills": 1}, build, "1 spills in a loop"),
        ({"shared": (227 << 10) + 1}, build, "bytes of shared memory"),
        ({"tensor": 0, "warp_tensor": 9}, build, "no HGMMA"),
    ]:
        assert any(words in found for found in aot._problems(target, replace(good, **change)))
    assert not list(aot._problems(replace(build, dim=256), replace(good, tensor=0, warp_tensor=9)))


CODE = """
        /*0000*/                   STL [R1], R2 ;
.L_x_0:
        /*0010*/                   LDGSTS.E.128 [R4], desc[UR4][R2.64] ;
        /*0020*/                   LDL R2, [R1] ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0040*/                   LDL R2, [R1] ;
        /*0050*/                   STL [R1], R2 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/               @P0 BRA `(.L_x_2) ;
        /*0080*/                   LDL R2, [R1] ;
.L_x_2:
        /*0090*/                   EXIT ;
"""


def test_spills_count_inside_pipelined_loops():
    assert loop_spills(CODE) == 1
    assert loop_spills(re.sub("LDGSTS.*;", "NOP ;", CODE)) == 3
    assert loop_spills(CODE.replace("LDL R2", "LDG R2").replace("STL", "STG")) == 0


def test_unknown_arguments_of_a_kernel_are_named(monkeypatch):
    build = Build("merge", "sm_90", "bfloat16", 64, Config(16, 32, 4, 1))
    constants = aot._constants(build)
    monkeypatch.setattr(aot, "_constants", lambda build: {k: v for k, v in constants.items() if k != "TILE"})
    with pytest.raises(BackendError, match="constant TILE that the gate does not know"):
        aot._source(build)
    monkeypatch.undo()
    monkeypatch.setattr(aot, "_PLAN", ("p_q_rows",))
    with pytest.raises(BackendError, match="pointer p_joins whose type"):
        aot._source(build)


def test_shipped_builds_cover_every_table():
    builds = shipped_builds(full=True)
    assert len(builds) == len(set(builds))
    assert {build.arch for build in builds} == set(ARCHS) == set(aot.MACHINES)
    assert {build.kernel for build in builds} == {*aot.ATTENTION, *aot.HELPERS}
    assert {build.dtype for build in builds} == {"bfloat16", "float16", "float32"}
    assert {padded_dim(build.dim) for build in builds} == set(DIMS)
    assert {build.bias for build in builds} == {True, False}
