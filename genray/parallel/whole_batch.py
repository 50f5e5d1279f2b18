"""Layers that depend on the whole batch, for a network trained by several processes on shards of one batch.

BatchNorm normalises by the mean and variance of the whole batch, and dropout draws the masks of the whole batch and
takes its rows. With both, n processes compute what one process computes on the batch, except for the order of sums.
torch's SyncBatchNorm does the first on CUDA only, where it makes the host wait in every layer.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from genray.errors import ConfigError
from genray.parallel.process_group import ProcessGroup, Shard


class WholeBatch:
    """The state that the layers share.

    Attributes:
        process_group: the processes that train the network.
        shard: of the current batch, set before each step.
    """

    def __init__(self, process_group: ProcessGroup):
        self.process_group, self.shard = process_group, Shard(0, 0, 0)

    def __deepcopy__(self, memo):
        return self


def across_batches(network: nn.Module, process_group: ProcessGroup) -> WholeBatch:
    """Makes a network's BatchNorm and dropout layers compute on whole batches, in place; parameters and buffers stay.

    In eval mode the layers do not change.
    """
    batch = WholeBatch(process_group)
    if process_group.size == 1:
        return batch
    if layers := per_process_layers(network):
        raise ConfigError(f"workers: expected 1, because {layers[0]} would compute on each process's shard alone")
    for module in network.modules():
        if type(module) in REPLACED:
            module.__class__, module.batch = REPLACED[type(module)], batch  # type: ignore[assignment]
    return batch


def per_process_layers(network: nn.Module) -> list[str]:
    """Layers that depend on the whole batch or on random numbers, and that `across_batches` cannot replace.

    Randomness in a network's own code (functional dropout) cannot be seen.
    """
    return [f"{name} ({type(module).__name__})" for name, module in network.named_modules() if _is_per_process(module)]


def _is_per_process(module):
    if type(module) is nn.BatchNorm2d:
        return not (module.affine and module.track_running_stats and module.momentum is not None)
    if isinstance(module, _BatchNorm):
        return True
    rate = next((getattr(module, name) for name in ("p", "drop_prob") if hasattr(module, name)), 0.0)
    random = isinstance(module, _DropoutNd) or type(module).__name__ in RANDOM_LAYERS
    return random and type(module) is not nn.Dropout and rate != 0


# Of timm and torchvision: not subclasses of torch's dropout.
RANDOM_LAYERS = ("DropPath", "StochasticDepth", "DropBlock2d", "PatchDropout")


class WholeBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the shards of all processes; for the standard kind, affine and with running statistics."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y, mean, variance, count = _Normalise.apply(x, self.weight, self.bias, self.eps, self.batch.process_group)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)  # unbiased, as torch keeps it
        return y


class _Normalise(torch.autograd.Function):
    """(y, mean, variance, number of values) of x (N, C, H, W), in train mode; one sum over all processes each way."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, process_group):
        variances, means = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        gathered = means.new_zeros(process_group.size, 3, len(means))  # Chan's formula: mean and variance of each rank
        gathered[process_group.rank] = torch.stack([torch.full_like(means, x.numel() // len(means)), means, variances])
        counts, means, variances = process_group.sum_(gathered).unbind(1)
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean).square())).sum(0) / count
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps), count)
        ctx.process_group = process_group
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance, count

    @staticmethod
    def backward(ctx, gradient, *_):
        x, weight, mean, scale, count = ctx.saved_tensors
        gradient, per_channel = gradient.float(), (1, -1, 1, 1)
        normalised = (x.float() - mean.view(per_channel)) * scale.view(per_channel)
        mine = torch.stack([gradient.sum((0, 2, 3)), (gradient * normalised).sum((0, 2, 3))])
        shift, slope = (ctx.process_group.sum_(mine.clone()) / count).view(2, *(1, -1, 1, 1)).unbind(0)
        to_x = (gradient - shift - normalised * slope) * (weight * scale).view(per_channel)
        # The gradients of weight and bias are summed over the process group with all others.
        return to_x.to(x.dtype), mine[1], mine[0], None, None


class WholeBatchDropout(nn.Dropout):
    """Dropout with the masks that one process would draw for the whole batch."""

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        shard = self.batch.shard
        if len(x) != len(shard):
            raise ValueError(f"dropout: expected the {len(shard)} examples of this part of the batch, got {len(x)}")
        return x * shard.of(F.dropout(x.new_ones(shard.total, *x.shape[1:]), self.p))


REPLACED = {nn.BatchNorm2d: WholeBatchNorm, nn.Dropout: WholeBatchDropout}
