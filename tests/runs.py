"""Small runs for tests, and the command line in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

RING = """
train.teacher = @ring()
train.flow_map = @from_teacher
from_teacher.conditioning = 'anchored'
from_teacher.network = @mlp()
mlp.hidden_size = 16
mlp.depth = 1
train.objective = @freeflow()
freeflow.prediction = @freeflow_prediction()
freeflow.correction = @freeflow_correction()
freeflow_correction.noising = @online_network()
online_network.network = @mlp
train.optimizer = @AdamW
AdamW.lr = 1e-3
train.steps = 12
train.batch_size = 16
train.log_every = 2
train.sample_every = 0
train.checkpoint_every = 4
"""

FLOW_MATCHING = """
train.objective = @flow_matching()
train.flow_map = @network()
network.network = @mlp()
network.conditioning = 'instantaneous'
mlp.num_classes = None
train.states = @noised_data()
noised_data.dataset = @exact_samples()
exact_samples.teacher = @ring()
train.optimizer = @AdamW
AdamW.lr = 1e-3
train.steps = 2000
train.batch_size = 256
"""


def write(path: Path, text: str = RING, **changes: object) -> Path:
    """A gin file with some bindings changed."""
    lines = [*text.splitlines(), *(f"train.{name} = {value}" for name, value in changes.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def command(*arguments: object, cwd: Path, env: dict[str, str] | None = None, **kwargs) -> subprocess.CompletedProcess:
    """The command line as users run it."""
    return subprocess.run(
        [sys.executable, "-m", "flowdistill", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )
