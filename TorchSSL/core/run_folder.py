"""The folder of a run: its owner, the checkpoint to continue from, and the files besides checkpoints and log."""
from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from shared import distributed
from shared.cli import UserError
from shared.distributed import World
from shared.training.checkpoint import load_newest, previous_path, read_checkpoint
from shared.training.files import atomic, lock, make_dir, move_aside, write_json
from shared.training.precision import computed_on
from shared.training.run import Run, plain
from TorchSSL.core.data import TrainingData, write_split
from TorchSSL.core.labels import INDEX_FILE
from TorchSSL.core.networks import AS_TRAINED, load_weights, strip_prefix

LATEST, BEST, CONFIG, RESULT = "latest_model.pth", "model_best.pth", "config.json", "result.json"


def open_folder(folder: Path, options: SimpleNamespace, config: Mapping[str, Any], inputs: Mapping[str, str],
                data: TrainingData, world: World) -> None:
    """Make the folder this run's own (rank 0 writes, all ranks call).

    A folder of the same configuration and inputs is continued. A folder of another run or program is an error, or with
    --overwrite moved aside as `<name>.replaced-1`. Raises UserError.
    """
    distributed.on_main(lambda: _take_folder(folder, options, config, inputs, data.labeled_index), world)
    if world.main:
        write_split(data, options, folder)
        values = {key: value for key, value in vars(options).items() if key != "given"}
        write_json(folder / CONFIG, {**plain(values), **plain(config), "inputs": inputs}, sort_keys=True)
    distributed.barrier(world)


def _take_folder(folder: Path, options: SimpleNamespace, config: Mapping[str, Any], inputs: Mapping[str, str],
                 labeled: np.ndarray) -> None:
    with lock(folder):  # a run that is still going on there is not moved
        reason = _foreign_owner(folder, options, config, inputs, labeled)
        if reason and not options.overwrite:
            raise UserError(f"{folder} holds another run ({reason}); choose another --save_name, or give --overwrite "
                            "to move it aside and start anew")
        if reason:
            print(f"{folder} held another run ({reason}): moved to {move_aside(folder)}", flush=True)
    make_dir(folder)


def _foreign_owner(folder: Path, options: SimpleNamespace, config: Mapping[str, Any], inputs: Mapping[str, str],
                   labeled: np.ndarray) -> str:
    """Return why the folder belongs to another run, or ''."""
    latest = folder / LATEST
    if not any(path.exists() for path in (latest, previous_path(latest), folder / BEST)):
        return ""  # nothing trained there yet
    if options.resume and Path(options.load_path).absolute().parent == folder.absolute():
        return ""  # asked for by name
    if not (folder / CONFIG).exists():
        return f"{LATEST} without a {CONFIG}"
    saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    changed = [f"{key} was {saved[key]!r}, is {value!r}" for key, value in plain(config).items()
               if key in saved and saved[key] != value]
    before = saved.get("inputs", inputs)  # older versions wrote none
    changed += [f"the content of {name} has changed" for name in {**before, **inputs}
                if before.get(name) != inputs.get(name)]
    index = folder / INDEX_FILE
    if index.exists() and not np.array_equal(np.load(index, allow_pickle=False), labeled):
        changed.append(f"other labelled images are listed in {INDEX_FILE}")
    return "; ".join(changed[:4])


def resume_from(folder: Path, options: SimpleNamespace) -> str:
    """Return the `resume` of Run: "auto", or the checkpoint of --resume --load_path, "never" for one of the original.

    The same command given again continues after the last step of its first start.
    """
    if not options.resume:
        return "auto"
    newest = load_newest(folder / LATEST)
    asked = Path(options.load_path).absolute()
    if newest and (asked == newest[0].absolute() or newest[1].get("state", {}).get("load_path") == str(asked)):
        return "auto"
    is_original = "step" not in read_checkpoint(asked)
    return "never" if is_original else str(asked)


