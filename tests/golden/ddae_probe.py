"""The linear heads: trained all at once, each is what it is trained alone."""
from __future__ import annotations

import numpy as np
import torch

from DDAE.ddae.probe import LinearHeads, cosine_rate, heads_loss
from tests.golden.cases import each, fill, number, serves, whole
from tests.golden.ddae_compare import assert_close, cases_of, given, tensors

PROBES = cases_of("probe")
SERVES = serves(PROBES)


def features(x: torch.Tensor, t: float, text: str) -> dict[str, torch.Tensor]:
    """Return the stand-ins for block features that a case describes; the numbers are the case's."""
    row, of_time, count = whole(text, "row #"), number(text, r"\+ # t"), whole(text, "first # flattened")
    return {"out_1": x.mean((2, 3)) * t, "out_2": x[:, :, row].amax(2) + of_time * t,
            "out_3": torch.sin(t * x.flatten(1)[:, :count])}


@each(PROBES)
def test_linear_heads(case):
    made, stored = case["constructor"], tensors(case)

    def all_features(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"{t}/{name}": value for t in made["times"] for name, value in features(x, t, made["features"]).items()
                if made["names"] is None or name in made["names"]}

    dims = {key: value.shape[1] for key, value in all_features(stored["X"][0]).items()}
    assert list(dims) == case["notes"]["keys"]
    heads = LinearHeads(dims, made["classes"])
    for key, dim in dims.items():
        alone = fill(torch.nn.Linear(dim, made["classes"]))
        for ours, theirs in zip(heads.head(key), (alone.weight, alone.bias), strict=True):
            ours.copy_(theirs.data)
    optimizer = torch.optim.Adam(heads.parameters())
    rates = []
    for epoch in range(made["epochs"]):
        rates.append(cosine_rate(epoch, made["lr"], made["epochs"]))
        optimizer.param_groups[0]["lr"] = rates[-1]
        for x, y in zip(stored["X"], stored["Y"], strict=True):
            optimizer.zero_grad()
            heads_loss(heads(all_features(x)), y.long()).backward()
            optimizer.step()
    assert_close(rates, stored["lr_f64"], case["tolerance"], "lr")
    predicted = dict(zip(heads.keys, heads(all_features(stored["X"][0])).argmax(2), strict=True))
    for key in dims:
        name = key.replace("/", "_")
        weight, bias = heads.head(key)
        assert_close(weight, stored[f"w_{name}"], case["tolerance"], f"w_{name}")
        assert_close(bias, stored[f"b_{name}"], case["tolerance"], f"b_{name}")
        assert np.array_equal(predicted[key], given(case)[f"pred_{name}"]), key
