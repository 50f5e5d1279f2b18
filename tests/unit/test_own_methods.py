"""Objectives, training attacks and evaluation columns of a user's package, named `package.module:Class`."""

import sys
import textwrap

import pytest
import torch

import genray
from genray.cli import evaluate as evaluate_command
from genray.cli import train as train_command
from genray.cli.parser import run_command
from genray.config import load_config, to_yaml
from genray.core import user_code
from genray.errors import ConfigError
from genray.run.cost import step_passes
from genray.run.setup import prepare

# The same methods as `adversarial` with beta 1/2 and `pgd`, written without looking at ours.
OWN = """
    import torch
    import torch.nn.functional as F
    from genray.objectives import Objective


    class Half(Objective):
        attacks, passes = "one", 2

        def __init__(self, weight=0.5):
            self.weight = weight

        def __call__(self, step):
            logits = step.model(step.craft("attack"))
            robust = F.cross_entropy(logits, step.y)
            return self.weight * robust + (1 - self.weight) * F.cross_entropy(step.model(step.x), step.y), logits


    class Ascent:
        def __init__(self, epsilon, step_size, num_steps=20, stretch=1.0):
            self.epsilon, self.step_size, self.num_steps, self.stretch = epsilon, step_size, num_steps, stretch

        def __call__(self, model, x, y, draw):
            found = (x + self.epsilon * (2 * draw.uniform(x) - 1)).clamp(0, 1)
            for _ in range(self.num_steps):
                found = found.detach().requires_grad_()
                loss = F.cross_entropy(model(found), y, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, found)
                moved = found + self.step_size * gradient.sign()
                found = (x + self.stretch * (moved - x).clamp(-self.epsilon, self.epsilon)).clamp(0, 1)
            return found


    class Fixed:
        def __init__(self, what="x"):
            self.what = what

        def __call__(self, model, x, y, draw):
            if self.what == "raise":
                raise KeyError("gone")
            return {"x": x, "short": x[:1], "none": None, "nan": x * float("nan"), "outside": x + 2}[self.what]


    class Plain(Objective):
        attacks = "none"

        def __init__(self, what):
            self.what = what

        def __call__(self, step):
            logits = step.model(step.x)
            loss = F.cross_entropy(logits, step.y)
            if self.what == "raise":
                raise KeyError("gone")
            return {"one": loss, "detached": (loss.detach(), logits), "nan": (loss * float("nan"), logits),
                    "each": (logits.sum(1), logits), "swapped": (logits, loss)}[self.what]


    class Stranger:
        pass
"""
TINY = [
    "name=own", "training.epochs=1", "training.batch_size=30", "data.train_examples=110", "data.test_examples=24",
    "data.validation_examples=20", "model.width=4", "base_learners.linf.attack.num_steps=2",
    "global_learner.warmup_epochs=0",
]  # fmt: skip
L = "base_learners.linf"


@pytest.fixture(autouse=True)
def own_methods(tmp_path, monkeypatch):
    """A package of the user's, in a folder of the path."""
    (tmp_path / "own_methods.py").write_text(textwrap.dedent(OWN))
    monkeypatch.syspath_prepend(str(tmp_path))
    with user_code.only_here():
        yield
    sys.modules.pop("own_methods", None)


def trained(tmp_path, name, *overrides, runtime="local"):
    storage = str(tmp_path / name)
    genray.train(None, [*TINY, *overrides], runtime=runtime, storage=storage)
    return torch.load(f"{storage}/own/learners/linf.pt", weights_only=True)["state_dict"]


def furthest(ours, theirs):
    return max(float((ours[key].double() - theirs[key]).abs().max()) for key in ours)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


OBJECTIVE = f"{L}.objective={{name: own_methods:Half, options: {{weight: 0.5}}}}"
ATTACK = f"{L}.attack.algorithm=own_methods:Ascent"


