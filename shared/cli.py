"""Command lines: options declared once for flags and YAML keys, and one clear line for every mistake."""
from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

import yaml

from shared.option_types import (
    FALSE_WORDS,
    TRUE_WORDS,
    Bool,
    Choice,
    Flag,
    Float,
    Int,
    IntList,
    IntTuple,
    Text,
    nearest,
)

__all__ = ["Bool", "Choice", "Diverged", "Flag", "Float", "Int", "IntList", "IntTuple", "MachineError", "Option",
           "Text", "UserError", "is_bounded", "is_out_of_memory", "less_memory", "nearest", "parse", "read_value",
           "read_yaml", "run_main"]

# OS errors (disk full, no permission): one line, no traceback.
MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
LARGEST_YAML = 1_000_000  # characters


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: found, expected, remedy."""

    status = 2


class Diverged(UserError):
    """A run that produced a non-finite loss; nothing of the bad state is saved."""

    status = 1


class MachineError(UserError):
    """A full or read-only disk."""


@contextlib.contextmanager
def less_memory(remedy: str) -> Iterator[None]:
    """Turn running out of memory, in this context or decorated function, into a UserError that names the flag to lower.

    remedy: the flag or key as the user writes it, "--batch-gpu".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{_what_was_full(error)}; lower {remedy}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, PyTorch or CUDA's libraries means that memory was used up."""
    # By name, since torch need not be there; the CPU's allocator and CUDA's libraries have no class of their own.
    text = str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        "CUDA error: out of memory" in text or "ALLOC_FAILED" in text or "DefaultCPUAllocator" in text)


def _what_was_full(error: BaseException) -> str:
    text = str(error)
    wanted, whole = re.search(r"allocate ([\d.]+ \w+)", text), re.search(r"capacity of ([\d.]+ \w+)", text)
    device = "memory" if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text else "the GPU's memory"
    facts = [f"{wanted[1]} more were needed" if wanted else "", f"it has {whole[1]}" if whole else ""]
    shown = ", ".join(fact for fact in facts if fact)
    return f"out of memory: {device} is used up{f' ({shown})' if shown else ''}"


