"""Trainings and samplings in threads of one process, as a sweep or a web server has them."""

from concurrent.futures import ThreadPoolExecutor

import torch
from runs import RING, write

import flowdistill
from flowdistill.runs.run import Run


def weights(run):
    return torch.cat([parameter.flatten() for parameter in Run(run).student.parameters()])


def test_threads_train_and_sample_what_each_alone_does(tmp_path):
    """Four trainings of other settings at once, and samples of a run meanwhile, again and again."""
    files = [
        write(tmp_path / f"{i}.gin", RING + f"AdamW.lr = {1e-3 * (i + 1)}\nmlp.hidden_size = {8 + 4 * i}\n", seed=i)
        for i in range(4)
    ]
    alone = [flowdistill.train(gin_file=f, workdir=tmp_path / "alone" / f.stem, report=False).workdir for f in files]
    samples = flowdistill.sample(alone[0], 8)
    with ThreadPoolExecutor(8) as pool:
        trained = [
            pool.submit(flowdistill.train, gin_file=f, workdir=tmp_path / "at once" / f.stem, report=False)
            for f in files
        ]
        drawn = [pool.submit(flowdistill.sample, alone[0], 8) for _ in range(8)]
        together = [future.result().workdir for future in trained]
        assert all(torch.equal(future.result(), samples) for future in drawn)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(weights(one), weights(other))
        assert (one / "config.gin").read_text() == (other / "config.gin").read_text()
