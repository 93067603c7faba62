"""Gin files: what is wrong with them is said once, clearly, with the place."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from packaged import packaged
from runs import RING, write

import flowdistill
from flowdistill import CheckpointError, ConfigError
from flowdistill.plumbing import config
from flowdistill.plumbing.hints import hints_of, matches
from flowdistill.plumbing.registry import REGISTRIES, Preset, Registry, load_all
from flowdistill.plumbing.statements import parts_of


def fail(tmp_path, text="", bindings=(), **changes):
    """The message with which a run refuses to start; nothing of a run is left behind."""
    file = write(tmp_path / "bad.gin", RING + text, **changes)
    with pytest.raises(ConfigError) as error:
        flowdistill.train(gin_file=file, gin_bindings=list(bindings), workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("binding", "wanted"),
    [
        ("train.objective = @freflow()", ["unknown name 'freflow'", "did you mean freeflow", "bad.gin", "line 20"]),
        ("train.stepps = 3", ["unknown parameter of train 'stepps'", "steps", "bad.gin", "line 20"]),
        ("trian.steps = 3", ["unknown name 'trian'", "train", "bad.gin", "line 20"]),
        ("freeflow.alpha = 'much'", ["freeflow", "alpha", "bad.gin", "line 20"]),
        ("freeflow.alpha = -1.0", ["alpha", ">= 0", "bad.gin", "line 20"]),
        ("freeflow.correction_fraction = 1.0", ["correction_fraction", "< 1", "line 20"]),
        ("finite_difference.scheme = 'forward'", ["scheme", "forward", "backward"]),
        ("train.steps = = 3", ["bad.gin", "line 20"]),
        ("train.steps = (3", ["bad.gin"]),
        ("train.steps = 0", ["train: steps must be positive"]),
        ("train.steps = 1.5", ["train.steps must be a whole number", "1.5"]),
        ("train.steps = True", ["train.steps must be a whole number", "True"]),
        ("train.batch_size = '4'", ["train.batch_size must be a whole number"]),
        ("train.seed = 'x'", ["train.seed must be a whole number"]),
        ("train.gradient_clip = 'x'", ["train.gradient_clip"]),
        ("train.gradient_clip = -1.0", ["train: gradient_clip must be positive"]),
        ("train.evaluation = @evaluation()\nevaluation.metrics = ('w3',)", ["w3", "did you mean"]),
        ("train.evaluation = @evaluation()\nevaluation.features = 'digit'", ["digit", "did you mean"]),
        ("train.evaluation = @evaluation()\nevaluation.teacher_steps = ()", ["teacher_steps"]),
        ("train.evaluation = @evaluation()\nring.modes = 1\nevaluation.deltas = (2.0,)", ["deltas"]),
        ("train.precision = 'fp8'", ["precision", "fp8", "bf16"]),
        ("train.objective = 3", ["train.objective must be an Objective, by a reference such as @NAME()"]),
        ("train.teacher = @mlp()", ["train: teacher must be of type Teacher"]),
        ("train.teacher = None", ["needs a teacher"]),
        ("train.flow_map = 3", ["train.flow_map"]),
        ("train.flow_map = @freeflow", ["freeflow", "takes 1 positional argument"]),
        ("train.optimizer = 3", ["train.optimizer"]),
        ("train.states = @ring()", ["train: states must be of type StateSource"]),
        ("train.objective = @meanflow()", ["MeanFlow needs data", "noised_data"]),
        ("mlp.dim = 3", ["shape"]),
        ("mlp.num_classes = 4", ["num_classes"]),
        ("ring.modes = 0", ["modes"]),
        ("freeflow.prediction = 3", ["prediction"]),
        ("freeflow_correction.times = 0.5", ["times"]),
        ("online_network.network = 3", ["network"]),
    ],
)
def test_bad_bindings(binding, wanted, tmp_path):
    if binding.startswith("finite_difference"):
        binding = f"freeflow_prediction.estimator = @finite_difference()\n{binding}"
    message = fail(tmp_path, f"{binding}\n")
    for part in wanted:
        assert part in message, message
    assert message.count("\n") < 12


def test_a_binding_may_include_a_packaged_file():
    with config.parsed(["freeflow/ring.gin"], ["include 'freeflow/digits.gin'", "train.steps = 7"]):
        assert type(config.value("train.teacher")).__name__ != "Ring"
        assert config.value("train.steps") == 7


def test_bad_bindings_of_the_command_line_are_located(tmp_path):
    message = fail(tmp_path, bindings=["train.steps = @nothing()"])
    assert "unknown name 'nothing'" in message


def test_a_binding_that_nothing_uses(tmp_path):
    message = fail(tmp_path, "heun.steps = 3\nlogit_normal.mean = 1.0\n", bindings=["guidence = 4"])
    assert "guidence, heun.steps, logit_normal.mean" in message


def test_files_may_offer_macros_that_nothing_uses(tmp_path):
    """As settings do; nor does the part that only such a macro names have to be used."""
    file = write(tmp_path / "mine.gin", RING + "data = @noised_data()\nnoised_data.label_dropout = 0.1\n")
    assert flowdistill.train(gin_file=file, workdir=tmp_path / "run").steps == 12


def test_missing_required_bindings(tmp_path):
    file = tmp_path / "empty.gin"
    file.write_text("train.steps = 3\n")
    with pytest.raises(ConfigError, match="objective"):
        flowdistill.train(gin_file=file, workdir=tmp_path / "run")


def test_missing_files_list_near_recipes(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean freeflow/digits\.gin"):
        flowdistill.train(gin_file="freeflow/digit.gin", workdir=tmp_path / "run")
    file = tmp_path / "includes.gin"
    file.write_text("include 'nowhere.gin'\n")
    with pytest.raises(ConfigError, match="nowhere"):
        flowdistill.train(gin_file=file, workdir=tmp_path / "run")


def test_packaged_recipes_can_be_included(tmp_path):
    file = tmp_path / "mine.gin"
    file.write_text("include 'freeflow/ring.gin'\ntrain.steps = 2\nschedule.warmup = 1\nlogit_normal.mean = 1.0\n")
    with pytest.raises(ConfigError, match=r"nothing uses logit_normal\.mean"):
        flowdistill.train(gin_file=file, workdir=tmp_path / "run")
    file.write_text('include "freeflow/ring.gin"\ntrain.steps = 2\nevaluation.num_samples = 10\n')
    bindings = config.statements(file)
    assert [binding.name for binding in bindings[-2:]] == ["train.steps", "evaluation.num_samples"]
    assert bindings[:-2] == config.statements("freeflow/ring.gin")
    assert flowdistill.train(gin_file=file, workdir=tmp_path / "run").steps == 2


def test_an_evaluation_may_be_left_out_and_made_up_for(tmp_path):
    """Its bindings need no use then, and a run may be measured by training it again, which trains nothing."""
    file, run = tmp_path / "mine.gin", tmp_path / "run"
    text = "include 'freeflow/ring.gin'\ntrain.steps = 2\ntrain.sample_every = 0\n"
    file.write_text(f"{text}train.evaluation = None\n")
    first = flowdistill.train(gin_file=file, workdir=run)
    assert not (run / "evaluation.json").exists()
    saved = first.checkpoint.stat().st_mtime_ns
    for metric in ("w2", "mmd"):
        file.write_text(f"{text}evaluation.num_samples = 10\nevaluation.metrics = ('{metric}',)\n")
        assert metric in flowdistill.train(gin_file=file, workdir=run).metrics
    assert first.checkpoint.stat().st_mtime_ns == saved
    file.write_text(f"{text}evaluation.num_samples = 10\nAdamW.lr = 1.0\n")
    with pytest.raises(ConfigError, match=r"another configuration"):
        flowdistill.train(gin_file=file, workdir=run)


def test_a_configuration_parsed_by_the_caller_holds(tmp_path):
    import gin

    try:
        gin.parse_config(RING)
        assert flowdistill.train(workdir=tmp_path / "run").steps == 12
        assert gin.query_parameter("train.steps") == 12
    finally:
        gin.clear_config()


def test_scoped_bindings_count_as_used(tmp_path):
    text = "online/mlp.depth = 2\nonline_network.network = @online/mlp\n"
    file = write(tmp_path / "scoped.gin", RING + text)
    assert flowdistill.train(gin_file=file, workdir=tmp_path / "run").steps == 12


BLOCKS = """
train:
    objective = @freeflow()  # what is minimised
    steps = 12
