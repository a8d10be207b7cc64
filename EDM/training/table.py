"""A table of a network's modules: parameters, buffers and output shapes."""
from __future__ import annotations

from collections.abc import Iterable

import torch

DEEPEST = 2


@torch.no_grad()
def module_table(net: torch.nn.Module, batch: int) -> str:
    """Return a table of the modules that a preconditioned network calls, down to calls within calls within the network.

    The shapes are those for `batch` images, found with a single one. A parameter is counted in the first row it belongs
    to, so that the columns add up. Raises RuntimeError or ZeroDivisionError for a network that does not fit its images.
    """
    names = {module: name or "<top-level>" for name, module in net.named_modules()}
    rows: list[tuple[str, ...]] = []
    depth, counted = 0, set()

    def count(tensors: Iterable[torch.Tensor]) -> str:
        new = {id(tensor): tensor for tensor in tensors if id(tensor) not in counted}
        counted.update(new)
        return str(sum(tensor.numel() for tensor in new.values()) or "-")

    def enter(module: torch.nn.Module, inputs: tuple) -> None:
        nonlocal depth
        depth += 1

    def leave(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal depth
        depth -= 1
        output = output[0] if isinstance(output, tuple) else output  # of a classifier with a transition matrix
        if depth <= DEEPEST:
            rows.append((names[module], count(module.parameters()), count(module.buffers()),
                         str([batch, *output.shape[1:]]), str(output.dtype).removeprefix("torch.")))

    hooks = [hook for module in names for hook in (module.register_forward_pre_hook(enter),
                                                   module.register_forward_hook(leave))]
    training, device = net.training, next(net.parameters()).device
    try:
        image = torch.zeros([1, net.img_channels, net.img_resolution, net.img_resolution], device=device)
        net.eval()(image, torch.ones([1], device=device), torch.zeros([1, net.label_dim], device=device))
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()

    counted.clear()
    total = ("Total", count(net.parameters()), count(net.buffers()), "-", "-")
    rows = [("Module", "Parameters", "Buffers", "Output shape", "Datatype"), *rows, total]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join(["", lines[0], rule, *lines[1:-1], rule, lines[-1], ""])
