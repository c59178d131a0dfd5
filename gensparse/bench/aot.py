"""Ahead-of-time gate: every shipped config compiled for its GPU, on a machine without one.

Triton's wheel brings its own ptxas, cuobjdump and nvdisasm, so registers, spills, shared memory and instructions can be
read from the machine code. A config passes when it fits, keeps its loops free of spills, and multiplies on the tensor
cores. Nothing here says how fast a kernel is.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from gensparse.errors import BackendError
from gensparse.kernels.triton import installed
from gensparse.kernels.triton.tune import ARCHS, Case, Config, padded_dim, shipped_config

KIB = 1 << 10
STACK_BYTES = 64  # outside the loops; inside none are allowed
REGISTERS = 255
WIDE_DIM = 128  # head dimension up to which the newest tensor instructions are asked for
# no config without spills was found for these; exact fp32 products keep all operands in registers
KNOWN = {("forward", "float32", 256), ("dq", "float32", 256)}
ATTENTION = ("forward", "dq", "dkv")
HELPERS = ("delta", "merge", "sum")
HALF = ("bfloat16", "float16")
_TRITON_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_BATCH, _HEADS, _TOKENS = 2, 24, 4608  # of the call whose strides are compiled for


class Machine(NamedTuple):
    """What one block may use on an architecture, and the instruction that says tensor cores are used."""

    shared: int
    tensor: str


MACHINES = {
    "sm_80": Machine(163 * KIB, "HMMA"),
    "sm_89": Machine(99 * KIB, "HMMA"),
    "sm_90": Machine(227 * KIB, "HGMMA"),
    "sm_100": Machine(227 * KIB, "UTCHMMA"),
    "sm_120": Machine(99 * KIB, "HMMA"),
    "gfx942": Machine(64 * KIB, "v_mfma"),
}


@dataclass(frozen=True)
class Build:
    """One kernel to compile.

    Args:
        kernel: one of `ATTENTION` or `HELPERS`.
        arch: one of `ARCHS`.
        dtype: "bfloat16", "float16" or "float32", of q, k and v.
        dim: head dimension, not padded.
        config: block sizes, warps, stages, loader; the helpers only read the warps.
        bias: whether the call has a key bias.
        groups: whether the plan has a menu.
        tiles: query and key slots of the plan's tiles.
    """

    kernel: str
    arch: str
    dtype: str
    dim: int
    config: Config
    bias: bool = False
    groups: bool = False
    tiles: tuple[int, int] = (128, 64)

    @property
    def name(self) -> str:
        """Short text that tells builds apart, for tables and test ids."""
        words = [self.kernel, self.arch, _TRITON_TYPES[self.dtype], f"d{self.dim}"]
        words += ["bias"] * self.bias + ["groups"] * self.groups
        if self.kernel in ATTENTION:
            shape = self.config
            words.append(f"{shape.BM}x{shape.BN}w{shape.num_warps}s{shape.num_stages}{shape.loader}")
        return "-".join(words)


@dataclass(frozen=True)
class Reading:
    """What the compiler made of a build; counts are instructions in the machine code.

    Args:
        registers: per thread (VGPRs on AMD).
        stack: bytes per thread of spills and other local memory.
        loop_spills: local loads and stores inside a pipelined loop (any loop where nothing is pipelined).
        shared: bytes per block.
        tensor: matrix instructions of the architecture's newest kind.
        warp_tensor: those of the older kind, one warp at a time, which blocks of fewer than 64 rows use.
        copies: asynchronous copies to shared memory.
        descriptors: loads by tensor descriptor.
        error: why it did not compile.
    """

    registers: int = 0
    stack: int = 0
    loop_spills: int = 0
    shared: int = 0
    tensor: int = 0
    warp_tensor: int = 0
    copies: int = 0
    descriptors: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Result:
    """A build, its reading, and what the gate objects to."""

    build: Build
    reading: Reading
    problems: tuple[str, ...] = field(default=())

    @property
    def passes(self) -> bool:
        """Whether the gate has no objection, or only one that is known and lasting (`KNOWN`)."""
        return not self.problems or (self.known and not self.reading.error)

    @property
    def verdict(self) -> str:
        """pass, or what is wrong."""
        text = "; ".join(self.problems)
        return f"known: {text}" if text and self.passes else text or "pass"

    @property
    def known(self) -> bool:
        build = self.build
        return (build.kernel, build.dtype, padded_dim(build.dim)) in KNOWN

    def row(self) -> dict[str, Any]:
        """One line of the table."""
        build, reading = self.build, self.reading
        config = {item.name: getattr(build.config, item.name) for item in fields(build.config)}
        numbers = {item.name: getattr(reading, item.name) for item in fields(reading) if item.name != "error"}
        return {
            "arch": build.arch,
            "kernel": build.kernel,
            "dtype": build.dtype,
            "head_dim": build.dim,
            "bias": int(build.bias),
            **config,
            **numbers,
            "verdict": self.verdict,
        }


def gate(build: Build) -> Result:
    """Compile a build and judge it."""
    reading = compile_build(build)
    return Result(build, reading, tuple(_problems(build, reading)))


def _problems(build: Build, reading: Reading) -> Iterator[str]:
    if reading.error:
        yield f"does not compile: {reading.error}"
        return
    machine = MACHINES[build.arch]
    if reading.shared > machine.shared:
        yield f"{reading.shared} bytes of shared memory, {machine.shared} exist"
    if reading.loop_spills:
        yield f"{reading.loop_spills} spills in a loop"
    allowed = 0 if build.arch.startswith("gfx") else STACK_BYTES
    if reading.stack > allowed:
        yield f"{reading.stack} bytes of stack, {allowed} allowed"
    if reading.registers > REGISTERS and not build.arch.startswith("gfx"):
        yield f"{reading.registers} registers"
    small = build.dim > WIDE_DIM  # registers leave room for small blocks only
    used = reading.tensor + small * reading.warp_tensor
    if build.kernel in ATTENTION and build.dtype in HALF and not used:
        yield f"no {machine.tensor}: the tensor cores are not used"
    if build.config.loader == "boxes" and not reading.descriptors:
        yield "loader boxes, but no load by descriptor"


# --------------------------------------------------------------------------------------------------------------- builds
def shipped_builds(archs: Iterable[str] = ARCHS, *, full: bool = False) -> list[Build]:
    """Builds that shipped configs lead to, without repeats.

    Args:
        full: every dtype, the padded head dimensions and calls without a bias as well; otherwise calls with one, which
            need the most registers, in bfloat16 with head dimensions 64, 128 and 256 and float32 with 64 and 128.
    """
    builds: dict[Build, None] = {}
    for arch in archs:
        for (dtype, dim), biases in (_FULL if full else _SHORT).items():
            for kernel in ATTENTION:
                # plans with and without bit masks may have configs of their own; the kernel holds both loops either way
                for bias, partial in product(biases, (True, False)):
                    case = Case(kernel, arch, dtype, padded_dim(dim), partial, bias, *Build.tiles)
                    builds[Build(kernel, arch, dtype, dim, shipped_config(case), bias)] = None
            if dtype != "float16":
                builds.update(dict.fromkeys(Build(kernel, arch, dtype, dim, HELPER) for kernel in HELPERS))
    return list(builds)


HELPER = Config(16, 32, 4, 1)  # of which the helpers only read the warps
_SHORT = {
    **{("bfloat16", dim): (True,) for dim in (64, 128, 256)},
    **{("float32", dim): (True,) for dim in (64, 128)},
}
_FULL = {
    **{("bfloat16", dim): (True, False) for dim in (64, 128, 256)},
    **{("bfloat16", dim): (True,) for dim in (16, 32, 40, 80, 160)},
    **{("float16", dim): (True,) for dim in (64, 128)},
    **{("float32", dim): (True,) for dim in (64, 128, 256)},
}


# -------------------------------------------------------------------------------------------------------------- compile
def compile_build(build: Build) -> Reading:
    """Compile for the architecture of the build and read its machine code; no GPU is needed.

    Raises:
        BackendError: triton is missing, or runs as an interpreter.
    """
    triton = _triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(*_source(build))
    number = build.arch.removeprefix("sm_")
    nvidia = number != build.arch
    target = GPUTarget("cuda", int(number), 32) if nvidia else GPUTarget("hip", build.arch, 64)
    config = build.config
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    try:
        made = triton.compile(source, target=target, options=options)
    except Exception as error:  # compilers raise whatever they like; the verdict tells
        lines = str(error).strip().splitlines()
        return Reading(error=f"{type(error).__name__}{': ' + lines[0] if lines else ''}")
    if nvidia:
        return _read_nvidia(made.asm["cubin"], made.metadata.shared, MACHINES[build.arch].tensor)
    return _read_amd(made.asm["amdgcn"], made.metadata.shared)


def triton_version() -> str:
    """Version of triton. Raises BackendError where there is none."""
    return str(_triton().__version__)


def _triton() -> ModuleType:
    if installed() is None:
        raise BackendError("the gate needs triton; pip install triton")
    import triton

    if triton.knobs.runtime.interpret:
        raise BackendError("the gate cannot compile while TRITON_INTERPRET is set; unset it")
    return triton


def _kernel(build: Build) -> Any:
    from gensparse.kernels.triton import backward, boxes, forward, merge

    name = build.kernel
    if build.config.loader == "boxes":
        if name != "forward":
            raise BackendError(f"the {name} kernel loads no boxes")
        return boxes.forward_boxes_kernel
    owners = {"forward": forward, "merge": merge, "sum": merge}
    return getattr(owners.get(name, backward), f"{name}_kernel")


def _source(build: Build) -> tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """Kernel, signature, constants and attributes as a launch would specialise them.

    A launch turns integers equal to 1 into constants and notes pointers and integers that 16 divides: without those
    facts loads are not vectorised.
    """
    kernel = _kernel(build)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list] = {}
    given = _constants(build)
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            if name not in given:
                raise BackendError(f"the {build.kernel} kernel has a constant {name} that the gate does not know")
            signature[name], constants[name] = "constexpr", given[name]
        elif name.startswith("p_"):
            signature[name] = _pointer(name, build)
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name.startswith("d_"):
            signature[name] = f"tensordesc<{_TRITON_TYPES[build.dtype]}[{','.join(map(str, _box(build)))}]>"
        elif name in ("factor", "scale"):
            signature[name] = "fp32"
        else:
            value = None if parameter.do_not_specialize else _stride(name, build)
            signature[name] = "constexpr" if value == 1 else "i32"
            if value == 1:
                constants[name] = 1
            elif value is not None and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return kernel, signature, constants, attributes


def _constants(build: Build) -> dict[str, Any]:
    from gensparse.kernels.triton import backward, merge

    config, rows = build.config, backward.DELTA_ROWS if build.kernel == "delta" else merge.ROWS
    return {
        "HAS_BIAS": build.bias,
        "HAS_GROUPS": build.groups,
        "NEGATE": False,
        "D": build.dim,
        "BD": padded_dim(build.dim),
        "TILE": build.tiles[0],
        "TILE_M": build.tiles[0],
        "TILE_N": build.tiles[1],
        "ROWS": rows,
        "BM": config.BM,
        "BN": config.BN,
        "STAGES": config.num_stages,
        "UPCAST": False,
        "PRECISION": "ieee",
    }


def _box(build: Build) -> tuple[int, ...]:
    """Box of a descriptor: one key tile of a picture, as square as its slots allow, with the vectors of one head."""
    height = 1 << (build.tiles[1].bit_length() // 2)
    return 1, 1, height, build.tiles[1] // height, build.dim


_OWN_TYPE = ("p_q", "p_k", "p_v", "p_out", "p_do", "p_dq", "p_dk", "p_dv", "p_x")
_FLOATS = ("p_bias", "p_lse", "p_dlse", "p_delta", "p_total", "p_dbias", "p_parts")
_PLAN = (
    "p_q_rows",
    "p_k_rows",
    "p_corners",
    "p_rows",
    "p_key_tile",
    "p_query_tile",
    "p_mask_id",
    "p_atlas",
    "p_pieces",
    "p_joins",
)


def _pointer(name: str, build: Build) -> str:
    if name in _OWN_TYPE:
        return "*" + _TRITON_TYPES[build.dtype]
    if name in _FLOATS or name.startswith("p_part_"):
        return "*fp32"
    if name in _PLAN:
        return "*i32"
    if name == "p_groups":
        return "*i64"
    raise BackendError(f"the {build.kernel} kernel has a pointer {name} whose type the gate does not know")


def _stride(name: str, build: Build) -> int | None:
    """Value of a stride of contiguous [B, S, H, D] tensors; None for other integers, about which nothing is assumed."""
    if name.startswith("box_"):  # batch on the first axis, heads on the last
        return {"b": 1, "h": 0, "d": build.dim}[name[-1]]
    if not name.startswith("stride_"):
        return None
    special = {"stride_bias_b": 0, "stride_bias_h": 0, "stride_bias": 1, "stride_gb": 0, "stride_gh": 0}
    tensor, axis = name[len("stride_") : -1], name[-1]
    if name in special:
        return int(build.groups) if name == "stride_gh" else special[name]
    dim = 1 if tensor in ("l", "dl") else build.dim  # lse and its gradient are [B, S, H]
    return {"b": _TOKENS * _HEADS * dim, "s": _HEADS * dim, "h": dim, "d": 1}.get(axis)


# ----------------------------------------------------------------------------------------------------------------- read
def _read_nvidia(cubin: bytes, shared: int, tensor: str) -> Reading:
    tools = _tools()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output(tools / "cuobjdump", "-res-usage", path)
        code = _output(tools / "nvdisasm", "-c", "-ndf", path)
    counted = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    if counted.keys() != {"REG", "STACK"}:
        raise BackendError(f"cuobjdump said nothing about registers: {usage[:200]!r}")
    return Reading(
        registers=counted["REG"],
        stack=counted["STACK"],
        loop_spills=loop_spills(code),
        shared=shared,
        tensor=_count(code, tensor),
        warp_tensor=_count(code, "HMMA"),
        copies=_count(code, "LDGSTS"),
        descriptors=_count(code, "UTMALDG"),
    )


def _tools() -> Path:
    return Path(_triton().__file__).parent / "backends" / "nvidia" / "bin"


def _output(tool: Path, *arguments: object) -> str:
    done = subprocess.run([str(tool), *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"{tool.name} failed: {done.stderr.strip()[:200]}")
    return done.stdout + done.stderr


def _count(code: str, name: str) -> int:
    return len(re.findall(rf"\b{name}\b", code))


def loop_spills(code: str) -> int:
    """Local loads and stores between a label and a jump back to it, in a disassembly.

    The kernels run a second, unpipelined pass over broken inputs only; its loops do not count where others are
    pipelined.
    """
    lines = code.splitlines()
    labels = {line.strip()[:-1]: number for number, line in enumerate(lines) if re.match(r"\s*\.L_x_\d+:", line)}
    loops = []
    for number, line in enumerate(lines):
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], number) < number:
            loops.append(range(labels[jump[1]], number))
    pipelined = [loop for loop in loops if any(re.search(r"\b(LDGSTS|UTMALDG)\b", lines[n]) for n in loop)]
    inside = {number for loop in pipelined or loops for number in loop}
    return sum(bool(re.search(r"\b(LDL|STL)\b", lines[number])) for number in inside)


def _read_amd(code: str, shared: int) -> Reading:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        if found is None:
            raise BackendError(f"the AMD assembly has no .{name}")
        return int(found[1])

    return Reading(
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        loop_spills=number("vgpr_spill_count"),
        shared=shared,
        tensor=len(re.findall(r"\bv_mfma_", code)),
    )


def summary(results: Iterable[Result]) -> Mapping[str, int]:
    """How many builds pass and fail."""
    verdicts = [result.passes for result in results]
    return {"builds": len(verdicts), "passed": sum(verdicts), "failed": len(verdicts) - sum(verdicts)}
