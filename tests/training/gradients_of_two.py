"""What two processes make of gradients that both have, that one has, and that none has."""

import os

import torch
import torch.distributed as dist
from torch import nn

from flowdistill.plumbing.distributed import add_up_gradients, process_group

with process_group(torch.device("cpu"), timeout=60):
    first = dist.get_rank() == 0
    both, one, none = parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    both.grad = torch.tensor([1.0 if first else 2.0])
    one.grad = None if first else torch.tensor([5.0])
    add_up_gradients(parameters)
    gradients = [None if p.grad is None else p.grad.item() for p in parameters]
    os.write(1, f"{gradients}\n".encode())  # at once, since both write into one pipe
