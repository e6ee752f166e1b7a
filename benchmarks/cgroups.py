# SPDX-License-Identifier: MIT
"""A memory limit and a disk throttle for one process, by Linux control groups, v1 or v2; needs root.

Groups are made below this process's own group, so that its limits stay in force. Memory and disk are two
hierarchies in v1 and one in v2.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rotary_llamacpp.host.cgroups import find_groups
from rotary_llamacpp.units import MIB

_number = itertools.count()
_made: list[Path] = []  # directories that exist now


def hierarchy(
    controller: str, mountinfo: str | None = None, membership: str | None = None
) -> tuple[int, Path, Path]:
    """Find the hierarchy of `controller`; returns version, this process's own group, and the mount point.

    Parameters
    ----------
    controller : str
        ``"memory"`` or ``"io"``, which v1 calls blkio.
    mountinfo, membership : str, optional
        Contents of ``/proc/self/mountinfo`` and ``/proc/self/cgroup``, which are read by default.

    Raises
    ------
    OSError
        No hierarchy with that controller is mounted.
    """
    mountinfo = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    membership = Path("/proc/self/cgroup").read_text() if membership is None else membership
    found = {}
    for each in find_groups({"io": "blkio"}.get(controller, controller), membership, mountinfo):
        found.setdefault(each.version, each)
    if not found:
        raise OSError(f"no cgroup hierarchy with {controller} is mounted")
    own = found[min(found)]  # v2 cannot use a controller that v1 has
    return own.version, own.folders[0], own.mount


def _parent(controllers: list[str]) -> tuple[int, Path]:
    """Version and parent for a new group with `controllers`; v1 takes one controller at a time."""
    version, own, mount = hierarchy(controllers[0])
    if version == 1:
        return version, own
    # v2 allows children with controllers only where these were delegated, so walk up to such a group.
    for folder in (own, *own.parents):
        delegated = (folder / "cgroup.subtree_control").read_text().split()
        if set(controllers) <= set(delegated):
            return version, folder
        if folder == mount:
            break
    raise OSError(f"no cgroup v2 delegates {' and '.join(controllers)} to its children")


class Group:
    """The group of one measurement: a directory in each hierarchy."""

    def __init__(self) -> None:
        self.version = 0
        self.folders: list[Path] = []
        self.memory: Path | None = None

    def add(self, controllers: list[str]) -> tuple[int, Path]:
        """Make a directory for `controllers`."""
        self.version, parent = _parent(controllers)
        folder = parent / f"rotary-bench-{os.getpid()}-{next(_number)}"
        folder.mkdir()
        _made.append(folder)
        self.folders.append(folder)
        return self.version, folder

    @property
    def joined_by(self) -> list[str]:
        """Files to which a process writes its id to join the group."""
        return [str(folder / "cgroup.procs") for folder in self.folders]

    def peak_bytes(self) -> int | None:
        """Peak of the memory charged, page cache included; None if there is no limit or it is not known."""
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        return (
            int((self.memory / name).read_text()) if self.memory and (self.memory / name).exists() else None
        )

    def oom_kills(self) -> int:
        """Processes that the kernel killed because the limit left no memory."""
        if self.memory is None:
            return 0
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        fields = dict(line.split() for line in (self.memory / name).read_text().splitlines())
        return int(fields.get("oom_kill", 0))


@contextlib.contextmanager
def group(memory_bytes: int | None = None, throttle: tuple[str, int] | None = None) -> Iterator[Group]:
    """A fresh group, removed at the end.

    Parameters
    ----------
    memory_bytes : int, optional
        Limit on anonymous memory and page cache together; swapping is turned off.
    throttle : (str, int), optional
        A whole disk as ``"major:minor"``, and the bytes per second that may be read from it.

    Raises
    ------
    OSError
        The hierarchy is not there or not writable, or the device cannot be throttled.
    """
    made = Group()
    wanted = [name for name, limit in (("memory", memory_bytes), ("io", throttle)) if limit]
    try:
        folders = {}
        if wanted and hierarchy(wanted[0])[0] == 2:
            _, folder = made.add(wanted)
            folders = dict.fromkeys(wanted, folder)
        else:
            folders = {name: made.add([name])[1] for name in wanted}
        if memory_bytes:
            made.memory = folders["memory"]
            v1 = made.version == 1
            _write(made.memory / ("memory.swappiness" if v1 else "memory.swap.max"), 0, optional=True)
            _write(made.memory / ("memory.limit_in_bytes" if v1 else "memory.max"), memory_bytes)
        if throttle:
            device, rate = throttle
            if made.version == 1:
                _write(folders["io"] / "blkio.throttle.read_bps_device", f"{device} {rate}")
            else:
                _write(folders["io"] / "io.max", f"{device} rbps={rate}")
        yield made
    finally:
        remove(made.folders)


def _write(path: Path, value: object, optional: bool = False) -> None:
    if optional and not path.exists():
        return
    path.write_text(str(value))


def remove(folders: list[Path] | None = None) -> None:
    """Kill the processes in groups and remove these, by default all that this process has made."""
    for folder in list(_made if folders is None else folders):
        for _ in range(100):
            try:
                for pid in (folder / "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                folder.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError:  # busy until the kernel has buried the last process
                time.sleep(0.05)
        else:
            print(f"{folder}: cannot be removed; is a process stuck in it?", file=sys.stderr)
        if folder in _made:
            _made.remove(folder)


def join(files: list[str]) -> None:
    """Move this process into a group; `files` are its `Group.joined_by`."""
    for file in files:
        Path(file).write_text(str(os.getpid()))


def unavailable(throttle: tuple[str, int] | None = None) -> str | None:
    """Why memory cannot be limited here (or the disk throttled, if `throttle` is given); None if it can."""
    what = "memory cannot be limited" if throttle is None else f"device {throttle[0]} cannot be throttled"
    if sys.platform != "linux":
        return f"{what}: control groups are Linux's, this is {sys.platform}"
    if os.geteuid() != 0:
        return f"{what}: that takes root"
    try:
        with group(None if throttle else 64 * MIB, throttle):
            return None
    except OSError as error:
        return f"{what}: {error}"