scoped/mlp:
    depth = 2

size = 16
mlp.hidden_size = %size
freeflow.correction = (@freeflow_correction(), [@scoped/mlp, {'a': 1e-3}],
                       None)
"""


def test_a_configuration_as_data():
    """Blocks, scopes, macros, containers and references; comments and layout leave no trace."""
    found = config.statements_of(BLOCKS, "blocks")
    assert [str(binding) for binding in found] == [
        "train.objective = @freeflow()",
        "train.steps = 12",
        "scoped/mlp.depth = 2",
        "size = 16",
        "mlp.hidden_size = %size",
        "freeflow.correction = (@freeflow_correction(), [@scoped/mlp, {'a': 0.001}], None)",
    ]
    assert [binding.part for binding in found] == ["train", "train", "mlp", "%size", "mlp", "freeflow"]
    assert [binding.place for binding in found[1:3]] == ["blocks, line 4", "blocks, line 6"]
    assert parts_of(*found) == {"freeflow", "%size", "freeflow_correction", "mlp"}
    again = config.statements_of("\n".join(map(str, found)), "again")
    assert again == found


@pytest.mark.parametrize(
    "files",
    [["freeflow/digits.gin"], config.composed("meanflow", "plane"), config.composed("imm", "mnist_sit")],
    ids=["whole", "meanflow-plane", "imm-mnist_sit"],
)
def test_data_are_what_gin_reads(files):
    """Of every binding, those of included files and macros among them, the value in force is the last one's."""
    import gin

    last = {binding.name: binding for file in files for binding in config.statements(file)}
    with config.parsed(files, []):
        assert sum(len(parameters) for parameters in gin.config._CONFIG.values()) == len(last)
        for name, binding in last.items():
            key = name if binding.selector else f"{name}/macro.value"
            assert repr(gin.query_parameter(key)) == repr(binding.value)


