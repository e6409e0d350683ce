"""`condenser launch`, without a SLURM: what is written, what the job does, what is refused. See test_slurm.py too."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import error_of
from test_checkpoints import NEEDS_ROOT, fill, small_disk
from test_devices import write_recipe

import condenser
from condenser.cli import main
from condenser.cluster.launch import seconds_of
from condenser.data.lock import locked

ON_CPUS = ["--gpus", "0", "--tasks", "2", "--cpus", "1"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working folder with a space in its name."""
    folder = tmp_path / "my project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Stand-ins for commands, found before any other; each notes its arguments in FOLDER/NAME.called."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def command(name, *lines):
        path = folder / name
        path.write_text("\n".join(["#!/bin/bash", f'echo "$*" >> "{path}.called"', *lines]) + "\n")
        path.chmod(0o755)
        return path

    return command


def launch(recipe, *options, devices=ON_CPUS, dry=True):
    return main(["launch", "--config", str(recipe), *devices, *options, *(["--dry-run"] if dry else [])])


def directives(folder):
    lines = (folder / "job.sh").read_text().splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]


def test_a_dry_run_writes_a_job_of_one_process_per_device_and_submits_nothing(recipe, project, commands, capsys):
    sbatch = commands("sbatch")
    more = ["--partition", "short", "--sbatch", "--mem=8G --comment='a b'", "--notice", "90", "--time", "1:00:00"]
    more += ["--data.micro_batches_per_step", "4"]
    assert launch(recipe, "--name", "N", "--nodes", "2", *more) == 0
    folder = project / "runs" / "N" / "launch"
    assert directives(folder) == [
        "--job-name=N",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--cpus-per-task=1",
        "--time=1:00:00",
        f"--chdir='{project}'",
        f"--output='{folder}'/slurm-%j.out",
        "--open-mode=append",
        "--requeue",
        "--signal=USR1@90",
        "--partition=short",
        "--mem=8G",
        "'--comment=a b'",
    ]
    assert subprocess.run(["bash", "-n", folder / "job.sh"]).returncode == 0
    assert (folder / "job.sh").read_text() in capsys.readouterr().out
    assert not sbatch.with_suffix(".called").exists()


def test_gpus_are_asked_for_with_a_process_for_each(recipe, project):
    settings = write_recipe(recipe, project / "gpu.yaml", trainer__accelerator="gpu", data__micro_batches_per_step=8)
    assert launch(settings, "--name", "N", "--gpus", "4", "--nodes", "2", devices=[]) == 0
    found = directives(project / "runs" / "N" / "launch")
    assert {"--gpus-per-node=4", "--ntasks-per-node=4", "--cpus-per-task=8"} < set(found)
    trainer = yaml.safe_load((project / "runs/N/launch/settings.yaml").read_text())["trainer"]
    assert (trainer["devices"], trainer["num_nodes"]) == (4, 2)


def test_the_settings_are_complete_and_find_the_run_folder_from_anywhere(recipe, project):
    assert launch(recipe, "--name", "N", "--data.batch_size", "4", "--runs_dir", "here") == 0
    settings = yaml.safe_load((project / "here/N/launch/settings.yaml").read_text())
    assert settings["runs_dir"] == str(project / "here")
    assert settings["data"]["batch_size"] == 4
    assert settings["model"]["init_args"]["late_mlm"] is True
    assert (settings["name"], settings["seed_everything"]) == ("N", 1)


def test_a_job_is_submitted_and_how_to_follow_and_stop_it_is_said(recipe, project, commands, capsys):
    sbatch = commands("sbatch", "echo '17;cluster'")
    commands("squeue", "echo '17 /another/job.sh'")
    assert launch(recipe, "--name", "N", dry=False) == 0
    script = project / "runs/N/launch/job.sh"
    assert sbatch.with_suffix(".called").read_text() == f"--parsable {script}\n"
    said = capsys.readouterr().out
    assert "job 17." in said
    assert "scancel --signal=USR1 17" in said


