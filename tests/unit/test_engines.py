"""Who runs AutoAttack's members: the same verdicts from each, and a model that stays as it was."""

import copy

import pytest
import torch
from torch import nn

import genray
from genray.data.datasets import load_image_data
from genray.errors import ConfigError
from genray.evaluation import engines
from genray.evaluation.engines import ENGINES, PASSES
from genray.evaluation.record import record_table
from genray.models.attack_copy import AttackCopy
from genray.types import ThreatModel

pytestmark = pytest.mark.slow  # runs the package beside ours

THREATS = {"linf": 0.1, "l2": 0.6, "l1": 1.5}


@pytest.fixture(scope="module")
def victim(trained_run):
    """A trained network and 24 test digits that it gets right."""
    model, test = genray.load_model(trained_run), load_image_data("digits").test
    x, y = test.images[:40].float() / 255, test.labels[:40]
    right = model(x).argmax(1) == y
    return model, x[right][:24], y[right][:24]


def standing(engine, victim, member, norm):
    model, x, y = victim
    found = ENGINES[engine](model, x, y, member=member, threat=ThreatModel(norm, THREATS[norm]), seed=3, num_classes=10)
    distance = (found - x).flatten(1)
    length = {"linf": distance.abs().amax(1), "l2": distance.norm(dim=1), "l1": distance.abs().sum(1)}[norm]
    assert float(length.max()) <= THREATS[norm] * (1 + 1e-5)
    return model(found).argmax(1) == y


@pytest.mark.parametrize(("member", "norm"), [("apgd_ce", "l2"), ("apgd_dlr", "linf"), ("fab_t", "linf")])
def test_our_members_give_the_verdicts_of_the_package(victim, member, norm):
    theirs, ours = (standing(engine, victim, member, norm) for engine in ("pyautoattack", "genray"))
    assert 0 < int(theirs.sum()) < len(theirs)  # some fall, some stand
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("member", ["apgd_ce", "apgd_t", "square"])
def test_bf16_changes_few_verdicts(victim, member, monkeypatch):
    monkeypatch.setattr("genray.attacks.native.square.square.__kwdefaults__", {"search": None, "num_queries": 300})
    single, half = (standing(engine, victim, member, "linf") for engine in ("genray", "genray-bf16"))
    assert int((single != half).sum()) <= 1


def test_only_searches_use_less_precision(victim, monkeypatch):
    """FAB walks along the boundary, where rounding decides, and so do the fine steps of l2: no second network."""
    made = []

    class Recorded(AttackCopy):
        def __init__(self, network, **options):
            made.append(options["dtype"])
            super().__init__(network, **options)

    monkeypatch.setattr(engines, "AttackCopy", Recorded)
    standing("genray-bf16", victim, "fab_t", "linf")
    standing("genray-bf16", victim, "apgd_ce", "l2")
    assert made == [torch.float32, torch.float32]
    made.clear()
    standing("genray-bf16", victim, "apgd_ce", "linf")
    assert made == [torch.float32, torch.bfloat16]


def test_the_model_stays_as_it_was(victim):
    model, x, y = victim
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    try:
        how = {"threat": ThreatModel("linf", 0.1), "seed": 3, "num_classes": 10}
        ENGINES["genray"](model, x[:4], y[:4], member="apgd_ce", **how)
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("member", ["apgd_ce", "apgd_dlr", "apgd_t", "fab_t", "square"])
def test_the_stated_passes_are_those_of_an_example_that_resists(member, norm):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    x, seen = torch.rand((1, 1, 8, 8), generator=torch.Generator().manual_seed(1)), []
    y = model(x).argmax(1)
    model[1].register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].requires_grad] * len(output)))
    found = ENGINES["genray"](model, x, y, member=member, threat=ThreatModel(norm, 1e-6), seed=1, num_classes=4)
    assert torch.equal(found, x)
    assert (sum(seen), len(seen) - sum(seen)) == PASSES["genray"](member, norm, 4)


@pytest.mark.parametrize("member", ["apgd_ce", "square"])
def test_the_seed_acts(victim, member, monkeypatch):
    monkeypatch.setattr("genray.attacks.native.square.square.__kwdefaults__", {"search": None, "num_queries": 100})
    how = {"member": member, "threat": ThreatModel("linf", 0.1), "num_classes": 10}
    one, again, two = (ENGINES["genray"](*victim, seed=seed, **how) for seed in (1, 1, 2**62 + 7))
    assert torch.equal(one, again) and not torch.equal(one, two)