def test_a_recipe_in_blocks_is_a_recipe(tmp_path, monkeypatch):
    blocks = "train:\n    objective = @freeflow()\n    steps = 3\n"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "blocks.gin").write_text(blocks)
    (tmp_path / "mine" / "including.gin").write_text("include 'mine/blocks.gin'\n")
    (tmp_path / "mine" / "setting.gin").write_text("train:\n    steps = 3\n# train.objective = @freeflow()\n")
    roots = config.recipe_roots()
    monkeypatch.setattr(config, "recipe_roots", lambda: [*roots, tmp_path])
    mine = {name for name in config.recipes() if name.startswith("mine/")}
    assert mine == {"mine/blocks.gin", "mine/including.gin"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("train.steps = 1\ntrain.x = = 3", "line 2"),
        ("train:\n    steps = 1\n    3 = 4", "line 3"),
        ("train.x = (3", "EOF"),
        ("include 'nowhere.gin'", "nowhere"),
    ],
)
def test_text_that_is_no_configuration(text, wanted):
    with pytest.raises(ConfigError, match=wanted):
        config.statements_of(text, "text")


@pytest.mark.parametrize("name", [name for name in config.recipes() if "imagenet" in name])
def test_recipes_of_imagenet_state_their_clipping(name):
    """No default decides: the file itself says whether it is published."""
    assert "train.gradient_clip" in {statement.name for statement in config.statements(config.find_gin_file(name))}


