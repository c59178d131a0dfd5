"""What the distribution contains and what importing it costs, each looked at in a fresh process."""

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gensparse

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run_python(code: str, cwd: Path, *flags: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(code: str, cwd: Path) -> set[str]:
    report = "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    return set(json.loads(run_python(f"{code}\n{report}", cwd, "-P").splitlines()[-1]))


def test_every_package_folder_is_listed() -> None:
    folders = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for top in ("gensparse", "kernels", "pipelines")
        for p in (ROOT / top).rglob("__init__.py")
    }
    named = {name if name.startswith("gensparse") else f"gensparse.{name}" for name in folders}
    assert named == set(PROJECT["tool"]["setuptools"]["packages"])


def test_mapped_packages_point_into_the_checkout() -> None:
    for name in ("kernels", "pipelines"):
        module = importlib.import_module(f"gensparse.{name}")
        assert Path(module.__file__).resolve().parent == ROOT / name


def test_versions_agree() -> None:
    assert gensparse.__version__ == PROJECT["project"]["version"]
    assert f"version: {gensparse.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {gensparse.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_no_public_name_shadows_a_submodule() -> None:
    submodules = {p.stem for p in (ROOT / "gensparse").iterdir()} | {"kernels", "pipelines"}
    assert not submodules & set(gensparse._EXPORTS)


def test_every_public_name_loads() -> None:
    assert set(gensparse.__all__) == {*gensparse._EXPORTS, "__version__"}
    for name in gensparse.__all__:
        assert getattr(gensparse, name) is not None


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sparse_everything'"):
        gensparse.sparse_everything  # noqa: B018


def test_importing_gensparse_is_light(tmp_path: Path) -> None:
    heavy = {"torch", "diffusers", "transformers", "triton", "gradio", "numpy", "PIL"}
    assert not heavy & loaded_after("import gensparse", tmp_path)


def test_patterns_need_no_torch(tmp_path: Path) -> None:
    assert "torch" not in loaded_after("from gensparse.patterns import Disc, Text", tmp_path)


def test_engine_needs_no_diffusers(tmp_path: Path) -> None:
    loaded = loaded_after("import gensparse.attention, gensparse.plan", tmp_path)
    assert not {"diffusers", "transformers", "triton"} & loaded


def test_help_answers_without_torch(tmp_path: Path) -> None:
    code = """
import sys
from gensparse.cli import main
sys.argv = ["gensparse", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code
"""
    assert not {"torch", "diffusers", "numpy", "transformers"} & loaded_after(code, tmp_path)


def test_kernels_name_belongs_to_others(tmp_path: Path) -> None:
    """Outside the checkout a module named `kernels` is never ours, so diffusers finds the hub package of that name."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else '')"
    origin = run_python(code, tmp_path).strip()
    assert not origin or not Path(origin).resolve().is_relative_to(ROOT)
    assert run_python("import gensparse.kernels as k; print(k.__name__)", tmp_path).strip() == "gensparse.kernels"


def test_suite_runs_without_the_checkout_on_the_path() -> None:
    """`kernels/` in the repository root must not shadow the hub package while the tests run."""
    assert str(ROOT) not in sys.path
    assert "" not in sys.path


def test_no_source_imports_the_top_level_names() -> None:
    for top in ("gensparse", "kernels", "pipelines", "samples", "tests"):
        for path in (ROOT / top).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                words = line.split()
                if words[:1] in (["import"], ["from"]) and len(words) > 1:
                    assert words[1].split(".")[0] not in ("kernels", "pipelines"), f"{path}:{number}"
