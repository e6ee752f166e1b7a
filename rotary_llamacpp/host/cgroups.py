# SPDX-License-Identifier: MIT
"""Finds the Linux control groups of this process, of version 1 and 2. Changes none.

``/proc/self/cgroup`` has the path of the process's own group as its cgroup namespace shows it,
``/proc/self/mountinfo`` which part of each hierarchy is mounted where. In a container the two may not fit
together; then all mounted groups count. native/src/base/cgroup.cpp finds the same groups for paging, and
tests/unit/test_machine.py checks both against the same trees.

Source: cgroups(7), cgroup_namespaces(7), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path("/")


@dataclass(frozen=True)
class Group:
    """A group that the process is in, of version 1 or 2."""

    version: int
    mount: Path  # of its hierarchy
    inside: tuple[str, ...]  # names of groups below the mount, the process's own last

    @property
    def folders(self) -> list[Path]:
        """Directories of the process's own group and of those around it, up to the mount point."""
        return [self.mount.joinpath(*self.inside[:n]) for n in range(len(self.inside), -1, -1)]


def own_groups(controller: str, root: Path = HERE) -> list[Group]:
    """Groups of this process that may have a controller.

    Parameters
    ----------
    controller : str
        As version 1 calls it: ``"memory"``, ``"cpu"``, ``"blkio"``. Version 2 has one group for all.
    root : Path
        Directory that /proc and the mount points are in.
    """
    membership = read(root / "proc" / "self" / "cgroup")
    mountinfo = read(root / "proc" / "self" / "mountinfo")
    return [
        Group(group.version, root / str(group.mount).lstrip("/"), group.inside)
        for group in find_groups(controller, membership, mountinfo)
    ]


def find_groups(controller: str, membership: str, mountinfo: str) -> list[Group]:
    """Find groups by the text of ``/proc/self/cgroup`` and ``/proc/self/mountinfo``; see `own_groups`."""
    mounts = _mounts(controller, mountinfo)
    if not mountinfo:  # assume the usual places
        mounts = [(1, "/", f"/sys/fs/cgroup/{controller}"), (2, "/", "/sys/fs/cgroup")]
    found = []
    for line in membership.splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]  # a path may have colons
        version = 2 if not controllers else 1
        if not path or (version == 1 and controller not in controllers.split(",")):
            continue
        mounted = [(top, mount) for found_version, top, mount in mounts if found_version == version]
        below = [
            Group(version, Path(mount), names)
            for top, mount in mounted
            if (names := _below(path, top)) is not None
        ]
        found += below or [Group(version, Path(mount), ()) for _, mount in mounted]
    return found


def _mounts(controller: str, mountinfo: str) -> list[tuple[int, str, str]]:
    """Version, root within the hierarchy, and mount point of each mount that may have the controller."""
    found = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")  # the number of fields before it varies
        mount, file_system = ([field for field in each.split(" ") if field] for each in (left, right))
        is_v2 = file_system[:1] == ["cgroup2"]
        is_v1 = file_system[:1] == ["cgroup"] and controller in file_system[-1].split(",")
        if len(mount) > 4 and (is_v2 or is_v1):
            found.append((2 if is_v2 else 1, _unescaped(mount[3]), _unescaped(mount[4])))
    return found


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _below(path: str, top: str) -> tuple[str, ...] | None:
    """Names that lead from `top` to `path`; None if none do, as when the path leaves the namespace."""
    names, first = ([name for name in each.split("/") if name] for each in (path, top))
    rest = names[len(first) :]
    return tuple(rest) if names[: len(first)] == first and ".." not in rest else None


def read(path: Path) -> str:
    """Content of a file of the kernel; empty if it does not exist or is not readable."""
    try:
        return path.read_text(errors="surrogateescape")
    except OSError:
        return ""


def read_number(path: Path) -> int | None:
    """Number in a file of a group; None for "max", -1 and a file that does not exist."""
    return number(read(path).partition("\n")[0].strip())


def read_fields(path: Path) -> dict[str, int]:
    """Numbers by name in a file of lines "name number"."""
    words = [line.split() for line in read(path).splitlines()]
    return {each[0]: value for each in words if len(each) > 1 and (value := number(each[1])) is not None}


def number(text: str) -> int | None:
    """Read a whole number that is not negative; None for anything else."""
    return int(text) if text.isascii() and text.isdigit() else None
