"""Tasks of lm-evaluation-harness, by name or out of local files, and what models score on them."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spdcompile.errors import SpdCompileError, UsageError
from spdcompile.harness_library import missing_error, quietly

_YAML = (".yaml", ".yml")
_SEED = 1234


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task.

    Args:
        task, metric: their names; metric:filter where the task has filters.
        value: the metric over all documents.
        stderr: its standard error, None if the harness has none.
        documents: how many were scored.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int | None


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model scored.

    Args:
        scores: in the order of tasks.
        samples: task -> for each document its number, the model's answers and its metrics.
    """

    scores: tuple[Score, ...]
    samples: Mapping[str, list[dict[str, Any]]]


def load_tasks(names: Sequence[str], *, progress: bool = True) -> list[Any]:
    """Tasks of the harness, with their data.

    Args:
        names: names of tasks, groups or tags that the harness has; paths of YAML files of the
            harness' format, or of directories of them. Relative paths of data in such a file are
            taken from its own place, which the harness does not do.

    Raises:
        UsageError: lm_eval is not installed, there is no such task, or it cannot be loaded.
    """
    try:
        library = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise missing_error(str(error)) from error
    _seed()
    with quietly(progress):
        # Reading the harness' own list takes seconds, which local files need not wait for.
        manager = library.TaskManager(include_defaults=not all(map(_is_path, names)))
        found: list[Any] = []
        for name in names:
            for path in _files(name):
                with chdir(path.parent):
                    found += _load(manager, path.name, str(path))
            if not _is_path(name):
                found += _load(manager, name, name)
        return found


def _is_path(name: str) -> bool:
    return name.endswith(_YAML) or os.sep in name or Path(name).is_dir()


def _files(name: str) -> list[Path]:
    """The YAML files that a name means; none if it means a task of the harness."""
    if not _is_path(name):
        return []
    path = Path(name)
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.suffix in _YAML)
    if not files:
        raise UsageError(
            "There are no tasks at this path.",
            where=f"tasks {name}",
            found="a directory without *.yaml" if path.is_dir() else "no file or directory",
            needed="a YAML file that describes a task, or a directory of them",
        )
    return files


def _load(manager: Any, spec: str, where: str) -> list[Any]:
    if not _is_path(spec) and spec not in manager.all_tasks:
        raise UsageError(
            f"There is no task {spec!r}.",
            where=f"tasks {where}",
            needed="a task, group or tag of lm_eval, a YAML file or a directory of them",
            fix="list those of lm_eval with: lm-eval ls tasks",
        )
    try:
        loaded = manager.load([spec])
    except Exception as error:  # what YAML, datasets, file systems and the network raise
        raise UsageError(
            "The task cannot be loaded.",
            where=f"tasks {where}",
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}",
            needed="a task whose description is of lm_eval's format and whose data is at hand",
        ) from error
    inner = {name for children in loaded["group_map"].values() for name in children}
    both = {**loaded["tasks"], **loaded["groups"]}
    return [item for name, item in both.items() if name not in inner]


def run_tasks(
    lm: Any,
    tasks: Sequence[Any],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> Scores:
    """What a language model of the harness scores on tasks.

    Args:
        lm: such as `HarnessLM`; under torchrun, every rank calls it alike.
        tasks: from `load_tasks`.
        num_fewshot: examples before each question, where a task does not say that it has none.
        limit: documents of each task, from its first on; all of them if None.

    Returns: the scores, in every process.

    Raises:
        UsageError: a task asks for what the model cannot do.
    """
    library = importlib.import_module("lm_eval")
    with quietly(progress):
        manager = importlib.import_module("lm_eval.tasks").TaskManager(include_defaults=False)
        loaded = manager.load(list(tasks))
        for task in loaded["tasks"].values():
            _set_examples(task, num_fewshot)
        _seed()
        try:
            # Not simple_evaluate: that goes on to describe machine and packages, for seconds.
            found = library.evaluate(lm, loaded, limit=limit, log_samples=True)
        except SpdCompileError:
            raise
        except ValueError as error:
            raise UsageError("The tasks cannot be run.", where="tasks", found=str(error)) from error
    counts = {name: count["effective"] for name, count in found["n-samples"].items()}
    scores = [
        score
        for task, metrics in found["results"].items()
        for score in _scores(task, metrics, counts.get(task))
    ]
    samples = {task: [_answer(row) for row in rows] for task, rows in found["samples"].items()}
    return Scores(tuple(scores), samples)


def _set_examples(task: Any, number: int | None) -> None:
    """As the harness' command line does it."""
    own = task.get_config("num_fewshot")
    if number is not None and own != 0:
        task.set_config(key="num_fewshot", value=number)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)


def _seed() -> None:
    """The harness' own seeds, before tasks are read and before they are run."""
    random.seed(0)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)


def _scores(task: str, metrics: Mapping[str, Any], documents: int | None) -> Iterator[Score]:
    for key, value in metrics.items():
        metric, _, chosen = key.partition(",")
        if not isinstance(value, int | float) or metric.endswith("_stderr") or not chosen:
            continue
        error = metrics.get(f"{metric}_stderr,{chosen}")
        name = metric if chosen == "none" else f"{metric}:{chosen}"
        number = float(error) if isinstance(error, int | float) else None
        yield Score(task, name, float(value), number, documents)


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    answers = [answer for answers in row["resps"] for answer in answers]
    metrics = {name: row[name] for name in row["metrics"]}
    return {"document": row["doc_id"], "filter": row["filter"], "answers": answers, **metrics}
