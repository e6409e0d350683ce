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
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence

from condenser.cluster import signals

COMMANDS = {  # name: (module:function, one line)
    "prepare": ("condenser.corpus.prepare:prepare", "text -> token store"),
    "prepare merge": ("condenser.corpus.merge:merge", "put the shares of several machines together"),
    "fit": ("condenser.training.fit:fit", "pre-train from a YAML recipe; resumes a run of the same name"),
    "launch": ("condenser.cluster.launch:launch", "pre-train as a SLURM job that goes on where it was stopped"),
    "validate": ("condenser.training.fit:validate", "validation losses and accuracies of a checkpoint"),
    "estimate": ("condenser.reports.estimate:estimate", "parameters, memory and hours of a run, before it is started"),
    "export": ("condenser.export:export", "checkpoint -> a folder that Hugging Face and sentence-transformers load"),
    "evaluate": ("condenser.evaluation.evaluate:evaluate", "retrieval, similarity, [CLS] attention; also fine-tuned"),
    "evaluate compare": (
        "condenser.evaluation.comparison:compare",
        "two evaluations, query by query: paired bootstrap",
    ),
    "inspect": (
        "condenser.reports.inspection:inspect_store",
        "what is in a token store: numbers, lengths, masks, steps",
    ),
    "bench": ("condenser.reports.bench:bench", "speed of a training step, from the authors' recipe to ours"),
    "bench data": (
        "condenser.reports.bench_data:bench_data",
        "speed of preparing and batching, beside others",
    ),
    "report": ("condenser.reports.report:report", "curves and tables of one or several runs in one HTML file"),
}
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
        print(f"condenser: no command {name!r}\n\n{overview()}", file=sys.stderr)
        return 2
    with signals.listening() if name == "fit" else contextlib.nullcontext():
        return run(name, rest)


def run(name: str, rest: Sequence[str]) -> int:
    try:
        function = load(COMMANDS[name][0])
        if name in OWN_PARSER:
            function(rest)
        else:
            function_call(function, f"condenser {name}", rest)
        return 0
    except SystemExit as stop:  # argparse: --help and usage errors
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("condenser: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("CONDENSER_TRACEBACK"):
            raise
        print(f"condenser {name}: error: {error}", file=sys.stderr)
        return signals.LOST if isinstance(error, ConnectionError) else 1


def overview() -> str:
    rows = "\n".join(f"  {name:<16} {line}" for name, (_, line) in COMMANDS.items())
    return (
        f"usage: condenser <command> [options]\n\n{rows}\n\n"
        "`condenser <command> --help` lists a command's options. CONDENSER_TRACEBACK=1 shows where an error came from."
    )


def load(path: str) -> Callable:
    module, function = path.split(":")
    return getattr(importlib.import_module(module), function)


def function_call(function: Callable, prog: str, argv: Sequence[str]) -> None:
    """Parse ``argv`` by the signature of ``function`` and call it."""
    values = vars(function_parser(function, prog).parse_args(argv))
    parameters = inspect.signature(function).parameters.values()
    positional = [values.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY]
    function(*positional, **values)


def function_parser(function: Callable, prog: str) -> argparse.ArgumentParser:
    from docstring_parser import parse

    doc = parse(inspect.getdoc(function) or "")
    about = {param.arg_name: " ".join((param.description or "").split()) for param in doc.params}
    parser = argparse.ArgumentParser(
        prog=prog,
        description="\n\n".join(text for text in (doc.short_description, doc.long_description) if text),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        add_argument(parser, parameter, hints[parameter.name], about.get(parameter.name, ""))
    return parser


def add_argument(parser: argparse.ArgumentParser, parameter: inspect.Parameter, hint: object, about: str) -> None:
    many, choices, kind = unpack_hint(hint)
    options: dict = {"help": about.replace("%", "%%")}
    if many:
        options["nargs"] = "+"
    if choices:
        options["choices"] = choices
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options |= {"type": kind, "metavar": None if choices else parameter.name.rsplit("_")[-1].upper()}
    if parameter.kind is parameter.POSITIONAL_ONLY:
        parser.add_argument(parameter.name, **options)
        return
    required = parameter.default is parameter.empty
    if not required:
        options["default"] = parameter.default
        if parameter.default not in (None, False, ()):
            options["help"] += f" (default: {parameter.default})"
    parser.add_argument("--" + parameter.name.replace("_", "-"), dest=parameter.name, required=required, **options)


def unpack_hint(hint: object) -> tuple[bool, tuple | None, type]:
    """``list[T]``, ``Literal[...]``, ``T | None`` and plain ``T`` -> (several values?, choices, type of one value)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is list:
        _, choices, kind = unpack_hint(typing.get_args(hint)[0])
        return True, choices, kind
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        return False, choices, type(choices[0])
    assert isinstance(hint, type), f"cannot make a command-line option of {hint}"
    return False, None, hint
