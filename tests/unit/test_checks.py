"""Every finding of an evaluation is provoked by a model built to trip it, and a sound model fires none."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import genray
from genray.errors import DataError, InputError
from genray.evaluation.checks import look_at_model, look_at_numbers
from genray.evaluation.job import as_pixels, check_points, check_scores
from genray.evaluation.record import record_table


class Wrapped(nn.Module):
    """A trained network with something wrong around it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


class Softmax(Wrapped):
    def forward(self, x):
        return self.network(x).softmax(1)


class Noisy(Wrapped):
    def forward(self, x):
        return self.network((x + 0.1 * torch.randn_like(x)).clamp(0, 1))


class Quantised(Wrapped):
    def forward(self, x):
        return self.network((x * 16).round() / 16)


class BatchStatistics(Wrapped):
    def forward(self, x):
        return self.network(F.batch_norm(x, None, None, training=True))


class SingleValues(Wrapped):
    """BatchNorm in train mode on one value a channel: torch refuses a batch of one."""

    def forward(self, x):
        return F.batch_norm(self.network(x), None, None, training=True)


class Purifying(Wrapped):
    """Descends on its own entropy before it answers."""

    def forward(self, x):
        with torch.enable_grad():
            moved = x.detach().requires_grad_(True)
            entropy = torch.special.entr(self.network(moved).softmax(1)).sum()
            if self.by_backward:
                entropy.backward(inputs=[moved])
                gradient = moved.grad
            else:
                (gradient,) = torch.autograd.grad(entropy, moved)
        return self.network((x - 1e-3 * gradient).clamp(0, 1))

    by_backward = False


class PurifyingByBackward(Purifying):
    by_backward = True


class Detached(Wrapped):
    def forward(self, x):
        return self.network(x.detach())


class Decided(Wrapped):
    def forward(self, x):
        return F.one_hot(self.network(x).argmax(1), 10).float() * 3


class NotFinite(Wrapped):
    def forward(self, x):
        return self.network(x) / torch.zeros(1)


BROKEN = {
    Softmax: "the outputs are probabilities",
    Noisy: "the outputs are random",
    Quantised: "images have a zero gradient of the margin loss",
    BatchStatistics: "depend on the others in its batch (by",
    SingleValues: "depend on the others in its batch (alone it cannot be classified)",
    Purifying: "gradients are computed during inference",
    PurifyingByBackward: "gradients are computed during inference",
    Detached: "the outputs are not differentiable",
    Decided: "the outputs are not differentiable",
    NotFinite: "the outputs are NaN or infinite",
}

# These have operations besides by which gradients are lost.
HIDING = {Quantised: "round", Decided: "argmax"}


@pytest.fixture(scope="module")
def batch(digits):
    return as_pixels(digits[0][:32]), digits[1][:32]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_model_built_to_trip_a_check_fires_it_alone(model, batch, kind):
    findings = look_at_model(kind(model).eval(), *batch)
    if kind in HIDING:
        assert findings.pop(-2 if len(findings) > 1 else 0).startswith(f"layers hide gradients ({HIDING[kind]} in ")
    assert len(findings) == 1
    assert BROKEN[kind] in findings[0]


def test_train_mode(model, batch):
    wrapped = Wrapped(model).eval()
    wrapped.training = True
    modes = [module.training for module in wrapped.modules()]
    assert look_at_model(wrapped, *batch) == ["the model was in train mode; it is evaluated in eval mode"]
    assert [module.training for module in wrapped.modules()] == modes


@pytest.mark.parametrize("scale", [1e-4, 1, 1e4])
def test_a_sound_model_fires_none_however_its_logits_are_scaled(model, batch, scale):
    class Scaled(Wrapped):
        def forward(self, x):
            return scale * self.network(x)

    assert look_at_model(Scaled(model).eval(), *batch) == []


def test_a_single_image_is_looked_at_too(model, batch):
    assert look_at_model(model, batch[0][:1], batch[1][:1]) == []


def test_looking_leaves_autograd_as_it_was(model, batch):
    before = torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward
    look_at_model(Purifying(model).eval(), *batch)
    assert (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward) == before


# --- numbers -------------------------------------------------------------------------------------------------------

SOUND = {"natural": 0.9, "pgd20": 0.5, "pgd100": 0.5, "mim": 0.5, "cw": 0.48, "apgd_ce": 0.48, "apgd_t": 0.45}
SOUND |= {"fab_t": 0.46, "square": 0.52, "aa": 0.45, "aa_apgd_ce": 0.48, "aa_fab_t": 0.45, "aa_square": 0.45}
NUMBERS = [
    ({"pgd100": 0.51}, "PGD-100 leaves more standing than PGD-20"),
    ({"square": 0.44}, "Square, which sees no gradients, beats the white-box attacks"),
    ({"aa": 0.46}, "AA is above its own member apgd_t"),
    ({"aa_fab_t": 0.46, "aa_square": 0.45}, "Square lowers the white-box result of AA"),
    ({"cw": 0.3}, "CW breaks far more than PGD-20"),
]


