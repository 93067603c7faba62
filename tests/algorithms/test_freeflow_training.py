"""FreeFlow's recipes, trained to the end."""

import pytest
import torch

import flowdistill
from flowdistill.evaluation import modes_found, wasserstein2


@pytest.mark.slow
def test_the_ring_is_learnt_from_noise_alone(tmp_path):
    """W2 at most 0.24 where two sets of true samples are about 0.12 apart, and all modes."""
    result = flowdistill.train(gin_file="freeflow/ring.gin", gin_bindings=["train.seed = 4"], workdir=tmp_path / "run")
    ring = flowdistill.load_teacher("ring")
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    samples = result.flow_map.sample(noise)
    assert wasserstein2(samples, ring.sample_data(2000, torch.Generator().manual_seed(2))) <= 0.24
    found, near = modes_found(samples, ring.means, radius=0.24)
    assert found == 1.0
    assert near >= 0.7


@pytest.mark.slow
def test_a_few_hundred_steps_teach_the_digits(tmp_path):
    """A third of the recipe: half way from the teacher's four Euler steps to its 64, with labels and variety."""
    bindings = ["train.steps = 400", "freeflow.correction_start = 0.75", "freeflow.online_warmup = 0.25"]
    result = flowdistill.train(gin_file="freeflow/digits.gin", gin_bindings=bindings, workdir=tmp_path / "run")
    assert result.metrics["accuracy"] >= 0.95
    assert result.metrics["recall"] >= 0.6
    assert result.metrics["fid"] <= 2.9  # the teacher's at 4 Euler steps
