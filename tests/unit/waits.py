"""A guard that fails where a GPU would make the host wait; the tensors are on a CPU, where nothing shows it."""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(AssertionError):
    """The host reads what the device has not yet computed."""


READS = {"_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal", "is_nonzero", "_unique2"}
MASKED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result, or whose result's shape, the host needs from the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in READS or (name in MASKED and any(_is_mask(index) for index in args[1])):
            raise Waits(name)
        return function(*args, **kwargs or {})


def _is_mask(index):
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _refused(name):
    def read(tensor, *args, **kwargs):
        raise Waits(name)

    return read


def _to(tensor, *args, **kwargs):
    # The device's name is a text only where the host is meant.
    if any(isinstance(arg, str) and arg == "cpu" for arg in args) and not kwargs.get("non_blocking"):
        raise Waits("to")
    return _TO(tensor, *args, **kwargs)


def _made_on_device(make):
    def made(data, *args, **kwargs):
        if kwargs.get("device") is not None:
            raise Waits("a copy of host numbers to the device, which waits")
        return make(data, *args, **kwargs)

    return made


_TO = torch.Tensor.to


@contextmanager
def no_waiting():
    """Inside, whatever would make the host wait for a GPU raises `Waits`."""
    with mock.patch.multiple(torch.Tensor, **{n: _refused(n) for n in ("cpu", "tolist", "numpy")}, to=_to):
        with mock.patch.multiple(torch, **{n: _made_on_device(getattr(torch, n)) for n in ("tensor", "as_tensor")}):
            with NoWaiting():
                yield


@contextmanager
def in_host_memory():
    """Inside, all tensors are in host memory by design, on a GPU too: reading them is no wait."""
    with torch.utils._python_dispatch._disable_current_modes():
        with mock.patch.multiple(torch.Tensor, **_READERS, to=_TO):
            yield


_READERS = {name: getattr(torch.Tensor, name) for name in ("cpu", "tolist", "numpy")}


def of_host(function):
    """The function, whose tensors are in host memory by design."""

    def called(*args, **kwargs):
        with in_host_memory():
            return function(*args, **kwargs)

    return called
