"""pi-Flow: a network gives a policy that needs no network (Chen et al. 2025, arXiv 2510.14974)."""

from flowdistill.algorithms.piflow.flow_map import PolicyFlowMap, policy
from flowdistill.algorithms.piflow.objective import PiFlow
from flowdistill.algorithms.piflow.policies import DXHead, DXPolicy, GMFlowHead, GMFlowPolicy, Policy, PolicyHead
from flowdistill.algorithms.piflow.released import PiFlowStudent

__all__ = [
    "DXHead",
    "DXPolicy",
    "GMFlowHead",
    "GMFlowPolicy",
    "PiFlow",
    "PiFlowStudent",
    "Policy",
    "PolicyFlowMap",
    "PolicyHead",
    "policy",
]