RECIPES = [name for name in config.recipes() if "imagenet" not in name]  # those are planned, see test_planning.py
QUICK = [name for name in RECIPES if "mnist" not in name and "fashion" not in name]
SETTINGS = [name for name in config.settings() if not name.startswith(("imagenet", "plane"))]


def starts(tmp_path, recipe, on=None):
    """Two steps are taken, with every binding used, and the run's own configuration repeats them."""
    files = config.chosen(recipe, on, None, ())
    found = [binding for file in files for binding in config.statements(file)]
    names = {binding.name for binding in found}
    bindings = ["train.steps = 2", "train.batch_size = 8", "train.sample_every = 0"]
    if "train.evaluation" in names:
        bindings += ["evaluation.num_samples = 20", "evaluation.teacher_steps = (1,)"]
    data = {"mnist", "fashion_mnist"} & parts_of(*found)
    if data:
        for part in ("train", "t10k"):
            images = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(2 * 28 * 28)
            (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(images)
            (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 3, 9]))
        bindings += [f"{name}.folder = {str(tmp_path)!r}" for name in data]
    result = flowdistill.train(recipe, on=on, gin_bindings=bindings, workdir=tmp_path / "run")
    assert result.steps == 2
    again = flowdistill.train(tmp_path / "run" / "config.gin", workdir=tmp_path / "again", report=False)
    assert (again.workdir / "config.gin").read_text() == (result.workdir / "config.gin").read_text()
    weights, repeated = (run.flow_map.state_dict() for run in (result, again))
    assert all(torch.equal(weights[name], repeated[name]) for name in weights)


@pytest.mark.parametrize("recipe", QUICK)
def test_recipes_start(recipe, tmp_path):
    starts(tmp_path, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in QUICK])
def test_every_recipe_of_images_starts(recipe, tmp_path):
    starts(tmp_path, recipe)


@pytest.mark.parametrize("method", config.methods())
def test_methods_start_in_the_plane(method, tmp_path):
    starts(tmp_path, method, "plane")


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", config.methods())
def test_every_method_starts_on_images(method, setting, tmp_path):
    starts(tmp_path, method, setting)


SETTING = """
train.teacher = @guided()
guided.teacher = @gaussian_mixture()
gaussian_mixture.means = ((1.0, 0.0), (0.0, 2.0))
gaussian_mixture.labels = (0, 1)
guided.scale = %guidance
guided.interval = %guided_interval
student = @network()
train.flow_map = %student
network.network = @mlp()
network.conditioning = %conditioning
network.guidance = %told_guidance
mlp.hidden_size = 16
mlp.num_classes = 2
data = @noised_data()
noised_data.dataset = @exact_samples()
exact_samples.teacher = @gaussian_mixture()
data_std = 1.0
guidance = 1.5
guidance_range = (1.0, 2.0)
conditioning = 'two_time'
told_guidance = None
guided_interval = (0.0, 1.0)
fresh_network = @mlp
train.optimizer = @AdamW
AdamW.lr = 1e-3
train.steps = 2
train.batch_size = 8
train.sample_every = 0
"""


@pytest.mark.parametrize("method", config.methods())
def test_one_file_makes_a_setting_for_every_method(method, tmp_path):
    """A setting of one's own, in another folder; methods know nothing of it."""
    setting = tmp_path / "mine.gin"
    setting.write_text(SETTING)
    assert flowdistill.train(method, on=setting, workdir=tmp_path / "run").steps == 2


