"""Networks that predict velocities, and the layers they are made of."""

from flowdistill.networks.base import VelocityNetwork
from flowdistill.networks.edm2 import EDM2
from flowdistill.networks.embeddings import LabelEmbedding, ScalarEmbedding
from flowdistill.networks.forced_weight import ForcedWeight
from flowdistill.networks.lightning_dit import LightningDiT
from flowdistill.networks.linear import Linear
from flowdistill.networks.lora import add_lora
from flowdistill.networks.mlp import MLP
from flowdistill.networks.sit import SiT

__all__ = [
    "EDM2",
    "MLP",
    "ForcedWeight",
    "LabelEmbedding",
    "LightningDiT",
    "Linear",
    "ScalarEmbedding",
    "SiT",
    "VelocityNetwork",
    "add_lora",
]
