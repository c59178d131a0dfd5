"""Golden vectors: where they are, which folders the tests own, and strict reading.

`GENSPARSE_GOLDEN` may name another root with the same folders and other files of the same schemas, so tests take every
name and parameter from the files. A file or an array that no schema describes is an error, never skipped.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

# folder -> test modules that read it
OWNED: dict[str, tuple[str, ...]] = {
    "natten": ("patterns/test_golden_masks.py", "testing/test_natten_order.py", "kernels"),
    "clear": ("patterns/test_golden_masks.py", "kernels"),
    "classic_windows": ("patterns/test_golden_masks.py", "kernels"),
    "msw_msa": ("patterns/test_golden_masks.py", "testing/test_msw_reference.py", "kernels"),
    "highres-rope": ("highres",),
    "highres-freq": ("highres",),
}


class GoldenError(AssertionError):
    """A golden file that the tests do not understand."""


@dataclass(frozen=True)
class Schema:
    """The arrays of one kind of file: names it must have, names it may have, or a grammar for all names."""

    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    grammar: str | None = None

    def fits(self, names: Iterable[str]) -> bool:
        names = set(names)
        if self.grammar is not None:
            return bool(names) and all(re.fullmatch(self.grammar, name) for name in names)
        return self.required <= names <= self.required | self.optional


def _schema(required: str, optional: str = "") -> Schema:
    return Schema(frozenset(required.split()), frozenset(optional.split()))


SCHEMAS: dict[str, dict[str, Schema]] = {
    "natten": {
        "attention": _schema("q k v out lse mask kernel_size stride dilation is_causal"),
        "attention_extra_keys": _schema("q k v out lse mask kernel_size stride dilation is_causal add_k add_v"),
        "token_permute": Schema(grammar=r"grid\d+(x\d+){0,2}_tile\d+(x\d+){0,2}_dil\d+(x\d+){0,2}"),
        "merge": _schema("outs lses out lse"),
    },
    "clear": {
        "attention": _schema(
            "q k v out mask text_length height width window_size down_factor proportional scale", "spatial_weight"
        ),
    },
    "classic_windows": {
        "masks": Schema(
            grammar=r"(swin(_masked|_wrap)?_w\d+_s\d+|halo_b\d+_h\d+|maxvit_grid_g\d+|cswin_[hv]_sw\d+|ccnet|"
            r"crossformer_sda_G\d+|crossformer_lda_G\d+_I\d+)_\d+x\d+"
        ),
    },
    "msw_msa": {
        "even": _schema("q k v out heads height width shift_index window shift mask window_id"),
        "odd_bicubic": _schema("q k v out heads height width shift_index window shift"),
    },
}


def golden_root() -> Path:
    """GENSPARSE_GOLDEN, or tests/golden."""
    return Path(os.environ.get("GENSPARSE_GOLDEN") or Path(__file__).resolve().parent / "golden")


def folder_files(name: str, root: Path | None = None) -> list[Path]:
    """Every file of an owned folder but its README.md; an empty or missing folder is an error."""
    folder = (root or golden_root()) / name
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    if not files:
        raise GoldenError(f"golden folder {folder} holds no files")
    return files


def unowned_folders(root: Path | None = None) -> list[str]:
    """Folders of the root that no test reads."""
    return sorted(path.name for path in (root or golden_root()).iterdir() if path.is_dir() and path.name not in OWNED)


def read(path: Path, schemas: Mapping[str, Schema]) -> tuple[str, dict[str, np.ndarray]]:
    """Kind and arrays of an npz file; GoldenError unless exactly its schema's arrays are there."""
    if path.suffix != ".npz":
        raise GoldenError(f"{path}: not an npz file")
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    for kind, schema in schemas.items():
        if schema.fits(arrays):
            return kind, arrays
    raise GoldenError(f"{path}: arrays {sorted(arrays)} match none of {', '.join(schemas)}")


def load(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """`read` with the schemas of the file's folder."""
    return read(path, SCHEMAS[path.parent.name])


def golden_params(*folders: str, kinds: Iterable[str] = ()) -> list:
    """One pytest parameter per file, id golden-<folder>-<file>.

    With `kinds`, files known to be of another kind are left out; unknown files stay in, so that they fail.
    """
    wanted = set(kinds)
    paths = [path for folder in folders for path in folder_files(folder)]
    return [
        pytest.param(path, id=f"golden-{path.parent.name}-{path.name}")
        for path in paths
        if not wanted or _kind(path) in wanted | {None}
    ]


def unpack_mask(bits: np.ndarray, keys: int) -> np.ndarray:
    """Boolean rows from numpy packbits rows, cut to `keys` columns."""
    return np.unpackbits(bits, axis=-1)[:, :keys].astype(bool)


def _kind(path: Path) -> str | None:
    try:
        return load(path)[0]
    except Exception:  # an unreadable file must become a failing test, not a collection error
        return None
