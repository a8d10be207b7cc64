"""The moving average of a network."""
from __future__ import annotations

import re

import torch

from DASO.lib.config.config import Config
from DASO.lib.models.ema import PREFIX, ModelEMA
from DASO.lib.models.semi import build_model
from tests.golden.cases import each, fill, fill_value, numbers, serves, whole
from tests.golden.daso_cases import Case, cases_of, close, stored

AVERAGES = cases_of("average")
SERVES = serves(AVERAGES)


@each(AVERAGES)
def test_moving_average(case: Case) -> None:
    wanted, given, said = stored(case), case["ctor"], case["what"]
    width, classes = whole(said, "WIDTH ?= ?#"), whole(said, r"\bK ?= ?#")
    slope, start = numbers(re.search(r"num_batches_tracked to (\d+\*step\+\d+)", said)[1])
    net = fill(build_model(Config({"MODEL.WIDTH": width, "MODEL.NUM_CLASSES": classes})))
    ema = ModelEMA(net, given["ema_decay"], given["ema_weight_decay"])
    steps = sorted({int(key.split("/")[0].removeprefix("step")) for key in wanted if key.startswith("step")})
    decays = [ema.decay(step) for step in steps]
    close(decays, wanted["decays"], case, "decays")
    for step in steps:
        with torch.no_grad():
            for name, tensor in net.state_dict().items():
                shape = tuple(tensor.shape)
                if name.endswith("num_batches_tracked"):
                    tensor.fill_(slope * step + start)
                elif name.endswith("running_var"):
                    tensor.copy_(torch.from_numpy(fill_value(f"{step}.running_var", shape)))
                else:
                    tensor.copy_(torch.from_numpy(fill_value(f"{name}.{step}.weight", shape)))
        ema.update(net, step, given["current_lr"])
        for key, expected in wanted.items():
            if not key.startswith(f"step{step}/"):
                continue
            name = key.partition("/")[2].removeprefix(PREFIX)
            if name.endswith("num_batches_tracked"):  # an integer here: the network's own
                assert ema.module.state_dict()[name] == slope * step + start
            else:
                close(ema.module.state_dict()[name], expected, case, key)
