"""How much memory there is, and where activations live: on the device, in the machine's memory, or in a file mapped into it."""

# Shapes: K width.

import math
import mmap
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

STREAMS = 3  # at a time: the quantized one, and a float block's inputs and targets
SHARE = 0.25  # of what is free, for activations; the rest is for a block, what trains in it, and its statistics
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Files of a control group: its limit, what it uses, and the cached files that it would give up first. Version 2, then 1.
CGROUP_FILES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


def allocate(shape: tuple[int, ...], device: torch.device, folder: Path) -> Tensor:
    """Room for a stream of ``shape`` [..., K], float32 and not yet filled, in the first place where all streams take at most a
    quarter of what is free: the device, this machine's memory; otherwise in a file below ``folder``, which the system
    writes out as it needs the memory. The file has no name: it goes when the process does, however it ends.

    Raises ValueError where the disk has not the room either.
    """
    nbytes = 4 * math.prod(shape)
    for place in dict.fromkeys((device, torch.device("cpu"))):
        if STREAMS * nbytes <= SHARE * free_memory(place):
            return torch.empty(shape, device=place)
    free = shutil.disk_usage(folder).free
    if free < STREAMS * nbytes:
        raise ValueError(
            f"activations of {math.prod(shape[:-1])} calibration tokens take {STREAMS * nbytes / 1e9:.1f} GB, too much for "
            f"memory, and {folder} has {free / 1e9:.1f} GB free. Take fewer or shorter calibration sequences, or another disk"
        )
    return _mapped(nbytes, folder).view(shape)


def _mapped(nbytes: int, folder: Path) -> Tensor:
    """Float32 numbers in a nameless file below ``folder``."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(nbytes)
        if hasattr(os, "posix_fallocate"):  # a sparse file would end the process where the disk fills up later
            os.posix_fallocate(file.fileno(), 0, nbytes)
        return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.float32)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on ``device``: on a CPU the machine's, or less under a control group's limit
    (systemd, containers)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_available(), *(limit - used for limit, used in _limits())])


def total_memory(device: torch.device) -> int:
    """Bytes that this process could ever take on ``device``."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([_physical(), *(limit for limit, _ in _limits())])


def _physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _available() -> int:
    file = Path("/proc/meminfo")
    if not file.is_file():
        return _physical()
    fields = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def _limits() -> Iterator[tuple[int, int]]:
    """The limit of this process's control group and of every one above it, and what is used of it."""
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            yield from _limit(group)
            if group == root:
                break


def _limit(group: Path) -> Iterator[tuple[int, int]]:
    for limit_file, usage_file, caches in CGROUP_FILES:
        if not (group / limit_file).is_file():
            continue
        limit = (group / limit_file).read_text().strip()
        if limit != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield int(limit), int((group / usage_file).read_text()) - sum(int(stat[name]) for name in caches)


def peak_memory() -> int:
    """The most bytes that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
