"""Free memory, and the error for data that do not fit."""

import resource
from pathlib import Path

import torch

from genray.errors import DataError

_UNLIMITED = 2**60  # cgroup v1 states a number of this size where there is no limit


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still allocate: the minimum over the machine, the cgroups of the process (container,
    batch job) and its address space limit; None if none of them is known.

    Args:
        root: the folder that holds proc and sys.
    """
    found = [_of_machine(root), _of_address_space(root), *_of_cgroups(root)]
    return min((max(0, free) for free in found if free is not None), default=None)


def free_on(device: torch.device) -> int | None:
    """Free bytes on a device; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() if device.type == "cpu" else None


def check_memory(needed: int, what: str, free: int | None = None):
    """Raises an error if `needed` bytes are not free.

    Args:
        needed: bytes.
        what: the subject of the message.
        free: bytes; None asks `free_memory`.

    Raises:
        DataError: names both numbers.
    """
    free = free_memory() if free is None else free
    if free is not None and needed > free:
        raise too_large(needed, what, free)


def too_large(needed: int, what: str, free: int | None = None) -> DataError:
    """The error of `check_memory`."""
    there = "which could not be allocated" if free is None else f"expected at most the {bytes_text(free)} that are free"
    return DataError(
        f"data: {what} take {bytes_text(needed)} of memory, {there}; set data.home to mapped, data.image_size or "
        "data.train_examples, or use a machine with more memory"
    )


def bytes_text(count: int) -> str:
    """ "1.50 GiB (1,610,612,736 bytes)"."""
    return (
        f"{count / 2**30:.2f} GiB ({count:,} bytes)" if count >= 2**30 else f"{count / 2**20:.2f} MiB ({count:,} bytes)"
    )


def _of_machine(root):
    return _field(root / "proc/meminfo", "MemAvailable:", 1024)


def _of_address_space(root):
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _field(root / "proc/self/status", "VmSize:", 1024)
    return None if limit == resource.RLIM_INFINITY or used is None else limit - used


def _of_cgroups(root):
    """Yields the bytes left in each cgroup of the process, from its own to the root; file cache counts as free."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be that of the host, which is not there: then only the root is.
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            limit, used = _number(folder / names[0]), _number(folder / names[1])
            if limit is not None and used is not None and limit < _UNLIMITED:
                yield limit - used + (_field(folder / "memory.stat", names[2], 1) or 0)
            if folder == base:
                break


def _text(file):
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(file):
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _field(file, name, unit):
    for line in _text(file).splitlines():
        words = line.split()
        if words[:1] == [name] and words[1].isdigit():
            return int(words[1]) * unit
    return None
