"""Process groups of torch.distributed between the actors of a run: gloo on CPU, NCCL on GPUs.

Ray's collective groups (ray.util.collective) are built on torch.distributed too, but connect through a named actor
and do not let the caller choose the network interface to listen on.
"""

import socket
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from os import environ

import torch.distributed as dist

from genray.errors import LostError, PlacementError, one_line
from genray.parallel.process_group import ALONE, ProcessGroup

LOOPBACK = "127.0.0.1"
ALL_LEARNERS = "all learners"


@dataclass(frozen=True)
class WorkerRank:
    """The rank of an actor.

    Attributes:
        learner: name of the learner that it trains.
        rank, size: its rank among the workers of that learner, and their number.
        global_rank, world_size: the same among the workers of all learners.
        owners: learner name -> `global_rank` of its first worker.
        share_attack: whether all workers craft adversarial images together.
    """

    learner: str
    rank: int
    size: int
    global_rank: int
    world_size: int
    owners: dict
    share_attack: bool

    @property
    def name(self) -> str:
        """Its name among the actors of a run."""
        return f"{self.learner}{f' (worker {self.rank + 1})' if self.rank else ''}"

    @property
    def who(self) -> str:
        """Its name in messages."""
        return f"base_learners.{self.name}"

    @property
    def own(self) -> ProcessGroup:
        """The process group of its learner, not yet connected."""
        return _TorchProcessGroup(self.rank, self.size, self.who) if self.size > 1 else ALONE

    @property
    def everyone(self) -> ProcessGroup | None:
        """The process group of all learners, not yet connected; None if each learner attacks alone."""
        shared = self.share_attack and self.world_size > 1
        return _TorchProcessGroup(self.global_rank, self.world_size, self.who) if shared else None


def worker_ranks(workers: dict, share_attack: bool) -> list[WorkerRank]:
    """One rank for each actor, learner after learner.

    Args:
        workers: learner name -> number of workers.
        share_attack: runtime.share_attack.
    """
    pairs = [(name, rank) for name, n in workers.items() for rank in range(n)]
    owners = {name: pairs.index((name, 0)) for name in workers}
    return [
        WorkerRank(name, rank, workers[name], global_rank, len(pairs), owners, share_attack)
        for global_rank, (name, rank) in enumerate(pairs)
    ]


class _TorchProcessGroup(ProcessGroup):
    """A process group of torch.distributed; `join` connects it.

    Every operation raises LostError if another process is gone.
    """

    def __init__(self, rank, size, who):
        self.rank, self.size, self.who = rank, size, who
        self.group = self.members = None

    def sum_(self, tensor):
        return self._together(dist.all_reduce, tensor)

    def broadcast_(self, tensor, source):
        return self._together(dist.broadcast, tensor, src=self.members[source])

    def begin_sum(self, tensor):
        with self._naming_who():
            work = dist.all_reduce(tensor, group=self.group, async_op=True)

        def wait():
            with self._naming_who():
                work.wait()

        return wait

    def _together(self, operation, tensor, **options):
        with self._naming_who():
            operation(tensor, group=self.group, **options)
        return tensor

    @contextmanager
    def _naming_who(self):
        try:
            yield
        except RuntimeError as error:  # gloo and NCCL have no error classes of their own
            raise LostError(self.who, f"cannot reach those it works with: {one_line(error)}") from None


@dataclass(frozen=True)
class GroupSpec:
    """Actors that form a process group: their global ranks, and its backend."""

    members: tuple
    backend: str


def group_specs_of(all_ranks: list[WorkerRank], whereabouts: list[dict]) -> dict:
    """Learner name (or ALL_LEARNERS) -> `GroupSpec`; empty if no actors form a group.

    Args:
        all_ranks: result of `worker_ranks`.
        whereabouts: node, device and GPU ids of each actor.

    Raises:
        PlacementError: the actors of a group are not on devices of one kind.
    """
    found = {}
    for worker in all_ranks:
        if worker.size > 1 and worker.rank == 0:
            found[worker.learner] = tuple(range(worker.global_rank, worker.global_rank + worker.size))
    if all_ranks[0].everyone:
        found[ALL_LEARNERS] = tuple(range(len(all_ranks)))
    return {key: GroupSpec(members, _backend(key, [whereabouts[i] for i in members])) for key, members in found.items()}


def _backend(key, whereabouts):
    kinds = {where["device"].split(":")[0] for where in whereabouts}
    if len(kinds) > 1:
        field = "runtime.share_attack" if key == ALL_LEARNERS else f"base_learners.{key}.workers"
        raise PlacementError(f"{field}: expected devices of one kind, got {' and '.join(sorted(kinds))}")
    devices = {(where["node"], *where["gpu_ids"]) for where in whereabouts}
    # NCCL refuses two processes on one GPU; gloo goes through host memory.
    return "nccl" if kinds == {"cuda"} and len(devices) == len(whereabouts) else "gloo"


def open_store(address: str) -> int:
    """Opens the run's rendezvous store in this process, on one address only; returns its port."""
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), timeout=CONNECT
    )
    _opened.append(store)  # it listens until it is garbage-collected
    return port


CONNECT = timedelta(seconds=120)
_opened = []


def join(worker: WorkerRank, process_groups: dict, group_specs: dict, meeting: tuple, address: str, timeout_s: float):
    """Connects the process groups of this process; all workers call it at the same time.

    Args:
        worker: the rank of this process.
        process_groups: learner name (or ALL_LEARNERS) -> this process's `ProcessGroup`.
        group_specs: result of `group_specs_of`.
        meeting: (address, port) of the rendezvous store.
        address: of this process's node, on which gloo and NCCL listen.
        timeout_s: limit of an operation's wait for the other processes.
    """
    interface = _interface_of(address)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interface:
            environ.setdefault(variable, interface)
    host, port = meeting
    store = _opened[0] if _opened else dist.TCPStore(host, port, is_master=False, timeout=CONNECT)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=store, rank=worker.global_rank, world_size=worker.world_size, timeout=timeout)
    for key, spec in group_specs.items():  # in the same order in every process, members or not
        group = dist.new_group(list(spec.members), backend=spec.backend, timeout=timeout)
        if worker.global_rank in spec.members:
            process_groups[key].group, process_groups[key].members = group, spec.members


def _interface_of(address):
    """Name of the network interface with this address; None if it cannot be determined (not on Linux)."""
    if address.startswith("127."):
        return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    try:
        import fcntl
    except ModuleNotFoundError:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


SIOCGIFADDR = 0x8915
