"""Three training steps of a small model, run by a launcher or directly: `two_processes.py OUT ACCUMULATION`."""

import sys
from pathlib import Path

import importable  # noqa: F401  makes the pack importable without a server
import torch
from stillmotion.nodes.training.loop import fit
from stillmotion.nodes.training.parallel import make_processes

out, accumulation = Path(sys.argv[1]), int(sys.argv[2])
processes = make_processes()
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1), torch.nn.Linear(8, 1))


def loss_of(number, generator):
    x = torch.randn(2, 4, generator=generator)
    hidden = net[1](net[0](x) + net[0](-x))  # as families call theirs: parts of the network, some twice,
    return (net[2](hidden) - x.prod(1, keepdim=True)).square().mean()  # and not its last layer at all


fit(net, loss_of, steps=3, lr=0.01, checkpoint=out.with_suffix(".state"), warmup=0, accumulation=accumulation,
    processes=processes)
if processes.rank == 0:
    torch.save({**net.state_dict(), **({"count": processes.count} if processes.count > 1 else {})}, out)