def run_main(main: Callable[..., Any]) -> NoReturn:
    """Run `main` as a program.

    A UserError, memory that is used up and a full or read-only disk end in one line on stderr; the exit status is 2 for
    what the user can mend, 1 for a diverged run, 130 for Ctrl-C.
    """
    warnings.formatwarning = _one_line_warning
    try:
        main()
    except UserError as error:
        _fail(str(error), error.status, at_once=isinstance(error, MachineError))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(f"{_what_was_full(error)}; end other programs that use it, or take a machine with more", 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        _fail(f"{error.strerror}: {error.filename or 'the output folder'}", 2, at_once=True)
    sys.exit(0)


def _one_line_warning(message: Warning | str, category: type[Warning], *_: Any) -> str:
    # Ours are for the user and carry no class; those of libraries say which kind they are.
    kind = "warning" if category is UserWarning else category.__name__
    return f"{kind}: {' '.join(str(message).split())}\n"


def _fail(message: str, status: int, at_once: bool = False) -> NoReturn:
    rank = int(os.environ.get("RANK", "0"))
    where = f"[rank {rank}] " if rank else ""
    print(f"{where}error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if at_once:  # what libraries still want to write at the end would fail again, in many lines
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def is_bounded(value: Any, values: int = 4_000_000, containers: int = 100_000, deepest: int = 100) -> bool:
    """Return whether plain containers stay within the limits; a repeated container counts each time.

    A few lines of YAML can repeat a list exponentially often, or nest without end.
    """
    waiting = [(value, 0)]
    while waiting:
        found, depth = waiting.pop()
        inside = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else ()
        values, containers = values - len(inside), containers - 1
        if values < 0 or containers < 0 or depth > deepest:
            return False
        waiting += [(item, depth + 1) for item in inside if isinstance(item, (dict, list, tuple))]
    return True


def read_yaml(path: str | os.PathLike, flag: str) -> Any:
    """Return the plain values of a YAML file that `flag` names; UserError if unreadable or too large."""
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read(LARGEST_YAML + 1)
        if len(text) > LARGEST_YAML:
            raise UserError(f"{flag}: {path} is refused, a configuration has at most {LARGEST_YAML:,} characters")
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{flag}: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{flag}: {path} is not plain YAML: {str(error).splitlines()[0]}") from None
    if not is_bounded(content, 10_000):
        raise UserError(f"{flag}: {path} is refused, it unfolds to more than a configuration holds")
    return content


# ---------------------------------------------------------------- options


@dataclass(frozen=True)
class Option:
    """One flag, positional argument, YAML key or `KEY VALUE` pair.

    names: as typed, separated by spaces; a name without dashes is a positional argument. type: Int(1), Text, ....
    default: the value if the option is not given; its type is not checked. help: one phrase, to which the
    help text adds `unit`, range and default, or `default_help` in place of a default that depends on something. many: a
    list of values; a flag may be repeated or take several words. key: name of the attribute and of the YAML key; by
    default the first long name.
    """

    names: str
    type: Any = Text
    default: Any = None
    help: str = ""
    _: KW_ONLY
    unit: str = ""
    default_help: str = ""
    required: bool = False
    metavar: str = ""
    hidden: bool = False
    many: bool = False
    key: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.type, type):
            object.__setattr__(self, "type", self.type())
        if not self.key:
            object.__setattr__(self, "key", self.name.lstrip("-").replace("-", "_"))

    @property
    def name(self) -> str:
        """The first long name, which messages use."""
        names = self.names.split()
        return next((name for name in names if name.startswith("--")), names[0])

    @property
    def is_flag(self) -> bool:
        return self.names.startswith("-")

    @property
    def placeholder(self) -> str:
        """Placeholder of the value in the help text."""
        word = self.metavar or (self.type.metavar if self.is_flag else self.key.upper())
        return f"{word} ..." if self.many else word


Options = Sequence[Option] | Mapping[str, Sequence[Option]]


def parse(doc: str, flags: Options, argv: Sequence[str] | None = None, config: str = "") -> SimpleNamespace:
    """Read a command line (None: this process's).

    doc: the script's docstring, which --help shows. flags: options, or {title of a group: options}. config: name of a
    flag that names a YAML file, whose keys overrule the defaults and are overruled by the command line.
    The result has an attribute for every option, and `given`: the names of those set by file or command line. Raises
    UserError for a mistake in either.
    """
    groups = dict(flags) if isinstance(flags, Mapping) else {"": tuple(flags)}
    if config:
        file = Option(config, Text, help="YAML file with any of these options as keys", metavar="FILE")
        groups = {"configuration": (file,), **groups}
    options = {option.key: option for group in groups.values() for option in group}
    words = sys.argv[1:] if argv is None else list(argv)
    found = vars(_build_parser(doc, groups).parse_args(_complete_switches(words, options.values())))
    values = {key: _from_words(options[key], text) for key, text in found.items()}
    if config and values.get(file.key):
        values = {**_from_file(values[file.key], options, file), **values}
    for option in options.values():
        if option.required and values.get(option.key) in (None, "", []):
            kind = f"option '{option.name}'" if option.is_flag else f"argument '{option.placeholder}'"
            raise UserError(f"Missing {kind}; see --help")
    defaults = {key: list(option.default or ()) if option.many else option.default for key, option in options.items()}
    return SimpleNamespace(**{**defaults, **values}, given=set(values))


def read_value(option: Option, value: Any, source: str) -> Any:
    """Return one value of a YAML file, or the text of a `KEY VALUE` pair, as `option` declares it.

    Everything goes through text, since YAML's own types mislead: `1e-3` is a string to YAML. None, also as text, is
    accepted if it is the default. Raises UserError, prefixed by `source` unless that is empty.
    """
    if value is None or value == "None":
        if option.default is None:
            return None
        problem = "a value is missing."
    elif isinstance(value, (dict, list, tuple)) and not (option.many or isinstance(option.type, IntList)):
        problem = f"{value!r} is not one value."
    else:
        try:
            if option.many:
                return [option.type.convert(str(item)) for item in (value if isinstance(value, list) else [value])]
            return option.type.convert(str(value))
        except ValueError as error:
            problem = str(error)
    raise UserError(f"{source}{': ' if source else ''}{option.key}: {problem}")


def _from_words(option: Option, found: str | list[str]) -> Any:
    try:
        if option.many:
            return [option.type.convert(text) for text in found]
        return option.type.convert(found)
    except ValueError as error:
        raise UserError(f"Invalid value for '{option.name}': {error}") from None


def _from_file(path: str, options: Mapping[str, Option], file: Option) -> dict[str, Any]:
    content = read_yaml(path, file.name) or {}
    if not isinstance(content, dict):
        raise UserError(f"{file.name}: {path} must hold one `key: value` per line")
    known = {key: option for key, option in options.items() if option is not file}
    for key in content:
        if key not in known:
            raise UserError(f'{path}: unknown key "{key}"{nearest(str(key), known)}')
    return {key: read_value(known[key], value, path) for key, value in content.items()}


def _complete_switches(words: Sequence[str], options: Iterable[Option]) -> list[str]:
    """Write `--strict` as `--strict=true`, and `--strict no` as `--strict=no`; other words that follow stay apart."""
    switches = {name for option in options if isinstance(option.type, Flag) for name in option.names.split()}
    complete: list[str] = []
    for word in words:
        if complete and complete[-1] in switches:
            if word.lower() in TRUE_WORDS + FALSE_WORDS:
                complete[-1] += f"={word}"
                continue
            complete[-1] += "=true"
        complete.append(word)
    if complete and complete[-1] in switches:
        complete[-1] += "=true"
    return complete


def _build_parser(doc: str, groups: Mapping[str, Sequence[Option]]) -> _Parser:
    arguments = [option.placeholder for options in groups.values() for option in options if not option.is_flag]
    parser = _Parser(usage=" ".join(["%(prog)s [OPTIONS]", *arguments]), description=doc.strip(),
                     formatter_class=partial(_HelpFormatter, max_help_position=32), allow_abbrev=False,
                     argument_default=argparse.SUPPRESS)
    parser._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")  # `--p-mean -1e-3`: a value, not a flag
    for title, options in groups.items():
        group = parser.add_argument_group(title) if title else parser
        for option in options:
            how: dict[str, Any] = {"help": argparse.SUPPRESS if option.hidden else _help(option)}
            needed = option.is_flag or option.required
            if option.many:
                how |= {"nargs": "+" if needed else "*", "action": "extend", "default": argparse.SUPPRESS}
            elif not needed:
                how["nargs"] = "?"
            if option.is_flag:
                group.add_argument(*option.names.split(), dest=option.key, metavar=option.placeholder, **how)
            else:
                group.add_argument(option.key, metavar=option.placeholder, **how)
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors, with the nearest known name."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        values, left = self.parse_known_intermixed_args(args, namespace)
        if left:
            known = [name for action in self._actions for name in action.option_strings]
            raise UserError(f"unknown argument {left[0]}{nearest(left[0].split('=')[0], known)}; see --help")
        return values


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Write `-j, --workers INT` in place of `-j INT, --workers INT`."""
        if not action.option_strings:
            return str(action.metavar)
        return f"{', '.join(action.option_strings)} {action.metavar or ''}".rstrip()


def _help(option: Option) -> str:
    default = option.default
    if isinstance(default, (list, tuple)):
        default = ",".join(map(str, default))
    if option.default_help or default is None or default == "" or isinstance(option.type, Flag):
        default = option.default_help
    facts = [option.unit, option.type.range, f"default: {default}" if default != "" else "",
             "required" if option.required else ""]
    shown = "; ".join(fact for fact in facts if fact)
    return f"{option.help}{f' [{shown}]' if shown else ''}".strip().replace("%", "%%")
