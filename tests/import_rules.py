"""Reads every module's imports and sizes: the rules that test_imports.py holds the code to."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCT_FOLDERS = ("spdcompile", "passes", "runtime")
ALL_FOLDERS = (*PRODUCT_FOLDERS, "tests", "examples")
LINKED = ("passes", "runtime")  # folders at the top that install below spdcompile

# A module may import from its own level and from those below it.
FOUNDATION, PASSES, RUNTIME, FACE, OUTSIDE = range(5)
FOUNDATION_NAMES = {"errors", "config", "files", "plan", "log", "__version__"}

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60


@dataclass(frozen=True, slots=True)
class Module:
    """A source file under its import name."""

    name: str
    tree: ast.Module
    num_lines: int = 0
    is_package: bool = False

    @property
    def package(self) -> str:
        return self.name if self.is_package else self.name.rpartition(".")[0]


def parse(name: str, source: str, *, is_package: bool = False) -> Module:
    return Module(name, ast.parse(source), len(source.splitlines()), is_package)


def load(path: Path) -> Module:
    parts = path.relative_to(ROOT).with_suffix("").parts
    prefix = ("spdcompile",) if parts[0] in LINKED else ()
    is_package = parts[-1] == "__init__"
    name = ".".join((*prefix, *(parts[:-1] if is_package else parts)))
    return parse(name, path.read_text(encoding="utf-8"), is_package=is_package)


def modules_of(*folders: str) -> list[Module]:
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    # Some versions of rglob follow spdcompile/passes: a file counts under its own place only.
    return [load(path) for path in paths if path.resolve() == path]


# ---- what a module imports


def imports_of(module: Module) -> Iterator[tuple[int, str]]:
    """Yield the line and absolute name of everything imported, inside functions too."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base_of(node, module)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and (name := _dynamic_import(node)):
            yield node.lineno, name


def _base_of(node: ast.ImportFrom, module: Module) -> str:
    if not node.level:
        return node.module or ""
    parents = module.package.split(".")
    kept = parents[: len(parents) - node.level + 1]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _dynamic_import(node: ast.Call) -> str | None:
    function = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    function = node.func.id if isinstance(node.func, ast.Name) else function
    if function not in {"import_module", "__import__"} or not node.args:
        return None
    match node.args[0]:
        case ast.Constant(value=str() as name):
            return name
    return None


# ---- the rules: each yields one line of text per violation


def level_of(name: str) -> int | None:
    """Return the layer of a module, or None where it is not ours."""
    top, _, rest = name.partition(".")
    second = rest.partition(".")[0]
    if top in {"tests", "examples"}:
        return OUTSIDE
    if top != "spdcompile":
        return None
    if second in LINKED:
        return PASSES if second == "passes" else RUNTIME
    return FOUNDATION if second in FOUNDATION_NAMES else FACE


def upward_imports(module: Module) -> Iterator[str]:
    own = level_of(module.name)
    assert own is not None, f"{module.name} belongs to no layer"
    for line, name in imports_of(module):
        level = level_of(name)
        if level is not None and level > own:
            yield f"{module.name}:{line} imports {name}, which lies above it"


def bare_imports(module: Module) -> Iterator[str]:
    for line, name in imports_of(module):
        if name.partition(".")[0] in LINKED:
            yield f"{module.name}:{line} imports {name}; write spdcompile.{name}"


def private_torch_uses(module: Module) -> Iterator[str]:
    if module.name.rpartition(".")[2] == "_torch":
        return
    uses = [*imports_of(module), *_torch_attributes(module)]
    found = {(line, private) for line, name in uses if (private := _private_part(name))}
    for line, name in sorted(found):
        yield f"{module.name}:{line} uses {name}, which belongs in _torch.py"


def _private_part(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "torch" or parts[1:2] == ["ops"]:  # torch.ops._c10d_functional is an operator
        return None
    for end, part in enumerate(parts, start=1):
        if part.startswith("_") and not part.endswith("__"):
            return ".".join(parts[:end])
    return None


def _torch_attributes(module: Module) -> Iterator[tuple[int, str]]:
    aliases = _torch_aliases(module)
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Attribute):
            continue
        names = _dotted(node)
        if names and names[0] in aliases:
            yield node.lineno, ".".join([aliases[names[0]], *names[1:]])


def _dotted(node: ast.expr) -> list[str]:
    """Return the parts of a.b.c, or nothing where the chain starts at a call or an index."""
    if isinstance(node, ast.Name):
        return [node.id]
    if not isinstance(node, ast.Attribute):
        return []
    parts = _dotted(node.value)
    return [*parts, node.attr] if parts else []


def _torch_aliases(module: Module) -> dict[str, str]:
    aliases = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                aliases[alias.asname or name] = name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return {name: full for name, full in aliases.items() if full.partition(".")[0] == "torch"}


def oversized_parts(module: Module) -> Iterator[str]:
    if module.num_lines > MAX_FILE_LINES:
        yield f"{module.name} has {module.num_lines} lines, more than {MAX_FILE_LINES}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                yield (
                    f"{module.name}:{node.lineno} {node.name} has {num_lines} lines, "
                    f"more than {MAX_FUNCTION_LINES}"
                )


# ---- the rules held over the repository

Rule = Callable[[Module], Iterator[str]]