def test_a_users_objective_and_attack_train_as_ours_do(tmp_path):
    ours = trained(tmp_path, "ours", f"{L}.objective={{name: adversarial, beta: 0.5}}")
    theirs = trained(tmp_path, "theirs", OBJECTIVE, ATTACK)
    other = trained(tmp_path, "other", OBJECTIVE.replace("0.5", "0.4"), ATTACK)
    assert furthest(theirs, ours) < 1e-5 < 1e-4 < furthest(other, ours)  # rounded in another order


@pytest.mark.ray
def test_both_runtimes_give_the_same_bits(tmp_path, no_ray):
    here = trained(tmp_path, "local", OBJECTIVE, ATTACK)
    assert same(trained(tmp_path, "ray", OBJECTIVE, ATTACK, runtime="ray"), here)


def test_classes_take_the_place_of_names(tmp_path):
    import own_methods

    by_name = trained(tmp_path, "names", OBJECTIVE, ATTACK)
    objective = {"name": own_methods.Half, "options": {"weight": 0.5}}
    classes = {f"{L}.objective": objective, f"{L}.attack.algorithm": own_methods.Ascent}
    assert same(trained(tmp_path, "classes", classes), by_name)


def test_the_objective_says_its_cost():
    user_code.allow_import("own_methods")
    config = load_config(None, [*TINY, OBJECTIVE, ATTACK])
    passes = step_passes(config.base_learners["linf"])
    assert (passes.training, passes.attack) == (2, 2)


def test_a_column_gives_the_numbers_of_the_same_attack_of_ours():
    import own_methods

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    x = torch.rand(60, 1, 8, 8)
    y = model(x).argmax(1)
    record = genray.evaluate(model, x, y, attacks=["pgd20", own_methods.Ascent], epsilon=0.02)
    found = record["norms"]["linf"]["columns"]
    assert list(found) == ["pgd20", "own_methods:Ascent"] and 0 < found["pgd20"]["value"] < 1
    # Another name, so other random starts; a linear model's best point does not depend on them.
    assert found["own_methods:Ascent"]["value"] == found["pgd20"]["value"]
    attack = record["protocol"]["threats"][0]["attacks"][1]
    assert (attack["num_steps"], attack["step_size"], attack["passes"]) == (20, 0.005, 20)
    again = genray.evaluate(model, x, y, attacks="own_methods:Ascent", epsilon=0.02)["norms"]["linf"]["columns"]
    assert again["own_methods:Ascent"] == found["own_methods:Ascent"]