def test_a_job_that_is_still_in_the_queue_keeps_its_code_and_settings(recipe, project, commands, capsys):
    folder = project / "runs/N/launch"
    commands("squeue", "exit 1")  # as where SLURM does not answer
    assert launch(recipe, "--name", "N") == 0
    commands("squeue", "echo '16 '", "echo '16 /another/job.sh'", f"echo '17 {folder}/job.sh'")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for dry in (False, True):
        assert launch(recipe, "--name", "N", "--data.batch_size", "4", dry=dry) == 1
        assert "N is in the queue already, as job 17: scancel it first" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    commands("squeue")
    assert launch(recipe, "--name", "N", "--data.batch_size", "4") == 0
    assert before != {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_seeds_and_overlays_are_one_array_with_a_run_for_each(recipe, project):
    (project / "plain.yaml").write_text("name: other\nmodel: {n_head_layers: 0}\n")
    (project / "span.yaml").write_text("data: {mask_unit: span}\n")
    assert launch(recipe, "--name=N", "--overlays", "plain.yaml", "span.yaml", "--seeds", "0", "7") == 0
    folder = project / "runs/N/launch"
    settings = [yaml.safe_load((folder / f"settings-{number}.yaml").read_text()) for number in range(4)]
    names = ["N-plain-seed=0", "N-plain-seed=7", "N-span-seed=0", "N-span-seed=7"]
    assert [each["name"] for each in settings] == names
    assert [each["seed_everything"] for each in settings] == [0, 7, 0, 7]
    assert [each["model"]["init_args"]["n_head_layers"] for each in settings] == [0, 0, 2, 2]
    assert [each["data"]["mask_unit"] for each in settings] == ["word", "word", "span", "span"]
    assert {"--array=0-3", f"--output='{folder}'/slurm-%A_%a.out"} < set(directives(folder))


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_snapshot_holds_the_package_and_what_git_knows_here(recipe, project):
    subprocess.run(["git", "init", "--quiet"], check=True)
    (project / ".gitignore").write_text("/runs/\n/secret.txt\n")
    for name, size in {"my_objective.py": 10, "secret.txt": 10, "large.bin": 5_000_001, "sub/in it.py": 10}.items():
        path = project / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#" * size)
    assert launch(recipe, "--name", "N") == 0
    code = project / "runs/N/launch/code"
    package = Path(condenser.__file__).parent
    ours = {path.relative_to(package.parent): path.read_bytes() for path in package.rglob("*.py")}
    assert ours == {path.relative_to(code): path.read_bytes() for path in (code / "condenser").rglob("*.py")}
    files = {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()}
    beside = {name for name in files if not name.startswith("condenser/")}
    assert beside == {".gitignore", "COMMIT", "my_objective.py", "sub/in it.py"}


@pytest.mark.parametrize("how", ["file", "package", "folder"])
def test_the_module_of_an_own_objective_is_taken_along_without_git_and_the_job_imports_that(
    how, recipe, project, commands, own_modules
):
    name = {"file": f"mine_{how}", "package": f"mine_{how}.sub.idea", "folder": f"mine_{how}.idea"}[how]
    path = own_modules / f"{name.replace('.', '/')}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = ["words.txt"] if how == "package" else []
    if beside:
        (own_modules / f"mine_{how}/__init__.py").touch()
        (own_modules / f"mine_{how}/words.txt").touch()
    path.write_text("from condenser.models.condenser import Condenser\n\n\nclass Mine(Condenser):\n    pass\n")
    python = str(commands("fake-python"))
    assert launch(recipe, "--name", "N", "--model.objective", f"{name}.Mine", "--python", python) == 0
    path.write_text("raise SystemExit('edited')\n")
    code = project / "runs/N/launch/code"
    assert {path.name for path in code.rglob("*.txt")} == set(beside)
    where = f"import importlib.util as found; print(found.find_spec('{name}').origin)"
    lines = [f'exec {sys.executable} -c "{where}"']
    done, _ = run_job(code.parent, commands, lines, PYTHONPATH=str(own_modules))
    assert done.stdout.strip() == str(code / path.relative_to(own_modules)), done.stderr


def test_two_launches_do_not_write_one_job_at_a_time(recipe, project, capsys):
    folder = project / "runs/N/launch"
    folder.mkdir(parents=True)
    with locked(folder / "lock", ""):
        assert launch(recipe, "--name", "N") == 1
    assert f"{folder} is being written by process" in capsys.readouterr().err
    assert not any(folder.iterdir())


def run_job(folder, commands, python_lines, srun_lines=(), **environment):
    """The job script, with an srun that starts one process and an interpreter of these lines; what it put back."""
    python = commands("fake-python", *python_lines)
    commands("srun", *(srun_lines or [f'while [ "$1" != "{python}" ]; do shift; done', '"$@"']))
    scontrol = commands("scontrol").with_suffix(".called")
    scontrol.unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", folder / "job.sh"], env={**os.environ, **environment}, capture_output=True, text=True
    )
    return done, scontrol.read_text() if scontrol.exists() else ""


def test_a_job_runs_the_code_as_it_was_when_launched(recipe, project, commands, tmp_path):
    shutil.copytree(Path(condenser.__file__).parent, project / "condenser")
    assert launch(recipe, "--name", "N", "--python", str(tmp_path / "commands/fake-python")) == 0
    (project / "condenser/__main__.py").write_text("print('edited')\n")
    (project / "condenser/cli.py").write_text("raise SystemExit('edited')\n")
    python = [f'exec {sys.executable} -c "import condenser.cli as cli; print(cli.__file__)"']
    done, _ = run_job(project / "runs/N/launch", commands, python, PYTHONPATH=str(project))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(project / "runs/N/launch/code/condenser/cli.py")
    done, _ = run_job(project / "runs/N/launch", commands, [f'exec {sys.executable} -m condenser "--help"'])
    assert "usage: condenser <command>" in done.stdout, done.stderr


