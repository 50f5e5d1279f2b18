"""The gradient of several processes: every element summed once, in buckets that begin during the backward pass."""

import pytest
import torch
from process_groups import together
from torch import nn

from genray.core.flat import FlatWeights
from genray.parallel.gradient_sum import GradientSum
from genray.parallel.process_group import ALONE, ProcessGroup

X = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))


def network(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 300), nn.Tanh(), nn.Linear(300, 3))


class Recorder(ProcessGroup):
    """Two processes with one gradient: notes each bucket as it is when its sum begins, and doubles it at the end."""

    size = 2

    def __init__(self, seen):
        self.seen, self.begun = seen, []

    def begin_sum(self, tensor):
        self.begun.append((tensor.clone(), tensor.storage_offset(), len(self.seen)))
        return lambda: tensor.mul_(2)


def recorded(bucket, loss_of=lambda module: module(X).square().mean(), alignment=None):
    module, seen = network(), []
    flat, group = FlatWeights(module, alignment), Recorder(seen)
    for p in module.parameters():
        p.register_post_accumulate_grad_hook(seen.append)
    summed = GradientSum(flat, group, bucket)
    summed.backward(loss_of(module))
    return flat, group, seen, summed, loss_of


@pytest.mark.parametrize("bucket", [1, 100, 2000, 1 << 20])
@pytest.mark.parametrize("alignment", [None, 256])
def test_every_element_is_summed_once_and_not_before_it_is_known(bucket, alignment):
    flat, group, seen, summed, loss_of = recorded(bucket, alignment=alignment)
    same = network()
    loss_of(same).backward()
    for p, q in zip(flat.module.parameters(), same.parameters()):
        assert torch.equal(p.grad, 2 * q.grad)
    end = len(flat.parameter)
    for noted, start, _ in group.begun:  # from the end to the beginning, without gaps
        assert start + len(noted) == end
        assert torch.equal(2 * noted, flat.parameter.grad[start:end])
        end = start
    assert end == 0


def test_sums_begin_while_the_rest_is_computed():
    _, group, seen, _, _ = recorded(bucket=1)
    assert [known for _, _, known in group.begun] == [1, 2, 3, 4, 5, 6] and len(seen) == 6
    _, group, _, _, _ = recorded(bucket=2000)  # the second weight and what follows it are more than that together
    assert [known for _, _, known in group.begun] == [2, 4, 6]


def test_a_bucket_whose_parameters_have_no_gradient_is_summed_too():
    flat, group, seen, _, _ = recorded(bucket=1, loss_of=lambda module: module[4](torch.ones(2, 300)).sum())
    assert len(seen) == 2 and len(group.begun) == 6
    assert not flat.parameter.grad[: 5 * 7].any() and flat.parameter.grad[-3:].tolist() == [4.0] * 3


def test_a_backward_pass_of_someone_else_sums_nothing():
    module, group = network(), Recorder([])
    summed = GradientSum(FlatWeights(module), group, 1)
    module(X).sum().backward()
    assert not group.begun
    summed.backward(module(X).sum())
    assert len(group.begun) == 6


def test_processes_get_the_sum_with_the_same_bits():
    def work(worker, own, everyone):
        module = network()
        flat = FlatWeights(module)
        one = GradientSum(FlatWeights(alone := network()), ALONE)
        found = {}
        for bucket in (64, 1 << 20):
            GradientSum(flat, own, bucket).backward(module(X[worker.rank * 3 :][:3]).square().mean())
            found[bucket] = flat.parameter.grad.numpy().copy()
        one.backward(alone(X[worker.rank * 3 :][:3]).square().mean())
        return found, one.flat.parameter.grad.numpy()

    (first, mine), (second, other) = together({"linf": 2}, work)
    for bucket in first:
        assert (first[bucket] == second[bucket]).all()
        assert (first[bucket] == mine + other).all()
