"""Values of a run that are needed again: in memory up to a budget, in mapped files beyond."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from spdcompile.errors import SaveError


class HiddenStates:
    """Keeps tensors that are read again later.

    Args:
        directory: where files go; every file loses its name as soon as it is mapped, so that the
            system takes its room back when the process ends, however that comes about.
        budget_bytes: how much to keep in memory; None for all.
    """

    def __init__(self, directory: Path, budget_bytes: int | None) -> None:
        self._directory = directory
        self._budget = math.inf if budget_bytes is None else budget_bytes
        self.memory_bytes = 0
        self.file_bytes = 0

    def keep(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors on the CPU, for as long as the result is referenced.

        Raises:
            SaveError: there is no room for a file.
        """
        return {name: self._kept(tensor.detach()) for name, tensor in values.items()}

    def _kept(self, tensor: Tensor) -> Tensor:
        if self.memory_bytes + tensor.nbytes <= self._budget or not tensor.numel():
            self.memory_bytes += tensor.nbytes
            return tensor.cpu()
        self.file_bytes += tensor.nbytes
        return self._mapped(tensor.cpu().contiguous())

    def _mapped(self, tensor: Tensor) -> Tensor:
        # Written, and not mapped at once: a full disk is an error here, and a signal there.
        try:
            with tempfile.NamedTemporaryFile(dir=self._directory) as file:
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                file.flush()
                flat = torch.from_file(file.name, size=tensor.numel(), dtype=tensor.dtype)
        except OSError as error:
            raise SaveError(
                "The hidden states cannot be written.",
                where=str(self._directory),
                found=str(error),
                needed=f"room for {tensor.nbytes} bytes more after {self.file_bytes}",
                fix="name another scratch directory, allow more memory, or take fewer chunks",
            ) from error
        return flat.view(tensor.shape)


@contextmanager
def hidden_states(scratch: str | Path | None, budget_bytes: int | None) -> Iterator[HiddenStates]:
    """A place for hidden states, gone at the end.

    Args:
        scratch: directory in which a private one is made; the system's own by default.
        budget_bytes: how much to keep in memory; None for all.

    Raises:
        SaveError: no directory can be made there.
    """
    try:
        private = tempfile.TemporaryDirectory(prefix="spdcompile-", dir=scratch)
    except OSError as error:
        raise SaveError(
            "The scratch directory cannot be used.", where=str(scratch), found=str(error)
        ) from error
    with private as directory:
        yield HiddenStates(Path(directory), budget_bytes)
