"""`condenser prepare --engine ray`: the shares of the work as a Ray Data job, on any cluster Ray is connected to."""

from dataclasses import replace
from pathlib import Path

from condenser.corpus.work import Job, do_share


def do_all(job: Job, shares: int | None = None) -> None:
    """Do every share, each in one Ray task; by default as many as the cluster has CPUs.

    The input and the store must be reachable under the same path on every node.

    Raises:
        ValueError: Ray is not installed, or a share that failed.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install 'condenser[ray]'") from None

    sources = [
        source if source.kind == "hub" else replace(source, name=str(Path(source.name).resolve()))
        for source in job.sources
    ]
    job = replace(job, folder=job.folder.resolve(), sources=sources)  # Ray's workers have a folder of their own
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    count = shares or int(ray.cluster_resources()["CPU"])

    def share(row: dict) -> dict:
        try:
            do_share(job, int(row["id"]), count, workers=1, progress=False)
        except (ValueError, OSError) as error:
            return {"error": str(error)}
        return {"error": ""}

    done = ray.data.range(count, override_num_blocks=count).map(share).take_all()
    if errors := [row["error"] for row in done if row["error"]]:
        raise ValueError(errors[0])
