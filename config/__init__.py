"""Settings, expected errors and progress: what every script shares.

A script has one dataclass of settings. Their values are the defaults, then those of recipe files
from left to right, then `--name=value`; later wins. A recipe is data, never code: a docstring,
comments and lines `name = value`, where numbers may be arithmetic (8 * 1024), read with `ast`.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import time
from operator import add, floordiv, mul, neg, pos, sub, truediv
from pathlib import Path

BAD_INPUT, NOT_FINITE, NO_CHECKPOINT, IN_USE, INPUT_OUTPUT = 2, 3, 4, 5, 6  # exit codes; 0 is done
INTERRUPTED = 130
BEFORE_EXIT = []  # functions that wait for what is being written

# Settings that are, or can be, a path
PATHS = "out_dir data_dir dataset init_from tokenizer deepspeed_config"
PATHS += " checkpoint prompts text choices export_hf"
RANK = int(os.environ.get("RANK", "0"))  # as torchrun numbers the processes of a run
FULL = "MemoryError|DefaultCPUAllocator|out of memory|ALLOC_FAILED"  # in errors: memory is full
LOST_RANK = "gloo|nccl|Connection|Timed out"  # in torch's errors: another rank is gone


def power(base, exponent):
    """base ** exponent, where it is quick to compute. Raises ValueError."""
    if abs(base) >= 2**63 or abs(exponent) >= 64:
        raise ValueError(f"{base} ** {exponent} is too large")
    return base**exponent


OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.FloorDiv: floordiv}
OPERATORS |= {ast.Pow: power, ast.UAdd: pos, ast.USub: neg}


class Failure(Exception):
    """An expected error: its text is for the user, `code` is the exit code."""

    def __init__(self, message: str, code: int = BAD_INPUT):
        super().__init__(message)
        self.code = code


def run(main, settings_class, less_memory: str, positional: str = ""):
    """Run a script: main(settings), with the settings of the command line, then end the process.

    less_memory: what to do where memory is full. Any text can be printed, in UTF-8 whatever the
    console's encoding; a closed standard stream is replaced by an empty one.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name) or open(os.devnull, mode)  # noqa: SIM115  open to the end
        with contextlib.suppress(AttributeError):  # of a notebook, which has its own streams
            encoding = "utf-8" if mode == "w" else None
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
        setattr(sys, name, stream)
    try:
        with exit_on_failure(less_memory):
            main(load(settings_class, sys.argv[1:], positional))
    except SystemExit as end:
        end_process(end.code)
    end_process(0)


@contextlib.contextmanager
def exit_on_failure(less_memory: str = ""):
    """An expected error inside ends the program with one message and its exit code."""
    try:
        yield
        sys.stdout.flush()  # here, where an error still gets its exit code
    except BaseException as error:
        message, code = explain(error, less_memory) or (None, 1)
        if message is None:  # not expected: a traceback
            raise
        if message:  # "" where another rank prints it, or for a closed pipe
            # If all ranks have this error, torchrun ends the others once rank 0 has printed it
            time.sleep(10 if RANK else 0)
            print_error(message)
        sys.exit(code)


def print_error(message: str):
    source = Path(sys.argv[0]).name + (f", rank {RANK}" if RANK else "")
    with contextlib.suppress(OSError):  # a log on a full disk: the exit code still tells
        print(f"{source}: {message}", file=sys.stderr, flush=True)


def explain(error: BaseException, less_memory: str) -> tuple[str, int] | None:
    """The message and the exit code of an expected error; None for another."""
    if isinstance(error, Failure):
        return str(error), error.code
    if isinstance(error, BrokenPipeError):  # as of `| head`
        return "", 0
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {error}", INPUT_OUTPUT
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, (MemoryError, RuntimeError)) and re.search(FULL, repr(error)):
        return f"memory is full; {less_memory}", BAD_INPUT
    if isinstance(error, RuntimeError) and re.search(LOST_RANK, str(error)):
        return f"another rank ended or did not answer: {error!r:.200}", INPUT_OUTPUT
    return None