class Uncopyable(nn.Module):
    """Holds a tensor that is not a leaf, which Python cannot copy."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn((64, 4), generator=torch.Generator().manual_seed(0)))
        self.derived = self.weight * 2

    def forward(self, x):
        return x.flatten(1) @ self.derived


def test_a_model_that_cannot_be_copied_is_attacked_itself():
    model, x = Uncopyable(), torch.rand((5, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    with pytest.raises(RuntimeError):
        AttackCopy(model)
    y = model(x).argmax(1)
    found = [
        ENGINES[engine](model, x, y, member="apgd_ce", threat=ThreatModel("linf", 0.5), seed=1, num_classes=4)
        for engine in ("genray", "pyautoattack")
    ]
    wrong = [model(points).argmax(1) != y for points in found]
    assert wrong[0].any()
    assert torch.equal(*wrong)


def test_too_few_classes_are_refused(victim):
    model, x, y = victim
    for engine in ENGINES.values():
        with pytest.raises(ConfigError, match="apgd_t: expected at least 4 classes"):
            engine(model, x, y, member="apgd_t", threat=ThreatModel("linf", 0.1), seed=0, num_classes=3)
        assert (
            len(engine(model, x[:0], y[:0], member="fab_t", threat=ThreatModel("l2", 1), seed=0, num_classes=10)) == 0
        )


def test_by_default_ours_runs_where_it_gives_the_packages_verdicts(victim):
    model, x, y = victim
    epsilon = {"linf": 0.1, "l2": 0.6, "l1": 1.5}
    how = {"attacks": "pgd20,apgd_ce", "norms": "linf,l2,l1", "epsilon": epsilon}
    stated = genray.evaluate(model, x[:6], y[:6], **how)["protocol"]
    assert stated["engine"] == "genray (linf, l2), pyautoattack (l1)"
    ran = {norm: of["apgd_ce"] for norm, of in stated["engines"].items()}
    assert ran == {"linf": "genray", "l2": "genray", "l1": "pyautoattack"}
    assert {of["pgd20"] for of in stated["engines"].values()} == {"genray"}
    alone = genray.evaluate(model, x[:6], y[:6], **how | {"engine": "pyautoattack"})["protocol"]
    assert alone["engine"] == "pyautoattack" and {of["apgd_ce"] for of in alone["engines"].values()} == {"pyautoattack"}


def test_whose_code_ran_stands_beside_published_figures(victim):
    model, x, y = victim
    how = {"attacks": "pgd20,apgd_ce", "epsilon": 0.1}
    ours, theirs = (genray.evaluate(model, x[:6], y[:6], **how, engine=e) for e in ("genray", "pyautoattack"))
    published = {"linf": {"row": "published AT", "values": {"natural": 85.0, "apgd_ce": 50.0}}}
    note = "note: apgd_ce: run by genray; published figures are of the authors' code (--engine pyautoattack)"
    assert note in record_table(ours, published) and "run by" not in record_table(theirs, published)
    del theirs["protocol"]["engines"]  # as records of before
    assert "run by" not in record_table(theirs, published)


@pytest.mark.slow
def test_an_evaluation_copies_the_model_once_and_the_next_one_anew(victim, monkeypatch):
    model, x, y = victim
    made = []

    class Recorded(AttackCopy):
        def __init__(self, network, **options):
            made.append(options["in_place"])
            super().__init__(network, **options)

    monkeypatch.setattr(engines, "AttackCopy", Recorded)
    changed = copy.deepcopy(model)
    x, y = x[:8], y[:8]
    how = {"attacks": "apgd_ce,apgd_dlr", "epsilon": 0.1, "block_size": 4}
    before = genray.evaluate(changed, x, y, **how)
    assert made == [True]
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.zero_()
    assert genray.evaluate(changed, x, y, **how)["natural"] != before["natural"] and made == [True] * 2
    changed.load_state_dict(model.state_dict())
    assert genray.evaluate(changed, x, y, **how) == before and made == [True] * 3


def test_an_evaluation_says_which_engine_it_used(victim):
    model, x, y = victim
    how = {"attacks": "apgd_ce", "epsilon": 0.1}
    records = {engine: genray.evaluate(model, x[:8], y[:8], engine=engine, **how) for engine in ENGINES}
    assert {name: record["protocol"]["engine"] for name, record in records.items()} == {name: name for name in ENGINES}
    values = {name: record["norms"]["linf"]["columns"]["apgd_ce"]["value"] for name, record in records.items()}
    assert values["genray"] == values["pyautoattack"]
