"""Batches that processes decode before the training asks for them."""

import itertools
import signal
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from genray.data.homes import Home
from genray.errors import DataError


def batches_ahead(home: Home, places_of: Callable[[int], torch.Tensor], first: int, workers: int) -> Iterator:
    """Images of batch `first`, `first` + 1, ..., endlessly, which `workers` processes take ahead.

    Args:
        places_of: (number of a batch) -> places of its images.
    """
    loader = DataLoader(
        _Batches(home),
        batch_size=None,
        sampler=map(places_of, itertools.count(first)),  # type: ignore[arg-type]  # an iterable is enough
        num_workers=workers,
        worker_init_fn=_begin_process,
        # Forked processes share the memory of this one, but a client of remote storage does not survive it.
        multiprocessing_context="fork" if home.local else "spawn",
        generator=torch.Generator(),  # else the seed of the processes is drawn from the global one
    )
    for found in loader:
        if isinstance(found, DataError):
            raise found
        yield found


class _Batches(Dataset):
    def __init__(self, home):
        self.home = home

    def __getitem__(self, places):
        try:
            return self.home.take(places)
        except DataError as error:  # raised there, it would become an error of many lines
            return error


def _begin_process(_):
    """The process that decodes ends with the one that trains, whose handlers of signals are not for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