WRONG = {
    "absent module": (["nowhere.at:C"], "objective.name: expected a module that can be imported, got 'nowhere.at'"),
    "absent class": (["own_methods:C"], "objective.name: expected own_methods to have C, it has not"),
    "no objective": (["own_methods:Stranger"], "expected a class derived from genray.objectives.Objective, got"),
    "options": (["{name: own_methods:Half, options: {w: 1}}"], "own_methods:Half cannot be made: TypeError"),
    "raises": (["{name: own_methods:Plain, options: {what: raise}}", f"{L}.attack=null"], "KeyError: 'gone'"),
    "one": (["{name: own_methods:Plain, options: {what: one}}", f"{L}.attack=null"], "got Tensor"),
    "detached": (["{name: own_methods:Plain, options: {what: detached}}", f"{L}.attack=null"], "without gradients"),
    "nan": (["{name: own_methods:Plain, options: {what: nan}}", f"{L}.attack=null"], "got (nan, (2, 10)"),
    "each": (["{name: own_methods:Plain, options: {what: each}}", f"{L}.attack=null"], "got ((2,) torch.float32, (2"),
    "swapped": (["{name: own_methods:Plain, options: {what: swapped}}", f"{L}.attack=null"], "got ((2, 10) torch"),
    "attack": (["{name: own_methods:Plain, options: {what: one}}"], "expected no attack for own_methods:Plain, got"),
    "no attack": (["own_methods:Half", f"{L}.attack=null"], "expected one `attack` for own_methods:Half, got no"),
    "step size": (["trades", f"{L}.attack.algorithm=own_methods:Fixed"], "own_methods:Fixed takes no step_size"),
    "failing": (["trades", f"{L}.attack={{algorithm: own_methods:Fixed, norm: l2, epsilon: 1, "
                 "options: {what: raise}}"], "own_methods:Fixed failed: KeyError"),
    "short": (["trades", f"{L}.attack={{algorithm: own_methods:Fixed, norm: l2, epsilon: 1, "
               "options: {what: short}}"], "expected images of shape (2, 1, 8, 8)"),
    "nothing": (["trades", f"{L}.attack={{algorithm: own_methods:Fixed, norm: l2, epsilon: 1, "
                 "options: {what: none}}"], "got NoneType"),
    "outside": (["trades", f"{L}.attack={{algorithm: own_methods:Fixed, norm: l2, epsilon: 1, "
                 "options: {what: outside}}"], "attack own_methods:Fixed: points outside [0, 1]"),
    "ball": (["trades", ATTACK, f"{L}.attack.options={{stretch: 2}}"], "attack own_methods:Ascent: points outside the"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_one_line_for_wrong_code(case, tmp_path, capsys):
    (objective, *overrides), says = WRONG[case]
    mixed = ["global_learner.gamma=null", "global_learner.mixing_weights={linf: 0.5, natural: rest}"]
    line = [*TINY, *mixed, "evaluation.attack={norm: linf, epsilon: 0.1, step_size: 0.1}", f"{L}.objective={objective}"]
    args = train_command.parse_args(["--runtime", "local", "--storage", str(tmp_path / "runs"), *line, *overrides])
    assert run_command(train_command.main, args) == 2
    err = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert len(err) == 1 and says in err[0] and err[0].startswith(f"error: {L}.")
    assert not (tmp_path / "runs/own/config.yaml").exists()


@pytest.mark.parametrize(
    ("attacks", "says"),
    [
        ("own_methods:Far", "evaluation attack: expected own_methods to have Far"),
        ("own_methods:Stranger", "expected own_methods:Stranger to be called with (model, x, y, draw)"),
        ("nowhere:C", "evaluation attack: expected a module that can be imported"),
    ],
)
def test_one_line_for_a_wrong_column(attacks, says, trained_run, tmp_path, capsys):
    line = [str(trained_run), "--attacks", attacks, "--examples", "20", "--output", str(tmp_path / "evaluation")]
    assert run_command(evaluate_command.main, evaluate_command.parse_args(line)) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "evaluation").exists()


def test_a_column_outside_the_ball_is_named():
    import own_methods

    class Far(own_methods.Ascent):
        def __init__(self, epsilon, step_size):
            super().__init__(epsilon, step_size, stretch=1.5)

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    x = torch.full((20, 1, 8, 8), 0.5)
    with pytest.raises(ConfigError, match=r"^attack .*Far: points outside the ball: norm 1.5"):
        genray.evaluate(model, x, model(x).argmax(1), attacks=[Far], epsilon=0.1)


def test_a_configuration_file_alone_imports_nothing(tmp_path):
    with user_code.only_here():
        user_code.allow_import("own_methods")
        prepare(load_config(None, [*TINY, OBJECTIVE, ATTACK]))
        (tmp_path / "my.yaml").write_text(to_yaml(load_config(None, [*TINY, OBJECTIVE, ATTACK])))
    sys.modules.pop("own_methods")
    how = {"runtime": "local", "storage": str(tmp_path)}
    with pytest.raises(ConfigError, match="objective.name: own_methods:Half is not imported because a file names it"):
        genray.train(tmp_path / "my.yaml", **how)
    with pytest.raises(ConfigError, match="attack.algorithm: own_methods:Ascent is not .* --allow own_methods:A"):
        genray.train(tmp_path / "my.yaml", {f"{L}.objective.name": "own_methods:Half"}, **how)
    sys.modules.pop("own_methods")
    line = ["--config", str(tmp_path / "my.yaml"), "--runtime", "local", "--storage", str(tmp_path), "--allow"]
    assert run_command(train_command.main, train_command.parse_args([*line, "own_methods_too"])) == 2
    assert "own_methods" not in sys.modules
    assert run_command(train_command.main, train_command.parse_args([*line, "own_methods"])) == 0
