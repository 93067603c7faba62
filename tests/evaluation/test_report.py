"""Where a report measures."""

import pytest

from flowdistill import load_teacher
from flowdistill.evaluation.report import _device
from flowdistill.networks import MLP


@pytest.mark.parametrize("model", [load_teacher("ring"), MLP(dim=2, hidden_size=4)], ids=["buffers", "parameters"])
def test_a_model_is_measured_where_it_is(model):
    """Exact teachers have no parameters."""
    assert _device(None, model).type == "cpu"
    assert _device(None, model.to("meta"), None).type == "meta"
