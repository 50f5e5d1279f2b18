"""What both runtimes need of the records of a run; `genray.recording` has the classes."""

from collections.abc import Callable
from typing import Any, Protocol

from genray.core.schedules import Window
from genray.learners.window_statistics import WindowStats
from genray.run.setup import RunSetup
from genray.types import WeightSnapshot


class Progress(Protocol):
    """Shows how far a phase of the work is."""

    done: float

    def say(self, text: str) -> None: ...

    def phase(self, name: str, total: int, done: int = 0, unit: str = "steps") -> None: ...

    def steps(self, done: float) -> None: ...


class Recorder(Protocol):
    """Takes a run's finished windows in order, and keeps its newest state.

    Attributes:
        setup: the run.
        newest: the newest state; None before the first.
        newest_step: its step; 0 before the first.
    """

    setup: RunSetup
    newest: Any
    newest_step: int

    def go_back(self) -> dict | None:
        """The newest state; None for the beginning of the run. Windows after it are recorded again."""

    def begin(self, devices: list[str]) -> None:
        """Training begins, or begins again after `go_back`, on devices of these names."""

    def window_done(
        self,
        window: Window,
        stats: dict[str, WindowStats],
        scores: dict | None,
        theta_g: Callable[[], WeightSnapshot],
        own: dict[str, dict],
    ) -> None:
        """Records a window, with the scores of theta_g and of the learners' own models where it was evaluated."""

    def write_state(self, window: Window, learner_states: dict[str, dict], theta_g: WeightSnapshot) -> None:
        """Keeps and writes the state at the end of a window."""

    def models_to_judge(self, last: WeightSnapshot, learners: dict[str, WeightSnapshot]) -> dict[str, WeightSnapshot]:
        """Model name -> weights for the final table."""

    def finish(self, flags: dict[str, dict]) -> dict:
        """The final record, from model name -> attack name -> whether each test image was classified correctly."""
