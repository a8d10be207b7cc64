"""Which learner a name of ALGORITHM.NAME means."""
from __future__ import annotations

from DASO.lib.algorithm.acr import ACR
from DASO.lib.algorithm.crt import CRT
from DASO.lib.algorithm.darp_estim import DARPEstimate
from DASO.lib.algorithm.daso import DASO
from DASO.lib.algorithm.fixmatch import FixMatch
from DASO.lib.algorithm.fixmatch_abc import FixMatchABC
from DASO.lib.algorithm.fixmatch_crest import FixMatchCReST
from DASO.lib.algorithm.interface import Algorithm
from DASO.lib.algorithm.meanteacher import MeanTeacher
from DASO.lib.algorithm.mixmatch import MixMatch
from DASO.lib.algorithm.pseudolabel import PseudoLabel
from DASO.lib.algorithm.remixmatch import ReMixMatch
from DASO.lib.algorithm.remixmatch_crest import ReMixMatchCReST
from DASO.lib.algorithm.remixmatch_daso import ReMixMatchDASO
from DASO.lib.algorithm.simpro import SimPro
from DASO.lib.algorithm.supervised import Supervised
from DASO.lib.algorithm.usadtm import USADTM
from shared.cli import UserError, nearest

ALGORITHMS: dict[str, type[Algorithm]] = {
    "Supervised": Supervised,
    "PseudoLabel": PseudoLabel,
    "MeanTeacher": MeanTeacher,
    "MixMatch": MixMatch,
    "ReMixMatch": ReMixMatch,
    "FixMatch": FixMatch,
    "USADTM": USADTM,
    "DARP_ESTIM": DARPEstimate,
    "FixMatchCReST": FixMatchCReST,
    "ReMixMatchCReST": ReMixMatchCReST,
    "FixMatchABC": FixMatchABC,
    "cRT": CRT,
    "DASO": DASO,
    "ReMixMatchDASO": ReMixMatchDASO,
    "ACR": ACR,
    "SimPro": SimPro,
}


def algorithm_of(name: str) -> type[Algorithm]:
    """Return the class of a learner; UserError for an unknown name."""
    if name not in ALGORITHMS:
        raise UserError(f"ALGORITHM.NAME {name}: expected one of {', '.join(ALGORITHMS)}{nearest(name, ALGORITHMS)}")
    return ALGORITHMS[name]