def test_the_snapshot_reaches_the_processes_of_a_job_that_exports_nothing(recipe, project, commands, tmp_path):
    """As --export=NONE of sbatch says, which srun takes for its own as long as it has none."""
    assert (
        launch(recipe, "--name", "N", "--sbatch=--export=NONE", "--python", str(tmp_path / "commands/fake-python")) == 0
    )
    srun = ['[[ " $* " = *" --export=ALL "* ]] || unset PYTHONPATH', "while [[ $1 != */fake-python ]]; do shift; done"]
    done, _ = run_job(project / "runs/N/launch", commands, ['echo "$PYTHONPATH"'], [*srun, '"$@"'], PYTHONPATH="mine")
    assert done.stdout.strip() == f"{project}/runs/N/launch/code:mine", done.stderr


def test_a_snapshot_of_code_that_may_not_be_written_can_be_replaced(recipe, project, monkeypatch, tmp_path):
    package = Path(shutil.copytree(condenser.__path__[0], tmp_path / "installed" / "condenser"))
    for folder in (package, *(path for path in package.rglob("*") if path.is_dir())):
        folder.chmod(0o555)
    monkeypatch.setattr(condenser, "__path__", [str(package)])
    assert launch(recipe, "--name", "N") == 0
    code = project / "runs/N/launch/code"
    assert all(path.stat().st_mode & 0o200 for path in code.rglob("*") if path.is_dir())
    assert not list(code.rglob("*.pyc"))


@NEEDS_ROOT
def test_a_launch_on_a_full_disk_is_one_line_and_goes_through_when_there_is_space(recipe, project, tmp_path, capsys):
    with small_disk(tmp_path / "disk", "5m") as disk:
        fill(disk, but=100_000)
        options = ["--name", "N", "--runs_dir", str(disk)]
        assert len(error_of(capsys, launch(recipe, *options), "No space left on device", disk / "N/launch")) < 500
        (disk / "filler").unlink()
        assert launch(recipe, *options) == 0


