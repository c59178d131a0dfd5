"""Shipped configs compiled ahead of time, which needs no GPU: no spills, shared memory fits, tensor cores are used."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from gensparse.kernels.triton import interpreted
from gensparse.kernels.triton.tune import Case, config_for

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(interpreted(), reason="interpreted kernels cannot be compiled")

SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
INSTRUCTION = {"sm_80": r"\bHMMA", "sm_90": r"\bHGMMA", "sm_100": r"\bUTCHMMA", "gfx942": r"v_mfma"}
SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
INTS = re.compile(r"p_(q_rows|k_rows|key_tile|query_tile|mask_id|atlas|pieces|groups)$")
FLOATS = re.compile(r"p_(bias|lse|delta|total|dbias|part_\w+)$")


def kernel_of(name):
    from gensparse.kernels.triton import backward, forward

    return forward.forward_kernel if name == "forward" else getattr(backward, f"{name}_kernel")


def compiled(case):
    """The kernel of a case for its architecture, as the launchers specialise it for contiguous tensors."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config, kernel = config_for(case), kernel_of(case.kernel)
    constants = {
        "HAS_BIAS": case.bias, "HAS_GROUPS": False, "NEGATE": False, "D": case.dim, "BD": case.dim,
        "TILE_M": case.tile_m, "TILE_N": case.tile_n, "BM": config.BM, "BN": config.BN, "STAGES": config.num_stages,
        "UPCAST": False, "PRECISION": "ieee", "stride_qd": 1, "stride_kd": 1, "stride_vd": 1, "stride_dod": 1,
        "stride_bias": 1,
    }  # fmt: skip
    signature, values, divisible = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
            continue
        if name.startswith("p_"):
            signature[name] = "*i32" if INTS.match(name) else "*fp32" if FLOATS.match(name) else f"*{SHORT[case.dtype]}"
        else:
            signature[name] = "fp32" if name in ("factor", "scale") else "i32"
        if name.startswith("p_") or re.match(r"stride_(q|k|v|o|do|gq|gk)[bsh]$", name):
            divisible[(index,)] = [["tt.divisibility", 16]]
    hip = case.arch.startswith("gfx")
    target = GPUTarget("hip", case.arch, 64) if hip else GPUTarget("cuda", int(case.arch.removeprefix("sm_")), 32)
    source = ASTSource(kernel, signature, values, divisible)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=target, options=options)


def tool(name, *arguments):
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("kernel", "arch", "dim"),
    [
        ("forward", "sm_90", 128),
        ("dq", "sm_90", 128),
        ("dkv", "sm_90", 128),
        ("forward", "sm_80", 128),
        ("forward", "sm_100", 128),
        ("forward", "gfx942", 128),
    ],
)
def test_shipped_configs_do_not_spill(kernel, arch, dim):
    case = Case(kernel, arch, "bfloat16", dim, partial=True, bias=False, tile_m=128, tile_n=64)
    binary = compiled(case)
    assert binary.metadata.shared <= SHARED[arch]
    if arch.startswith("gfx"):
        text = binary.asm["amdgcn"]
        assert re.search(r"\.vgpr_spill_count:\s*0\b", text)
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            usage = tool("cuobjdump", "-res-usage", file.name)
            text = tool("nvdisasm", "-c", file.name)
        assert re.search(r"STACK:0\b", usage), usage
        assert not re.search(r"\b(LDL|STL)\b", text)
    assert re.search(INSTRUCTION[arch], text), "no tensor core instruction"
