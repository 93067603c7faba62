"""Where a report measures."""

import pytest

from flowdistill import load_teacher
from flowdistill.evaluation.comparison import device_of
from flowdistill.networks import MLP


@pytest.mark.parametrize("model", [load_teacher("ring"), MLP(dim=2, hidden_size=4)], ids=["buffers", "parameters"])
def test_a_model_is_measured_where_it_is(model):
    """Exact teachers have no parameters."""
    assert device_of(None, model).type == "cpu"
    assert device_of(None, model.to("meta"), None).type == "meta"
