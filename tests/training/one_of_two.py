"""``flowdistill train`` in which one of two processes does something odd: ``one_of_two.py DEED OPTIONS...``."""

import os
import signal
import subprocess
import sys
import time

import attrs
import torch

import flowdistill
from flowdistill.cli import main
from flowdistill.evaluation import comparison, pictures
from flowdistill.plumbing.distributed import whole
from flowdistill.runs import parts
from flowdistill.training import trainer

DEED, SECOND = sys.argv[1], os.environ["RANK"] == "1"


@flowdistill.register_objective("odd")
@attrs.define(kw_only=True)
class Odd(flowdistill.Objective):
    """Regression onto the noise, with what the second process does at step 5."""

    def loss(self, states, step):
        if SECOND and step.number == 5:
            if DEED == "stops":  # until the others have given up; torchrun alone would wait for half a minute
                killer = ["sh", "-c", f"sleep 10; kill -9 {os.getpid()}"]
                subprocess.Popen(killer, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                signal.raise_signal(signal.SIGSTOP)
            if DEED == "dies":
                os._exit(3)
            if DEED == "fails":
                raise flowdistill.DataError("a file is damaged")
        if DEED == "has_other_weights" and step.number == 0:
            total = sum(float(whole(p.detach()).double().sum()) for p in self.student.parameters())
            os.write(1, f"{total}\n".encode())  # at once, since both write into one pipe
        loss = (self.student.average_velocity(*states.to(0.0)) - states.x).square().mean()
        extra = {"extra": torch.ones(())} if SECOND and DEED == "has_a_part" else {}
        return flowdistill.ObjectiveOutput(loss, extra)


def slowed(function):
    def later(*arguments):
        time.sleep(5)
        return function(*arguments)

    return later


if DEED == "is_slow" and not SECOND:
    parts.write_files, pictures.save_picture = slowed(parts.write_files), slowed(pictures.save_picture)
    trainer.write_report, comparison.measure = slowed(trainer.write_report), slowed(comparison.measure)
if DEED == "has_no_room" and not SECOND:

    def refuse(file):
        raise OSError(28, "No space left on device")

    os.fsync = refuse
if DEED == "has_other_weights" and SECOND:
    torch.nn.Linear.reset_parameters = lambda self: [torch.nn.init.ones_(p) for p in self.parameters()]
options = sys.argv[2:]
if SECOND and DEED == "has_another_rate":
    options.append("--gin.AdamW.lr=0.5")
if SECOND and DEED == "has_a_mistake":
    options.append("--gin.train.batch_size=-1")
main(["train", *options])