@pytest.mark.parametrize(("changed", "says"), NUMBERS, ids=[says for _, says in NUMBERS])
def test_numbers_that_cannot_be(changed, says):
    findings = look_at_numbers(SOUND | changed, 1000)
    assert any(says in finding for finding in findings)
    assert len(findings) == 1 + ("square" in changed)  # Square below white-box is also below AA


@pytest.mark.parametrize(
    "changed",
    [{}, {"pgd100": 0.505}, {"square": 0.448}, {"aa": 0.452, "apgd_t": 0.45}, {"aa_square": 0.448}, {"cw": 0.4}],
)
def test_numbers_at_the_thresholds_are_no_finding(changed):
    """0.505 - 0.5 is more than 0.005 in floats."""
    assert look_at_numbers(SOUND | changed, 10_000) == []


def test_one_or_two_examples_are_no_finding():
    """Of 60 examples one is 1.7 points: another random start can do that on a sound model."""
    few = {name: round(value * 60) / 60 for name, value in SOUND.items()}
    for name, by in (("pgd100", 2), ("square", -6), ("aa", 2), ("aa_square", -2)):
        assert look_at_numbers(few | {name: few[name] + by / 60}, 60) == [], name
    assert look_at_numbers(few | {"pgd100": few["pgd100"] + 3 / 60}, 60) != []


def test_numbers_of_a_part_of_the_attacks():
    for name in SOUND:
        assert look_at_numbers({"natural": 0.9, name: 0.1}, 1000) == []


# --- returned points -----------------------------------------------------------------------------------------------

EPSILON = {"linf": 0.1, "l2": 0.5, "l1": 2.0}


def direction(norm, shape=(4, 1, 8, 8)):
    """A perturbation of norm 1 with signs that alternate."""
    signs = torch.tensor([1.0, -1.0]).repeat(32).reshape(shape[1:]).expand(shape)
    return signs / {"linf": 1, "l2": 8, "l1": 64}[norm]


@pytest.mark.parametrize("norm", EPSILON)
def test_points(norm):
    x, epsilon = torch.full((4, 1, 8, 8), 0.5), EPSILON[norm]
    longest, problems = check_points(x, x + epsilon * direction(norm), norm, epsilon)
    assert longest == pytest.approx(1, abs=1e-4) and problems == []
    assert check_points(x, x, norm, epsilon) == (0.0, [])

    outside = x.clone()
    outside[2] += 1.001 * epsilon * direction(norm)[2]
    longest, problems = check_points(x, outside, norm, epsilon)
    assert longest == pytest.approx(1.001, abs=1e-4)
    assert len(problems) == 1 and problems[0].startswith("points outside the ball: norm 1.00")

    missing = x.clone()
    missing[1, 0, 3, 3] = torch.nan
    assert check_points(x, missing, norm, epsilon)[1] == ["points with NaN or infinite pixels"]

    bright = torch.ones(4, 1, 8, 8)
    beyond = bright + 0.5 * epsilon * direction(norm)
    assert check_points(bright, beyond, norm, epsilon)[1] == ["points outside [0, 1]"]


@pytest.mark.parametrize("norm", EPSILON)
def test_points_on_the_sphere_are_inside_for_any_image(norm):
    """x + epsilon in float32 is off by half a unit in the last place: no finding."""
    noise = torch.Generator().manual_seed(0)
    x = torch.rand(500, 3, 32, 32, generator=noise).clamp(0.2, 0.8)
    delta = torch.randn(x.shape, generator=noise, dtype=torch.float64)
    for epsilon in (8 / 255, 1 / 255):
        if norm == "linf":
            moved = x.double() + epsilon * delta.sign()
        else:
            length = delta.flatten(1).norm(p=int(norm[1]), dim=1)[:, None, None, None]
            moved = x.double() + epsilon * delta / length
        assert check_points(x, moved.float(), norm, epsilon)[1] == []


def test_scores(model, batch):
    x, y = batch
    survived = model(x).argmax(1) == y
    assert check_scores(model, x, y, survived) == []
    wrong = survived.clone()
    wrong[[3, 7]] = ~wrong[[3, 7]]
    assert check_scores(model, x, y, wrong) == ["2 points are judged otherwise when scored again"]
    assert check_scores(model, x[:0], y[:0], survived[:0]) == []


