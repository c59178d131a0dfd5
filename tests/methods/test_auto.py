"""auto and the profiles it reads: what is measured, what is chosen, what is refused."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import gensparse
from gensparse.calibrate import _Meter, calibrate
from gensparse.embedded import embedded_path
from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods import Auto, parse_method
from gensparse.methods.auto import _share_of
from gensparse.methods.profile import FILE_NAME, GridProfile, LayerProfile, Profile
from gensparse.patterns import Box, Text
from gensparse.plan import build_plan
from gensparse.processors.operators import OperatorCall
from gensparse.processors.rows import sample_rows
from gensparse.processors.site import Action, ActionSlot, Site, SiteCall, Work
from gensparse.testing.tiny import tiny_denoiser, tiny_flux_pipeline, tiny_inputs

SITES = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")


def profile(errors: dict[str, list[list[float]]], *, grid: tuple[int, int, int] = (1, 11, 13)) -> Profile:
    layers = tuple(
        LayerProfile(name, tuple(tuple(round(1 - e, 3) for e in row) for row in rows), tuple(map(tuple, rows)))
        for name, rows in errors.items()
    )
    return Profile("tiny", (GridProfile(grid, ((1, 1, 1), (1, 3, 3)), layers),), {})


TWO = profile({SITES[0]: [[0.05, 0.01], [0.5, 0.2]], SITES[1]: [[0.9, 0.8], [0.3, 0.08]]})


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "profile.json"
    file.write_text(TWO.to_json())
    return str(file)


def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).sample


def test_text_and_dict_forms() -> None:
    assert parse_method("auto") == Auto()
    method = parse_method("auto:error=0.2,density=0.1,dense_below=0,profile=some/file.json")
    assert method == Auto(0.2, 0.1, 0, "some/file.json")
    assert Auto.from_dict(json.loads(json.dumps(method.to_dict()))) == method


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "x", math.nan])
@pytest.mark.parametrize("name", ["error", "density"])
def test_shares_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"auto {name}="):
        Auto(**{name: value})


def test_profile_survives_its_file(path: str) -> None:
    again = Profile.load(path)
    assert again.grids == TWO.grids
    assert again.model == "tiny"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.update(gensparse_profile=2),
        lambda d: d.update(grids=[]),
        lambda d: d.pop("model"),
        lambda d: d["grids"][0]["layers"][0]["error"][0].pop(),
        lambda d: d["grids"][0]["layers"][0]["error"][0].__setitem__(0, -1),
        lambda d: d["grids"][0]["layers"][0]["error"][0].__setitem__(0, float("nan")),
        lambda d: d["grids"][0]["windows"].clear(),
        lambda d: d["grids"][0].update(grid=[1, 2]),
    ],
)
def test_damaged_profiles_are_refused(spoil: Any, tmp_path: Path) -> None:
    data = json.loads(TWO.to_json())
    spoil(data)
    file = tmp_path / "p.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"p\.json is no attention profile.*gensparse calibrate"):
        Profile.load(file)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"\xff\xfe"])
def test_files_that_are_no_profile_are_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="gensparse calibrate"):
        Profile.load(file)


SHARES = (0.1, 0.35, 1.0)


def test_whoever_loses_most_gets_a_larger_window_first() -> None:
    entry = TWO.grids[0]
    assert entry.choose(1.0, SHARES) == ((0, 0), (0, 0))
    assert entry.choose(0.3, SHARES) == ((0, 0), (2, 0)), "the middle window brings the third head nothing"
    assert entry.choose(0.2, SHARES) == ((0, 1), (2, 0))
    assert entry.choose(0.1, SHARES) == ((0, 2), (2, 1))
    assert entry.choose(1e-9, SHARES) == ((2, 2), (2, 2))
    assert entry.predicted(((0, 2), (2, 1))) == pytest.approx(math.sqrt((0.05**2 + 0.08**2) / 4))


def test_windows_that_lose_more_than_smaller_ones_are_never_chosen() -> None:
    entry = profile({"a": [[0.2, 0.3], [0.0, 0.0]]}).grids[0]
    for error in (1.0, 0.15, 0.1, 1e-6):
        assert {row[0] for row in entry.choose(error, SHARES)} <= {0, 2}
        assert entry.choose(error, SHARES)[0][1] == 0


@pytest.mark.parametrize("seed", range(12))
def test_choices_cost_no_more_than_the_best_by_more_than_one_step(seed: int) -> None:
    """Against all choices of three heads, which the small sizes allow; and never above the density."""
    table = [sorted(row, reverse=True) for row in torch.rand(3, 2, generator=torch.manual_seed(seed)).tolist()]
    entry = profile({"a": table[:2], "b": table[2:]}).grids[0]
    every = [((a, b), (c,)) for a in range(3) for b in range(3) for c in range(3)]

    def cost(choice: tuple[tuple[int, ...], ...]) -> float:
        return sum(SHARES[w] for row in choice for w in row)

    for error in (0.05, 0.2, 0.4, 0.6):
        choice = entry.choose(error, SHARES)
        assert entry.predicted(choice) <= error
        best = min(cost(other) for other in every if entry.predicted(other) <= error)
        assert cost(choice) <= best + 0.9
    for density in (0.1, 0.2, 0.5, 1.0):
        choice = entry.choose(1e-9, SHARES, density)
        assert cost(choice) <= 3 * density + 1e-9
        fitting = [other for other in every if cost(other) <= 3 * density - 0.9]
        assert all(entry.predicted(choice) <= entry.predicted(other) + 1e-9 for other in fitting)


def test_the_shipped_profile_beats_one_window_for_all_heads() -> None:
    """At the cost of every window of the profile, on 2048 and 4096 pixels."""
    measured = Profile.load(embedded_path() / FILE_NAME)
    for side in (128, 256):
        layout = Layout.image(side, side, text=32)
        entry = measured.nearest(layout.grid)
        for window, share in enumerate(_share_of(entry, w, layout) for w in range(len(entry.windows))):
            alike = entry.predicted([[window] * len(layer.error) for layer in entry.layers])
            resolved = Auto(error=1e-6, density=share, dense_below=0).planned(str(embedded_path() / FILE_NAME), None)
            assert resolved.predicted_error(layout) <= alike + 1e-9
            assert resolved.share(layout) <= share + 1e-9


def test_every_head_gets_its_own_window(path: str) -> None:
    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 11, 13), text=4)
    dense = run(model, inputs)
    handle = gensparse.apply(model, Auto(error=0.1, dense_below=0, profile=path), strict=True)
    sparse = run(model, inputs)
    groups = {name: work.groups for name, work in works_of(model).items()}
    assert {name: g.tolist() for name, g in groups.items()} == {SITES[0]: [[0, 2]], SITES[1]: [[2, 1]]}
    assert (sparse - dense).abs().max() > 1e-3
    assert handle.report()["calls"] == {"sparse": 2, "dense": {}}
    gensparse.remove(model)
    assert torch.equal(run(model, inputs), dense)


def works_of(model: Any) -> dict[str, Any]:
    return {
        name: module._gensparse_site.slot.get().works[0]
        for name, module in model.named_modules()
        if hasattr(module, "_gensparse_site")
    }


def test_whole_windows_equal_dense(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    far = profile({name: [[0.9, 0.01], [0.9, 0.01]] for name in SITES}, grid=(1, 40, 40))
    file.write_text(far.to_json())
    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 3, 4), text=4)
    dense = run(model, inputs)
    gensparse.apply(model, Auto(error=0.1, dense_below=0, profile=str(file)), strict=True)
    # windows of radius 3 cover a 3 x 4 grid, so auto sees that nothing would be saved
    assert torch.equal(run(model, inputs), dense)


def test_a_density_that_must_be_kept_lets_the_error_rise(path: str) -> None:
    subject = gensparse.methods.Subject("FLUX.1", tiny_denoiser("flux"))
    layout = Layout.image(11, 13, text=4)
    free = Auto(error=0.1, dense_below=0, profile=path).resolved(subject)
    tight = Auto(error=0.1, density=0.2, dense_below=0, profile=path).resolved(subject)
    assert free.predicted_error(layout) < tight.predicted_error(layout)
    share = [p.bind(layout).dense_mask().mean() for p in tight.pattern(layout).parts]
    heads = [tight.heads(gensparse.methods.At(kind=name, layout=layout), 2) for name in SITES]
    assert sum(share[h] for row in heads for h in row) / 4 <= 0.2 + 1e-9


def test_small_grids_and_useless_windows_run_dense_and_say_so(path: str) -> None:
    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 11, 13), text=4)
    dense = run(model, inputs)
    for method, reason in (
        (Auto(profile=path), "dense is cheaper up to 8192 tokens"),
        (Auto(error=0.001, dense_below=0, profile=path), "of all pairs"),
        (Auto(dense_below=0), "calibrate this model"),
    ):
        handle = gensparse.apply(model, method, strict=True)
        assert torch.equal(run(model, inputs), dense)
        report = handle.report()
        assert report["sparse"] == 0
        assert all(reason in text for text in report["dense"])


def test_without_a_profile_the_window_is_that_of_the_training_size() -> None:
    pipe = tiny_flux_pipeline()
    pipe.scheduler.register_to_config(max_image_seq_len=36)
    handle = gensparse.apply(pipe, Auto(dense_below=0), strict=True)
    pipe("a cat", height=64, width=64, num_inference_steps=1, max_sequence_length=16, output_type="latent")
    assert handle.report()["sparse"] == 2
    assert works_of(pipe.transformer)[SITES[0]].plan.pattern == Box(3) | Text()


def test_a_profile_in_the_models_folder_is_found(tmp_path: Path) -> None:
    model = tiny_denoiser("flux")
    model.save_pretrained(tmp_path / "transformer")
    (tmp_path / FILE_NAME).write_text(TWO.to_json())
    loaded = type(model).from_pretrained(tmp_path / "transformer")
    gensparse.apply(loaded, Auto(error=0.1, dense_below=0))
    run(loaded, tiny_inputs("flux", (1, 11, 13), text=4))
    assert works_of(loaded)[SITES[0]].groups.tolist() == [[0, 2]]


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(profile({"blocks.7.attn": [[0.1, 0.1]]}).to_json())
    with pytest.raises(ConfigError, match=r"blocks\.7\.attn.*calibrate this model"):
        gensparse.apply(tiny_denoiser("flux"), Auto(profile=str(file)))


def test_a_profile_with_another_number_of_heads_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(profile({SITES[0]: [[0.05, 0.01]] * 3, SITES[1]: [[0.2, 0.01]] * 3}).to_json())
    model = tiny_denoiser("flux")
    gensparse.apply(model, Auto(error=0.1, dense_below=0, profile=str(file)))
    with pytest.raises(ConfigError, match=r"3 heads.*the model has 2"):
        run(model, tiny_inputs("flux", (1, 11, 13), text=4))


@pytest.mark.parametrize(("height", "width", "text"), [(7, 5, 3), (1, 9, 0), (11, 13, 4)])
def test_the_meter_measures_what_windows_lose(height: int, width: int, text: int) -> None:
    layout = Layout.image(height, width, text=text)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, layout.tokens, 3, 8, generator=generator) for _ in range(3))
    meter = _Meter(rows=1000, radii=(1, 2), seed=0)
    meter.names[0] = "layer"
    out = meter.attend(q, k, v, OperatorCall(layout, None, None, None, 0, 0, lambda: v))
    assert out is v
    (entry,) = meter.grids()
    picture = slice(layout.starts[layout.target], layout.starts[layout.target] + height * width)
    weights = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()).div(8**0.5).softmax(-1)[:, :, picture]
    whole = weights @ v.double().transpose(1, 2)
    for index, radii in enumerate(entry.windows):
        mask = torch.from_numpy((Box(radii[1:]) | Text()).dense_mask(layout)[0][picture])
        inside = weights * mask
        kept = inside.sum(-1).mean((0, 2))
        lost = (inside / inside.sum(-1, keepdim=True)) @ v.double().transpose(1, 2) - whole
        error = (lost.square().sum((0, 2, 3)) / whole.square().sum((0, 2, 3))).sqrt()
        torch.testing.assert_close(
            torch.tensor([r[index] for r in entry.layers[0].kept]).double(), kept, atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            torch.tensor([r[index] for r in entry.layers[0].error]).double(), error, atol=1e-5, rtol=0
        )


def test_sampled_rows_are_spread_and_distinct() -> None:
    for first, count, rows in ((5, 100, 8), (0, 7, 7), (3, 5, 50), (0, 1, 4)):
        found = sample_rows(first, count, rows, 0, torch.device("cpu"))
        assert len(found) == min(rows, count)
        assert len(set(found.tolist())) == len(found)
        assert first <= found.min()
        assert found.max() < first + count


def test_calibrating_leaves_the_picture_and_the_model_alone() -> None:
    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 9, 7), text=4)
    dense, seen = run(model, inputs), []
    measured = calibrate(model, lambda: seen.append(run(model, inputs)), rows=4, radii=(1, 2, 3))
    assert torch.equal(seen[0], dense)
    assert torch.equal(run(model, inputs), dense)
    assert not model._forward_pre_hooks
    (entry,) = measured.grids
    assert entry.grid == (1, 9, 7)
    assert [layer.name for layer in entry.layers] == list(SITES)
    assert all(0 <= a <= b <= 1 + 1e-6 for layer in entry.layers for a, b, *_ in layer.kept)


def test_calibrating_nothing_is_refused() -> None:
    model = tiny_denoiser("flux")
    with pytest.raises(ConfigError, match="nothing to measure"):
        calibrate(model, lambda: None)
    with pytest.raises(ConfigError, match="rows"):
        calibrate(model, lambda: None, rows=0)


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl", "wan", "hunyuan_video", "lumina2"])
def test_audits_measure_the_error_of_windows(name: str) -> None:
    """With every token looked at, the audit is the error of all picture outputs against dense ones."""
    grid = (3, 5, 7) if name in ("wan", "hunyuan_video") else (1, 7, 5)
    model, inputs = tiny_denoiser(name), tiny_inputs(name, grid, text=4)
    if name == "sdxl":
        inputs = tiny_inputs(name, grid)
    for radius, low, high in ((100, 0.0, 1e-5), (1, 1e-3, 3.0)):
        handle = gensparse.apply(model, f"sliding_window:radius={radius}", strict=True, audit=10_000)
        with torch.no_grad():
            model(**inputs)
        error = handle.report()["error"]
        assert error["predicted"] is None
        assert low <= error["measured"] <= high
    gensparse.remove(model)


def test_an_audit_equals_the_error_of_the_call() -> None:
    layout = Layout.image(5, 7, text=3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, layout.tokens, 3, 8, generator=generator) for _ in range(3))
    slot = ActionSlot()
    slot.put(Action((Work(layout, plan=build_plan(Box(1) | Text(), layout)),), audit=1000))
    site = Site("attn", slot)
    bias = torch.randn(1, 1, 1, layout.tokens, generator=generator)
    out = site.attend(SiteCall(q, k, v, bias, 0.4, lambda: v))
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2).double() for x in (q, k, v)), attn_mask=bias.double(), scale=0.4
    ).transpose(1, 2)
    lost, norm = site.audited.tolist()
    assert lost == pytest.approx(float((out - dense)[:, 3:].square().sum()), rel=1e-4)
    assert norm == pytest.approx(float(dense[:, 3:].square().sum()), rel=1e-4)


def test_auto_reports_predicted_and_measured_error() -> None:
    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 11, 13), text=4)
    measured = calibrate(model, lambda: run(model, inputs), rows=143, radii=(1, 3))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "p.json")
        file.write_text(measured.to_json())
        handle = gensparse.apply(model, Auto(error=1.0, density=0.5, dense_below=0, profile=str(file)), audit=1000)
    run(model, inputs)
    error = handle.report()["error"]
    # the second layer's input is no longer the one that was measured, and heads differ in size
    assert error["measured"] == pytest.approx(error["predicted"], rel=0.5)


def test_audit_is_checked() -> None:
    with pytest.raises(ConfigError, match="audit=-1"):
        gensparse.apply(tiny_denoiser("flux"), "clear", audit=-1)
