"""The C++ operators of this package: built when they are first needed, kept for the next time.

One call of the compiler does it. torch's extension builder needs ninja on the PATH, and leaves a
lock behind when it is killed, on which the next build waits for ever.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from spdcompile.log import Component, get_logger
from spdcompile.runtime.kernel_directory import locked, make_private, root_directory
from spdcompile.runtime.kernels import conditions

_LOG = get_logger(Component.RUNTIME)
_HERE = Path(__file__).parent
SOURCES = tuple(
    _HERE / f"{name}.cpp" for name in ("attention", "products", "shared_memory", "sockets")
)
_HEADERS = (_HERE / "vectors.h", _HERE / "sums.h")
_TORCH = Path(torch.__file__).parent
_FLAGS = (
    *("-shared", "-fPIC", "-std=c++20", "-O3", "-march=native"),
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
)
_PATIENCE_S = 300.0


class CannotBuildError(Exception):
    """There is no library; says why."""


def load_library() -> None:
    """Loads the operators of all sources, after building them if need be.

    Of processes that ask at once, one builds and the others wait for it. A process tries once.

    Raises:
        CannotBuildError: there is no compiler or it fails, or nowhere to build.
    """
    if why := _load():
        raise CannotBuildError(why)


@cache
def _load() -> str:
    """Returns why it failed; "" if it did not."""
    try:
        root = make_private(make_private(root_directory()) / "native")
        library = root / f"{_key()}.so"
        with locked(root):
            if not library.exists():
                _build(library)
        torch.ops.load_library(library)
    except subprocess.CalledProcessError as error:
        return f"{_compiler()} says: {error.stderr.strip()[:500]}"
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return str(error).splitlines()[0]
    return ""


def _build(library: Path) -> None:
    """Makes a library; what is at its place is whole, or nothing is."""
    _LOG.info("building %s", library)
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        made = Path(directory) / library.name
        command = (
            *(_compiler(), *_FLAGS, "-isystem", _TORCH / "include", "-x", "c++", "-", "-o", made),
            *(f"-L{_TORCH / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"),
        )
        # As one text, since reading torch's headers takes longer than all the rest.
        text = "".join(f'#include "{source}"\n' for source in SOURCES)
        subprocess.run(
            command, input=text, check=True, capture_output=True, text=True, timeout=_PATIENCE_S
        )
        made.replace(library)


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _key() -> str:
    """What a library is good for: this source, these versions, this processor."""
    made_by = conditions(torch.device("cpu"))
    facts = [made_by["torch"], made_by["cpu"], _compiler(), *_FLAGS]
    facts += [source.read_text("utf-8") for source in (*SOURCES, *_HEADERS)]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]
