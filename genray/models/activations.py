"""The activations of our residual networks, by name."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

# "silu" (swish): as in the networks that are trained on synthetic images (Gowal et al., 2110.09468; Wang et al.,
# 2302.04638).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "softplus": F.softplus}
