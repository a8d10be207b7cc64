"""The record of an output's settings and inputs: the same command again finds it complete.

    record = Record(output, settings={"resolution": 32}, inputs={"--source": source})
    if record.is_complete(overwrite=options.overwrite):
        return
    ...                             # make the output
    record.write()

The record of a file NAME is `.NAME.record.json` beside it, that of a folder `.record.json` inside it: settings,
fingerprints of inputs and output, and the name of the program.
"""
from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.cli import UserError
from shared.training.files import sweep, write_json
from shared.training.fingerprint import fingerprint, fingerprints


class Record:
    """The settings and inputs of one output, a file or a folder.

    settings: plain values, everything that decides about the content besides the inputs. inputs: name as the user knows
    it -> path, ImageSet, array, fingerprint, or None (not given); nothing is read before a method is called.
    """

    def __init__(self, output: str | os.PathLike, settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        self.output, self.settings = Path(output), json.loads(json.dumps(dict(settings), default=str))
        self._inputs = dict(inputs)

    @property
    def path(self) -> Path:
        """Where the record lies."""
        if self.output.is_dir():
            return self.output / ".record.json"
        return self.output.with_name(f".{self.output.name}.record.json")

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of the inputs, by name."""
        return fingerprints(self._inputs)

    def is_complete(self, overwrite: bool = False) -> bool:
        """Return whether the output exists with the same settings and inputs, and print so.

        False for an output without a record, changed since, or only begun (see `begin`). Other settings or inputs raise
        UserError, or with `overwrite` remove the record and return False.
        """
        sweep(self.output.parent, f"{glob.escape(self.output.stem)}*")
        sweep(self.path.parent, glob.escape(self.path.name))
        saved = self._read()
        if not saved:
            return False
        if changed := self._changes(saved):
            reason = f"{self.output} was made by {saved.get('program')} from something else ({changed})"
            if not overwrite:
                raise UserError(f"{reason}; give --overwrite to make it anew, or another output")
            print(f"{reason}: it is made anew", flush=True)
            self.path.unlink()
            return False
        if saved.get("output") != fingerprint(self.output):
            return False
        print(f"complete: {self.output}", flush=True)
        return True

    def has_same_inputs(self) -> bool:
        """Return whether an existing output was made from the same inputs, with any settings."""
        saved = self._read()
        return not saved or saved.get("inputs") == self.inputs

    def begin(self) -> None:
        """Record settings and inputs before the work, for programs that continue a partial folder."""
        self._write(None)

    def write(self) -> None:
        """Record that the output is complete; the last thing that a program does."""
        self._write(fingerprint(self.output))

    def _write(self, output: str | None) -> None:
        write_json(self.path, {"program": Path(sys.argv[0]).name, "settings": self.settings, "inputs": self.inputs,
                               "output": output})

    def _read(self) -> dict[str, Any]:
        """Return the record of an existing output, or {}."""
        if not self.output.exists() or not self.path.exists():
            return {}
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise UserError(f"{self.path}: cannot be read; remove it to make {self.output} anew") from None

    def _changes(self, saved: Mapping[str, Any]) -> str:
        before, inputs = saved.get("settings", {}), saved.get("inputs", {})
        changed = [f"{name} was {str(before.get(name))[:50]}, is {str(self.settings.get(name))[:50]}"
                   for name in {**before, **self.settings} if before.get(name) != self.settings.get(name)]
        changed += [f"the content of {name} has changed" for name in {**inputs, **self.inputs}
                    if inputs.get(name) != self.inputs.get(name)]
        return "; ".join(changed[:4])
