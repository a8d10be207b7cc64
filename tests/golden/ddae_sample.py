"""The sampling script: names of folders and files, and the bytes of the images."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from DDAE import sample
from DDAE.ddae import sampling
from DDAE.ddae.checkpoints import checkpoint_path, write_model
from DDAE.ddae.config import make_config, make_network
from shared.cli import UserError
from tests.golden.cases import each, fill, number, serves
from tests.golden.ddae_compare import cases_of, given

SCRIPTED = cases_of("sampling script")
SERVES = serves(SCRIPTED)


class StoredNoise:
    """Stands in for ImageNoise: the recorded latents and step noise of images by number."""

    def __init__(self, case: dict[str, Any], items: Sequence[int]) -> None:
        stored = given(case)
        self.latent = torch.from_numpy(stored["xT"]).flatten(0, 1)[list(items)]
        # [batch, step, image, ...] -> [step, image, ...]
        self.noise = torch.from_numpy(stored["z"]).transpose(0, 1).flatten(1, 2)[:, list(items)] if "z" in stored \
            else None

    def latents(self) -> torch.Tensor:
        return self.latent

    def step(self, number: int) -> torch.Tensor:
        return self.noise[number]


@pytest.mark.parametrize("batch", [400, 77])
@each(SCRIPTED)
def test_sampling_script(case: dict[str, Any], batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = dict(case["constructor"])
    options, notes = made.pop("options"), case["notes"]
    made["save_dir"] = str(tmp_path / "out")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(made))
    config = make_config(made, case["id"])
    net = fill(make_network(config))
    epoch = made["n_epoch"] - 1 if options["epoch"] == -1 else options["epoch"]
    path = checkpoint_path(config, epoch)
    path.parent.mkdir(parents=True)
    write_model(path, net, net, 1, torch.optim.Adam(net.parameters()), config, epoch)

    monkeypatch.setattr(sampling, "ImageNoise", lambda seed, items, shape, device: StoredNoise(case, items))
    flags = [f"--{name}={value}" for name, value in options.items() if value is not None]
    monkeypatch.setattr("sys.argv", ["sample.py", f"--config={tmp_path / 'config.yaml'}", "--device=cpu",
                                     f"--batch={batch}", *flags])
    sample.main()

    folders = [path for path in (tmp_path / "out").iterdir() if path.is_dir() and path.name != "ckpts"]
    assert [folder.name for folder in folders] == [notes["output_directory"]]
    assert sorted(path.name for path in folders[0].iterdir()) == notes["entries"]
    *names, count = notes["pngs"]
    files = {path.name for path in (folders[0] / "pngs").iterdir()}
    assert set(names) <= files and len(files) == count

    def pixels(file: Path) -> np.ndarray:
        with Image.open(file) as image:
            return np.asarray(image)

    reference = given(case)["png_uint8"].astype(int)
    found = np.stack([pixels(folders[0] / "pngs" / f"{number}.png") for number in range(count)]).astype(int)
    assert [*found.shape[1:]] == notes["png_shape"]
    difference = np.abs(found - reference)
    levels, percent = number(case["tolerance"], "at most # grey"), number(case["tolerance"], "< #%")
    assert difference.max() <= levels and (difference > 0).mean() < percent / 100
    assert [*pixels(folders[0] / "grid_0.png").shape] == notes["grid_png_shape"]


def test_flags_out_of_range_are_refused() -> None:
    for flags in (["--steps=0"], ["--batches=0"], ["--eta=-1"], ["--mode=ddim"], ["--epoch=-2"]):
        with pytest.raises(UserError):
            sample.parse(flags)
