"""Tasks of MTEB by name, such as SciFact or the benchmark NanoBEIR, through the mteb library.

It brings data, metrics and protocol (prompts, splits, subsets), so that numbers can be set beside those of its
leaderboard. Data come from the Hugging Face hub when a task runs.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condenser.data.store import write_json
from condenser.evaluation.encoders import Encoder, describe
from condenser.evaluation.jobs import fingerprint, read_kept


def find_tasks(names: Sequence[str]) -> list[Any]:
    """Tasks by name, and all tasks of benchmarks; ValueError for a name that mteb does not know."""
    if not names:
        return []
    try:
        import mteb
    except ModuleNotFoundError:
        raise ImportError("MTEB's tasks need mteb: pip install 'condenser[mteb]'") from None
    found: list[Any] = []
    for name in names:
        try:
            found += mteb.get_benchmark(name).tasks
        except KeyError:
            try:
                found.append(mteb.get_task(name))
            except KeyError as error:
                hint = error.args[0].removeprefix("KeyError: ")
                raise ValueError(f"MTEB has no task or benchmark of the name {name!r}: {hint}") from None
    return found


def to_load(task: Any) -> str:
    """Which data a task takes from the hub, where they are not in its cache, and how much, as far as mteb says."""
    about, statistics = task.metadata.dataset, task.metadata.descriptive_stats or {}
    of_splits = [each | (each.get("text_statistics") or {}) for each in statistics.values() if isinstance(each, dict)]
    texts = sum(each.get("num_samples") or 0 for each in of_splits)
    characters = sum(each.get("number_of_characters") or each.get("total_text_length") or 0 for each in of_splits)
    size = f"{texts:,} texts, {characters / 1e6:,.1f} M characters" if texts else "of a size that mteb does not say"
    return f"{task.metadata.name} takes {about['path']} from the hub, or its cache: {size}"


def run_mteb(encoder: Encoder, tasks: Sequence[Any], folder: Path) -> list[dict[str, Any]]:
    """-> a row for each task with its main score, over splits and subsets; kept in ``folder``, a file for each"""
    import mteb

    rows, mark = [], describe(encoder)
    options: Any = {"cache": None, "co2_tracker": False, "show_progress_bar": sys.stderr.isatty()}
    for task in tasks:
        name = task.metadata.name
        file = folder / f"mteb-{fingerprint(mark, name, mteb.__version__)}.json"
        row = read_kept(file)
        if not row:
            print(f"MTEB: {to_load(task)}")
            try:
                (found,) = mteb.evaluate(encoder, [task], **options).task_results
            except OSError as error:
                raise ValueError(f"MTEB's {name} could not be loaded from the Hugging Face hub: {error}") from error
            row = {"collection": name, "metric": task.metadata.main_score, "score": float(found.get_score())}
            row |= {"revision": found.dataset_revision, "mteb": mteb.__version__}
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, row)
        rows.append(row)
    return rows