def test_a_demo_fits_on_a_page_and_the_recipes_in_a_hundred_files():
    examples = (Path(__file__).parents[1] / "docs").rglob("*.gin")
    assert len([*config.gin_files(), *examples]) <= 100
    for demo in ("freeflow/digits.gin", "freeflow/mnist.gin", "freeflow/ring.gin"):
        lines = config.find_gin_file(demo).read_text().splitlines()
        assert sum("=" in line.partition("#")[0] for line in lines) <= 25, demo


def test_registering_a_name_twice_names_both_places():
    shapes = Registry("test shape")

    @shapes.register("square")
    class Square:
        pass

    with pytest.raises(ConfigError, match=r"registered twice: .*Square.*test_config.*Circle"):

        @shapes.register("square")
        class Circle:
            pass

    with pytest.raises(ConfigError, match="did you mean square"):
        shapes.get("sqare")
    with pytest.raises(ConfigError, match="unexpected keyword argument 'side'"):
        shapes.build("square", side=2)


def test_a_broken_plugin_is_reported_and_skipped(monkeypatch):
    from flowdistill.plumbing import registry

    class Broken:
        value = "broken:plugin"

        def load(self):
            raise ImportError("no such thing")

    monkeypatch.setattr(registry, "entry_points", lambda group: [Broken()])
    with pytest.warns(RuntimeWarning, match=r"broken:plugin skipped.*no such thing"):
        registry.load_plugins.__wrapped__()


