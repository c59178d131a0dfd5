"""The import order of the package, stated once as data and checked by parsing every import."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Rows import only rows above them; names that share a row never import each other.
ORDER: list[tuple[str, ...]] = [
    ("errors",),
    ("kernels",),
    ("layout",),
    ("patterns",),
    ("plan",),
    ("attention",),
    ("parallel",),
    ("families", "highres", "subjects"),
    ("processors",),
    ("methods",),
    ("attach",),
    ("calibrate",),
    ("pipelines",),
    ("models", "request", "image_io", "estimate", "embedded"),
    ("engine",),
    ("bench", "app"),
    ("cli",),
]
LEVEL = {name: row for row, names in enumerate(ORDER) for name in names}
# The deepest row that tools for tests and samples may use.
LEVEL["testing"] = LEVEL["pipelines"] + 1

# Third-party packages that must not be imported when a layer is merely imported.
FORBIDDEN_AT_IMPORT = {
    "errors": {"torch", "numpy", "diffusers", "transformers", "triton"},
    "kernels": {"diffusers", "transformers", "numpy", "triton"},
    "layout": {"torch", "diffusers", "triton"},
    "patterns": {"torch", "diffusers", "triton"},
    "plan": {"diffusers", "triton"},
    "attention": {"diffusers", "triton"},
    "families": {"diffusers", "transformers", "triton"},
    "highres": {"diffusers", "transformers", "triton"},
    "subjects": {"diffusers", "transformers", "triton"},
    "processors": {"triton", "transformers"},
    "request": {"torch", "diffusers"},
    "cli": {"torch", "diffusers", "numpy", "transformers"},
}

# Modules that exist to hold Triton kernels; whoever needs them imports them where they run.
TRITON_MODULES = {
    ROOT / "kernels" / "triton" / f"{name}.py"
    for name in ("loaders", "inputs", "launch", "visit", "forward", "boxes", "backward", "merge")
}


def source_files() -> list[tuple[str, Path]]:
    """Every source file with the layer it belongs to."""
    files = [("kernels", p) for p in (ROOT / "kernels").rglob("*.py")]
    files += [("pipelines", p) for p in (ROOT / "pipelines").rglob("*.py")]
    for path in (ROOT / "gensparse").rglob("*.py"):
        parts = path.relative_to(ROOT / "gensparse").with_suffix("").parts
        if parts != ("__init__",):
            files.append((parts[0], path))
    return files


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("").parts
    dotted = relative if relative[0] == "gensparse" else ("gensparse", *relative)
    return ".".join(dotted[:-1] if dotted[-1] == "__init__" else dotted)


def imported_names(tree: ast.AST, module: str, is_package: bool) -> list[tuple[str, ast.stmt]]:
    """Absolute dotted names of every import in a module, relative ones resolved."""
    names: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                keep = len(parts) - node.level + (1 if is_package else 0)
                base = ".".join([*parts[:keep], *([base] if base else [])])
            names += [(f"{base}.{alias.name}", node) for alias in node.names]
    return names


def violations(layer: str, module: str, source: str, is_package: bool = False) -> list[str]:
    found = []
    for name, node in imported_names(ast.parse(source), module, is_package):
        parts = name.split(".")
        if parts[0] != "gensparse" or len(parts) < 2:
            continue
        target = parts[1]
        if target not in LEVEL or target == layer:
            continue
        if LEVEL[target] >= LEVEL[layer]:
            found.append(f"{module}:{node.lineno} imports {name}: {layer} must stay below {target}")
    return found


def runtime_imports(tree: ast.Module) -> set[str]:
    """Top-level packages imported when the module is imported (not inside functions or TYPE_CHECKING)."""
    found: set[str] = set()

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.If):
                if "TYPE_CHECKING" not in ast.dump(node.test):
                    visit(node.body)
                visit(node.orelse)
            elif isinstance(node, ast.Try):
                visit(node.body)
                visit(node.orelse)
            elif isinstance(node, ast.ClassDef):
                visit(node.body)

    visit(tree.body)
    return found


@pytest.mark.parametrize(("layer", "path"), source_files(), ids=lambda v: v.stem if isinstance(v, Path) else v)
def test_imports_point_downward(layer: str, path: Path) -> None:
    assert layer in LEVEL, f"{path} belongs to no row of ORDER: add {layer!r} where it belongs"
    found = violations(layer, module_name(path), path.read_text(), path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("layer", "path"), source_files(), ids=lambda v: v.stem if isinstance(v, Path) else v)
def test_no_heavy_import_at_import_time(layer: str, path: Path) -> None:
    heavy = FORBIDDEN_AT_IMPORT.get(layer, set()) & runtime_imports(ast.parse(path.read_text()))
    if path in TRITON_MODULES:
        heavy.discard("triton")
    assert not heavy, f"{path} imports {sorted(heavy)} at import time"


def test_the_check_itself_can_fail() -> None:
    assert violations("layout", "gensparse.layout", "from gensparse.patterns import Disc")
    assert violations("families", "gensparse.families.flux", "from gensparse.highres import rope")
    assert violations("patterns", "gensparse.patterns.disc", "from ..plan import Plan")
    assert violations("kernels", "gensparse.kernels.halo", "import gensparse.plan")
    assert not violations("plan", "gensparse.plan", "from gensparse.layout import Layout")
    assert "torch" in runtime_imports(ast.parse("try:\n    import torch\nexcept ImportError:\n    torch = None"))
    assert not runtime_imports(ast.parse("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch")) - {
        "typing"
    }
