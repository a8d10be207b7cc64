"""The U-Net and its blocks: names, shapes and order of tensors, outputs, activations, pooled features."""
from __future__ import annotations

from typing import Any

import pytest
import torch

from DDAE.ddae.model import (
    AttentionBlock,
    Downsample,
    LevelBlock,
    ResidualBlock,
    TimeEmbedding,
    UNet,
    Upsample,
    use_channels_last,
)
from tests.golden.cases import each, fill, serves
from tests.golden.ddae_compare import assert_close, cases_of, check_state, tensors

UNETS, BLOCKS = cases_of("unet"), cases_of("block")
SERVES = serves(UNETS, BLOCKS)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@each(UNETS)
def test_unet(case: dict[str, Any], memory: str) -> None:
    net, stored, notes = fill(UNet(**case["constructor"])).eval(), tensors(case), case["notes"]
    check_state(net, f"{case['id']}_state.json")
    assert sum(p.numel() for p in net.parameters()) == notes["params"]
    if memory == "channels_last":
        use_channels_last(net)
    stages: list[torch.Tensor] = []
    named = {"image_proj": net.image_proj, "middle": net.middle,
             **{f"down_{i}": block for i, block in enumerate(net.down)},
             **{f"up_{i}": block for i, block in enumerate(net.up)}}
    for name in notes["stages_in_stage_mean_std"]:
        named[name].register_forward_hook(lambda _, inputs, out: stages.append(out.flatten(1)))
    x, t, aug = stored["x"], stored["t"], stored.get("aug")
    with torch.no_grad():
        out, blocks = net(x, t, aug, ret_activation=True)
        emb = net.time_emb(t, aug)
        last = net.block_names[-1]
        alone = net.features(x, t, [net.block_names[0], last], aug)
    compare = {"out": out, "time_emb_out": emb, "stage_mean_std": torch.stack(
        [torch.stack([stage.mean(1), stage.std(1, correction=0)]) for stage in stages[:len(named)]])}
    assert {name: list(block.shape[1:]) for name, block in blocks.items()} == notes["hooks"]
    for key, reference in stored.items():
        if key in ("x", "t", "aug"):
            continue
        name, _, form = key.rpartition("_")
        value = compare[key] if key in compare else \
            blocks[name].mean((2, 3)) if form == "gap" else blocks[name][tuple(map(slice, reference.shape))]
        assert_close(value, reference, case["tolerance"], key)
    for name, block in alone.items():
        assert torch.equal(block, blocks[name])


def make_block(case: dict[str, Any]) -> torch.nn.Module:
    """Return the block that the constructor's arguments belong to."""
    made = case["constructor"]
    if "in_channels" in made:
        return ResidualBlock(**made)
    if "d_k" in made:
        return AttentionBlock(**made)
    if "augment_dim" in made:
        return TimeEmbedding(**made)
    assert "use_conv" in made, f"no block for the case {case['id']}"
    grows = case["keys"]["out"][2] > case["keys"]["x"][2]
    return (Upsample if grows else Downsample)(**made)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@each(BLOCKS)
def test_unet_block(case: dict[str, Any], memory: torch.memory_format) -> None:
    block, stored = fill(make_block(case)).eval(), tensors(case)
    if block.state_dict() and not isinstance(block, (Upsample, Downsample, LevelBlock)):
        check_state(block, f"block_{case['id']}_state.json")
    with torch.no_grad():
        if isinstance(block, TimeEmbedding):
            for key, given in (("out_with_aug", ("t", "aug")), ("out_without_aug", ("t",))):
                if key in stored:
                    assert_close(block(*(stored[name] for name in given)), stored[key], case["tolerance"], key)
            return
        x = stored["x"].to(memory_format=memory)
        out = block(x, stored["emb"]) if "emb" in stored else block(x)
    assert_close(out, stored["out"], case["tolerance"])
