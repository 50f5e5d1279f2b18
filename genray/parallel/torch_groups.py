"""How the actors of a run that work together talk: torch.distributed between them, gloo on CPU and NCCL on GPUs.

Ray's own collective groups (ray.util.collective) rendezvous through a named actor and leave no say in which network
interface is listened on; torch.distributed does, and it is what they are made of.
"""

import socket
import struct
from dataclasses import dataclass
from datetime import timedelta
from os import environ

import torch.distributed as dist

from genray.errors import LostError, PlacementError, one_line
from genray.parallel.process_group import ALONE, Crew

LOOPBACK = "127.0.0.1"
EVERYONE = "all learners"


@dataclass(frozen=True)
class Seat:
    """Where an actor sits.

    Attributes:
        learner: which one it trains.
        rank, size: its number among that learner's workers, and how many they are.
        place, places: the same among all learners' workers.
        owners: learner name -> `place` of its first worker.
        share_attack: whether all of them make adversarial images together.
    """

    learner: str
    rank: int
    size: int
    place: int
    places: int
    owners: dict
    share_attack: bool

    @property
    def who(self) -> str:
        """As messages call it."""
        return f"base_learners.{self.learner}{f' (worker {self.rank + 1})' if self.rank else ''}"

    @property
    def own(self) -> Crew:
        """The crew of its learner, not yet connected."""
        return _TorchCrew(self.rank, self.size, self.who) if self.size > 1 else ALONE

    @property
    def everyone(self) -> Crew | None:
        """The crew of all learners, not yet connected; None where each attacks for itself."""
        shared = self.share_attack and self.places > 1
        return _TorchCrew(self.place, self.places, self.who) if shared else None


def seats(workers: dict, share_attack: bool) -> list[Seat]:
    """One for each actor, in order: learner after learner.

    Args:
        workers: learner name -> how many.
        share_attack: runtime.share_attack.
    """
    pairs = [(name, rank) for name, n in workers.items() for rank in range(n)]
    owners = {name: pairs.index((name, 0)) for name in workers}
    return [
        Seat(name, rank, workers[name], place, len(pairs), owners, share_attack)
        for place, (name, rank) in enumerate(pairs)
    ]


class _TorchCrew(Crew):
    """Talks through a process group, once it has one.

    Raises:
        LostError: another process of the crew is gone, from every operation.
    """

    def __init__(self, rank, size, who):
        self.rank, self.size, self.who = rank, size, who
        self.group = self.members = None

    def sum_(self, tensor):
        return self._together(dist.all_reduce, tensor)

    def broadcast_(self, tensor, source):
        return self._together(dist.broadcast, tensor, src=self.members[source])

    def _together(self, operation, tensor, **options):
        try:
            operation(tensor, group=self.group, **options)
        except RuntimeError as error:  # gloo and NCCL have no kinds of errors of their own
            raise LostError(self.who, f"cannot reach those it works with: {one_line(error)}") from None
        return tensor


@dataclass(frozen=True)
class Team:
    """Actors that become a crew: their places, and how they talk."""

    members: tuple
    backend: str


def teams(all_seats: list[Seat], whereabouts: list[dict]) -> dict:
    """Learner name (or EVERYONE) -> `Team`; empty where every actor works alone.

    Args:
        all_seats: as `seats` gave them.
        whereabouts: of each one's actor.

    Raises:
        PlacementError: the actors of a team are not on devices of one kind.
    """
    found = {}
    for seat in all_seats:
        if seat.size > 1 and seat.rank == 0:
            found[seat.learner] = tuple(range(seat.place, seat.place + seat.size))
    if all_seats[0].everyone:
        found[EVERYONE] = tuple(range(len(all_seats)))
    return {key: Team(members, _backend(key, [whereabouts[i] for i in members])) for key, members in found.items()}


def _backend(key, whereabouts):
    kinds = {where["device"].split(":")[0] for where in whereabouts}
    if len(kinds) > 1:
        field = "runtime.share_attack" if key == EVERYONE else f"base_learners.{key}.workers"
        raise PlacementError(f"{field}: expected devices of one kind, got {' and '.join(sorted(kinds))}")
    devices = {(where["node"], *where["gpu_ids"]) for where in whereabouts}
    # NCCL refuses two processes on one GPU; gloo goes through host memory.
    return "nccl" if kinds == {"cuda"} and len(devices) == len(whereabouts) else "gloo"


def open_store(address: str) -> int:
    """Opens the meeting point of a run in this process, on one address alone; returns its port."""
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), timeout=CONNECT
    )
    _opened.append(store)  # it listens as long as it lives
    return port


CONNECT = timedelta(seconds=120)
_opened = []


def join(seat: Seat, crews: dict, all_teams: dict, meeting: tuple, address: str, timeout_s: float):
    """Connects this process's crews; every seat's process calls it at the same time.

    Args:
        seat: of this process.
        crews: learner name (or EVERYONE) -> this process's crew.
        all_teams: as `teams` gave them.
        meeting: (address, port) of the store.
        address: of this process's node: gloo and NCCL listen there.
        timeout_s: how long an operation may wait for the others.
    """
    interface = _interface_of(address)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interface:
            environ.setdefault(variable, interface)
    store = _opened[0] if _opened else dist.TCPStore(*meeting, is_master=False, timeout=CONNECT)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=store, rank=seat.place, world_size=seat.places, timeout=timeout)
    for key, team in all_teams.items():  # in the same order everywhere, also for those who are not in it
        group = dist.new_group(list(team.members), backend=team.backend, timeout=timeout)
        if seat.place in team.members:
            crews[key].group, crews[key].members = group, team.members


def _interface_of(address):
    """Name of the network interface that has an address; None where that cannot be found out (not on Linux)."""
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
