"""What finds room on a cluster, and how much of a GPU each actor holds.

Ray takes a fraction of a GPU from one device, and a bundle from one node. Two thirds of a GPU three times are 2 GPUs in
sum, and do not fit on two: one function answers what actors hold, and one whether bundles fit, both a device and a node
at a time.
"""

UNIT = 10_000  # Ray counts resources in parts of this size


class Room:
    """What is free on one node.

    Args:
        resources: "CPU", "GPU", ... -> how much.
    """

    def __init__(self, resources: dict):
        self.free = dict(resources)
        whole, rest = divmod(self.free.pop("GPU", 0) * UNIT + 0.5, UNIT)
        self.gpus = [UNIT] * int(whole) + [int(rest)] * bool(int(rest))

    def take(self, bundle: dict) -> bool:
        """Takes a bundle's resources if they are there; whether they were."""
        gpus, others = bundle.get("GPU", 0), {kind: amount for kind, amount in bundle.items() if kind != "GPU"}
        if any(self.free.get(kind, 0) < amount - 1e-9 for kind, amount in others.items()):
            return False
        parts = [UNIT] * int(gpus) if gpus >= 1 else [round(gpus * UNIT)] * bool(gpus)
        left = list(self.gpus)
        for part in parts:
            fitting = [i for i, free in enumerate(left) if free >= part]
            if not fitting:
                return False
            left[min(fitting, key=left.__getitem__)] -= part  # as Ray: the device with the least that suffices
        self.gpus = left
        for kind, amount in others.items():
            self.free[kind] = self.free.get(kind, 0) - amount
        return True


def placed(bundles: list[dict], nodes: list[dict]) -> int:
    """How many bundles, from the first on, find room, each on the first node that holds it.

    Args:
        bundles: resources of each.
        nodes: resources of each node.
    """
    rooms = [Room(node) for node in nodes]
    for number, bundle in enumerate(bundles):
        if not any(room.take(bundle) for room in rooms):
            return number
    return len(bundles)


def fit(bundles: list[dict], nodes: list[dict]) -> bool:
    """Whether all bundles find room at the same time; arguments as of `placed`."""
    return placed(bundles, nodes) == len(bundles)


def largest_part(fits) -> float:
    """The largest of 1, 1/2, 1/3, ... 1/100 for which `fits(part)` is true; 1 where it never is."""
    each = ((UNIT // n) / UNIT for n in range(1, 101))
    return next((part for part in each if fits(part)), 1.0)


def gpus_each(wanted: list, device: str, there: float, auto: float | None = None) -> list[float]:
    """GPUs that each of some actors holds.

    Args:
        wanted: of each actor: a number, or "auto" for a whole GPU, and where there are too few the largest equal part
            of one with which all of them find room.
        device: "cpu" holds none where that is auto; "cuda" asks for a whole one although none may be there yet.
        there: GPUs of the cluster, or those that are free.
        auto: what "auto" is, where that is given.
    """

    def held(auto):
        return [auto if amount == "auto" else float(amount) for amount in wanted]

    if auto is None and (device == "cpu" or (there < 1 and device != "cuda")):
        auto = 0.0
    if auto is None:
        auto = largest_part(lambda part: fit([{"GPU": gpus} for gpus in held(part)], [{"GPU": there}]))
    return held(auto)


def equal_workers(nodes: list[dict], wanted: int, most: int, device: str) -> tuple[int, dict]:
    """How many equal workers there are, and what each holds, such that all of them find room.

    Args:
        nodes: resources of each node.
        wanted: how many; 0 for one a GPU, or one a CPU where there is no GPU; one where there is neither yet.
        most: what there is for them to do.
        device: as in `gpus_each`.

    Returns:
        (number, {"num_cpus", "num_gpus"}); a whole one of what is not there yet.
    """
    cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    gpus = 0 if device == "cpu" else gpus
    number = min(wanted or gpus or (1 if device == "cuda" else cpus) or 1, most)
    share = gpus_each(["auto"] * number, device, gpus)[0]
    part = largest_part(lambda cpu: fit([{"CPU": cpu, "GPU": share}] * number, nodes))
    return number, {"num_cpus": part, "num_gpus": share}
