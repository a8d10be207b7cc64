"""The learners by their published name, which ALGORITHM.NAME chooses."""
from __future__ import annotations

from DASO.lib.algorithm.darp import DARPEstimate
from DASO.lib.algorithm.daso import DASO
from DASO.lib.algorithm.fixmatch import FixMatch, FixMatchABC, FixMatchCReST
from DASO.lib.algorithm.interface import Algorithm
from DASO.lib.algorithm.meanteacher import MeanTeacher, PseudoLabel
from DASO.lib.algorithm.mixmatch import MixMatch
from DASO.lib.algorithm.remixmatch import ReMixMatch, ReMixMatchCReST, ReMixMatchDASO
from DASO.lib.algorithm.rivals import ACR, SimPro
from DASO.lib.algorithm.supervised import CRT, Supervised
from DASO.lib.algorithm.usadtm import USADTM

ALGORITHMS: dict[str, type[Algorithm]] = {
    "Supervised": Supervised, "PseudoLabel": PseudoLabel, "MeanTeacher": MeanTeacher, "MixMatch": MixMatch,
    "ReMixMatch": ReMixMatch, "FixMatch": FixMatch, "USADTM": USADTM, "DARP_ESTIM": DARPEstimate,
    "FixMatchCReST": FixMatchCReST, "ReMixMatchCReST": ReMixMatchCReST, "FixMatchABC": FixMatchABC, "cRT": CRT,
    "DASO": DASO, "ReMixMatchDASO": ReMixMatchDASO, "ACR": ACR, "SimPro": SimPro}
