"""Protocols of the recorder and the display that both runtimes use; `genray.recording` implements them."""

from collections.abc import Callable
from typing import Any, Protocol

from genray.core.schedules import Window
from genray.run.setup import RunSetup
from genray.types import WeightSnapshot


class Progress(Protocol):
    done: float

    def say(self, text: str) -> None: ...
    def phase(self, name: str, total: int, done: int = 0, unit: str = "steps") -> None: ...
    def steps(self, done: float) -> None: ...


class Recorder(Protocol):
    """Attributes:
    setup: the run.
    newest, newest_step: its newest state and that state's step; None and 0 before the first.
    """

    setup: RunSetup
    newest: Any
    newest_step: int

    def go_back(self) -> dict | None: ...
    def begin(self, devices: list[str]) -> None: ...
    def window_done(
        self, window: Window, stats: dict, scores: dict | None, theta_g: Callable[[], WeightSnapshot], own: dict
    ) -> None: ...
    def write_state(self, window: Window, learner_states: dict, theta_g: WeightSnapshot) -> None: ...
    def models_to_judge(self, last: WeightSnapshot, learners: dict) -> dict[str, WeightSnapshot]: ...
    def finish(self, flags: dict) -> dict: ...
