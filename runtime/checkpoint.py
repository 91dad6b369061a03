"""A directory of safetensors under the names of a model's state_dict, nothing of it read yet."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spdcompile.errors import CheckpointError
from spdcompile.runtime import _transformers as hf
from spdcompile.runtime.file_tensor import FileTensor
from spdcompile.runtime.stored import Stored

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_LISTED = 3  # names that a message lists

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class ConversionError(Exception):
    """A checkpoint that cannot be read slice by slice; the message says why."""


def stored_tensors(directory: Path) -> dict[str, FileTensor]:
    """The tensors of a directory by the names that its files give them.

    Raises:
        CheckpointError: no file, or one that its header or the index contradicts.
        ConversionError: a dtype that has to be converted by something else than a cast.
    """
    if (directory / SINGLE).is_file():
        return _file_tensors(directory / SINGLE)
    if not (directory / INDEX).is_file():
        raise CheckpointError(
            f"{directory} has no checkpoint.",
            where=f"model={str(directory)!r}",
            found=", ".join(sorted(path.name for path in directory.glob("*.safetensors"))),
            needed=f"{SINGLE}, or {INDEX} and the files that it names",
        )
    index = _json((directory / INDEX).read_bytes(), directory / INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise _unreadable(directory / INDEX, "no weight_map of tensors to files")
    files = {name: _shard(directory, name) for name in sorted(set(places.values()))}
    found = {key: tensor for tensors in files.values() for key, tensor in tensors.items()}
    for key, name in places.items():
        if key not in files[name]:
            raise CheckpointError(
                "A tensor is missing.",
                where=f"{key} in {directory / name}",
                found="no tensor of that name",
                needed=f"one, as {INDEX} says",
            )
        found[key] = files[name][key]
    return found


def _shard(directory: Path, name: str) -> dict[str, FileTensor]:
    if Path(name).name != name or not (directory / name).is_file():
        raise CheckpointError(
            "A file of the checkpoint is missing.",
            where=str(directory / INDEX),
            found=f"{name!r}, which is no file in the directory",
            needed="every file that the index names, beside it",
            fix="copy or download it again",
        )
    return _file_tensors(directory / name)


def _file_tensors(path: Path) -> dict[str, FileTensor]:
    """Reads the header of a file: the size of what follows, JSON, and then the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = _json(file.read(length), path) if length <= size - 8 else None
    if header is None:
        raise _unreadable(path, f"a header of {length} bytes in a file of {size}")
    header.pop("__metadata__", None)
    return {key: _file_tensor(path, key, entry, 8 + length, size) for key, entry in header.items()}


def _file_tensor(path: Path, key: str, entry: Any, start: int, size: int) -> FileTensor:
    try:
        kind, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers_fit = all(type(n) is int and 0 <= n <= size for n in (*shape, first, last))
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, f"no description of {key}") from error
    if not isinstance(kind, str) or not numbers_fit:
        raise _unreadable(path, f"a description of {key} that cannot be")
    if kind not in _DTYPES:
        raise ConversionError(f"{key} is stored as {kind}")
    tensor = FileTensor(tuple(shape), _DTYPES[kind], path, key, start + first)
    needed = math.prod(shape) * tensor.dtype.itemsize
    if last - first != needed or last > size - start:
        raise CheckpointError(
            "A checkpoint file is cut short, or its header is wrong.",
            where=tensor.place,
            found=f"bytes {first} to {last} of {size - start}",
            needed=f"{needed} bytes for {kind} {list(shape)}",
            fix="copy or download the file again",
        )
    return tensor


def _json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise _unreadable(path, f"a JSON {type(value).__name__}")
    return value


def _unreadable(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "A checkpoint file cannot be read.",
        where=str(path),
        found=found,
        needed="safetensors" if path.suffix == ".safetensors" else "JSON",
        fix="copy or download the file again",
    )


def open_checkpoint(directory: Path, model: PreTrainedModel) -> dict[str, Stored | Tensor]:
    """What a model's state_dict holds, from the files of a directory, none of it read yet.

    Names and fused tensors are converted by transformers' own rules for the model. Tensors that the
    checkpoint leaves out on purpose, and non-persistent buffers, are computed.

    Args:
        model: on the meta device. It is made what loading would make of it: dtypes that it keeps,
            non-persistent buffers with data, ties undone where the checkpoint holds both tensors.

    Returns: every name of the state_dict; names that are tied share one entry.

    Raises:
        CheckpointError: a tensor is missing, extra or misshapen; names it and the file.
        ConversionError: the checkpoint has to be converted by more than names, stacks and cuts.
    """
    files = stored_tensors(directory)
    expected = model.state_dict()
    given, origin = _converted(files, model)
    unexpected = given.keys() - expected.keys()
    given = {name: tensor for name, tensor in given.items() if name in expected}
    aliases = _ties(model, given)
    absent = expected.keys() - given.keys() - aliases.keys()
    missing, unexpected = hf.not_ignored(model, absent, unexpected)
    _check_names(directory, missing, {origin[name] for name in unexpected}, files)
    for name, tensor in given.items():
        _check_shape(name, tensor, tuple(expected[name].shape))
    hf.keep_dtypes(model)
    made = hf.recompute(model, absent)
    return {**given, **made, **{name: given[other] for name, other in aliases.items()}}