def test_runs_that_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run directory nor a checkpoint"):
        flowdistill.load_flow_map(tmp_path)
    (tmp_path / "config.gin").write_text("")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        flowdistill.sample(tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean .*ring"):
        flowdistill.load_teacher("rings")


def test_shared_settings_are_found_quietly(tmp_path, caplog, monkeypatch):
    """What a recipe includes is looked for among the packaged ones without a word; what is nowhere is named."""
    file = tmp_path / "mine.gin"
    file.write_text("include 'settings/plane.gin'\ntrain.steps = 7\ndistribution = @checkerboard()\n")
    with config.parsed([file], []):
        assert config.value("train.steps") == 7
        assert type(config.value("train.teacher")).__name__ == "Checkerboard"
    assert not caplog.records
    (tmp_path / "settings").mkdir()
    monkeypatch.syspath_prepend(tmp_path)  # as where the command line is run beside a folder of that name
    with config.parsed([file], []):
        assert config.value("train.steps") == 7
    file.write_text("include 'settings/nowhere.gin'\n")
    with pytest.raises(ConfigError, match=r"settings/nowhere\.gin"), config.parsed([file], []):
        pass


# Files that include others, circles, and encodings.


def test_included_files_lie_beside_the_file_that_includes_them(tmp_path, monkeypatch):
    """From wherever it is read; blocks and lines after an include keep their numbers."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "steps.gin").write_text("include 'more.gin'\ntrain.steps = 5\n")
    (tmp_path / "shared" / "more.gin").write_text("train.batch_size = 3\n")
    file = tmp_path / "mine.gin"
    file.write_text("train.seed = 4\ninclude 'shared/steps.gin'\n\ntrain.steps = 7\ntrain.lr = 3\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    bindings = config.statements(file)
    assert [str(b) for b in bindings[:4]] == [
        "train.seed = 4",
        "train.batch_size = 3",
        "train.steps = 5",
        "train.steps = 7",
    ]
    assert bindings[-1].place == f"{file}, line 5"
    with (
        pytest.raises(ConfigError, match=rf"unknown parameter of train 'lr'(?s:.*){file}(?s:.*)line 5"),
        config.parsed([file], []),
    ):
        pass


@pytest.mark.parametrize("length", [1, 2, 3])
def test_files_that_include_each_other_in_a_circle(length, tmp_path):
    for i in range(length):
        (tmp_path / f"{i}.gin").write_text(f"train.seed = {i}\ninclude '{(i + 1) % length}.gin'\n")
    with pytest.raises(ConfigError) as found:
        config.statements(tmp_path / "0.gin")
    assert str(found.value).startswith(f"{tmp_path / f'{length - 1}.gin'}, line 2: {tmp_path / '0.gin'} includes ")
    assert str(found.value).endswith("0.gin, in a circle")


def test_a_file_may_be_included_twice(tmp_path):
    (tmp_path / "one.gin").write_text("train.seed = 1\n")
    (tmp_path / "two.gin").write_text("include 'one.gin'\ninclude 'one.gin'\n")
    assert len(config.statements(tmp_path / "two.gin")) == 2


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train.teacher = @guided()\nguided.teacher = @guided()\n", ["guided.teacher = @guided()"]),
        (
            "train.teacher = @guided()\nguided.teacher = %mine\nmine = @guided()\n",
            ["guided.teacher = %mine", "mine = @guided()"],
        ),
        ("train.teacher = %a\na = %b\nb = %a\n", ["a = %b", "b = %a"]),
    ],
    ids=["itself", "through a macro", "macros"],
)
def test_references_in_a_circle_are_named_with_their_lines(text, parts, tmp_path):
    file = write(tmp_path / "circle.gin", RING + text)
    with pytest.raises(ConfigError) as found:
        flowdistill.train(gin_file=file, workdir=tmp_path / "run")
    message = str(found.value)
    assert "refers to itself in a circle" in message
    for part in parts:
        assert f"{part}: {file}, line " in message
    assert message.count("\n") == len(parts)


def test_values_that_are_nested_too_deeply(tmp_path):
    file = tmp_path / "deep.gin"
    file.write_text(f"train.seed = {'[' * 20_000}{']' * 20_000}\n")
    with pytest.raises(ConfigError, match=r"deep\.gin: a value is nested too deeply"):
        config.statements(file)


def test_files_are_utf_8(tmp_path):
    file = tmp_path / "mine.gin"
    file.write_bytes("# café\ntrain.seed = 3\n".encode())
    assert [str(binding) for binding in config.statements(file)] == ["train.seed = 3"]
    file.write_bytes(b"# caf\xe9\ntrain.seed = 3\n")
    with pytest.raises(ConfigError, match=r"mine\.gin is no gin file: it is not UTF-8"):
        config.statements(file)


def test_gins_own_search_path_stays_as_it_is(tmp_path):
    before = list(config.gin.config._LOCATION_PREFIXES), list(config.gin.config._FILE_READERS), list(config.sys.path)
    for _ in range(3):
        with config.parsed(["freeflow/digits.gin"], ["include 'settings/plane.gin'"]):
            pass
    after = list(config.gin.config._LOCATION_PREFIXES), list(config.gin.config._FILE_READERS), list(config.sys.path)
    assert after == before


def test_threads_do_not_see_each_others_configuration():
    """Each holds gin for itself, however they interleave."""

    def steps(number):
        found = set()
        for _ in range(30):
            with config.parsed([], [f"train.steps = {number}"]):
                time.sleep(0.0005)
                found.add(config.value("train.steps"))
        return found

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(steps, range(1, 7))) == [{number} for number in range(1, 7)]


# Types, before anything is built.


def parameters():
    """Each parameter of everything that is registered, with the hint of its type."""
    load_all()
    for registry in REGISTRIES.values():
        for name in packaged(registry):
            entry = registry.get(name)
            kind = entry.entry if isinstance(entry, Preset) else entry
            suffix = registry.gin_suffix
            for parameter, hint in hints_of(kind).items():
                if parameter not in ("return", "self"):
                    yield pytest.param(f"{name}{suffix}.{parameter}", hint, id=f"{name}{suffix}.{parameter}")


def refused(binding):
    with pytest.raises(ConfigError) as found, config.parsed([], [binding]):
        pass
    assert f"binding {binding!r}" in str(found.value)
    return str(found.value)


def test_every_parameter_refuses_what_it_cannot_be():
    """Of all registered parts; a parameter whose hint says nothing would take anything."""
    seen = [parameter.values for parameter in parameters()]
    assert len(seen) > 200
    for name, hint in seen:
        for literal in ("{'odd': 'thing'}", "(1, 'two', None, 3.5)"):
            if not matches(config.statements_of(f"x.y = {literal}", "here")[0].value, hint):
                assert f"{name} must be " in refused(f"{name} = {literal}")
    takes_anything = [name for name, hint in seen if matches({"odd": "thing"}, hint) or matches((1, "two", None), hint)]
    arrays = {"gaussian", "gaussian_mixture", "product_mixture"}  # which make arrays of numbers, or say what is wrong
    names = {"sit_student", "imf_map", "policy_map"}  # which have an argument that is such a dictionary
    assert {name.partition(".")[0] for name in takes_anything} <= arrays | names


@pytest.mark.parametrize(
    ("binding", "reason"),
    [
        ("logit_normal.mean = '0.5'", "logit_normal.mean must be a number, not '0.5'"),
        ("logit_normal.mean = (0.5,)", "logit_normal.mean must be a number, not (0.5,)"),
        ("finite_difference.anneal = 0.5", "must be (a number, a number), not 0.5"),
        ("finite_difference.anneal = (0.0, 0.5, 1.0)", "must be (a number, a number), not (0.0, 0.5, 1.0)"),
        ("finite_difference.anneal = None", "must be (a number, a number), not None"),
        ("guided.scale = None", "guided.scale must be a number, not None"),
        ("network.guidance = @AdamW", "network.guidance must be a number or None, not @AdamW"),
        ("told = @ring\nnetwork.start = %told", "network.start must be a number, not @ring"),
        ("AdamW.differentiable = @finite_difference()", "AdamW.differentiable must be True or False, not @finite_diff"),
        ("edm2.channel_mult = @ring", "edm2.channel_mult must be a list of a whole number, not @ring"),
        ("guided.scale = True", "guided.scale must be a number, not True"),
        ("mlp.depth = 3.0", "mlp.depth must be a whole number, not 3.0"),
        ("sit.depth = 2147483648", "sit.depth is too large: 2147483648"),
        ("policy.substeps = 100000000000000000000", "policy.substeps is too large"),
        ("train.steps = 1000000000000", "train.steps is too large"),
        ("meanflow.pairs = 'uniform'", "meanflow.pairs must be a Pairs, by a reference such as @NAME(), not 'uniform'"),
        ("dmd2.weighting = 'dmd3'", "dmd2.weighting must be 'none' or 'dmd', not 'dmd3'"),
        ("number = 'x'\nlogit_normal.mean = %number", "logit_normal.mean must be a number, not 'x'"),
        ("AdamW.betas = (0.9, 0.9, 0.9, 0.9)", "AdamW.betas must be "),
    ],
)
def test_types_are_checked_before_anything_is_built(binding, reason):
    with pytest.raises(ConfigError) as found, config.parsed([], binding.split("\n")):
        pass
    assert reason in str(found.value)
    assert f"binding {binding.splitlines()[-1]!r}" in str(found.value)


def test_large_seeds_are_seeds():
    with config.parsed([], ["train.seed = 12345678901234"]):
        assert config.value("train.seed") == 12345678901234


@pytest.mark.parametrize(
    ("value", "instead"),
    [
        ("none", "none is no value: write None"),
        ("false", "false is no value: write False"),
        ("(1, null)", "null is no value: write None"),
        ("mnist", "mnist is no value: write 'mnist' in quotes, or @mnist for a part, or %mnist for a macro"),
        ("", "a value is missing"),
    ],
)
def test_values_that_are_none_say_what_to_write(value, instead):
    with pytest.raises(ConfigError) as found, config.parsed([], [f"evaluation.reference = {value}"]):
        pass
    assert f"line 1: {instead}" in str(found.value)
    assert "ast." not in str(found.value)
