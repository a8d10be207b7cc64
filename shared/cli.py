"""Command lines: one clear line for every mistake, YAML files below the flags, names suggested for typing errors.

Only the standard library is imported at the top, so that `--help` answers at once.
"""
from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

TRUE_WORDS = ("yes", "true", "t", "y", "1", "on")
FALSE_WORDS = ("no", "false", "f", "n", "0", "off")
# What the machine refuses, as opposed to what the program did wrong: reported in one line, without a traceback.
MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class UserError(Exception):
    """Something the user can mend. The message is one line: what was found, what was expected, what to do."""

    status = 2


class Diverged(UserError):
    """A run that produced a non-finite loss; nothing of the bad state is saved."""

    status = 1


class MachineError(UserError):
    """A disk that is full, or that may not be written to."""


def run_main(main: Callable[..., Any]) -> NoReturn:
    """Run `main` (a function or a click command) as a program.

    A UserError, a click or argparse error and a full or read-only disk end in one line on stderr; the exit status is
    2 for what the user can mend, 1 for a diverged run, 130 for Ctrl-C.
    """
    warnings.formatwarning = _one_line_warning
    try:
        if hasattr(main, "make_context"):  # a click command
            main.main(standalone_mode=False)
        else:
            main()
    except UserError as error:
        _fail(str(error), error.status, at_once=isinstance(error, MachineError))
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        _fail(f"{error.strerror}: {error.filename or 'the output folder'}", 2, at_once=True)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's exceptions have it
            if type(error).__name__ == "Abort":
                _fail("interrupted", 130)
            raise
        _fail(error.format_message(), 2)
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


def parse_bool(text: str | bool) -> bool:
    """Read yes/true/t/y/1/on and no/false/f/n/0/off in any case; raise argparse's type error otherwise."""
    word = str(text).strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise argparse.ArgumentTypeError(f"expected yes or no, got {text!r}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ' (did you mean "x"?)' for the known name closest to `name`, or '' when none is close."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f' (did you mean "{found[0]}"?)' if found else ""


def is_bounded(value: Any, values: int = 4_000_000, containers: int = 100_000, deepest: int = 100) -> bool:
    """Whether plain containers hold at most so many values and containers, each counted as often as it occurs, and are
    at most so many levels deep.

    A few lines of a file may say "ten times the list above" ten times over, or nest without end.
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
    """Return the plain values of a YAML file that `flag` names; UserError if it cannot be read or holds more."""
    import yaml

    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except OSError as error:
        raise UserError(f"{flag}: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{flag}: {path} is not plain YAML: {str(error).splitlines()[0]}") from None
    if not is_bounded(content, 10_000):
        raise UserError(f"{flag}: {path} is refused, it unfolds to more than a configuration holds")
    return content


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors, and which reads a YAML file below the command line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        values, left = self.parse_known_args(args, namespace)
        if left:
            known = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"unknown argument {left[0]}{nearest(left[0].split('=')[0], known)}; see --help")
        return values

    def parse_with_yaml(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Return defaults, overruled by the YAML file that `--c` names, overruled by the command line.

        The namespace gets `given`: the set of the names set by the file or the command line. A key of the file that
        is no option, or a value of the wrong type, raises UserError. The text None means null.
        """
        explicit = vars(self._parse_without_defaults(argv))
        file = explicit.get("c") or self.get_default("c")
        from_yaml = self._read_yaml(file) if file else {}
        values = argparse.Namespace(**{a.dest: a.default for a in self._actions if a.dest != "help"})
        for name, value in {**from_yaml, **explicit}.items():
            setattr(values, name, value)
        values.given = {*from_yaml, *explicit}
        return values

    def _parse_without_defaults(self, argv: Sequence[str] | None) -> argparse.Namespace:
        defaults = [(action, action.default) for action in self._actions]
        for action, _ in defaults:
            action.default = argparse.SUPPRESS
        try:
            return self.parse_args(argv)
        finally:
            for action, default in defaults:
                action.default = default

    def _read_yaml(self, file: str) -> dict[str, Any]:
        content = read_yaml(file, "--c") or {}
        if not isinstance(content, dict):
            raise UserError(f"--c: {file} must hold one `key: value` per line")
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", "c")}
        values = {}
        for key, value in content.items():
            if key not in actions:
                raise UserError(f'{file}: unknown key "{key}"{nearest(str(key), actions)}')
            values[key] = self._convert(actions[key], key, value, file)
        return values

    def _convert(self, action: argparse.Action, key: str, value: Any, file: str) -> Any:
        if value is None or value == "None":
            return None
        if isinstance(action, (argparse._StoreTrueAction, argparse._StoreFalseAction)):
            convert: Callable[[str], Any] = parse_bool
        else:
            convert = action.type or str  # type: ignore[assignment]
        try:
            # Through text, so that YAML's own idea of a type never decides: `1e-3` is a string to YAML.
            converted = convert(str(value))
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            kind = "yes or no" if convert is parse_bool else getattr(convert, "__name__", "value")
            raise UserError(f"{file}: {key}: expected {kind}, got {value!r}") from None
        if action.choices is not None and converted not in action.choices:
            raise UserError(f"{file}: {key}: expected one of {', '.join(map(str, action.choices))}, got {value!r}")
        return converted