def _converted(
    files: Mapping[str, FileTensor], model: PreTrainedModel
) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors by state_dict name, and each name's first key in the files.

    The loop of transformers' own loading, on tensors that are not read.
    """
    transforms = hf.get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, hf.WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, hf.WeightConverter)]
    if len(renamings) + len(converters) < len(transforms):
        raise ConversionError("its type has conversions of an unknown kind")
    by_pattern = {source: entry for entry in converters for source in entry.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    plain: dict[str, Stored] = {}
    collected: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key in sorted(files, key=hf.dot_natural_key):
        name, pattern = hf.rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = hf.rename_source_key(key, [], [], prefix, expected)
        origin.setdefault(name, key)
        if pattern is None or name not in expected:
            if name in plain:
                raise ConversionError(f"{key} and {origin[name]} are one tensor, {name}")
            plain[name] = files[key]
        else:
            if name not in collected:
                collected[name] = copy.deepcopy(by_pattern[pattern])
            collected[name].add_tensor(name, key, pattern, files[key])
    for name, converter in collected.items():
        for target, tensor in _convert(name, converter, model).items():
            origin.setdefault(target, origin[name])
            plain[target] = tensor
    return plain, origin


def _convert(name: str, converter: Any, model: PreTrainedModel) -> dict[str, Stored]:
    kinds = ", ".join(type(operation).__name__ for operation in converter.operations)
    try:
        made = converter.convert(name, model=model, config=model.config)
    except CheckpointError:
        raise
    except Exception as error:  # whatever an operation tries on a tensor that is not read
        raise ConversionError(f"{name} is made by {kinds}") from error
    tensors = {key: one[0] if isinstance(one, list) else one for key, one in made.items()}
    if not all(isinstance(tensor, Stored) for tensor in tensors.values()):
        raise ConversionError(f"{name} is made by {kinds}")
    return tensors


def _ties(model: PreTrainedModel, given: Mapping[str, Stored]) -> dict[str, str]:
    """Absent tied name -> the name that the checkpoint has; where it has both, they are untied."""
    groups: dict[str, list[str]] = {}
    for target, source in hf.tied_names(model).items():
        groups.setdefault(source, [source]).append(target)
    aliases = {}
    for names in groups.values():
        present = [name for name in names if name in given]
        if not present:
            continue
        for name in names:
            if name not in given:
                aliases[name] = present[0]
        for name in present[1:]:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            setattr(module, leaf, nn.Parameter(torch.empty_like(getattr(module, leaf))))
    return aliases


def _check_names(
    directory: Path, missing: Iterable[str], extra: Iterable[str], files: Mapping[str, FileTensor]
) -> None:
    """Raises CheckpointError for names without a tensor and tensors without a name."""
    named = directory / (SINGLE if (directory / SINGLE).is_file() else INDEX)
    if missing := sorted(missing):
        raise CheckpointError(
            f"{_listed(missing)} missing from the checkpoint.",
            where=str(named),
            found=f"{len(files)} tensors, none of them for {missing[0]}",
            needed="every tensor of the model",
            fix="see that config.json belongs to these weights",
        )
    if extra := sorted(extra):
        raise CheckpointError(
            f"{_listed(extra)} in the checkpoint but not in the model.",
            where=files[extra[0]].place,
            found=f"{len(extra)} such tensors",
            needed="none that the model has no place for",
            fix="see that config.json belongs to these weights, or load the model with "
            "transformers, which leaves them out, and give that",
        )


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    listed = ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
    return f"{listed} {'is' if len(names) == 1 else 'are'}"


def _check_shape(name: str, tensor: Stored, needed: tuple[int, ...]) -> None:
    if tensor.shape != needed:
        raise CheckpointError(
            f"{name} has another shape than the model.",
            where=tensor.place,
            found=str(list(tensor.shape)),
            needed=str(list(needed)),
            fix="see that config.json belongs to these weights",
        )
