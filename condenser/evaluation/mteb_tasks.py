"""Tasks of MTEB by name, such as SciFact or the benchmark NanoBEIR, through the mteb library.

It brings data, metrics and protocol (prompts, splits, subsets), so that numbers can be set beside those of its
leaderboard. Data come from the Hugging Face hub when a task runs.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def run_mteb(encoder: "SentenceTransformer", names: list[str], known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluate on tasks, or on all tasks of benchmarks, that are not among the rows ``known``. -> these and the new
    rows, one for each task with its main score, over splits and subsets

    Raises:
        ValueError: a name that mteb does not know, before anything runs; data that cannot be had.
    """
    try:
        import mteb
    except ImportError:
        raise ImportError("MTEB's tasks need mteb: pip install 'condenser[mteb]'") from None
    rows = {row["collection"]: row for row in known}
    for task in [task for name in names for task in tasks(name)]:
        name = task.metadata.name
        if rows.get(name, {}).get("mteb") == mteb.__version__:
            continue
        try:
            found = mteb.evaluate(
                encoder, [task], cache=None, co2_tracker=False, show_progress_bar=sys.stderr.isatty()
            ).task_results[0]
        except OSError as error:
            raise ValueError(f"MTEB's {name} could not be loaded from the Hugging Face hub: {error}") from error
        row = {"collection": name, "metric": task.metadata.main_score, "score": float(found.get_score())}
        rows[name] = row | {"revision": found.dataset_revision, "mteb": mteb.__version__}
    return list(rows.values())


def tasks(name: str) -> list[Any]:
    """A task by its name, or those of the benchmark."""
    import mteb

    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError:
        pass
    try:
        return [mteb.get_task(name)]
    except KeyError as error:
        hint = error.args[0].removeprefix("KeyError: ")
        raise ValueError(f"MTEB has no task or benchmark of the name {name!r}: {hint}") from None
