"""`condenser prepare --engine ray`: the shares of the work as Ray tasks, on any cluster Ray is connected to."""

from dataclasses import replace
from pathlib import Path

from condenser.corpus.work import Job, Share, do_share


def do_shares(job: Job, everything: Share, count: int | None = None) -> None:
    """Do ``count`` shares, each in one Ray task; by default as many as the cluster has CPUs.

    The input and the store must be reachable under the same path on every node.

    Raises:
        ValueError: Ray is not installed, or a share that failed.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install 'condenser[ray]'") from None

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    count = count or int(ray.cluster_resources()["CPU"])
    job = replace(job, folder=job.folder.resolve())  # Ray's workers have a folder of their own
    sources = [
        source if source.kind == "hub" else replace(source, name=str(Path(source.name).resolve()))
        for source in everything.sources
    ]
    shares = [replace(everything, sources=sources, index=index, count=count) for index in range(count)]
    task = ray.remote(do_share)
    try:
        ray.get([task.remote(job, share, workers=1, show_progress=False) for share in shares])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
