"""Needs of a grid's trials before the first one starts: bundles, passes through the model, seconds."""

import json
from dataclasses import dataclass

from genray.config import to_dict
from genray.errors import ConfigError
from genray.evaluation.estimate import FORWARDS_A_PASS, resisting_cost
from genray.run.allocation import gpus_each, placed, total
from genray.run.cost import Passes, RunCost, run_cost
from genray.run.devices import evaluation_threads
from genray.run.plan import make_plan
from genray.run.probe import PassSeconds, pass_seconds
from genray.run.setup import prepare
from genray.runtime.ray.placement import trial_bundles
from genray.tuning.grid import Grid, Trial


class Needs:
    """Reads the data of a grid, without decoding it, once for all trials with equal data, models and learners.

    Attributes:
        setups: trial name -> the `RunSetup` of the first such trial.

    Raises:
        DataError, ConfigError: the data is absent or does not fit a trial.
    """

    def __init__(self, grid: Grid):
        self.grid, self.setups, known = grid, {}, {}
        for trial in grid.trials:
            sections = ("data", "model", "base_learners", "device", "compute")
            key = json.dumps([to_dict(trial.config)[section] for section in sections])
            if key not in known:
                known[key] = prepare(trial.config, decode=False)
            self.setups[trial.name] = known[key]

    def bundles(self, num_gpus: float) -> dict:
        """Returns trial name -> bundles, the driver's first; in a search every trial reserves the largest ones.

        Args:
            num_gpus: GPUs of the cluster.
        """
        made = {id(setup): self._reserved(setup, num_gpus)[0] for setup in self.setups.values()}
        found = {name: made[id(setup)] for name, setup in self.setups.items()}
        if not self.grid.space:
            return found
        if len({len(bundles) for bundles in made.values()}) > 1:
            raise ConfigError("search: expected trials with equal base learners, because all reserve the same bundles")
        largest = [
            {kind: max(bundle.get(kind, 0) for bundle in same) for kind in total(same)} for same in zip(*made.values())
        ]
        return dict.fromkeys(found, largest)

    def selectors(self) -> dict:
        """Returns trial name -> label selectors of its bundles."""
        found = {name: self._reserved(setup, 0)[1] for name, setup in self.setups.items()}
        if self.grid.space and any(each != next(iter(found.values())) for each in found.values()):
            raise ConfigError("search: expected trials with equal resources.label_selector, as all reserve the same")
        return found

    def _reserved(self, setup, num_gpus):
        if self.grid.file.runtime == "ray":
            return trial_bundles(setup.plan, setup.weight_bytes, num_gpus)
        learners = [learner.resources for learner in setup.config.base_learners.values()]  # one after another
        gpus = max(gpus_each([each.num_gpus], setup.config.device, num_gpus)[0] for each in learners)
        return [{"CPU": float(max(each.num_cpus for each in learners)), **({"GPU": gpus} if gpus else {})}], [{}]

    def cost(self, trial: Trial) -> RunCost:
        """Returns the passes of a trial's run, without the grid's `evaluate`."""
        setup = self.setups[trial.name]
        return run_cost(make_plan(trial.config, setup.plan.num_train), setup.splits)

    def judging(self, trial: Trial) -> Passes:
        """Returns the passes of the grid's `evaluate` section if every image resists every attack."""
        setup, request = self.setups[trial.name], self.grid.judging
        if request is None:
            return Passes()
        size = len(setup.splits["test"])
        size = min(self.grid.evaluate.get("examples", size), size)
        return Passes(attack=resisting_cost(request, size, len(setup.class_names)) / FORWARDS_A_PASS)

    def work(self) -> dict:
        """Returns trial name -> (work of the run, work of `evaluate`), in passes through the model times its size."""
        found = {}
        for trial in self.grid.trials:
            cost, size = self.cost(trial), self.setups[trial.name].weight_bytes
            training = sum([*cost.learners.values(), cost.evaluations, cost.table], Passes())
            found[trial.name] = (training.units * size, self.judging(trial).units * size)
        return found

    def probe(self) -> dict[str, PassSeconds]:
        """Returns trial name -> seconds of a pass, measured on this machine once for each network."""
        seconds, found = {}, {}
        for name, setup in self.setups.items():
            config, architecture = setup.config, setup.architecture
            threads = evaluation_threads(config, architecture)
            key = str((architecture, config.training.batch_size, config.compute, threads))
            if key not in seconds:
                seconds[key] = pass_seconds(setup)
            found[name] = seconds[key]
        return found


def fits_at_once(wanted: list[list[dict]], nodes: list[dict]) -> int:
    """Returns the number of trials, from the first on, that fit at the same time, as in `placed`."""
    number = placed([bundle for trial in wanted for bundle in trial], nodes)
    return sum(sum(map(len, wanted[: i + 1])) <= number for i in range(len(wanted)))


@dataclass(frozen=True)
class GridPlan:
    """Attributes:
    at_once: trials that fit at the same time.
    seconds: of the runs, without `evaluate`; None if they use GPUs or other machines.
    judging_s: of `evaluate` at most; None as above.
    """

    at_once: int
    seconds: float | None = None
    judging_s: float | None = None


def plan_grid(needs: Needs, nodes: list[dict], cores: int | None, max_concurrent: int | None) -> GridPlan:
    """Plans a grid.

    Args:
        needs: of the grid.
        nodes: resources of each node.
        cores: of this machine; None if other machines compute.
        max_concurrent: at most so many trials at once, or None.
    """
    wanted, grid = needs.bundles(total(nodes).get("GPU", 0)), needs.grid
    queue = [wanted[trial.name] for trial in grid.trials]
    queue = queue[:1] * grid.size if grid.space else queue
    at_once = min(fits_at_once(queue, nodes), max_concurrent or grid.size)
    if cores is None or not at_once or any(bundle.get("GPU") for bundles in queue for bundle in bundles):
        return GridPlan(at_once)
    pace, longest, summed, judging = needs.probe(), 0.0, 0.0, 0.0
    for trial in grid.trials:
        cost, seconds = needs.cost(trial), pace[trial.name].of
        learners = [seconds(passes) for passes in cost.learners.values()]
        evaluations = seconds(cost.evaluations + cost.table)
        longest += (max(learners) if grid.file.runtime == "ray" else sum(learners)) + evaluations
        summed += sum(learners) + evaluations
        judging += seconds(needs.judging(trial))
    together, scale = min(at_once, cores), grid.size / len(grid.trials)
    return GridPlan(at_once, scale * max(longest / together, summed / cores), scale * judging / together)
