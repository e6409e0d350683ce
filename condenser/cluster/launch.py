"""`condenser launch`: a training run as a SLURM job that survives time limits, preemption and lost nodes.

    condenser launch --config configs/condenser.yaml --name N --nodes 2 --gpus 8 --time 24:00:00 [--dry-run]

The settings of `condenser fit` come beside its own. Everything the job needs is written to the run's folder first, so
that what is edited later does not reach a job that waits in the queue:

    runs/N/launch/{code/, settings.yaml, job.sh, slurm-JOB.out}

Several seeds or overlays are one job array: a run folder for each, and runs/N/launch/ for all of them.
"""

import argparse
import itertools
import math
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import condenser
from condenser.data.datamodule import check_shared, store_folder
from condenser.data.lock import locked
from condenser.data.store import read_manifest
from condenser.recipes import FOLDER, parser_beside_fit
from condenser.runs import COMMIT, at_least, flatten, newest_valid_checkpoint, output
from condenser.training.ending import goes_on
from condenser.training.fit import DryCLI, dumped, run_cli
from condenser.training.folder import intact

TEMPLATE = FOLDER / "cluster" / "slurm.sh"
UNLIMITED = ("0", "infinite", "unlimited")  # as sbatch's --time
LARGEST_FILE = 5_000_000  # bytes; larger ones beside the code are not taken along

Settings = dict[str, Any]


class Script(string.Template):
    """A job script with ``@{name}`` for what is filled in, so that the shell's own ``$name`` stay."""

    delimiter = "@"


def launch(args: Sequence[str]) -> None:
    options, of_fit = own_parser().parse_known_args(args)
    for name, least in {"nodes": 1, "gpus": 0, "tasks": 1, "cpus": 1, "notice": 1, "retries": 0}.items():
        at_least(name, getattr(options, name), least)
    if options.notice >= (limit := seconds_of(options.time)):
        raise ValueError(
            f"--notice {options.notice} must be shorter than --time {options.time}, which is {limit} seconds: the run "
            "would be told to save as soon as it begins"
        )
    options.tasks = options.gpus or options.tasks
    name, runs = settings_of_runs(options, of_fit)
    for settings in runs:
        check(settings, options)
    runs_dir = Path(runs[0]["runs_dir"]).absolute()
    folder = runs_dir / name / "launch"
    script = folder / "job.sh"
    if job := job_in_queue(script):
        raise ValueError(f"{name} is in the queue already, as job {job}: scancel it first, or give another --name")
    write(folder, name, runs, options)
    print(f"{len(runs)} run(s) of {options.nodes} x {options.tasks} processes: {script}")
    if options.dry_run:
        print(f"\n{script.read_text(encoding='utf-8')}\nnot submitted; that does: sbatch {shlex.quote(str(script))}")
        return
    job = submit(script)
    folders = [shlex.quote(str(runs_dir / settings["name"])) for settings in runs]
    print(
        f"job {job}. Follow it:          tail -F {shlex.quote(str(folder))}/slurm-{job}*.out\n"
        f"its curves:                 condenser report {' '.join(folders)} --output report.html\n"
        f"save and put it back:       scancel --signal=USR1 {job}\n"
        f"save and end it:            scancel --signal=TERM {job}"
    )


def own_parser() -> argparse.ArgumentParser:
    about = "A training run as a SLURM job: saved and put back into the queue before its time is up."
    parser = parser_beside_fit("condenser launch", about)
    add = parser.add_argument
    add("--name", help="name of the run, or of the job array (default: the configuration's)")
    add("--nodes", type=int, default=1, help="machines (default: 1)")
    add("--gpus", type=int, default=8, help="GPUs of each, with a process for each; 0 for a run on CPUs (default: 8)")
    add("--tasks", type=int, default=1, help="processes on each machine where --gpus is 0 (default: 1)")
    add("--cpus", type=int, default=8, help="cores of each process (default: 8)")
    add("--time", default="24:00:00", help="time limit, as for sbatch; the run goes on in the next (default: 24:00:00)")
    add("--notice", type=int, default=180, help="seconds before the limit at which the run is to save (default: 180)")
    add("--retries", type=int, default=3, help="a killed job is not put back after so many starts in vain (default: 3)")
    add("--partition", help="SLURM's partition")
    add("--account", help="SLURM's account")
    add("--sbatch", type=shlex.split, default="", help="further #SBATCH options: --sbatch='--mem=64G --exclusive'")
    add("--srun", default="", help="further options of srun: --srun='--container-image=...'")
    add("--setup", default="", help="shell lines before the run, such as 'module load cuda'")
    add("--python", default=sys.executable, help="the interpreter on the machines (default: this one)")
    add("--template", type=Path, default=TEMPLATE, help="job script with @{...} (default: configs/cluster/slurm.sh)")
    add("--seeds", type=int, nargs="+", default=[], help="a run for each of these: --seed_everything")
    add("--overlays", nargs="+", default=[], help="a run with each of these YAML files laid over the configuration")
    add("--dry-run", action="store_true", help="write everything, show the job script, submit nothing")
    return parser