def load_foreign(run: Run, trainer: Any, options: SimpleNamespace) -> None:
    """Start the run from a checkpoint of the original code if --load_path names one; UserError if it does not fit.

    Its counter `it` is the iteration just done. It holds no thresholds: they start anew.
    """
    if run.resumed_from is None and options.resume:
        path = options.load_path
        content = read_checkpoint(path)
        missing = {"model", "ema_model", "optimizer", "scheduler", "it"} - set(content)
        if missing:
            raise UserError(f"--load_path: {path} is no checkpoint of a trainer: it holds no {sorted(missing)[0]}")
        for name, target in (("model", trainer.net), ("ema_model", trainer.ema)):
            load_weights(getattr(target, "module", target), strip_prefix(content[name]), path, AS_TRAINED)
        try:
            trainer.optimizer.load_state_dict(content["optimizer"])
        except ValueError as error:
            raise UserError(f"--load_path: the optimizer of {path} does not fit this run: {error}") from None
        trainer.scheduler.load_state_dict(content["scheduler"])
        run.step = int(content["it"]) + 1 + trainer.algorithm.supervised_steps
        run.log.print(f"continuing at iteration {content['it'] + 1}: {path}, a checkpoint without thresholds, which "
                      "start anew")
    if options.resume:
        run.state.setdefault("load_path", str(Path(options.load_path).absolute()))
    trainer.iteration = max(0, run.step - trainer.algorithm.supervised_steps - 1)


def write_best(run: Run, trainer: Any, facts: Mapping[str, Any]) -> None:
    """Write model_best.pth, of the same form as latest_model.pth; rank 0."""
    if not run.world.main:
        return
    parts = {name: part.state_dict() for name, part in trainer.parts().items()}
    with atomic(run.outdir / BEST) as file:
        torch.save({**parts, **facts, "it": trainer.iteration, "step": run.step + 1, "finished": False,
                    "seconds": run.seconds, "state": run.state, "config": plain(run.config)}, file)


def write_result(run: Run, data: TrainingData, options: SimpleNamespace, precision: str) -> None:
    """Write result.json and print the accuracies by every protocol; rank 0."""
    state = run.state
    if not run.world.main or "last" not in state:
        return
    chosen = state.get("best_validation", {})
    accuracy = {"last": state["last"]["eval/top-1-acc"], "best_on_test": state.get("best_acc", 0.0),
                "best_iteration": state.get("best_it", 0), "median_of_last_20": statistics.median(state["accuracies"]),
                "evaluations_in_median": len(state["accuracies"]), "best_on_validation": chosen.get("test"),
                "best_validation_iteration": chosen.get("iteration")}
    result = {
        "save_name": options.save_name, "dataset": options.dataset, "seed": options.seed,
        "num_labels": data.num_real, "labeled_images": len(data.labeled), "unlabeled_images": len(data.unlabeled),
        "test_images": len(data.test), "classes": list(data.unlabeled.classes), "iterations": options.num_train_iter,
        "accuracy": accuracy, "validation_images": 0 if data.validation is None else len(data.validation),
        "last": state["last"], "confusion_matrix": state["confusion"],
        "accuracy_by_class": [row[label] / sum(row) if any(row) else None
                              for label, row in enumerate(state["confusion"])],
        "pseudo_label_accuracy_in_last_batch": state.get("pseudo_label_acc"),
        "seconds": run.seconds, "precision": precision, "processes": run.world.size, **computed_on(run.world.device)}
    write_json(run.outdir / RESULT, result)
    validated = f", best on {result['validation_images']} validation images {chosen['test']:.4f}" if chosen else ""
    run.log.print(f"accuracy of the averaged weights: last {accuracy['last']:.4f}, median of the last "
                  f"{accuracy['evaluations_in_median']} evaluations {accuracy['median_of_last_20']:.4f}{validated}, "
                  f"best on the test set {accuracy['best_on_test']:.4f} (iteration {accuracy['best_iteration']})")
