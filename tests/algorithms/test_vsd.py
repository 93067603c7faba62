"""VSD and DMD2: against the published formulas, the Kullback-Leibler gradient, and in short runs."""

import copy

import attrs
import pytest
import torch
from exact import auxiliary_loss_of, below, gradient, loss_of, perturbed, prior_states, residual_of

import flowdistill
from flowdistill import Condition, ConfigError, States, Step
from flowdistill.algorithms.identities import Residual
from flowdistill.algorithms.vsd import DMD2, VSD
from flowdistill.interfaces import NoisingVelocity
from flowdistill.networks import MLP
from flowdistill.pairs import Diagonal
from flowdistill.paths import interpolate
from flowdistill.states import NoisedData, Prior
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.testing import check_objective
from flowdistill.times import Always
from flowdistill.training import Loop, Training
from flowdistill.velocities import Exact, OnlineNetwork

NAMES = ["vsd", "dmd2"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def teacher_of(dim=3):
    return GaussianTeacher(torch.linspace(-1, 1, dim).double(), torch.linspace(0.2, 0.9, dim).double())


def distribution_of(student):
    """The Gaussian of a Gaussian student's samples."""
    return GaussianTeacher(student.mean.detach(), student.log_variances.detach().exp())


def build(name, student, **kwargs):
    return flowdistill.OBJECTIVES.build(name, noising=Exact(distribution=distribution_of(student)), **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_vanishes_at_the_flow_map_alone(name):
    teacher = teacher_of()
    states = prior_states(teacher)
    for student, exact in [(GaussianFlowMap(teacher), True), (perturbed(teacher), False)]:
        output = loss_of(build(name, student), student, teacher, states, step=0, generator=generator())
        size = float(gradient(output.loss, student).norm())
        assert (size < 1e-12) if exact else (size > 1e-2)
        assert (output.metrics["error"] < 1e-24) if exact else (output.metrics["error"] > 1e-3)


# The weight of DMD, against its formula in denoised samples.


def denoised_gradient(objective, student, teacher, states):
    """The gradient with respect to F, -(x_fake - x_teacher) / W, with the draws that the objective makes."""
    shared = generator(5)
    r = objective.times.sample(len(states), shared).double()
    noise = torch.randn(states.x.shape, generator=shared, dtype=torch.float64)
    x = student(states.x, states.t, 0 * states.t).detach()
    noised = interpolate(x, noise, r)
    fake = noised - r[:, None] * distribution_of(student).velocity(noised, r)
    true = noised - r[:, None] * teacher.velocity(noised, r)
    return -(fake - true) / (x - true).abs().mean(1, keepdim=True)


def formula_error(objective):
    teacher = teacher_of()
    student, states = perturbed(teacher, 0.2), prior_states(teacher)
    objective = attrs.evolve(objective, noising=Exact(distribution=distribution_of(student)))
    _, residual = residual_of(objective, student, teacher, states, generator=generator(5))
    return float((residual - denoised_gradient(objective, student, teacher, states)).abs().max())


@pytest.mark.parametrize("objective", [VSD(), DMD2()])
def test_weight_is_that_of_dmd(objective):
    assert formula_error(objective) < 1e-12


class _BatchWeight(VSD):
    """W over the whole batch."""

    def residual(self, start, step):
        self.weighting = "none"
        plain = VSD.residual(self, start, step)
        return Residual(plain.average, plain.value / plain.value.abs().mean())


class _WrongSign(VSD):
    def residual(self, start, step):
        right = VSD.residual(self, start, step)
        return Residual(right.average, -right.value)


@pytest.mark.parametrize("wrong", [VSD(weighting="none"), _BatchWeight(), _WrongSign()])
def test_wrong_weights_are_seen(wrong):
    assert formula_error(wrong) > 1e-2


def test_loss_has_the_residual_as_its_gradient():
    """Off the optimum: the gradient of the parameters is that of mean(F * 2 R) with R held."""
    teacher = teacher_of()
    student, states = perturbed(teacher, 0.2), prior_states(teacher)
    objective = build("vsd", student)
    loss = loss_of(objective, student, teacher, states, step=0, generator=generator(5)).loss
    average = student.average_velocity(states.x, states.t, 0 * states.t)
    held = denoised_gradient(objective, student, teacher, states)
    torch.testing.assert_close(
        gradient(loss, student), gradient((2 * average * held).mean(), student), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("time", [0.2, 0.4, 0.6])
def test_unweighted_update_is_the_gradient_of_the_divergence(time):
    """(1 - r)^2 / r times v_N - u: for Gaussians, dKL/dmu = (1 - r)^2 (mu - m) / S and the same for rho."""
    m, sigma, mu, rho = 1.0, 0.5, 0.3, 0.8
    teacher = GaussianTeacher(torch.tensor([m]).double(), torch.tensor([sigma**2]).double())
    student = GaussianFlowMap(GaussianTeacher(torch.tensor([mu]).double(), torch.tensor([rho**2]).double()))
    objective = build("vsd", student, times=Always(value=time), weighting="none")
    states = prior_states(teacher, 2**20)
    loss = loss_of(objective, student, teacher, states, step=0, generator=generator(1)).loss
    by_mean, by_log_variance = torch.autograd.grad(loss, [student.mean, student.log_variances])
    factor = (1 - time) ** 2 / time / 2  # the loss is |R|^2, without a half
    truth, own = ((1 - time) ** 2 * v**2 + time**2 for v in (sigma, rho))
    assert float(factor * by_mean) == pytest.approx((1 - time) ** 2 * (mu - m) / truth, rel=3e-3)
    wanted = (1 - time) ** 2 * rho * (1 / truth - 1 / own)
    assert float(factor * by_log_variance * 2 / rho) == pytest.approx(wanted, rel=3e-3)


def test_states_start_from_their_noise():
    teacher = teacher_of(2)
    student = perturbed(teacher)
    objective, prior = build("vsd", student), prior_states(teacher)
    elsewhere = States(x=prior.x + 1, t=0.3 * prior.t, s=below(0.3 * prior.t), condition=Condition(), noise=prior.x)
    losses = [loss_of(objective, student, teacher, s, step=0, generator=generator()).loss for s in (prior, elsewhere)]
    assert torch.equal(*losses)


# In one dimension, where 1/W has no mean, so without it: a Gaussian student, and for its noising velocity a Gaussian
# that is trained online.


class OnlineGaussian(NoisingVelocity):
    """The velocity of a Gaussian whose mean and variance are trained by flow matching."""

    def setup(self, student, teacher):
        super().setup(student, teacher)
        self.model = GaussianFlowMap(teacher)

    def modules(self):
        return {"online": self.model}

    def module_loss(self, name, samples, condition, generator):
        r = 0.02 + 0.96 * torch.rand(len(samples), generator=generator, dtype=samples.dtype)
        noise = torch.randn(samples.shape, generator=generator, dtype=samples.dtype)
        return (self.model.velocity(interpolate(samples, noise, r), r) - (noise - samples)).square().mean(1)

    @torch.no_grad()
    def estimate(self, x, r, condition, *, samples):
        return self.model.velocity(x, r)


def trained(objective, tmp_path, steps=250, online_rate=1.0):
    """The student's mean and standard deviation after each step, from (0, 1) to the teacher's (1, 0.5)."""
    teacher = GaussianTeacher(torch.tensor([1.0]).double(), torch.tensor([0.25]).double())
    student, source = GaussianFlowMap(GaussianTeacher(torch.zeros(1).double(), torch.ones(1).double())), Prior()
    source.setup(student, teacher)
    objective.setup(student, teacher)
    objective.noising.model.load_state_dict(student.state_dict())
    training = Training(
        objective=objective,
        flow_map=student,
        teacher=teacher,
        steps=steps,
        batch_size=256,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.0, 0.99)),
        auxiliary_optimizer=lambda p: torch.optim.Adam(p, lr=0.02 * online_rate, betas=(0.0, 0.99)),
        gradient_clip=None,
        ema=None,
    )
    loop = Loop(training, student, teacher, source, tmp_path)
    path = []
    for _ in range(steps):
        loop.train_step()
        path.append([float(student.mean.detach()), float(student.log_variances.detach().exp().sqrt())])
    return torch.tensor(path)


@pytest.mark.parametrize("updates", [1, 5])
def test_a_student_reaches_its_teacher(updates, tmp_path):
    path = trained(DMD2(noising=OnlineGaussian(), auxiliary_updates=updates, weighting="none"), tmp_path)
    torch.testing.assert_close(path[-50:].mean(0), torch.tensor([1.0, 0.5]), atol=0.05, rtol=0)
    assert path[:, 0].max() < 1.15


def test_a_slow_online_network_makes_the_student_overshoot(tmp_path):
    path = trained(VSD(noising=OnlineGaussian(), weighting="none"), tmp_path, online_rate=0.1)
    assert path[:, 0].max() > 1.5
    assert path[-1, 1] < 0.35


def test_the_wrong_sign_diverges(tmp_path):
    path = trained(_WrongSign(noising=OnlineGaussian(), weighting="none"), tmp_path, steps=60)
    assert path[-1, 0] < -0.5


def test_the_loop_updates_auxiliary_networks_several_times(tmp_path):
    """The first on the student's states, each other on fresh ones; the student once, the online network five times."""
    seen = []

    class Recording(DMD2):
        def loss(self, states, step):
            seen.append(("student", states.x, copy.deepcopy(self.noising.model.state_dict())))
            return super().loss(states, step)

        def auxiliary_loss(self, name, states, step):
            seen.append((name, states.x, copy.deepcopy(self.noising.model.state_dict())))
            return super().auxiliary_loss(name, states, step)

    trained(Recording(noising=OnlineGaussian()), tmp_path, steps=2)
    assert [name for name, _, _ in seen] == (["student"] + ["online"] * 5) * 2
    for step in (seen[:6], seen[6:]):
        states = [x for _, x, _ in step]
        assert torch.equal(states[0], states[1])
        assert all(not torch.equal(states[i], states[j]) for i in range(2, 6) for j in range(i))
    means = [float(weights["mean"]) for _, _, weights in seen]
    assert means[0] == means[1]
    assert len(set(means[1:6])) == 5


# Evaluations and the discriminator.


def setup_of(objective, teacher):
    torch.manual_seed(0)
    student = flowdistill.FLOW_MAPS.build("network", network=MLP(dim=2, hidden_size=8, depth=1))
    objective.setup(student, teacher)
    return student


def drawn(source, student, teacher, n):
    source.setup(student, teacher)
    return source.sample(n, Diagonal(), generator())


def test_evaluations_per_sample():
    teacher = GaussianTeacher([0.5, 0.0], 0.5)
    data = NoisedData(dataset=flowdistill.DATASETS.build("exact_samples", teacher=teacher))
    objective = DMD2(noising=OnlineNetwork(network=network), discriminator=network)
    student = setup_of(objective, teacher)
    states = drawn(data, student, teacher, 16)
    modules = objective.modules()

    def spent(call):
        models = {"student": student, "teacher": teacher, **modules}
        before = {name: model.evaluations for name, model in models.items()}
        call()
        return {name: (model.evaluations - before[name]) / 16 for name, model in models.items()}

    step = Step(generator())
    loss = spent(lambda: objective.loss(states, step))
    assert loss == {"student": 1, "teacher": 1, "online": 1, "discriminator": 1}
    online = spent(lambda: objective.auxiliary_loss("online", states, step))
    assert online == {"student": 1, "teacher": 0, "online": 1, "discriminator": 0}
    discriminator = spent(lambda: objective.auxiliary_loss("discriminator", states, step))
    assert discriminator == {"student": 1, "teacher": 0, "online": 0, "discriminator": 2}


def network():
    net = MLP(dim=2, hidden_size=8, depth=1)
    torch.nn.init.normal_(net.output.weight)
    return net


def test_conformance_with_a_discriminator():
    teacher = GaussianTeacher([0.5, 0.0], 0.5)
    objective = DMD2(noising=OnlineNetwork(network=network), discriminator=network)
    assert objective.needs_data
    assert not DMD2().needs_data
    states = NoisedData(dataset=flowdistill.DATASETS.build("exact_samples", teacher=teacher))
    check_objective(objective, setup_of(copy.deepcopy(objective), teacher), teacher, states)


def test_adversarial_terms():
    """Both losses by hand; the student's gradient goes through a discriminator that takes none."""
    teacher = GaussianTeacher([0.5, 0.0], 0.5)
    objective = DMD2(noising=OnlineNetwork(network=network), discriminator=network, discriminator_weight=0.7)
    student = setup_of(objective, teacher)
    data = NoisedData(dataset=flowdistill.DATASETS.build("exact_samples", teacher=teacher))
    states = drawn(data, student, teacher, 32)
    start, judge = states.at_prior(), objective.modules()["discriminator"]

    def logits(x, shared):
        r = objective.times.sample(len(x), shared)
        noise = torch.randn(x.shape, generator=shared)
        return judge(interpolate(x, noise, r), r, Condition())

    output = loss_of(objective, student, teacher, states, step=0, generator=generator(3))
    shared = generator(3)
    alone = VSD(noising=objective.noising)
    alone._student, alone._teacher = student, teacher  # without a new online network
    plain = loss_of(alone, student, teacher, states, step=0, generator=shared)
    adversarial = (1 + (-logits(student(start.x, start.t, 0 * start.t), shared)).exp()).log().mean()
    total = plain.loss + 0.7 * adversarial
    torch.testing.assert_close(output.loss, total)
    torch.testing.assert_close(output.metrics["adversarial"], adversarial.detach())
    wanted = gradient(total, student)
    assert (wanted - gradient(plain.loss, student)).norm() > 1e-2
    torch.testing.assert_close(gradient(output.loss, student), wanted)
    output.loss.backward()
    assert all(p.grad is None for p in judge.parameters())

    own = auxiliary_loss_of(objective, "discriminator", student, teacher, states, step=0, generator=generator(4)).loss
    shared = generator(4)
    fake = logits(student(start.x, start.t, 0 * start.t).detach(), shared)
    wanted = (1 + fake.exp()).log().mean() + (1 + (-logits(states.clean, shared)).exp()).log().mean()
    torch.testing.assert_close(own, wanted)


def test_a_discriminator_of_another_shape():
    objective = DMD2(noising=OnlineNetwork(network=network), discriminator=lambda: MLP(dim=3, hidden_size=8))
    with pytest.raises(ConfigError, match=r"\(3,\)"):
        setup_of(objective, GaussianTeacher([0.5, 0.0], 0.5))


def test_a_run_with_a_discriminator(tmp_path):
    """From a gin file: both networks are trained, counted and saved."""
    bindings = [
        "dmd2.discriminator = @mlp",
        "mlp.hidden_size = 8",
        "train.steps = 2",
        "train.batch_size = 8",
        "evaluation.num_samples = 20",
        "evaluation.teacher_steps = (1,)",
    ]
    result = flowdistill.train("dmd2", on="plane", gin_bindings=bindings, workdir=tmp_path / "run")
    assert result.metrics["discriminator_evaluations"] == 2 * 8 * (1 + 5 * 2)
    assert result.metrics["student_evaluations"] == 2 * 8 * (1 + 5 + 5)
    assert result.metrics["online_evaluations"] == 2 * 8 * (1 + 5)
    assert (result.checkpoint / "discriminator.safetensors").is_file()
