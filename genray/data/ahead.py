"""Batches that processes decode before the training asks for them."""

import itertools
import signal
import weakref
from collections.abc import Callable, Generator

import torch
from torch.utils.data import DataLoader, Dataset

from genray.data.homes import Home
from genray.errors import DataError


class Ahead:
    """Takes the images of one step after another in processes of its own, before they are asked for.

    Args:
        home: of the images.
        places: step -> places of its images; it must not refer to this object, which ends the processes when it goes.
        workers: number of processes, 1 or more.
    """

    def __init__(self, home: Home, places: Callable[[int], torch.Tensor], workers: int):
        self._home, self._places, self._workers, self._next = home, places, workers, -1
        self._running: list[Generator] = []
        weakref.finalize(self, _end, self._running)  # also when Python ends, before it ends the processes by signals

    def batch(self, step: int) -> torch.Tensor:
        """The images of a step; if it does not follow the last one, the processes start anew."""
        if step != self._next:
            _end(self._running)
            self._running.append(_batches(self._home, self._places, step, self._workers))
        self._next = step + 1
        return next(self._running[0])


def _end(running):
    while running:
        running.pop().close()


def _batches(home, places, first, workers):
    loader = DataLoader(
        _Batches(home),
        batch_size=None,
        sampler=map(places, itertools.count(first)),  # type: ignore[arg-type]  # an iterable is enough
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
