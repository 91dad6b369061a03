"""Rules about source text: import direction, bare names, private torch imports, sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_rules import (
    ALL_FOLDERS,
    LINKED,
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    ROOT,
    Rule,
    bare_imports,
    modules_of,
    oversized_parts,
    parse,
    private_torch_uses,
    upward_imports,
)


@pytest.mark.parametrize(
    ("rule", "folders"),
    [
        (upward_imports, ALL_FOLDERS),
        (bare_imports, ALL_FOLDERS),
        (private_torch_uses, ALL_FOLDERS),
        (oversized_parts, ALL_FOLDERS),
    ],
)
def test_repository_keeps_rule(rule: Rule, folders: tuple[str, ...]) -> None:
    violations = [text for module in modules_of(*folders) for text in rule(module)]
    assert not violations, "\n".join(["", *violations])


def test_modules_are_found_once_under_import_names() -> None:
    names = [module.name for module in modules_of(*ALL_FOLDERS)]
    assert {"spdcompile.errors", "spdcompile.passes", "spdcompile.runtime"} <= set(names)
    assert len(names) == len(set(names))


def test_links_are_relative() -> None:
    for name in LINKED:
        assert (ROOT / "spdcompile" / name).readlink() == Path("..", name)


def test_test_folders_are_packages() -> None:
    # Without tests/__init__.py pytest would put tests/ on sys.path, where `passes` and `runtime`
    # are folders of tests; without those of subfolders two tests of one name collide.
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()]
    assert not missing, f"no __init__.py in {missing}"


IMPORT_ALONE = "import spdcompile, sys"
IMPORT_ALL = """
import importlib, pkgutil, spdcompile, sys
for module in pkgutil.walk_packages(spdcompile.__path__, "spdcompile."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def imported_names(code: str) -> set[str]:
    report = f"{code}\nprint('MODULES', *sys.modules)"
    command = [sys.executable, "-c", report]
    # From the root, so that the bare names could be found.
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition("MODULES")[2].split())


def test_importing_package_loads_neither_bare_names_nor_torch() -> None:
    names = imported_names(IMPORT_ALONE)
    assert "spdcompile" in names
    assert names.isdisjoint({*LINKED, "torch", "transformers"})


def test_importing_every_module_loads_no_bare_name() -> None:
    names = imported_names(IMPORT_ALL)
    assert {"spdcompile.errors", "spdcompile.passes", "spdcompile.runtime"} <= names
    assert names.isdisjoint(LINKED)


# ---- the rules can fail


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("spdcompile.passes.sync", "import spdcompile.runtime.local"),
        ("spdcompile.passes.sync", "from spdcompile import runtime"),
        ("spdcompile.passes.sync", "from spdcompile.api import compile"),
        ("spdcompile.passes.sync", "import spdcompile"),
        ("spdcompile.passes.sync", "from spdcompile import *"),
        ("spdcompile.passes.sync", "from ..runtime import local"),
        ("spdcompile.passes.placement.view", "from ...cli import main"),
        ("spdcompile.passes.sync", "def f():\n    from spdcompile.runtime import local"),
        ("spdcompile.runtime.local", "from spdcompile.report import table"),
        ("spdcompile.plan", "if TYPE_CHECKING:\n    from spdcompile.passes import sync"),
        ("spdcompile.plan", "import_module('spdcompile.passes.sync')"),
        ("spdcompile.api", "import tests.reference"),
    ],
)
def test_upward_import_is_found(name: str, source: str) -> None:
    assert len(list(upward_imports(parse(name, source)))) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("spdcompile.passes.sync", "from spdcompile.errors import PassError"),
        ("spdcompile.passes.sync", "from spdcompile.passes.base import Pass"),
        ("spdcompile.passes.sync", "from .base import Pass"),
        ("spdcompile.runtime.local", "from spdcompile import passes"),
        ("spdcompile.plan", "from spdcompile import __version__"),
        ("spdcompile.api", "from spdcompile import runtime"),
        ("tests.test_x", "import spdcompile"),
        ("spdcompile.passes.sync", "import passes_of_another, json"),
    ],
)
def test_downward_import_is_allowed(name: str, source: str) -> None:
    assert not list(upward_imports(parse(name, source)))


def test_relative_import_in_package_starts_at_package() -> None:
    source = "from ..runtime import local"
    found = list(upward_imports(parse("spdcompile.passes", source, is_package=True)))
    assert found == ["spdcompile.passes:1 imports spdcompile.runtime.local, which lies above it"]


@pytest.mark.parametrize(
    "source",
    ["import passes", "import runtime.local", "from passes.sync import f", "__import__('passes')"],
)
def test_bare_import_is_found(source: str) -> None:
    assert len(list(bare_imports(parse("tests.test_x", source)))) == 1


@pytest.mark.parametrize("source", ["from spdcompile import passes", "import spdcompile.runtime"])
def test_full_import_is_not_bare(source: str) -> None:
    assert not list(bare_imports(parse("tests.test_x", source)))


PRIVATE_TORCH = [
    "import torch._inductor",
    "import torch.fx._pytree as tree",
    "from torch._inductor.config import patch",
    "from torch.fx._pytree import tree_map",
    "from torch import _C",
    "import torch\ntorch._C._set_something(torch.float32)",
    "import torch.fx as fx\nfx._pytree.tree_map",
    "from torch import fx\nfx.Graph._insert",
]


@pytest.mark.parametrize("source", PRIVATE_TORCH)
def test_private_torch_is_found_outside_its_file(source: str) -> None:
    assert len(list(private_torch_uses(parse("spdcompile.passes.sync", source)))) == 1
    assert not list(private_torch_uses(parse("spdcompile.passes._torch", source)))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.ops._c10d_functional.all_reduce",
        "import torch\ntorch.__version__",
        "import torch\ntorch.cat(self._pairs, dim=1).shape",
        "from __future__ import annotations\nimport torch.fx\nself._graph.nodes",
        "from spdcompile.passes._torch import tree_map",
        "import torchvision._internally",
    ],
)
def test_public_torch_is_allowed(source: str) -> None:
    assert not list(private_torch_uses(parse("spdcompile.passes.sync", source)))


def test_oversized_parts_are_found() -> None:
    at_limit = "def f():\n" + "    pass\n" * (MAX_FUNCTION_LINES - 1)
    assert not list(oversized_parts(parse("spdcompile.api", at_limit)))
    assert len(list(oversized_parts(parse("spdcompile.api", at_limit + "    pass\n")))) == 1
    assert not list(oversized_parts(parse("spdcompile.api", "x = 1\n" * MAX_FILE_LINES)))
    assert len(list(oversized_parts(parse("spdcompile.api", "x = 1\n" * 301)))) == 1
