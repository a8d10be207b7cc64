"""Run a script whose average of the weights reads one number from the device in every step.

    python one_wait.py SCRIPT ARGS...
"""
import runpy
import sys

from shared.training.ema import EMA

update = EMA.update


def update_and_read(self: EMA, net, *args) -> None:
    update(self, net, *args)
    next(net.parameters()).sum().item()


EMA.update = update_and_read
try:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    EMA.update = update
