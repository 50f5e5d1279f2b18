"""The plan of a grid, checked and printed before the first trial starts."""

import os

import torch

from genray.recording.dry_run import duration_text
from genray.recording.trackers import check_trackers
from genray.run.allocation import total
from genray.runtime.ray.cluster import check_cores
from genray.tuning.resources import Needs, plan_grid
from genray.tuning.search import check_searcher


def needs_of(grid, address) -> tuple[Needs, float]:
    """Returns (needs of the trials, most CPUs of a trial), checked as far as possible without a cluster."""
    check_trackers({name for trial in grid.trials for name in grid.trackers(trial.config)})
    check_searcher(grid)
    needs = Needs(grid)
    cpus = {name: [bundle.get("CPU", 0) for bundle in bundles] for name, bundles in needs.bundles(0).items()}
    check_cores({f"trial {name}": max(of) for name, of in cpus.items()}, address)
    return needs, max(map(sum, cpus.values()))


def dry_run(grid, address, max_concurrent) -> str:
    """Returns the plan with a private Ray on this machine as text; joins no cluster."""
    needs, widest = needs_of(grid, address)
    if address:
        return plan_text(needs, [], None, max_concurrent)
    cores = os.cpu_count() or 1
    node = {"CPU": max(widest, cores), "GPU": torch.cuda.device_count(), "memory": float("inf")}
    return plan_text(needs, [node], cores, max_concurrent)


def plan_text(needs, nodes: list[dict], cores: int | None, max_concurrent: int | None) -> str:
    """Returns the plan as text: trials, their resources, the number at the same time, and an estimate of the time.

    Args:
        needs, nodes, cores, max_concurrent: as in `genray.tuning.resources.plan_grid`; no nodes for a
            cluster.
    """
    grid = needs.grid
    lines = [f"grid           {grid.name}: {grid.size} trials{', suggested by Optuna' if grid.space else ''}"]
    wanted = needs.bundles(total(nodes).get("GPU", 0))
    for trial in grid.trials[:1] if grid.space else grid.trials:
        cpus, gpus = (total(wanted[trial.name]).get(kind, 0) for kind in ("CPU", "GPU"))
        who = "each" if grid.space else trial.name
        lines.append(f"trial          {who}: {cpus:g} CPU, {gpus:g} GPU, {trial.config.training.epochs} epochs")
    if not nodes:
        return "\n".join([*lines, "at once        as many as the cluster holds"])
    plan = plan_grid(needs, nodes, cores, max_concurrent)
    where = f"on {len(nodes)} node{'s' * (len(nodes) > 1)}"
    lines.append(f"at once        {plan.at_once} {where}" if plan.at_once else f"at once        none yet {where}")
    return "\n".join([*lines, *_time_lines(plan)])


def _time_lines(plan):
    if plan.seconds is None:
        return ["time           not known before the first epochs are done; then it is shown"]
    lines = [
        f"time           about {duration_text(plan.seconds)} of computing, at the pace of a pass measured on this "
        "machine just now; starting the processes of a trial adds some seconds"
    ]
    return lines + [f"               and at most {duration_text(plan.judging_s)} for `evaluate`"] * bool(plan.judging_s)
