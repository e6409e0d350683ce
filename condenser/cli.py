"""The command line: one table of commands, each a function whose signature *is* its command line.

    condenser <command> --help        (or: python -m condenser <command> --help)

A parameter before ``/`` is positional, one after ``*`` is an option (``--max-length`` for ``max_length``), one without
a default is required, ``list[...]`` takes several values; help texts come from the docstring. ``fit`` and ``validate``
hand their arguments to Lightning's command line instead. Modules are imported when their command runs, so ``--help``
is quick.
"""

import argparse
import contextlib
import importlib
import inspect
import itertools
import json
import os
import re
import select
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from condenser.cluster import signals

COMMANDS = {  # name: (module:function, one line)
    "prepare": ("condenser.corpus.prepare:prepare", "text -> token store"),
    "prepare merge": ("condenser.corpus.merge:merge", "put the shares of several machines together"),
    "fit": ("condenser.training.fit:fit", "pre-train from a YAML recipe; resumes a run of the same name"),
    "launch": ("condenser.cluster.launch:launch", "pre-train as a SLURM job that goes on where it was stopped"),
    "validate": ("condenser.training.fit:validate", "validation losses and accuracies of a checkpoint"),
    "estimate": ("condenser.reports.estimate:estimate", "parameters, memory and hours of a run, before it is started"),
    "export": (
        "condenser.exports.command:export",
        "checkpoint -> a folder that Hugging Face and sentence-transformers load",
    ),
    "evaluate": ("condenser.evaluation.evaluate:evaluate", "retrieval, similarity, [CLS] attention; also fine-tuned"),
    "evaluate compare": (
        "condenser.evaluation.comparison:compare",
        "the difference of two evaluations, paired by query and by seed",
    ),
    "inspect": (
        "condenser.evaluation.looking:inspect",
        "what is in a token store; what a model predicts, makes up, attends to",
    ),
    "bench": ("condenser.reports.bench:bench", "speed of a training step, from the authors' recipe to ours"),
    "bench data": (
        "condenser.reports.bench_data:bench_data",
        "speed of preparing and batching, beside others",
    ),
    "report": ("condenser.reports.report:report", "curves and tables of one or several runs in one HTML file"),
}
MAY_BE_EMPTY = {"--sbatch", "--srun", "--setup", "--query-prompt", "--document-prompt"}  # for others that is a mistake
OWN_PARSER = {"fit", "validate", "estimate", "launch"}  # called with the remaining arguments as they are


def main(args: Sequence[str] | None = None) -> int:
    """Run one command. Errors in what the user gave are one line on stderr and exit code 1 (2 for usage); training that
    a signal stopped ends with code 75, in a SLURM job that is to be put back into the queue with 76; one that lost a
    process with 74."""
    argv = list(sys.argv[1:] if args is None else args)
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0 if argv else 2
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS:
        print(f"condenser: no command {name!r} (`condenser --help` lists them)", file=sys.stderr)
        return 2
    with signals.listening() if name == "fit" else contextlib.nullcontext():
        return run(name, rest)


