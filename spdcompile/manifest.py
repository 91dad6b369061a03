"""What the manifest of an artefact says, and whether it still holds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import transformers
from transformers import PreTrainedModel

import spdcompile
from spdcompile.errors import ArtefactError
from spdcompile.loading import Loaded
from spdcompile.log import Component, get_logger
from spdcompile.passes.base import Program
from spdcompile.passes.vocabulary import Vocabulary
from spdcompile.passes.written import from_data
from spdcompile.plan import Plan
from spdcompile.runtime.fingerprint import fingerprint

_LOG = get_logger(Component.RUNTIME)
MANIFEST, PROGRAMS, CONSTANTS = "artefact.json", "programs.json", "constants.safetensors"
FORMAT = 1
_MOST_BYTES = 2**28  # of a file of JSON; hundreds of layers take a few MiB


@dataclass(frozen=True, slots=True)
class Manifest:
    """What artefact.json says."""

    directory: Path
    versions: dict[str, str]
    plan: Plan
    vocabulary: Vocabulary
    dtype: torch.dtype
    config: str
    weights: Path
    fingerprint: str
    digests: dict[str, str]

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        path = directory / MANIFEST
        try:
            data = json.loads(_content(path))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}")
            dtype = getattr(torch, data["dtype"])
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"dtype {data['dtype']!r}")
            return cls(
                directory=directory,
                versions=dict(data["versions"]),
                plan=Plan.from_dict(data["plan"]),
                vocabulary=Vocabulary(data["vocabulary"]),
                dtype=dtype,
                config=str(data["config"]),
                weights=directory / data["weights"],
                fingerprint=str(data["fingerprint"]),
                digests={name: str(data["digests"][name]) for name in data["digests"]},
            )
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ArtefactError(
                "This is no artefact.",
                where=str(path),
                found=f"{type(error).__name__}: {error}",
                needed=f"what `save` wrote, format {FORMAT}",
            ) from error

    def check(self, loaded: Loaded) -> None:
        """Raises ArtefactError if the weights or their configuration are others."""
        given = {
            "configuration": (self.config, config_digest(loaded.model)),
            "weights": (self.fingerprint, fingerprint(loaded.tensors)),
        }
        for name, (saved, found) in given.items():
            if saved != found:
                raise ArtefactError(
                    f"The artefact is of another {name}.",
                    where=str(self.weights),
                    found=f"{name} {found[:12]}",
                    needed=f"{name} {saved[:12]}, with which it was saved",
                    fix="compile the model anew and save it",
                )

    def programs(self) -> list[Program] | None:
        """The saved programs; None, with a notice, where they are stale or damaged."""
        if not self.digests:
            return None
        if self.versions != versions():
            _LOG.warning("Captured anew: saved with %s, this is %s", self.versions, versions())
            return None
        try:
            files = {name: _content(self.directory / name) for name in (PROGRAMS, CONSTANTS)}
            for name, content in files.items():
                if hashlib.sha256(content).hexdigest() != self.digests.get(name):
                    raise ArtefactError(f"{name} is damaged.")
            constants = safetensors.torch.load(files[CONSTANTS])
            programs = [from_data(data, constants) for data in json.loads(files[PROGRAMS])]
            if not programs or any(program.tp != self.plan.tp for program in programs):
                raise ArtefactError(f"{PROGRAMS} holds no program for {self.plan.tp} ranks.")
            return programs
        except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
            _LOG.warning("Captured anew: %s", error)
            return None


def versions() -> dict[str, str]:
    """Of what a program was made with; another one may mean other operators by the same names."""
    return {
        "spdcompile": spdcompile.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def config_digest(model: PreTrainedModel) -> str:
    """Of what the configuration says of the computation, not of where it was read or how."""
    data = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"):
        data.pop(key, None)
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def _content(path: Path) -> bytes:
    size = path.stat().st_size
    if path.suffix == ".json" and size > _MOST_BYTES:
        raise ArtefactError(f"{path} has {size} bytes, more than any artefact's.")
    return path.read_bytes()
