import os

import hypothesis
import pytest
import torch

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # figures are those of a CPU, some of them bit for bit
torch.set_num_threads(1)

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
