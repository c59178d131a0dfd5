"""Published vectors of PrimeComposer, folder primecomposer, every file: through an applied method on a diffusers layer.

Once with the plans of the method, once with the dense masks of their patterns.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import one_block
import pytest
import torch
from golden_files import GoldenError, folder_files, golden_params, golden_root, load
from one_block import BLOCK, OneBlock, layer, one_block_family, run
from torch import Tensor

import gensparse
from gensparse import Concept, Subjects
from gensparse.families import CROSS
from gensparse.kernels import reference
from gensparse.methods import PrimeComposer
from gensparse.methods.primecomposer_run import PrimeComposerRun
from gensparse.processors import confined, shared, steering
from gensparse.subjects.placing import Box, Placed, placed
from gensparse.subjects.read_masks import box_mask

PATHS = ("plan", "dense_mask")
CANVAS = 512
"""Pixels of the files' canvas, on which the object stands in the middle."""

Arrays = dict[str, np.ndarray]
Patch = pytest.MonkeyPatch


def close(got: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=0, atol=1e-5)


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def by_dense_mask(q: Tensor, k: Tensor, v: Tensor, plan: Any, **options: Any) -> Any:
    """`sparse_attention` as the oracle computes it, from the dense mask of the plan's pattern."""
    for source in plan.sources:
        more = options["sources"][source.name]
        k, v = torch.cat([k, more[0]], 1), torch.cat([v, more[1]], 1)
    allowed = torch.from_numpy(plan.pattern.dense_mask(plan.layout, plan.data))
    found = reference.attend(q, k, v, allowed, scale=options.get("scale"), key_bias=options.get("key_bias"))
    return found if options.get("return_lse") else found[0]


def own_box(arrays: Arrays) -> Box:
    """The object's box, in pixels of its mask."""
    width, height = arrays["fg_wh_px"].tolist()
    rows, columns = (side / CANVAS for side in arrays["object_mask64"].shape)
    middle = CANVAS / 2
    return (
        (middle - height / 2) * rows,
        (middle - width / 2) * columns,
        (middle + height / 2) * rows,
        (middle + width / 2) * columns,
    )


def whereabouts(arrays: Arrays) -> Placed:
    grid, centre = tuple(arrays["grid"].tolist()), tuple(arrays["center_rowcol"].tolist())
    return placed(tensor(arrays["object_mask64"]), own_box(arrays), centre, grid)


def subjects(arrays: Arrays) -> Subjects:
    """The object, with a small region around the middle of its place."""
    row, column = arrays["center_rowcol"].tolist()
    size, half = (2048, 2048), 2 / 2048
    region = box_mask((column - half, row - half, column + half, row + half), size)
    words = tuple(arrays["rca_tokens"].tolist())
    return Subjects(Concept("object", mask=arrays["object_mask64"], region=region, tokens=words))


def applied(arrays: Arrays, patch: Patch, model: OneBlock) -> Any:
    patch.setattr(PrimeComposerRun, "box", lambda *_: own_box(arrays))
    method = PrimeComposer(order=1, steer=0.0, halves=2)
    return gensparse.apply(model.eval(), method, strict=True, subjects=subjects(arrays))


def check_tokens(arrays: Arrays) -> None:
    found = whereabouts(arrays)
    assert found.source.tolist() == arrays["ref_index"].tolist()
    assert found.target.tolist() == arrays["target_index"].tolist()


def check_prior(arrays: Arrays) -> None:
    """The published logits are those that the factors give."""
    own, heads = arrays["ref_index"], int(arrays["heads"])
    hidden = tensor(arrays["cd_hidden"])
    q, k = ((hidden @ tensor(arrays[name]).T).unflatten(-1, (heads, -1)) for name in ("w_q", "w_k"))
    logits = torch.einsum("nhd,mhd->hnm", q[3], k[2, own]) * q.shape[-1] ** -0.5
    close(logits, arrays["cd_prior_logits"])


@torch.no_grad()
def check_steered(arrays: Arrays, patch: Patch) -> None:
    """A half: the picture whose queries count, the object's own, the generated one."""
    prior, own = tensor(arrays["cd_hidden"]), tensor(arrays["gen_hidden"])
    grid = tuple(arrays["grid"].tolist())
    sample = torch.cat([prior[:2], own[:1], prior[3:], prior[2:3], own[1:]])
    model = OneBlock(layer(arrays))
    handle = applied(arrays, patch, model)
    out = run(model, sample, grid)
    assert handle.report()["calls"] == {"sparse": 1, "dense": {}}
    close(out[[2, 5]], arrays["gen_out_steered"])
    close(out[[4, 3]], arrays["cd_out"][[2, 3]])  # the object's picture, then the one that asks
    plain = run(model, sample, grid, 1)  # behind the steered steps
    assert handle.report()["dense"] == {"primecomposer steers the first steps alone": 1}
    close(plain[[2, 5]], arrays["gen_out_plain"])
    handle.remove()


@torch.no_grad()
def check_confined(arrays: Arrays, patch: Patch) -> None:
    patch.setattr(
        one_block,
        "FAMILY",
        replace(one_block.FAMILY, cross=lambda _model, _names: {f"{BLOCK}.attn2": f"{CROSS}level1"}),
    )
    model = OneBlock(None, layer(arrays, "rca_"))
    handle = applied(arrays, patch, model)
    hidden, text = (tensor(arrays[name]) for name in ("rca_hidden", "rca_context"))
    grid = tuple(arrays["grid"].tolist())
    rows = [0, 0, 0, 1, 1, 1]
    out = run(model, hidden[rows], grid, 0, encoder_hidden_states=text[rows])
    close(out[[2, 5]], arrays["rca_out"])
    # behind the steered steps the generated pictures may stand alone
    close(run(model, hidden, grid, 1, encoder_hidden_states=text), arrays["rca_out"])
    handle.use(Subjects(Concept("object", mask=np.ones((4, 4)), region=np.ones((4, 4)))))
    plain = run(model, hidden[rows], grid, 2, encoder_hidden_states=text[rows])  # no words
    torch.testing.assert_close(out[:5], plain[:5], rtol=0, atol=1e-5)
    assert not torch.allclose(out[5], plain[5], atol=1e-3)
    handle.remove()
    assert torch.equal(plain, run(model, hidden[rows], grid, 0, encoder_hidden_states=text[rows]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("file", golden_params("primecomposer"))
def test_published_outputs(file: Path, path: str, monkeypatch: Patch) -> None:
    _, arrays = load(file)
    if path == "dense_mask":
        for module in (steering, confined, shared):
            monkeypatch.setattr(module, "sparse_attention", by_dense_mask)
    check_tokens(arrays)
    check_prior(arrays)
    with one_block_family():
        check_steered(arrays, monkeypatch)
        check_confined(arrays, monkeypatch)


def test_a_foreign_file_fails(tmp_path: Path, monkeypatch: Patch) -> None:
    copy = tmp_path / "primecomposer"
    copy.mkdir()
    shutil.copyfile(folder_files("primecomposer")[0], copy / "known.npz")
    np.savez(copy / "planted.npz", mystery=np.zeros(3))
    monkeypatch.setenv("GENSPARSE_GOLDEN", str(tmp_path))
    assert golden_root() == tmp_path
    params = {param.values[0].name: param.values[0] for param in golden_params("primecomposer")}
    assert set(params) == {"known.npz", "planted.npz"}
    with pytest.raises(GoldenError, match="match none"):
        test_published_outputs(params["planted.npz"], "plan", monkeypatch)
