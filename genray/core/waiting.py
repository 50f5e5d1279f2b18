"""Whether reading numbers of a tensor makes the host wait."""

import torch


def reads_are_free(tensor: torch.Tensor) -> bool:
    """Whether the host may read values of this tensor, and shapes that depend on them, without waiting.

    A CPU has computed them when the call returns. An accelerator would first have to finish everything that is queued,
    and would then idle until the host has queued the next operations: there, training computes the same with shapes
    that do not depend on values.
    """
    return tensor.device.type == "cpu"