def test_points_on_the_boundary_may_fall_either_way():
    """Attacks of least distance end there, and sums in another order decide."""

    class Two(nn.Module):
        def forward(self, x):
            return torch.stack([x.mean((1, 2, 3)) + 1e-6, x.mean((1, 2, 3))], 1)

    x = torch.full((3, 1, 8, 8), 0.5)
    assert check_scores(Two(), x, torch.zeros(3, dtype=torch.long), torch.tensor([True, False, True])) == []


# --- in the record and beside the number ---------------------------------------------------------------------------


def evaluated(model, digits, **options):
    options = {"attacks": "pgd20", "norms": "linf", "epsilon": 0.1, "block_size": 20} | options
    return genray.evaluate(model, digits[0][:40], digits[1][:40], **options)


def test_a_sound_model_has_a_clean_record(model, digits):
    names = "pgd20,pgd100,mim,cw,apgd_ce,apgd_t,fab_t"
    record = evaluated(model, digits, attacks=names, epsilon=0.1, block_size=40)
    assert record["findings"] == [] and record["norms"]["linf"]["findings"] == []
    assert "!" not in record_table(record)


@pytest.mark.parametrize("kind", [Softmax, Noisy, Quantised, BatchStatistics, Purifying])
def test_findings_about_the_model_are_recorded_and_printed(model, digits, kind):
    record = evaluated(kind(model).eval(), digits)
    found = [finding for finding in record["findings"] if not finding.startswith("layers hide gradients")]
    assert [BROKEN[kind] in finding for finding in found] == [True]
    assert len(record["findings"]) == 1 + (kind in HIDING)
    assert f"\n! {record['findings'][0]}" in record_table(record)


def test_a_random_model_does_not_give_the_same_answer_twice(model, digits):
    """Its stored points are judged otherwise: the flags of the attack were luck."""
    torch.manual_seed(0)
    record = evaluated(Noisy(model).eval(), digits, epsilon=0.2)
    assert any("judged otherwise when scored again" in f for f in record["norms"]["linf"]["findings"])


def test_what_cannot_be_differentiated_is_left_to_square(model, digits):
    detached = Detached(model).eval()
    with pytest.raises(DataError, match="not differentiable in the images.*only square and transfer can run"):
        evaluated(detached, digits, attacks="square,pgd20")
    x, y = digits
    record = genray.evaluate(detached, x[:2], y[:2], attacks="square", epsilon=0.3)
    assert BROKEN[Detached] in record["findings"][0]


def test_images_normalised_outside(model, digits):
    x = (as_pixels(digits[0]) - 0.5) / 0.25
    with pytest.raises(InputError, match=r"x: expected pixels in \[0, 1\] \(normalisation belongs into the model\)"):
        genray.evaluate(model, x, digits[1], attacks="pgd20")


def test_findings_about_numbers_and_points_stand_below_their_norm(model, digits, monkeypatch):
    from genray.evaluation import job

    def too_far(name, settings):
        step = 1.5 * settings.threat.radius
        return lambda model, x, y, indices: x + step * torch.where(x > 0.5, -1, 1), build(name, settings)[1]

    build = job.build_evaluation_attack
    monkeypatch.setattr(job, "build_evaluation_attack", too_far)
    record = evaluated(model, digits, norms="linf,l2", epsilon={"linf": 0.1, "l2": 0.1})
    (finding,) = record["norms"]["linf"]["findings"]
    assert finding.startswith("pgd20: points outside the ball: norm 1.5") and finding.endswith("(blocks 0, 1)")
    lines = record_table(record).splitlines()
    at = lines.index(f"  ! {finding}")
    assert lines[at - 4].startswith("linf 0.1") and lines[at + 1].startswith("l2 0.1")
    assert record["norms"]["l2"]["findings"] != []


def test_numbers_reach_the_record(model, digits, monkeypatch):
    from genray.evaluation import job

    def weak(name, settings):
        attack, description = build(name, settings)
        return (lambda model, x, y, indices: x.clone()) if name == "pgd100" else attack, description

    build = job.build_evaluation_attack
    monkeypatch.setattr(job, "build_evaluation_attack", weak)
    record = evaluated(model, digits, attacks="pgd20,pgd100", epsilon=0.2)
    findings = record["norms"]["linf"]["findings"]
    (finding,) = findings
    assert finding.startswith("PGD-100 leaves more standing than PGD-20: more steps should not be weaker; ")
    assert np.isclose(record["norms"]["linf"]["columns"]["pgd100"]["value"], record["natural"]["value"])
