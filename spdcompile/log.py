"""Loggers by component, chosen through SPD_LOGS."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import StrEnum

from spdcompile.errors import UsageError

VARIABLE = "SPD_LOGS"


class Component(StrEnum):
    """A part of the compiler that logs; the value is what SPD_LOGS lists."""

    PASSES = "passes"
    PLACEMENT = "placement"
    RUNTIME = "runtime"


# The names are those of the packages, so that logging.getLogger(__name__) in a module falls under
# its component.
_LOGGER_NAMES = {
    Component.PASSES: "spdcompile.passes",
    Component.PLACEMENT: "spdcompile.passes.placement",
    Component.RUNTIME: "spdcompile.runtime",
}


def get_logger(component: Component) -> logging.Logger:
    """Return the logger of a component."""
    return logging.getLogger(_LOGGER_NAMES[component])


def configure(environ: Mapping[str, str]) -> None:
    """Set each component's level: INFO where SPD_LOGS lists it, else WARNING.

    Args:
        environ: usually os.environ; only SPD_LOGS is read, a comma-separated list of components.

    Raises:
        UsageError: SPD_LOGS lists a component that does not exist.
    """
    listed = _listed_components(environ.get(VARIABLE, ""))
    for component in Component:
        get_logger(component).setLevel(logging.INFO if component in listed else logging.WARNING)
    if listed:
        _ensure_handler()


def _listed_components(text: str) -> frozenset[Component]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {component.value for component in Component}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(
            f"{VARIABLE} lists an unknown component.",
            where=f"environment variable {VARIABLE}={text}",
            found=", ".join(unknown),
            needed=f"a comma-separated list out of: {', '.join(sorted(known))}",
            fix=f"correct {VARIABLE}, or unset it",
        )
    return frozenset(Component(name) for name in names)


def _ensure_handler() -> None:
    # An application that set up logging itself already shows our records: a second handler would
    # print each twice.
    logger = logging.getLogger("spdcompile")
    if logger.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
    logger.addHandler(handler)