def run(name: str, rest: Sequence[str]) -> int:
    try:
        rest = as_a_shell(rest)
        for module in os.environ.get("CONDENSER_IMPORT", "").split():
            importlib.import_module(module)
        function = load(COMMANDS[name][0])
        if name in OWN_PARSER:
            function(rest)
        else:
            function_call(function, f"condenser {name}", rest)
        print(end="", flush=True)  # there may be no standard output
        return 0
    except SystemExit as stop:  # argparse: --help and usage errors
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except argparse.ArgumentError as error:
        print(f"condenser {name}: error: {in_short(str(error))} (--help lists what there is)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("condenser: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("CONDENSER_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError) and reader_left():
            return 128 + signal.SIGPIPE
        print(f"condenser {name}: error: {in_short(str(error))}{own_place(error)}", file=sys.stderr)
        return signals.LOST if isinstance(error, ConnectionError) else 1


def own_place(error: BaseException | None) -> str:
    """Where in a file of the user's own an error arose, in brackets; empty where it was in none."""
    place, others = "", (os.path.dirname(__file__), os.path.dirname(os.__file__), "<")
    while error is not None:
        for file, line, *_ in traceback.extract_tb(error.__traceback__):
            if not file.startswith(others) and "-packages" not in file:
                place = f" ({file}:{line})"
        error = error.__context__  # what it was raised from
    return place


def reader_left() -> bool:
    """Whether nobody reads standard output any more, as after ``condenser report --help | head``; then it is closed."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
    return True


def in_short(message: str) -> str:
    """What jsonargparse says of a value, without the types that it tried one after the other."""
    message = " ".join(message.split())
    for noise in (
        r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: ",
        r"- Expected a <class 'NoneType'> ?",
        r"Given value type: <class '[\w.]*'> ",
        r"- Problem with given class_path 'condenser\.training\.module\.CondenserModule': ",
        r" Given value: (Namespace\(|NestedArg\(|\{).*",
    ):
        message = re.sub(noise, "", message)
    if re.search(r"import path string|import path format|Parser key.*(No module named|has no attribute)", message):
        message += "; give a class path such as my_objective.Weighted, with PYTHONPATH=. for a file beside you"
    return re.sub(r"<class '([\w.]*)'>", r"\1", message).removeprefix("- ")


def overview() -> str:
    rows = "\n".join(f"  {name:<16} {line}" for name, (_, line) in COMMANDS.items())
    return (
        f"usage: condenser <command> [options]\n\n{rows}\n\n"
        "`condenser <command> --help` lists a command's options. CONDENSER_TRACEBACK=1 shows where errors came from.\n"
        "CONDENSER_IMPORT='module ...' imports modules first: objectives and backbones of your own, for commands that\n"
        "read a run without its configuration, as export does."
    )


def as_a_shell(argv: Sequence[str]) -> list[str]:
    """With home in the place of ``~`` after a ``=`` too. ValueError for an empty value, such as of a variable that is
    not set, which would pass for none."""
    words = []
    for before, word in itertools.pairwise(["", *argv]):
        alone = not is_option(word) or before in MAY_BE_EMPTY
        option, is_given, value = (before, "=", word) if alone else word.partition("=")
        if is_given and not value and option not in MAY_BE_EMPTY:
            what = option if is_option(option) else "an argument"
            raise ValueError(f"{what} is empty: give it a value, or leave it out")
        words.append(word.removesuffix(value) + os.path.expanduser(value))
    return words


def at_home(value: Any) -> Any:
    """A setting, or several, with home in the place of ``~``."""
    if isinstance(value, list):
        return [at_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def is_option(word: str) -> bool:
    return word.startswith("--") or word.partition("=")[0] == "-c"


def load(path: str) -> Callable:
    module, function = path.split(":")
    return getattr(importlib.import_module(module), function)


def function_call(function: Callable, prog: str, argv: Sequence[str]) -> None:
    """Parse ``argv`` by the signature of ``function`` and call it."""
    parser = function_parser(function, prog)
    if {"-h", "--help"}.intersection(argv):
        text = parser.format_help().replace("[ITEM,...]", "runs [runs ...]")  # of the one list that is positional
        print(re.sub(r"--[a-z_]+", lambda option: option[0].replace("_", "-"), text))
        return
    values = {name: at_home(value) for name, value in vars(parser.parse_args(in_full(argv, function))).items()}
    parameters = inspect.signature(function).parameters.values()
    positional = [values[p.name] for p in parameters if p.kind is p.POSITIONAL_ONLY]
    function(*positional, **{p.name: values[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY})


def function_parser(function: Callable, prog: str) -> Any:
    import jsonargparse
    from docstring_parser import parse

    from condenser.recipes import ConfigFile, Parser

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Leaves the lines of a description as they are."""

    doc = parse(inspect.getdoc(function) or "")
    about = "\n\n".join(text for text in (doc.short_description, doc.long_description) if text)
    parser = Parser(prog=prog, description=about, formatter_class=Formatter)
    if "config" not in inspect.signature(function).parameters:
        parser.add_argument("-c", "--config", action=ConfigFile, help="a YAML file with any of these settings")
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    return parser


def in_full(argv: Sequence[str], function: Callable) -> list[str]:
    """Arguments as a configuration has them.

    >>> ["docs", "--max-length", "64", "--input", "a", "b", "--append", "--no-verify"]  # becomes
    ["docs", "--max_length=64", '--input=["a", "b"]', "--append=true", "--verify=false"]
    """
    kinds = {name: kind_of(hint) for name, hint in typing.get_type_hints(function).items()}
    options, plain, left = list[str](), list[str](), list(argv)
    while left:
        word, is_given, value = left.pop(0).partition("=")
        if not word.startswith("-"):
            plain.append(word + is_given + value)
            continue
        name = word.removeprefix("--").replace("-", "_") if word.startswith("--") else "config"
        kind = kinds.get(name)
        if name == "config" and name in kinds and any(option.startswith("--config=") for option in options):
            raise ValueError("--config is given twice, and this command takes one recipe")
        if kinds.get(name.removeprefix("no_")) is bool and name.startswith("no_") and not is_given:
            name, value = name.removeprefix("no_"), "false"
        elif kind is bool and not is_given:
            value = left.pop(0) if left and left[0].lower() in ("true", "false") else "true"
        elif kind is list and not is_given:
            values = list(itertools.takewhile(lambda word: not is_option(word), left))
            left, value = left[len(values) :], json.dumps(values)
        elif not is_given and left and not is_option(left[0]) and (name in kinds or name == "config"):
            value = left.pop(0)
        elif not is_given:  # an option without a value, or an unknown one
            follows = left and not is_option(left[0])
            options += [f"--{name}" if word.startswith("--") else word, *([left.pop(0)] if follows else [])]
            continue
        options.append(f"--{name}={value}")
    parameters = inspect.signature(function).parameters.values()
    several = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and kinds[p.name] is list]
    return [*([json.dumps(plain)] if several and plain else plain), *options]


def kind_of(hint: object) -> object:
    """``list`` of ``list[T]``, and of several types the first: ``T`` of ``T | None``."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return kind_of(typing.get_args(hint)[0])
    return list if typing.get_origin(hint) is list else hint