JOB = {"SLURM_JOB_ID": "17"}
TASK = {"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "1"}


@pytest.mark.parametrize(
    ("code", "environment", "put_back"),
    [
        (0, JOB, ""),
        (1, JOB, ""),
        (74, JOB, "requeue 17\n"),
        (75, JOB, ""),
        (76, JOB, "requeue 17\n"),
        (76, TASK, "requeue 17_1\n"),
        (137, JOB, "requeue 17\n"),
        (143, JOB, ""),
    ],
)
def test_a_job_is_put_back_if_its_time_was_up_or_it_lost_a_process_and_not_if_it_failed(
    code, environment, put_back, recipe, project, commands, tmp_path
):
    assert launch(recipe, "--name", "N", "--retries", "3", "--python", str(tmp_path / "commands/fake-python")) == 0
    done, requeued = run_job(project / "runs/N/launch", commands, [f"exit {code}"], **environment)
    assert (done.returncode, requeued) == (code, put_back)


@pytest.mark.parametrize(("name", "environment"), [("N", JOB), ("N-seed=2", TASK)])
def test_a_job_that_loses_processes_is_put_back_while_it_gets_on(
    name, environment, recipe, project, commands, tmp_path
):
    python, seeds = str(tmp_path / "commands/fake-python"), ["--seeds", "1", "2"] if "seed" in name else []
    assert launch(recipe, "--name", "N", "--retries", "3", "--python", python, *seeds) == 0
    checkpoints = project / "runs" / name / "checkpoints"
    checkpoints.mkdir(parents=True)

    def put_back(code, step=None):
        lines = [f"touch '{checkpoints}/last-step={step}.ckpt'"] if step else []
        return bool(run_job(project / "runs/N/launch", commands, [*lines, f"exit {code}"], **environment)[1])

    assert [put_back(137, step) for step in (8, 9, 10, 11)] == [True] * 4
    assert [put_back(74), put_back(137), put_back(74, 100)] == [True, True, True]
    assert [put_back(137), put_back(137), put_back(76, 101)] == [True, True, True]
    assert [put_back(137), put_back(137), put_back(137), put_back(137)] == [True, True, False, False]


def test_each_task_of_an_array_reads_its_own_settings(recipe, project, commands, tmp_path):
    python = str(tmp_path / "commands/fake-python")
    assert launch(recipe, "--name", "N", "--seeds", "1", "2", "--python", python) == 0
    folder = project / "runs/N/launch"
    done, _ = run_job(folder, commands, ['echo "$5"'], **TASK)
    assert done.stdout == f"{folder}/settings-1.yaml\n"


REFUSED = {
    "unknown key": (["--model.skip_form", "2"], 2, "skip_form"),
    "no store": (["--data.store", "nowhere"], 1, "no token store at nowhere"),
    "shares": (["--tasks", "3"], 1, "cannot be shared out evenly over 3 devices; make it a multiple of 3"),
    "colon": (["--runs_dir", "a:b"], 1, "a:b: Python's path takes no colon, and SLURM's log no percent sign"),
    "no name": (["--name", ""], 1, "--name is empty"),
    "no partition": (["--partition="], 1, "--partition is empty"),
    "name": (["--name", "a/b"], 1, "--name a/b: use letters, digits"),
    "space in name": (["--name", "a b"], 1, "--name a b: use letters, digits"),
    "same name": (["--seeds", "1", "1"], 1, "two runs would be called N-seed=1"),
    "two seeds": (["--seed_everything", "3", "--seeds", "1"], 1, "--seed_everything and --seeds: give one of them"),
    "no template": (["--template", "nowhere.sh"], 1, "nowhere.sh"),
    "no overlay": (["--overlays", "nowhere.yaml"], 2, "nowhere.yaml"),
    "device": (["--trainer.accelerator", "gpu"], 1, "trainer.accelerator=gpu does not go with --gpus 0"),
    "trainer": (["--trainer.gradient_clip_val", "1"], 1, "by model.optimizer.gradient_clip"),
    "type": (["--nodes", "two"], 2, "--nodes"),
    "devices": (["--trainer.devices", "2"], 1, "--trainer.devices: a job's devices are --nodes and --gpus"),
    "no end": (["--trainer.max_steps", "0"], 1, "max_steps or max_epochs is 0: a run of no steps"),
    "no checkpoint": (["--ckpt_path", "nowhere.ckpt"], 1, "--ckpt_path nowhere.ckpt is missing, damaged"),
    "callback": (["--trainer.callbacks", "BatchSizeFinder"], 1, "BatchSizeFinder cannot be used here"),
    "quotes": (["--sbatch", "--comment='a"], 2, "--sbatch"),
    "trace": (["--trace_steps", "-1"], 2, "trace_steps"),
    "notice": (["--time", "3:00"], 1, "--notice 180 must be shorter than --time 3:00, which is 180 seconds"),
    "time": (["--time", "1h"], 1, "--time 1h: give it as minutes, H:M:S, D-H or D-H:M:S"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(case, recipe, project, capsys):
    options, code, message = REFUSED[case]
    assert launch(recipe, "--name", "N", *options) == code
    assert message in capsys.readouterr().err
    assert not list(project.iterdir())


def test_a_template_with_an_unknown_place_is_refused(recipe, project, capsys):
    Path("mine.sh").write_text("srun --qos=@{quality}\n")
    assert launch(recipe, "--name", "N", "--template", "mine.sh") == 1
    assert "mine.sh: 'quality' cannot be filled in; write @@ for a plain @" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_run_that_is_finished_or_was_started_otherwise_is_refused(run, recipe, capsys):
    there = ["--runs_dir", str(run.parent), "--name", run.name]
    assert "is finished: there is nothing to do" in error_of(capsys, launch(recipe, *there))
    error_of(capsys, launch(recipe, *there, "--data.batch_size", "4"), "was started with another data.batch_size")
    assert not (run / "launch").exists()


def test_a_run_whose_end_is_damaged_is_not_finished(run, recipe, project):
    shutil.copytree(run, project / "runs/N")
    assert launch(recipe, "--name", "N") == 1
    for path in (project / "runs/N/checkpoints").glob("*step=8.ckpt"):
        path.write_bytes(path.read_bytes()[:1000])
    assert launch(recipe, "--name", "N") == 0


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("10", 600),
        ("2:30", 150),
        ("24:00:00", 86400),
        ("1-2", 93600),
        ("1-2:03", 93780),
        ("0-0:03:04", 184),
        ("UNLIMITED", math.inf),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(time, seconds):
    assert seconds_of(time) == seconds


def test_where_there_is_no_sbatch_it_says_what_to_run_where_there_is(recipe, project, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(project))
    assert launch(recipe, "--name", "N", dry=False) == 1
    script = project / "runs/N/launch/job.sh"
    assert f"there is no sbatch here; run it where there is one: sbatch '{script}'" in capsys.readouterr().err
    assert script.is_file()


def test_what_sbatch_objects_to_is_said(recipe, project, commands, capsys):
    commands("sbatch", "echo 'invalid partition specified: x' >&2", "exit 1")
    assert launch(recipe, "--name", "N", "--partition", "x", dry=False) == 1
    assert "sbatch refused" in (error := capsys.readouterr().err)
    assert "invalid partition specified: x" in error