def seconds_of(time: str) -> float:
    """Of a time limit as sbatch reads it."""
    if time.lower() in UNLIMITED:
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise ValueError(f"--time {time}: give it as minutes, H:M:S, D-H or D-H:M:S")
    days, *parts = match.groups()
    given = [int(part) for part in parts if part]
    units = (3600, 60, 1) if days or len(given) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(given, units, strict=False))


def settings_of_runs(options: Any, of_fit: list[str]) -> tuple[str, list[Settings]]:
    """The name of all and the complete settings of each run. Raises ValueError as `fit` does."""
    if options.seeds and any(word.partition("=")[0] == "--seed_everything" for word in of_fit):
        raise ValueError("--seed_everything and --seeds: give one of them")
    of_fit = [*of_fit, *(["--name", options.name] if options.name else [])]
    plain = complete(of_fit, options)
    name, runs = plain["name"], {}
    if not name:
        raise ValueError("the run needs a name: --name NAME, or name: in the configuration")
    for overlay, seed in itertools.product(options.overlays or [None], options.seeds or [None]):
        parts, more = [name], []
        if overlay is not None:
            parts, more = [*parts, Path(overlay).stem], ["-c", overlay]
        if seed is not None:
            parts, more = [*parts, f"seed={seed}"], [*more, "--seed_everything", str(seed)]
        settings = {**complete([*of_fit, *more], options), "name": "-".join(parts)} if more else plain
        if settings["name"] in runs:
            raise ValueError(f"two runs would be called {settings['name']}: give each seed and overlay once")
        runs[settings["name"]] = settings
    return name, list(runs.values())


def complete(of_fit: list[str], options: Any) -> Settings:
    """The settings that `fit` makes of these arguments, on the devices that the job will have.

    Raises:
        ValueError: devices given to `fit`.
    """
    for word in of_fit:
        if word.startswith(("--trainer.devices", "--trainer.num_nodes")):
            raise ValueError(f"{word.partition('=')[0]}: a job's devices are --nodes and --gpus (or --tasks) of launch")
    run = run_cli("fit", of_fit, DryCLI)
    settings = yaml.safe_load(dumped(run))
    settings["trainer"] |= {"devices": options.tasks, "num_nodes": options.nodes}
    return {**settings, "runs_dir": str(Path(settings["runs_dir"]).absolute()), "config": None}


def check(settings: Settings, options: Any) -> None:
    """Raises ValueError for what would fail on the cluster only, after a wait."""
    name, data, accelerator = settings["name"], settings["data"], settings["trainer"]["accelerator"]
    if not re.fullmatch(r"\w[\w.=+-]*", name):
        raise ValueError(f"--name {name}: use letters, digits and . _ = + - only")
    if re.search("[:%]", settings["runs_dir"]):
        raise ValueError(
            f"--runs_dir {settings['runs_dir']}: Python's path takes no colon, and SLURM's log no percent sign"
        )
    for store in [data["store"]] if data["store"] else data["stores"]:
        read_manifest(store_folder(store))
    check_shared(data["micro_batches_per_step"], options.nodes * options.tasks)
    if accelerator in (("cpu",) if options.gpus else ("gpu", "cuda")):
        raise ValueError(f"trainer.accelerator={accelerator} does not go with --gpus {options.gpus}: change one")
    if settings["ckpt_path"] not in (None, "last"):
        intact(settings["ckpt_path"])
    if 0 in (settings["trainer"]["max_steps"], settings["trainer"]["max_epochs"]):
        raise ValueError("trainer.max_steps or max_epochs is 0: a run of no steps")
    run = Path(settings["runs_dir"]) / name
    newest = newest_valid_checkpoint(run, say=lambda message: None)
    if newest is not None and not goes_on(run, newest, settings):
        raise ValueError(f"{run} is finished: there is nothing to do; give the run another --name")


