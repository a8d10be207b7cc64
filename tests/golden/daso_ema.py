"""The moving average of a network."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch

from DASO.lib.config.config import Config
from DASO.lib.models.ema import PREFIX, ModelEMA
from DASO.lib.models.semi import build_model
from tests.golden.cases import _fill_module, fill
from tests.golden.daso_cases import each, numbers, of_file, serves, stored, tolerance

CASES = of_file("ema.npz")
SERVES = serves(CASES)


@each(CASES)
def test_moving_average(case: dict[str, Any]) -> None:
    wanted, given, value = stored(case), case["ctor"], _fill_module().value
    width, classes = numbers(case["what"])[:2]
    net = fill(build_model(Config({"MODEL.WIDTH": width, "MODEL.NUM_CLASSES": classes})))
    ema = ModelEMA(net, given["ema_decay"], given["ema_weight_decay"])
    steps = sorted({int(key.split("/")[0].removeprefix("step")) for key in wanted if key.startswith("step")})
    decays = [ema.decay(step) for step in steps]
    np.testing.assert_allclose(decays, wanted["decays"], **tolerance(case))
    for step in steps:
        with torch.no_grad():
            for name, tensor in net.state_dict().items():
                shape = tuple(tensor.shape)
                if name.endswith("num_batches_tracked"):
                    tensor.fill_(10 * step + 7)
                elif name.endswith("running_var"):
                    tensor.copy_(torch.from_numpy(value(f"{step}.running_var", shape)))
                else:
                    tensor.copy_(torch.from_numpy(value(f"{name}.{step}.weight", shape)))
        ema.update(net, step, given["current_lr"])
        for key, expected in wanted.items():
            if not key.startswith(f"step{step}/"):
                continue
            name = key.partition("/")[2].removeprefix(PREFIX)
            if name.endswith("num_batches_tracked"):  # an integer here: the network's own
                assert ema.module.state_dict()[name] == 10 * step + 7
            else:
                np.testing.assert_allclose(ema.module.state_dict()[name], expected, **tolerance(case), err_msg=key)
