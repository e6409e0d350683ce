"""Exports go to the Hugging Face hub: the newest as the repository's main branch, each step as a branch of its own."""

from collections.abc import Mapping
from pathlib import Path


def upload(repository: str, folders: Mapping[str, Path], dry_run: bool) -> None:
    """Make each folder the content of a branch.

    Args:
        repository: OWNER/NAME; made private where it is new.
        folders: by branch.
        dry_run: say what would be sent, and send nothing.

    Raises:
        ValueError: the hub does not answer, or refuses.
    """
    for branch, folder in folders.items():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        size = sum(path.stat().st_size for path in files)
        print(f"{repository}@{branch}: {len(files)} files, {size / 1e6:,.1f} MB from {folder}")
        if dry_run:
            for path in files:
                print(f"  {path.relative_to(folder)}  {path.stat().st_size:,} bytes")
    if dry_run:
        print("nothing was sent: --dry-run")
        return
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        for branch, folder in folders.items():
            if branch != "main":
                api.create_branch(repository, branch=branch, exist_ok=True)
            message = f"{folder.name} by condenser export"
            api.upload_folder(repo_id=repository, folder_path=folder, revision=branch, commit_message=message)
            print(f"{repository}@{branch} is there")
    except Exception as error:  # of the network, the token, the name
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--push {repository}: {reason}; the exports are in {', '.join(map(str, folders.values()))}"
        ) from error