def write(folder: Path, name: str, runs: list[Settings], options: Any) -> None:
    """The code, the settings of each run and the job script."""
    array = len(runs) > 1
    directives = [f"--gpus-per-node={options.gpus}"] if options.gpus else []
    directives += [f"--{key}={value}" for key in ("partition", "account") if (value := getattr(options, key))]
    directives += [f"--array=0-{len(runs) - 1}"] if array else []
    directives += options.sbatch
    values = vars(options) | {"name": name, "python": shlex.quote(options.python)}
    values |= {"folder": shlex.quote(str(folder)), "workdir": shlex.quote(os.getcwd())}
    values |= {"suffix": "-$SLURM_ARRAY_TASK_ID" if array else "", "log": "%A_%a" if array else "%j"}
    values |= {"runs": shlex.join(str(Path(settings["runs_dir"]) / settings["name"]) for settings in runs)}
    values |= {"directives": "\n".join(f"#SBATCH {shlex.quote(directive)}" for directive in directives)}
    try:
        script = Script(options.template.read_text(encoding="utf-8")).substitute(values)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{options.template}: {error} cannot be filled in; write @@ for a plain @") from None
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", f"{folder} is being written by {{holder}}: wait for its end, or give another --name"):
        snapshot(folder / "code", runs)
        for number, settings in enumerate(runs):
            path = folder / (f"settings-{number}.yaml" if array else "settings.yaml")
            path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        (folder / "job.sh").write_text(script, encoding="utf-8")


def snapshot(folder: Path, runs: list[Settings]) -> None:
    """The package, and beside it what git knows in the working folder, with the commit that it stands on, and modules
    of one's own."""
    fresh = folder.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    known = output("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    wanted = {name: Path(name) for name in (known or "").split("\0") if name} | own_modules(runs)
    wanted |= files_of(Path(condenser.__path__[0]))
    for name, source in wanted.items():
        target = fresh / name
        if source.is_file() and source.stat().st_size <= LARGEST_FILE:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    if known:
        commit = output("git", "rev-parse", "HEAD") or "no commit"
        (fresh / COMMIT).write_text(f"{commit}\n{output('git', 'status', '--short')}\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def own_modules(runs: list[Settings]) -> dict[str, Path]:
    """The files of modules that the settings name and that are not installed, by their place on Python's path."""
    values = {value for settings in runs for _, value in flatten(settings) if isinstance(value, str)}
    tops = {value.partition(".")[0] for value in values if re.fullmatch(r"\w+(\.\w+)+", value)} & sys.modules.keys()
    found: dict[str, Path] = {}
    for top in tops - sys.stdlib_module_names - {"condenser"}:
        spec: Any = getattr(sys.modules[top], "__spec__", None)
        for root in map(Path, spec.submodule_search_locations or [spec.origin or ""] if spec else []):
            if {"site-packages", "dist-packages"}.isdisjoint(root.parts):
                found |= files_of(root, "*" if spec.origin else "*.py")  # a folder without __init__ may hold much
    return found


def files_of(root: Path, pattern: str = "*") -> dict[str, Path]:
    """A module's, by their names beside it."""
    paths = [root, *root.rglob(pattern)]
    return {str(path.relative_to(root.parent)): path for path in paths if path.suffix != ".pyc"}


def submit(script: Path) -> str:
    """The number of the job."""
    if shutil.which("sbatch") is None:
        raise ValueError(f"there is no sbatch here; run it where there is one: sbatch {shlex.quote(str(script))}")
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def job_in_queue(script: Path) -> str | None:
    """The number of the job with this script that waits or runs, however it was submitted."""
    jobs = (output("squeue", "--me", "--noheader", "--format=%A %o") or "").splitlines()
    return next((job.split()[0] for job in jobs if job.endswith(f" {script}")), None)
