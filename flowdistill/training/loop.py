"""The training loop."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import gin
import torch
from torch import Tensor, nn

from flowdistill.differentiation import backward
from flowdistill.ema import AveragedModel
from flowdistill.flow_maps import build_flow_map
from flowdistill.interfaces import Condition, Counted, FlowMap, ObjectiveOutput, States, StateSource, Step, Teacher
from flowdistill.networks import ForcedWeight
from flowdistill.networks.compilation import compile_networks
from flowdistill.plumbing import config
from flowdistill.plumbing.distributed import (
    by_each,
    find_device,
    gathered,
    is_of_exchange,
    local,
    lost,
    rank_and_world,
    take_from_first,
    whole,
)
from flowdistill.plumbing.dry import placed, weights_unread
from flowdistill.plumbing.errors import ConfigError, NonFiniteError
from flowdistill.plumbing.files import fill_module
from flowdistill.plumbing.gin_errors import errors_located
from flowdistill.plumbing.precision import tf32
from flowdistill.plumbing.randomness import ONE_AT_A_TIME, step_generator, stream_seed
from flowdistill.runs.averages import keep_averages, names_of
from flowdistill.runs.checkpoints import (
    check_kept,
    checkpoint_path,
    checkpoint_paths,
    fill,
    load_optimizers,
    read_meta,
    save_checkpoint,
)
from flowdistill.runs.optimizer_states import restore
from flowdistill.runs.run import Run
from flowdistill.training.optimization import fuse, laid_out
from flowdistill.training.parallel import Sharding, recompute
from flowdistill.training.settings import OptimizerBuilder, Training


class _Trained:
    """A module with its optimiser: the student, or an auxiliary network."""

    def __init__(self, module: nn.Module, builder: OptimizerBuilder) -> None:
        self.module = module.train()
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.builder, self.optimizer = builder, builder(self.parameters)
        fuse(self.optimizer)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self._stepped = False

    def update(self, factor: float, clip: float | None) -> Tensor:
        """One optimiser step at a factor of the learning rate; returns the norm of the gradient."""
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, float("inf") if clip is None else clip))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        laid_out(self.optimizer)
        self._step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _step(self) -> None:
        """One step of the optimiser; ConfigError if it refuses the first, as by flags for another device."""
        try:
            self.optimizer.step()
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            if self._stepped or any(word in reason for word in ("memory", "CUDA", "without overflow")):
                raise
            shared = any(local(p) is not p for p in self.parameters)
            what = "parameters that processes share, unlike AdamW" if shared else "these parameters"
            raise ConfigError(f"{type(self.optimizer).__name__} cannot update {what}: {reason}") from error
        self._stepped = True


class Loop:
    """Student, auxiliary networks, optimisers and averages, and how one training step moves them all.

    The step does not depend on anything but its number and what a checkpoint holds, so that an interrupted run
    continues bit for bit on a CPU. Several processes share out the backward passes of a step, the ``accumulation`` of
    the training, and the networks, once `share_out` is called.
    """

    def __init__(
        self,
        training: Training,
        student: FlowMap,
        teacher: Teacher | None,
        source: StateSource,
        workdir: Path,
        device: torch.device | None = None,
    ) -> None:
        self.training, self.objective = training, training.objective
        self.student, self.teacher, self.source, self.workdir = student, teacher, source, workdir
        place = next(student.parameters()).device
        self.device, self.step = device or place, 0
        rank, self._world = rank_and_world()
        self._micros = range(rank, training.accumulation, self._world)
        self._extra = {name: placed(module, place) for name, module in self.objective.modules().items()}
        self._make_optimizers()
        tracks = () if training.ema is None else training.ema.tracks
        self.averages = dict(zip(names_of(len(tracks)), (AveragedModel(student, t) for t in tracks), strict=False))
        self._names = set(student.state_dict())
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._recorded = self._checks = 0
        self._first_bad = torch.full((), -1, device=self.device)
        self._started = time.monotonic()
        self._saving: Future[Path] | None = None
        self._sharding: Sharding | None = None
        self.on_saved: Callable[[Path], object] = lambda path: None  # of the first process, for whole checkpoints
        self.origin = ""  # in words, of a run that starts from another

    @classmethod
    def build(
        cls, training: Training, workdir: str | Path = "runs/train", device: str | torch.device | None = "cpu"
    ) -> Loop:
        """Build the models of a training, and the loop that trains them.

        One process can train with it at once, several after `share_out`.

        Args:
            training: the settings.
            workdir: the run directory, which is not touched yet.
            device: where to train, see `train`.

        Raises:
            ConfigError: the parts do not fit each other.
            CheckpointError: the run to start from cannot be read, or its student is of another architecture.
        """
        device, teacher, alone = find_device(device), training.teacher, rank_and_world()[1] == 1
        place = device if alone else torch.device("cpu")  # networks that processes share go to their devices in parts
        training.check()
        if teacher is not None:
            teacher = placed(teacher, place).eval().requires_grad_(False)
            for module in teacher.modules() if alone else ():
                if isinstance(module, ForcedWeight):
                    module.freeze()
        student = placed(build_flow_map(training.flow_map, teacher), place)
        check_kept(student)
        begun = weights_unread() or checkpoint_paths(Path(workdir))
        start = None if training.start is None or begun else Run(training.start)
        if start is not None:  # before the objective copies the student
            fill_module(student, start.tensors("student"), start.checkpoint)
        source = training.source()
        source.setup(student, teacher)
        training.objective.setup(student, teacher)
        if source.knows_all_times:
            training.objective.check_jumps(student, training.objective.trains)
        loop = cls(training, student, teacher, source, Path(workdir), device)
        if start is not None:
            loop._take(start)
        loop._prepare()
        return loop

    def _make_optimizers(self) -> None:
        training = self.training
        self.trained = _Trained(self.student, training.optimizer)
        self.auxiliary = {
            name: _Trained(module, training.auxiliary_optimizer or training.optimizer)
            for name, module in self._extra.items()
            if any(p.requires_grad for p in module.parameters())
        }

    def share_out(self) -> None:
        """Share the networks out over all processes, which call it at once, as ``train.parallel`` says.

        All must have built the same networks; only the values of the first one count. The optimisers are built again,
        for the parts of the weights that this process has.
        """
        sharding = self._sharding = Sharding(self.training.parallel, self.device, self.training.precision == "bf16")
        del self.trained, self.auxiliary  # which hold the whole weights
        for name, module in self.networks().items():
            sharding.share(name, module, frozen=name == "teacher")
        self._make_optimizers()
        self._prepare()

    def _prepare(self) -> None:
        """Let the networks recompute and compile as the training says; a plan sees to the first by itself."""
        if weights_unread():
            return
        if self.training.parallel.checkpoint_activations:
            for module in self.trained_modules():
                recompute(module)
        if self.training.compile is not None:
            self.compile(self.training.compile)

    def trained_modules(self) -> list[nn.Module]:
        """The student, and the modules of the objective that are trained."""
        return [part.module for part in self._all_trained().values()]

    def compile(self, backend: str | None) -> None:
        """Compile the networks of a step, or end it with None; the average, whose samples are few, never is."""
        for model in (self.student, self.teacher, *self._extra.values()):
            if model is not None:
                compile_networks(model, backend)

    @property
    def result(self) -> FlowMap:
        """The averaged student, or the student itself where no average is kept, in evaluation mode."""
        return (self.averages["ema"].module if self.averages else self.student).eval()

    @property
    def progress(self) -> float:
        """The part of the training that is done."""
        return self.step / self.training.steps

    def _random(self, stream: str, micro: int) -> torch.Generator:
        number = self.step * self.training.accumulation + micro
        return step_generator(self.training.seed, number, stream, self.device)

    def draw(self, generator: torch.Generator) -> States:
        """A batch of states at times of the objective's law."""
        return self.source.sample(self.training.batch_size, self.objective.law(self.progress), generator)

    def _prefetch(self, micro: int) -> None:
        """Begin to read the data of the backward pass after this one, which may be of the next step."""
        if self.source.needs_data:
            later = micro + self._micros.step
            following = later if later in self._micros else self.training.accumulation + self._micros.start
            self.source.prefetch(self.training.batch_size, self._random("states", following))

    def loss(self, states: States, generator: torch.Generator) -> ObjectiveOutput:
        """The student's loss."""
        with self.autocast():
            return self.objective.loss(states, Step(generator, self.step, self.progress))

    def auxiliary_loss(self, name: str, states: States, generator: torch.Generator) -> ObjectiveOutput | None:
        """The loss of one of the objective's own modules."""
        with self.autocast():
            return self.objective.auxiliary_loss(name, states, Step(generator, self.step, self.progress))

    def _seed_global(self, stream: str, micro: int) -> None:
        """Seed the generator that dropout draws from."""
        number = self.step * self.training.accumulation + micro
        torch.manual_seed(stream_seed(self.training.seed, number, stream))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision in which losses are evaluated."""
        if self.training.precision == "bf16":
            # Before 2.13 the cache holds casts of weights that were made without gradient, and hands them out with one.
            cached = torch.__version__ >= (2, 13)  # type: ignore[operator]
            return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=cached)
        return contextlib.nullcontext()

    def _backward(self, output: ObjectiveOutput, prefix: str = "") -> None:
        backward(output.loss / len(self._micros))  # and several processes take the mean over them
        loss = output.loss.detach()
        self._watch(loss)
        self._add({f"{prefix}loss": loss, **{f"{prefix}{k}": v for k, v in output.metrics.items()}})

    def _watch(self, value: Tensor) -> None:
        """Remember the first step at which a value was NaN or infinite, without waiting for the device."""
        bad = ~torch.isfinite(value) & (self._first_bad < 0)
        self._first_bad = torch.where(bad, self.step, self._first_bad)

    def _add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] += 1

    def train_step(self) -> None:
        """One update of the student, then those of the auxiliary networks, the first of them on the same states."""
        low = self.training.precision == "bf16"
        # One of the threads of a process, since dropout draws from torch's own generator.
        with ONE_AT_A_TIME, tf32(True) if low else contextlib.nullcontext():
            try:
                self._train_step()
            except RuntimeError as error:
                if is_of_exchange(error):
                    raise lost(error) from None
                if "mixed torch.Tensor and DTensor" in str(error):
                    raise ConfigError(
                        "weights that processes share are used outside the method that evaluates their network, as in "
                        "a penalty on them: train in one process, or let the network do it"
                    ) from error
                if "without overflow" not in str(error):
                    raise
                raise ConfigError("a number of the configuration is too large for the type of the tensors") from error

    def _train_step(self) -> None:
        training = self.training
        if not self.student.training:  # as after pictures of its samples
            self.student.train()
        if self._world > 1:
            self._agree()
        factor = training.schedule.factor(self.step, training.steps)
        batches: list[States] = []
        for micro in self._micros:
            states = self.draw(self._random("states", micro))
            batches.append(states)
            self._prefetch(micro)
            self._seed_global("global", micro)
            self._backward(self.loss(states, self._random("loss", micro)))
        if self.step == self._recorded and (new := self.student.state_dict().keys() - self._names):
            raise ConfigError(
                f"{min(new)} of the student was made by its first evaluation: make it in __init__, since a network "
                "that is built again must have it"
            )
        norm = self._update("student", self.trained, factor)
        self._add({"gradient_norm": norm})
        for average in self.averages.values():
            average.update(self.step)
        self.objective.after_step(self.step)
        for number in range(self.objective.auxiliary_updates if self.auxiliary else 0):
            stream = f" {number}" if number else ""
            if number:
                batches = [self.draw(self._random(f"states{stream}", micro)) for micro in self._micros]
            for name, auxiliary in self.auxiliary.items():
                if self._train_auxiliary(name, batches, f"auxiliary {name}{stream}"):
                    self._update(name, auxiliary, factor)
        self.step += 1

    def _agree(self) -> None:
        """Give all processes the buffers of the first, and replace the weights that their layers would replace."""
        modules = [self.student, *self._extra.values()]
        take_from_first(buffer for module in modules for buffer in module.buffers())
        for part in (part for module in modules for part in module.modules()):
            if isinstance(part, ForcedWeight):
                part.replace_weight()

    def _update(self, name: str, trained: _Trained, factor: float) -> Tensor:
        """One optimiser step of a module; returns the norm of its gradient."""
        if self._sharding is not None:
            self._sharding.free(trained.module)
        try:
            norm = trained.update(factor, self.training.gradient_clip)
        except RuntimeError as error:
            if "without overflow" not in str(error):
                raise
            raise self._not_finite(f"the update of {name} at step {self.step} is too large for its weights") from None
        self._watch(norm)
        return norm

    def _train_auxiliary(self, name: str, batches: list[States], stream: str) -> bool:
        trained = False
        for micro, states in zip(self._micros, batches, strict=True):
            self._seed_global(f"global {stream}", micro)
            output = self.auxiliary_loss(name, states, self._random(stream, micro))
            if output is not None:
                self._backward(output, prefix=f"{name}_")
                trained = True
        return trained

    def record(self) -> dict[str, float]:
        """The averages of the metrics since the last call, with speed and counted evaluations, over all processes.

        The learning rate is the student's at the last step, and the memory what this process has taken of its GPU.

        Raises:
            NonFiniteError: a loss or gradient was NaN or infinite.
            CheckpointWriteError: the last checkpoint could not be finished.
        """
        self.check_finite()
        if all(gathered(self._saving is not None and self._saving.done())):
            self.finish_saving()
        now = time.monotonic()
        record = {name: total / count for name, (total, count) in self._totals().items()}
        record["learning_rate"] = float(self.trained.optimizer.param_groups[0]["lr"])
        if self.device.type == "cuda":
            record["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        record["steps_per_second"] = (self.step - self._recorded) / max(now - self._started, 1e-9)
        record |= {name: float(count) for name, count in self.counters.items()}
        self._sums, self._counts, self._recorded, self._started = {}, Counter(), self.step, now
        return record

    def _totals(self) -> dict[str, list[float]]:
        """The sum of each metric since the last record and the number of its values, over all processes."""
        parts = gathered(({name: float(value) for name, value in self._sums.items()}, self._counts))
        names = dict.fromkeys(name for sums, _ in parts for name in sums)
        return {
            name: [sum(sums.get(name, 0.0) for sums, _ in parts), sum(counts[name] for _, counts in parts)]
            for name in names
        }

    @property
    def counters(self) -> dict[str, int]:
        """Evaluations of student, teacher and the objective's own models so far, by all processes, per sample."""
        models: dict[str, Any] = {"student": self.student, "teacher": self.teacher, **self._extra}
        ours = {f"{name}_evaluations": m.evaluations for name, m in models.items() if isinstance(m, Counted)}
        ours["student_evaluations"] -= self._checks
        ours.setdefault("teacher_evaluations", 0)
        parts = gathered(ours)
        return {name: self._base_counters.get(name, 0) + sum(part[name] for part in parts) for name in ours}

    _base_counters: Mapping[str, int] = {}

    def check_finite(self) -> None:
        """Raise NonFiniteError if a loss or gradient so far was NaN or infinite; names the first such step."""
        bad = [step for step in gathered(int(self._first_bad)) if step >= 0]
        if bad:
            name = type(self.objective).__name__
            raise self._not_finite(f"the loss or gradient of {name} became NaN or infinite at step {min(bad)}")

    def _check_weights(self) -> None:
        """Raise NonFiniteError if a weight is NaN or infinite, as after a step too large for its type."""
        modules = self._modules()
        bad = [name for name, m in modules.items() if not all(bool(local(p).isfinite().all()) for p in m.parameters())]
        if bad := [name for part in gathered(bad) for name in part]:
            raise self._not_finite(f"weights of {bad[0]} became NaN or infinite by step {self.step}")

    @torch.no_grad()
    def _check_samples(self) -> None:
        """Raise NonFiniteError if the result makes samples that are NaN or infinite, as of weights that are large."""
        n, result = 4, self.result
        before = self.student.evaluations
        noise = torch.randn((n, *result.sample_shape), generator=self._random("samples", 0), device=self.device)
        samples = result.sample(noise, 1, Condition.in_turn(result.num_classes, n).to(self.device))
        self._checks += self.student.evaluations - before
        if not bool(torch.isfinite(samples).all()):
            raise self._not_finite(f"samples of the student became NaN or infinite by step {self.step}")

    def _not_finite(self, what: str) -> NonFiniteError:
        """The error, which all processes raise at once, with the way to go on."""
        self.finish_saving()
        saved = checkpoint_paths(self.workdir)
        if saved:
            way = (
                f"the last good checkpoint is {saved[-1]}: start from it in another directory by "
                f"train.start = '{saved[-1]}', with another learning rate, train.gradient_clip or train.seed"
            )
        else:
            way = (
                "no checkpoint was saved before: start in another directory with a lower learning rate or "
                "train.gradient_clip"
            )
        error = NonFiniteError(f"{what}; {way}")
        error.told = rank_and_world()[0] > 0
        return error

    def networks(self) -> dict[str, nn.Module]:
        """The teacher and all that a checkpoint holds, by name."""
        return {**({} if self.teacher is None else {"teacher": self.teacher}), **self._modules()}

    def _modules(self) -> dict[str, nn.Module]:
        averages = {name: average.module for name, average in self.averages.items()}
        return {"student": self.student, **averages, **self._extra}

    def _all_trained(self) -> dict[str, _Trained]:
        return {"student": self.trained, **self.auxiliary}

    def save(self, keep: int) -> Path:
        """Begin to write a checkpoint of the present step, and keep the newest ``keep``.

        It has its name after `finish_saving`; the training may go on meanwhile.

        Raises:
            NonFiniteError: a loss, a gradient, a weight or a sample is NaN or infinite; nothing is written.
            CheckpointWriteError: the disk refused this checkpoint, or the one before.
        """
        self.check_finite()
        self._check_weights()
        self._check_samples()
        counters, totals = self.counters, self._totals()
        self.finish_saving()
        sharding, modules, group = self._sharding, self._modules(), None
        optimizers = {name: trained.optimizer for name, trained in self._all_trained().items()}
        if sharding is None:
            networks = {name: module.state_dict() for name, module in modules.items()}
            states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        else:
            networks = {name: sharding.stored(name, module) for name, module in modules.items()}
            states = {name: sharding.stored_state(name, optimizer) for name, optimizer in optimizers.items()}
            group = sharding.saves
        self._saving = save_checkpoint(self.workdir, self.step, networks, states, counters, keep, totals, group)
        return checkpoint_path(self.workdir, self.step)

    def finish_saving(self) -> None:
        """Wait, in all processes, until the last checkpoint has its name, if one is on its way.

        Raises:
            CheckpointWriteError: it could not be finished.
        """
        by_each(self._finish_saving)

    def _finish_saving(self) -> None:
        if self._saving is not None:
            wait([self._saving])  # an interrupt leaves it to `close`
            saving, self._saving = self._saving, None
            saved = saving.result()
            self._keep_averages(saved)
            self.on_saved(saved)

    def _keep_averages(self, checkpoint: Path) -> None:
        """Keep the averages of a whole checkpoint, where they are to be kept."""
        if self.training.ema is not None and self.training.ema.keeps_past and rank_and_world()[0] == 0:
            keep_averages(checkpoint, len(self.averages))

    def close(self) -> None:
        """Wait, in this process, for a checkpoint on its way; that it fails is a warning, since another error came."""
        try:
            self._finish_saving()
        except Exception as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)

    def load(self, checkpoint: Path) -> None:
        """Continue from a checkpoint whose files have been verified.

        Raises:
            CheckpointError: it is of another training.
        """
        meta = read_meta(checkpoint)
        sharding, modules = self._sharding, self._modules()
        if sharding is None:
            fill(checkpoint, {name: module.state_dict() for name, module in modules.items()})
        else:
            targets = {name: sharding.targets(name, module) for name, module in modules.items()}
            fill(checkpoint, targets)
            for name, tensors in targets.items():
                sharding.take(name, tensors)
        states = load_optimizers(checkpoint, {name: t.optimizer for name, t in self._all_trained().items()})
        for name, trained in self._all_trained().items():
            restore(trained.optimizer, states.get(name), trained.builder, checkpoint)
        self._keep_averages(checkpoint)  # which the process that saved it may not have lived to do
        self.step = self._recorded = meta.step
        self._base_counters = meta.counters
        if rank_and_world()[0] == 0:
            self._sums = {
                name: torch.tensor(float(total), device=self.device) for name, (total, _) in meta.sums.items()
            }
            self._counts = Counter({name: int(count) for name, (_, count) in meta.sums.items()})

    def _take(self, run: Run) -> None:
        """Take a run's average and its networks of the objective, where they have the architecture of ours.

        The average of a run without one is its student.
        """
        taken = ["student"]
        for name, module in self._modules().items():
            tensors = {} if name == "student" else run.tensors(name)
            if {key: v.shape for key, v in tensors.items()} == {key: v.shape for key, v in module.state_dict().items()}:
                module.load_state_dict(tensors)
                taken.append(name)
        self.origin = f"started from {run.checkpoint}: {', '.join(taken)}"


def configured_loop(workdir: str | Path, device: str | torch.device | None) -> Loop:
    """The loop of the configuration that gin holds; ConfigError if a binding in it is used by nothing."""
    with errors_located():
        seed = config.value("train.seed", 0)
        torch.manual_seed(seed if isinstance(seed, int) else 0)  # networks are built as gin builds the training
        training: Training = gin.get_configurable(Training)()
        loop = Loop.build(training, workdir, device)
        config.check_all_used(without=("evaluation", "features") if training.evaluation is None else ())
    return loop
