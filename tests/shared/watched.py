"""Calls readers of files, and tells what they did:

    python tests/shared/watched.py CALLS.json TIMES

CALLS.json: name -> [module, function, arguments...]. TIMES: 2 for every call to be made twice, as what is imported at
the first one is none of the file's doing. Prints as JSON: `answers`, name -> the UserError, or what else came of it;
`events`, name -> what the interpreter was seen to do in the last call that a reader has no business with; `grown`, by
how many MB the resident memory went beyond that of the imported modules.
"""
from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from shared.cli import UserError

HARMFUL = ("exec", "compile", "subprocess", "ctypes", "socket", "os.system", "os.exec", "os.posix_spawn", "os.fork",
           "os.putenv")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.chmod", "os.link", "os.symlink", "shutil")
CACHE = os.environ["FEWLABEL_CACHE"]    # where decoded images go, and a lock
seen: list[str] | None = None


def watch(event: str, arguments: tuple) -> None:
    if seen is None:
        return
    kinds = (event, event.split(".")[0])
    if any(kind in HARMFUL for kind in kinds):
        if not (event == "compile" and arguments[1] == "<unknown>"):  # ast.literal_eval, which reads NumPy's headers
            seen.append(f"{event} {arguments}"[:200])
    elif event == "open":
        path, mode, flags = arguments
        writes = isinstance(mode, str) and set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and not str(path).startswith(CACHE):
            seen.append(f"open {path!r} to write")
    elif any(kind in CHANGES for kind in kinds) and not str(arguments[0]).startswith(CACHE):
        if event != "os.remove" or arguments[1] == -1:  # others are of a folder in the cache
            seen.append(f"{event} {arguments}")


def answer(function: Any, arguments: list) -> str:
    try:
        function(*arguments)
        return "accepted"
    except UserError as error:
        return str(error)
    except BaseException as error:  # noqa: BLE001 - which is what is looked for
        return f"{type(error).__name__}: {error}"


def memory(kind: str) -> float:
    """Return the resident memory in MB: VmRSS, or VmHWM for the largest so far."""
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) / 1024


def main() -> None:
    global seen
    sys.addaudithook(watch)
    answers, events = {}, {}
    calls = json.loads(Path(sys.argv[1]).read_text())
    for module, *_ in calls.values():
        importlib.import_module(module)
    before = memory("VmRSS")
    for name, (module, attribute, *arguments) in calls.items():
        function = getattr(importlib.import_module(module), attribute)
        for _ in range(int(sys.argv[2]) - 1):
            answer(function, arguments)
        seen = []
        answers[name] = answer(function, arguments)
        events[name], seen = seen, None
    print(json.dumps({"answers": answers, "events": events, "grown": memory("VmHWM") - before}))


if __name__ == "__main__":
    main()
