"""Settings: the defaults, then recipe files from left to right, then --name=value; the later wins.

A recipe is data and never code. It is read with `ast` and holds `name = value` lines, numbers with arithmetic among
them (8 * 1024), a docstring and comments. All three scripts take the same grammar, and this file also turns their
expected errors into one line and an exit code.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import math
import operator
import os
import re
import sys
import time
from pathlib import Path

BAD_INPUT, NOT_FINITE, NO_CHECKPOINT, IN_USE, INPUT_OUTPUT = 2, 3, 4, 5, 6  # exit codes; 0 is done

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


class Failure(Exception):
    """An expected error: its text is for the user, and `code` is the exit code."""

    def __init__(self, message: str, code: int = BAD_INPUT):
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def exit_codes(one_voice: bool = False):
    """Within this, an expected error ends the program with its message and exit code instead of a traceback.

    one_voice: of the processes that torchrun starts only the first speaks, for an error that all of them have. Nor does
    another one speak whose Failure has no message, for an error that the first alone knows.
    """
    try:
        yield
    except Failure as failure:
        message, code = str(failure), failure.code
    except OSError as error:
        message, code = f"{type(error).__name__}: {error}", INPUT_OUTPUT
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    else:
        return
    rank = os.environ.get("RANK", "0")
    if rank == "0" or (message and not one_voice):
        who = Path(sys.argv[0]).name + (f", rank {rank}" if rank != "0" else "")
        print(f"{who}: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(10)  # the first process to end has torchrun kill the others; let that be the one that speaks
    sys.exit(code)


def load(settings_class, arguments: list[str], positional: str = ""):
    """Return an instance of the dataclass `settings_class`, checked.

    positional: the field that takes an argument without `--` that is not a recipe.
    Ends the program with code 2 where an argument, a recipe or a value doesn't fit, and after `--help`.
    """
    with exit_codes(one_voice=True):
        if {"--help", "-h"} & set(arguments):
            print(help_text(settings_class, positional))
            sys.exit(0)
        values = {}
        for argument in sorted(arguments, key=lambda a: a.startswith("-")):  # recipes first, in the order given
            found = parse_argument(settings_class, argument, positional)
            if not argument.startswith("-") and positional in found and positional in values:
                raise Failure(f"{argument}: {positional} is {values[positional]} already; one at a time")
            values |= found
        settings = settings_class(**values)
        try:
            settings.check()
        except ValueError as error:
            raise Failure(str(error)) from None
        return settings


def parse_argument(settings_class, argument: str, positional: str) -> dict:
    if argument.endswith(".py") and not argument.startswith("-"):
        return read_recipe(Path(argument), settings_class)
    if not argument.startswith("-"):
        if positional:
            return {positional: argument}
        raise Failure(f"{argument}: a recipe is a file like config/small.py, a setting is --name=value")
    name, equals, text = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or not equals:
        raise Failure(f"{argument}: write --name=value (--help lists the names)")
    return {name: convert(settings_class, name, text, f"--{name}", from_text=True)}


def read_recipe(path: Path, settings_class) -> dict:
    """Return the settings in a recipe file. Raises Failure at file:line for whatever is not `name = value`."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in Path(__file__).parent.glob("[!_]*.py")], 1)
        hint = f"; did you mean config/{near[0]}?" if near else ""
        raise Failure(f"{path}: there is no such recipe{hint}") from None
    except (SyntaxError, ValueError) as error:
        raise Failure(f"{path}:{getattr(error, 'lineno', None) or 1}: {error}") from None
    values = {}
    for node in tree.body:
        where = f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            continue  # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise Failure(f"{where}: a recipe holds only lines of the form name = value")
        name = node.targets[0].id
        values[name] = convert(settings_class, name, evaluate(node.value, where), where)
    return values


def evaluate(node, where: str):
    """The value of a literal, or of arithmetic on numbers."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str)):
        return node.value
    try:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -evaluate(node.operand, where)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            left, right = evaluate(node.left, where), evaluate(node.right, where)
            if not isinstance(left, str) and not isinstance(right, str):
                return OPERATORS[type(node.op)](left, right)
    except (ArithmeticError, TypeError) as error:
        raise Failure(f"{where}: {error}") from None
    raise Failure(f"{where}: a value is a number, arithmetic on numbers, a string, True or False")


def convert(settings_class, name: str, value, where: str, from_text: bool = False):
    """Check that `name` is a setting and that `value` has its type; `from_text` for a value as typed in a shell."""
    kinds = {field.name: field.type for field in dataclasses.fields(settings_class)}
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1)
        raise Failure(f"{where}: there is no setting {name}" + (f"; did you mean {near[0]}?" if near else ""))
    kind = kinds[name]
    if from_text and kind is not str:
        text = {"true": "True", "false": "False"}.get(value, value)
        with contextlib.suppress(SyntaxError, Failure):  # what is no value stays text, which the check below refuses
            value = evaluate(ast.parse(text.strip(), mode="eval").body, where)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind is float and not math.isfinite(value)):
        words = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string in quotes"}
        raise Failure(f"{where}: {name} is {words[kind]}, not {value!r}")
    return kind(value)


def help_text(settings_class, positional: str) -> str:
    """Every setting with its default, its meaning taken from the comment behind the field."""
    source = inspect.getsource(settings_class)
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", source, re.MULTILINE))
    script = Path(sys.argv[0]).name
    first = f"{positional.upper()} " if positional else ""
    usage = f"usage: python {script} {first}[recipe.py ...] [--name=value ...]"
    lines = [usage, "", inspect.getdoc(settings_class), ""]
    for field in dataclasses.fields(settings_class):
        lines.append(f"  --{field.name}={field.default!r}".ljust(36) + f"  {comments.get(field.name, '')}")
    return "\n".join(lines)


def find_device(name: str):
    """The torch.device that a `device` setting means: auto is cuda, else mps, else cpu. Raises Failure."""
    import torch  # only here, so that settings are read without waiting for it

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there[name]:
        raise Failure(f"device {name}: torch {torch.__version__} finds none here; --device=auto takes what there is")
    return torch.device(name)
