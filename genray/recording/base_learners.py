"""The base learners of a run, as it left them."""

from dataclasses import dataclass

from genray.core.flat import FlatWeights
from genray.errors import CheckpointError
from genray.interop.checkpoint_file import read_file
from genray.interop.checkpoint_layouts import load_into, read_metadata
from genray.models import build_model
from genray.recording.run_folder import LEARNERS, RunFolder
from genray.storage import Storage
from genray.types import WeightSnapshot


@dataclass(frozen=True)
class BaseLearnerStates:
    """Attributes:
    states: learner -> state dict of its own model: its averaged weights, or the raw ones where averaging is off.
    step: finished optimiser steps.
    """

    states: dict
    step: int


def load_base_learners(folder: Storage, setup) -> BaseLearnerStates:
    """The base learners' own models: of the end of the run, or of the newest checkpoint of a run that has not ended.

    Args:
        folder: a run folder.
        setup: its `RunSetup`.

    Raises:
        CheckpointError: neither is there, or a file cannot be read or is of another architecture.
    """
    places = {name: folder / f"{LEARNERS}/{name}.pt" for name in setup.config.base_learners}
    if all(place.is_file() for place in places.values()):
        files = {name: read_file(place) for name, place in places.items()}
        steps = {read_metadata(file).get("step") for file in files.values()}
        if len(steps) > 1 or None in steps:
            raise CheckpointError(f"{folder / LEARNERS}: expected models of one step, got {', '.join(map(str, steps))}")
        return BaseLearnerStates({name: _read(file, setup) for name, file in files.items()}, steps.pop())
    state = RunFolder(folder.parent, folder.name).read_newest_state()
    if state is None:
        raise CheckpointError(f"{folder}: expected base learners in {LEARNERS}/ or a checkpoint, there are none")
    states = {name: _unpacked(name, state["learners"][name], setup) for name in places}
    return BaseLearnerStates(states, state["step"])


def _read(file, setup):
    network = build_model(**setup.architecture)
    load_into(network, file)
    return network.state_dict()


def _unpacked(name, state, setup):
    """From a checkpoint, whose weights are flat in the memory order of the run."""
    network = setup.build_network()
    averaged = setup.config.base_learners[name].averaging.enabled
    weights = state["average" if averaged else "weights"]
    FlatWeights(network).load(WeightSnapshot(state["step"], weights, state["counters"]))
    return {key: value.contiguous().clone() for key, value in network.state_dict().items()}