def end_process(code: int):
    """Exit, after what is being written; for Ctrl-C at once."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a closed pipe or a full disk: Python would exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if code == INTERRUPTED:
        os._exit(code)
    if "WORLD_SIZE" in os.environ:  # in Python's clean-up threads of gloo can abort a rank
        for finish in BEFORE_EXIT:
            finish()
        os._exit(code)
    sys.exit(code)


def load(settings_class, arguments: list[str], positional: str = ""):
    """Return a checked instance of the dataclass `settings_class`. Raises Failure.

    positional: the field set by an argument that is neither a recipe nor `--name=value`.
    """
    if {"--help", "-h"} & set(arguments):
        print(help_text(settings_class, positional), flush=True)
        sys.exit(0)
    try:
        settings = settings_class(**parse(settings_class, arguments, positional))
        settings.check()
    except (ValueError, ArithmeticError) as error:
        raise Failure(str(error)) from None
    return settings


def check_bounds(settings, low: float, names: str, below: float = 2**63):
    """Raise ValueError unless each of the named settings is at least `low` and below `below`."""
    for name in names.split():
        value = getattr(settings, name)
        if not low <= value < below:
            limit = f" and below {below}" if below < 2**63 or value >= below else ""
            raise ValueError(f"{name} is {value} and must be at least {low}{limit}")


def check_choices(settings, **choices: str):
    """Raise ValueError unless each named setting is its default or one of its choices."""
    for name, words in choices.items():
        value, allowed = getattr(settings, name), words.split()
        if value not in allowed and value != getattr(type(settings), name):
            raise ValueError(f"{name} is {value!r} and must be one of {', '.join(allowed)}")


def parse(settings_class, arguments: list[str], positional: str) -> dict:
    """The settings that the arguments give. Raises ValueError; Failure in a recipe."""
    values = {}
    for argument in sorted(arguments, key=lambda a: a[:1] == "-" and "=" in a):  # recipes first
        name, equals, text = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and equals:
            values[name] = convert(settings_class, name, text, from_text=True)
        elif argument.endswith(".py"):
            values |= read_recipe(Path(argument), settings_class)
        elif positional and positional not in values and not argument.startswith("-"):
            values[positional] = argument
        else:
            hint = "a recipe is a file like config/small.py, a setting is --name=value, no spaces"
            raise ValueError(f"{argument}: {hint} (--help lists the names)")
    return values


def read_recipe(path: Path, settings_class) -> dict:
    """The settings of a recipe file. Raises Failure at file:line for anything else."""
    values, line = {}, 1
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait
            raise Failure(f"{path} is not a file")
        for node in ast.parse(path.read_text(encoding="utf-8-sig")).body:
            line = node.lineno
            match node:
                case ast.Expr(ast.Constant(str())):  # a docstring
                    continue
                case ast.Assign([ast.Name(name)], value):
                    values[name] = convert(settings_class, name, evaluate(value))
                case _:
                    raise ValueError("a recipe holds only lines of the form name = value")
    except FileNotFoundError:
        recipes = ", ".join(sorted(file.name for file in Path(__file__).parent.glob("[!_]*.py")))
        raise Failure(f"{path}: there is no such recipe; config/ has {recipes}") from None
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise Failure(f"{path}:{getattr(error, 'lineno', None) or line}: {error}") from None
    return values


def evaluate(node):
    """The value of a literal, or of arithmetic on numbers. Raises ValueError or Python's error."""
    match node:
        case ast.Constant(bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(operator, operand) if type(operator) in OPERATORS:
            return OPERATORS[type(operator)](evaluate(operand))
        case ast.BinOp(left, operator, right) if type(operator) in OPERATORS:
            values = evaluate(left), evaluate(right)
            if not any(isinstance(value, str) for value in values):
                return OPERATORS[type(operator)](*values)
    raise ValueError("a value is a number, arithmetic on numbers, a string, True or False")


def convert(settings_class, name: str, value, from_text: bool = False):
    """`value` as the type of setting `name`; from_text: as typed in a shell. Raises ValueError."""
    types = {field.name: field.type for field in dataclasses.fields(settings_class)}
    if name not in types:
        near = difflib.get_close_matches(name, types, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no setting {name}{hint}")
    wanted = types[name]
    if from_text and wanted is not str:
        text = {"true": "True", "false": "False"}.get(value, value)
        with contextlib.suppress(SyntaxError, ValueError, TypeError, ArithmeticError):
            value = evaluate(ast.parse(text, mode="eval").body)  # else the check below fails
    fits = type(value) is wanted or (wanted is float and type(value) is int)
    if not fits or (wanted is float and not math.isfinite(value)):
        words = {int: "a whole number", float: "a finite number", bool: "True or False"}
        raise ValueError(f"{name} is {words.get(wanted, 'a string in quotes')}, not {value!r}")
    if wanted is str and re.search("[\0\ud800-\udc7f\udd00-\udfff]", value):  # NUL, surrogates
        raise ValueError(f"{name} is {value!r}; no file name and no UTF-8 text can have that")
    if name in PATHS.split():
        value = os.path.expanduser(value)
        if not value and getattr(settings_class, name):
            raise ValueError(f"{name} is empty; name a path, or leave it out")
    return wanted(value)


def help_text(settings_class, positional: str) -> str:
    """Every setting with its default and its meaning, which is the comment behind the field."""
    sources = [inspect.getsource(c) for c in settings_class.__mro__ if dataclasses.is_dataclass(c)]
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", "\n".join(sources), re.MULTILINE))
    first = f"{positional.upper()} " if positional else ""
    usage = f"usage: python {Path(sys.argv[0]).name} {first}[recipe.py ...] [--name=value ...]"
    lines = [usage, "", inspect.getdoc(settings_class), ""]
    for field in dataclasses.fields(settings_class):
        setting = f"  --{field.name}={field.default!r}"
        lines.append(f"{setting:<36}  {comments.get(field.name, '')}")
    return "\n".join(lines)


def say(text: str):
    """Print a line that nothing depends on: a closed pipe or a full disk does not matter."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


class Progress(contextlib.AbstractContextManager):
    """How far a long task is, and the time left, on standard error after two seconds.

    with Progress("bytes read", total) as progress: progress.update(done); total 0 = unknown.
    """

    def __init__(self, unit: str, total: int):
        self.unit, self.total, self.started = unit, total, time.monotonic()
        self.is_terminal = sys.stderr.isatty()
        self.next_time = self.started + 2

    def update(self, done: int):
        """Show that `done` are done, at most five times per second; to a file, every 10 s."""
        now = time.monotonic()
        if now < self.next_time:
            return
        self.next_time = now + (0.2 if self.is_terminal else 10)
        line = f"{done:,} {self.unit}"
        if self.total:
            seconds = (now - self.started) * (self.total - done) / max(done, 1)
            line = f"{done:,} of {self.total:,} {self.unit}, {seconds:.0f} s left"
        start, end = ("\r", "") if self.is_terminal else ("", "\n")
        print(f"{start}{line:<70}", end=end, file=sys.stderr, flush=True)

    def __exit__(self, *_):
        if self.is_terminal:
            print(f"\r{'':<70}\r", end="", file=sys.stderr, flush=True)
