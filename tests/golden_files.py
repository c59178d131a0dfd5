"""Golden vectors: where they are, which folders the tests own, and strict reading.

`GENSPARSE_GOLDEN` may name another root with the same folders and other files of the same schemas, so tests take every
name and parameter from the files. A file or an array that no schema describes is an error, never skipped.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# folder -> test modules that read it
OWNED: dict[str, tuple[str, ...]] = {
    "natten": (
        "patterns/test_golden_masks.py",
        "testing/test_natten_order.py",
        "methods/test_golden_methods.py",
        "kernels",
    ),
    "clear": ("patterns/test_golden_masks.py", "methods/test_golden_methods.py", "kernels"),
    "classic_windows": ("patterns/test_golden_masks.py", "methods/test_golden_methods.py", "kernels"),
    "msw_msa": (
        "patterns/test_golden_masks.py",
        "testing/test_msw_reference.py",
        "methods/test_golden_methods.py",
        "kernels",
    ),
    "radial": ("test_golden_geometry.py", "methods/test_golden_video_methods.py"),
    "freeswim": ("test_golden_geometry.py", "methods/test_golden_methods.py"),
    "scale_dit": ("test_golden_geometry.py", "methods/test_golden_methods.py"),
    "hybrids": (
        "test_golden_geometry.py",
        "test_golden_pooled.py",
        "test_golden_routed.py",
        "methods/test_golden_methods.py",
        "methods/test_golden_video_methods.py",
    ),
    "ptdit": ("test_golden_pooled.py", "methods/test_golden_video_methods.py"),
    "psa": ("test_golden_routed.py", "methods/test_golden_video_methods.py"),
    "agentsd": ("methods/test_golden_video_methods.py",),
    "highres-rope": ("highres",),
    "highres-freq": ("highres",),
    "demofusion": ("highres",),
    "freescale": ("highres",),
    "hidiffusion": ("highres/test_golden_hidiffusion.py",),
    "freecustom": ("test_golden_references.py", "subjects/test_golden_subjects.py"),
    "magicface": ("test_golden_references.py", "subjects/test_golden_subjects.py"),
    "consistory": ("test_golden_references.py", "subjects/test_golden_subjects.py"),
    "storydiffusion": ("test_golden_references.py", "subjects/test_golden_subjects.py"),
    "ir-diffusion": ("test_golden_references.py", "subjects/test_golden_subjects.py"),
    "shared-attention": ("test_golden_references.py", "subjects/test_golden_subjects.py"),
    "primecomposer": ("subjects/test_golden_primecomposer.py",),
    "regional-prompting": (
        "test_golden_references.py",
        "processors/test_golden_cross.py",
        "subjects/test_golden_regions.py",
    ),
    "ip-adapter": ("processors/test_golden_ip_adapter.py", "processors/test_golden_cross.py"),
    "mip-adapter": ("processors/test_golden_cross.py",),
    "autostudio": ("processors/test_golden_cross.py", "subjects/test_golden_regions.py"),
    "structured-diffusion": ("processors/test_golden_cross.py", "subjects/test_golden_regions.py"),
    "lpa": ("processors/test_golden_cross.py", "subjects/test_golden_regions.py"),
    "disendiff": ("subjects/test_golden_regions.py",),
}


class GoldenError(AssertionError):
    """A golden file that the tests do not understand."""


@dataclass(frozen=True)
class Schema:
    """The arrays of one kind of file: names it must have, names it may have, a grammar for more, or one for all."""

    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    grammar: str | None = None
    more: str = "(?!)"

    def fits(self, names: Iterable[str]) -> bool:
        names = set(names)
        if self.grammar is not None:
            return bool(names) and all(re.fullmatch(self.grammar, name) for name in names)
        rest = names - self.required - self.optional
        return self.required <= names and all(re.fullmatch(self.more, name) for name in rest)


def _schema(required: str, optional: str = "", more: str = "(?!)") -> Schema:
    return Schema(frozenset(required.split()), frozenset(optional.split()), more=more)


CROSS = "hidden heads to_q to_k to_v to_out_w to_out_b"  # a cross-attention layer with its projections
LAYER = "hidden heads w_q w_k w_v w_o b_o out"  # an attention layer with its projections


def _linear(names: str) -> str:
    """Weight and bias of linear layers, as the files name them."""
    return " ".join(f"w.{name}.{part}" for name in names.split() for part in ("weight", "bias"))


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
    "radial": {
        "blocks": _schema("block_mask frames tokens_per_frame block decay model", "text_tokens density"),
        "attention": _schema("q k v out block_mask frames tokens_per_frame block decay model", "text_tokens density"),
    },
    "freeswim": {
        "window": _schema("mask_inward mask_plain frames height width d_h d_w"),
        "attention": _schema("q k v out_window out_full scale base_tokens_per_frame frames height width d_h d_w"),
        "schedule": _schema("timesteps sigmas num_inference_steps flow_shift strength"),
    },
    "scale_dit": {
        "mask": _schema("mask_bits seq text_length hr_hw lr_hw window permuted hr_perm lr_perm hilbert_perm"),
        "blocks": _schema("block_mask image_hw text_length block"),
    },
    "hybrids": {
        "double_attention": _schema("q k v out params"),
        "hilo": _schema(f"x y params {_linear('h_qkv h_proj l_q l_kv l_proj')}"),
        "biformer": _schema(f"x y route_index params {_linear('qkv.qkv wo')}"),
        "routing": _schema("q k v means q_index k_index out params"),
    },
    "ptdit": {
        "proxy_tokens": Schema(
            grammar=r"c\d+_(x|windows|proxy_mean|proxy_first|compress_ratios|proxy_compress_ratios|scale_ratio)"
        ),
        "windows": Schema(
            grammar=r"c\d+_(fhw|compress_ratios|window_token_index|shifted_window_token_index|shifted_allowed)"
        ),
        "pooled_kv": Schema(grammar=r"c\d+_(q|k|v|out|params)"),
        "block": Schema(grammar=r"x|y|text|text_mask|timestep6|compress_ratios|heads|w\..+"),
        "tiny_model": Schema(grammar=r"config|x|t|y|text|text_mask|w\..+"),
    },
    "agentsd": {
        "layer": _schema(
            "hidden normed out merge_unmerge dst_index n_merged n_agents params w.to_q.weight w.to_k.weight "
            "w.to_v.weight w.to_out.0.weight w.to_out.0.bias",
            "agents_sorted_by_dst",
        ),
        "core": Schema(grammar=r"c\d+_(q|k|v|agent|out|k_scale2|k_shortcut)"),
    },
    "hidiffusion": {
        "resample": Schema(grammar=r"[a-z]_(x|weight|bias|conv_off|conv_on|up_weight|up_bias|up_on|avgpool|bicubic)"),
        "windows": Schema(grammar=r"[a-z]_(size|idx[0-3])"),
        "schedule": Schema(grammar=r"(sd15|sdxl(inpaint|controlnet|turbo)?)_n\d+(_lat\d+)?_(conv|block)_T[12]"),
        "unet": Schema(grammar=r"w:.+|(raunet|raunet_odd|both)_(x|text|out_plain|out_steps)"),
    },
    "psa": {
        "importance": _schema("q k sample_q sample_k importance block_m block_n"),
        "levels": _schema("importance levels mode level_keys level_start level_end block_n tile_n density"),
        "caps": _schema("k caps block_n thresholds"),
        "attention": _schema("q k v levels out block_m block_n"),
        "gilbert": _schema("order width height depth"),
    },
    "demofusion": {
        "core": Schema(
            grammar=r"timesteps|cosine_factor|c[123]|views_\d+x\d+_win\d+_stride\d+|kernel_k\d+_s[\d.]+|"
            r"dil_s\d+_(x|c3|gauss|views|recombined_2x)|(blend|skip)_\d+|blend_[LG]|skip_(z|noisy)|"
            r"anchor_(in|mean|std|out)"
        ),
    },
    "freescale": {
        "fusion": Schema(
            grammar=r"views_\d+x\d+_sub\d+x\d+_sf[\d.]+|"
            r"[a-z]+_(local|global|scale|lp_local|fused|fused_spatial2d)"
        ),
    },
    "freecustom": {"mrsa": _schema("q k v ref_masks mask_weights style_fidelity grid layer_bias out")},
    "magicface": {
        "attention": _schema(
            "q k v ref_masks mask_weights step inject_step ref_index semantic_map region_mask grid out"
        ),
        "segmentation": _schema(
            "ref_index ca_scale_x100 latent_size semantic_map foreground noise_uncond noise_text guidance_scale rate",
            more=r"r\d+_(self|cross)",
        ),
    },
    "consistory": {
        "sdsa": _schema(f"{LAYER} subject_mask extended_mapping", "vanilla_query blend"),
        "feature_injection": _schema(
            "features features_smoothed subject_mask extended_mapping nn_map nn_dist alpha attn_out attn_out_injected"
        ),
        "subject_mask": _schema("cross_attn token_indices mask_lo mask_hi"),
    },
    "storydiffusion": {
        "attention": _schema(
            "size id_length sa_rate heads w_q w_k w_v w_o b_o key_mask hidden_write out_write hidden_read out_read"
        ),
    },
    "ir-diffusion": {
        "attention": _schema(
            "grid heads source_mask_px target_mask_px source_mask target_mask repositioned_mask "
            "iso_hidden iso_out iso_w_q iso_w_k iso_w_v iso_w_o iso_b_o "
            "mca_hidden mca_context mca_lambda mca_out mca_w_q mca_w_k mca_w_v mca_w_o mca_b_o "
            "rep_hidden rep_moved_hidden rep_ref_bias rep_out rep_w_q rep_w_k rep_w_v rep_w_o rep_b_o"
        ),
    },
    "shared-attention": {
        "stylealigned": _schema(
            f"{LAYER} adain_queries adain_keys adain_values share_attention full_attention_share shared_score_scale "
            "shared_score_shift"
        ),
        "groupnorm": _schema("x groups weight bias eps out"),
        "masactrl": _schema("q k v out", "mask_source mask_target"),
        "tokenflow": _schema(f"{LAYER} inject_source_qk"),
    },
    "primecomposer": {
        "steer": _schema(
            "grid heads object_mask64 fg_wh_px center_rowcol ref_index target_index w_q w_k w_v w_o b_o cd_hidden "
            "cd_prior_logits cd_out gen_hidden gen_out_plain gen_out_steered rca_w_q rca_w_k rca_w_v rca_w_o rca_b_o "
            "rca_hidden rca_context rca_tokens rca_out"
        ),
    },
    "regional-prompting": {
        "flux_mask": _schema("image_size token_grid text_len regions_xyxy region_masks expected_mask"),
        "unet_couple": _schema(
            "hidden uncond base_text grid region_masks base_weight heads expected_weights expected "
            "to_q to_k to_v to_out_w to_out_b",
            more=r"region_text_\d+",
        ),
        "multidiffusion": _schema("image_size views masks denoised expected expected_count"),
        "boxdiff": _schema(
            "attention token_indices boxes_xyxy_512 P corner_L smooth expected_fg expected_bg expected_corner_x "
            "expected_corner_y expected_max_fg_loss expected_loss"
        ),
    },
    "mip-adapter": {
        "weighted_merge": _schema(
            f"{CROSS} text image_tokens entity_text entity_token_len to_k_ip to_v_ip text_to_weight scale "
            "expected_relevance_raw expected_relevance expected_text_weight expected expected_text_weight_one"
        ),
    },
    "autostudio": {
        "parallel_attention": _schema(
            f"{CROSS} text image_tokens boxes_xywh image_size grid have_ref fuse_scale scale to_k_ip to_v_ip "
            "expected_layout_resized expected expected_switched_off"
        ),
        "layout": _schema("boxes_xywh image_size fuse_scale expected"),
        "latent_blend": _schema("latents guide_noised mask steps_active expected_per_step"),
    },
    "structured-diffusion": {
        "attention": _schema(
            f"{CROSS} uncond encodings spans expected_values expected expected_conjunction "
            "expected_conjunction_as_released"
        ),
        "spans": _schema("prompt normalised constituency bpe_tokens phrases token_spans lowest"),
    },
    "lpa": {
        "attention": _schema(f"{CROSS} text dropped expected_zeroed expected_hard_mask expected_off"),
        "parse": _schema("parse token_match"),
        "schedule": _schema("timesteps rows"),
    },
    "disendiff": {
        "loss": _schema(
            "maps modifier_class_tokens alpha gauss_kernel expected_modifier_masks expected_class_masks expected_bind "
            "expected_separate expected_total"
        ),
    },
    "ip-adapter": {
        "decoupled": _schema(
            "hidden text image_tokens to_k_ip to_v_ip scale heads expected expected_scale0 to_q to_k to_v to_out_w "
            "to_out_b"
        ),
        "multi_masked": _schema(
            "hidden text grid heads scales expected_masked to_q to_k to_v to_out_w to_out_b",
            "expected_unmasked",
            more=r"(image_tokens|mask|to_k_ip|to_v_ip)_\d+",
        ),
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


def read(path: Path, schemas: Mapping[str, Schema]) -> tuple[str, Any]:
    """Kind and arrays of an npz file, or kind and data of a JSON file.

    GoldenError unless exactly its schema's arrays are there; of JSON, its entries, or those of every row of a list.
    """
    if path.suffix == ".json":
        return _read_json(path, schemas)
    if path.suffix != ".npz":
        raise GoldenError(f"{path}: not an npz file")
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    for kind, schema in schemas.items():
        if schema.fits(arrays):
            return kind, arrays
    raise GoldenError(f"{path}: arrays {sorted(arrays)} match none of {', '.join(schemas)}")


def _read_json(path: Path, schemas: Mapping[str, Schema]) -> tuple[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = data if isinstance(data, list) else [data]
    for kind, schema in schemas.items():
        if rows and all(isinstance(row, dict) and schema.fits(row) for row in rows):
            return kind, data
    raise GoldenError(f"{path}: its entries match none of {', '.join(schemas)}")


def load(path: Path) -> tuple[str, Any]:
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
