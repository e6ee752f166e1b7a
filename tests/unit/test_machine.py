# SPDX-License-Identifier: MIT
"""Memory and CPUs that a machine or a container lets this process use.

Python, for plans and the doctor, and the native library, for paging, read trees of /proc and /sys/fs/cgroup
as real systems show them, and must agree.
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass, field

import pytest

from rotary_llamacpp.host import machine
from tests.support.compiled import pure_logic

MIB = 1 << 20
GIB = 1 << 30
SOURCES = (
    "base/memory.cpp",
    "base/cgroup.cpp",
    "base/cpus.cpp",
    "base/fork.cpp",
)  # with machine_host.cpp
V1_NO_LIMIT = 0x7FFFFFFFFFFFF000  # PAGE_COUNTER_MAX
V1_NO_LIMIT_64K = 0x7FFFFFFFFFFF0000  # PAGE_COUNTER_MAX with pages of 64 KiB
FREE = 50 * GIB
HOST = 64 * GIB

V1_MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:7 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:8 master:3 - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
"""
HYBRID_MOUNTS = (
    V1_MOUNTS + "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
)
V2_MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
30 24 0:26 / /sys/fs/cgroup rw,nosuid,nodev shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
"""


def v1(folder, limit, usage=0, cache=0, use_hierarchy=1, around=V1_NO_LIMIT):
    """Files of a memory group of version 1; `around` is the lowest limit of the groups around it."""
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.soft_limit_in_bytes": f"{MIB}\n",
        f"{folder}/memory.usage_in_bytes": f"{usage}\n",
        f"{folder}/memory.use_hierarchy": f"{use_hierarchy}\n",
        f"{folder}/memory.stat": (
            f"cache 1\nrss 2\ninactive_file 3\nactive_file 4\n"
            f"hierarchical_memory_limit {min(limit, around)}\n"
            f"total_cache {cache + 5}\ntotal_inactive_file {cache // 4}\n"
            f"total_active_file {cache - cache // 4}\n"
        ),
    }


def v2(folder, limit, usage=0, cache=0, high="max"):
    """Files of a memory group of version 2."""
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.high": f"{high}\n",
        f"{folder}/memory.current": f"{usage}\n",
        f"{folder}/memory.swap.max": f"{8 * GIB}\n",
        f"{folder}/memory.swap.current": f"{GIB}\n",
        f"{folder}/memory.stat": (
            f"anon {usage - cache}\nfile {cache + MIB}\nshmem {MIB}\n"
            f"inactive_file {cache // 4}\nactive_file {cache - cache // 4}\n"
        ),
    }


def v1_cpu(folder, quota, period=100000):
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


@dataclass
class Tree:
    """A machine: the process's groups, mounts and files, and the memory and CPUs that it may use by these."""

    membership: str | None
    mounts: str | None
    files: dict[str, str] = field(default_factory=dict)
    total: int | None = HOST
    available: int | None = FREE
    cpus: int | None = None  # by quotas alone
    meminfo: str | None = (
        f"MemTotal:       {HOST >> 10} kB\nMemFree:         {GIB >> 10} kB\nMemAvailable:   {FREE >> 10} kB\n"
        f"SwapTotal:      {HOST >> 10} kB\nSwapFree:       {HOST >> 10} kB\n"
    )


CG = "/sys/fs/cgroup"
DOCKER = "/docker/1a2b"
POD = "/kubepods/burstable/pod12-34"
POD_V2 = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod12_34.slice"
POD_V1_MOUNTS = V1_MOUNTS.replace(" / /sys/fs/cgroup/", f" {POD}/9f {CG}/")
DOCKER_V1_MOUNTS = V1_MOUNTS.replace(" / /sys/fs/cgroup/", f" {DOCKER} {CG}/")
TREES = {
    "no cgroups": Tree("", V2_MOUNTS),
    "no files at all": Tree(None, None, meminfo=None, total=None, available=None),
    "no meminfo, but a limit": Tree(
        "0::/\n", V2_MOUNTS, v2(CG, 2 * GIB, GIB, MIB), total=2 * GIB, available=GIB + MIB, meminfo=None
    ),
    "v1": Tree(
        "4:memory:/job\n3:cpu,cpuacct:/job\n1:name=systemd:/user.slice\n", V1_MOUNTS,
        {**v1(f"{CG}/memory", V1_NO_LIMIT, 60 * GIB), **v1(f"{CG}/memory/job", 8 * GIB, 3 * GIB, 2 * GIB),
         **v1_cpu(f"{CG}/cpu,cpuacct/job", 350000)},
        total=8 * GIB, available=7 * GIB, cpus=3,
    ),
    "v1 without limits": Tree(
        "4:memory:/job\n3:cpu,cpuacct:/job\n", V1_MOUNTS,
        {**v1(f"{CG}/memory/job", V1_NO_LIMIT_64K, 60 * GIB), **v1(f"{CG}/memory", V1_NO_LIMIT, 60 * GIB),
         **v1_cpu(f"{CG}/cpu,cpuacct/job", -1), **v1_cpu(f"{CG}/cpu,cpuacct", -1)},
    ),
    "v1, the largest number": Tree(
        "4:memory:/\n", V1_MOUNTS, v1(f"{CG}/memory", 2**64 - 1, 60 * GIB)
    ),
    "v1, an ancestor is tighter": Tree(
        "4:memory:/a/b/c\n3:cpu,cpuacct:/a/b\n", V1_MOUNTS,
        {**v1(f"{CG}/memory/a", 16 * GIB, 15 * GIB, GIB), **v1(f"{CG}/memory/a/b/c", 12 * GIB, GIB),
         **v1_cpu(f"{CG}/cpu,cpuacct/a", 200000, 50000), **v1_cpu(f"{CG}/cpu,cpuacct/a/b", 600000)},
        total=12 * GIB, available=2 * GIB, cpus=4,
    ),
    "v1, groups around it are not charged": Tree(
        "4:memory:/a/b\n", V1_MOUNTS,
        {**v1(f"{CG}/memory/a", 4 * GIB, 4 * GIB, use_hierarchy=0), **v1(f"{CG}/memory/a/b", 6 * GIB, GIB)},
        total=6 * GIB, available=5 * GIB,
    ),
    "v1, more is used than the limit": Tree(
        "4:memory:/a\n", V1_MOUNTS, v1(f"{CG}/memory/a", 4 * GIB, 5 * GIB), total=4 * GIB, available=0
    ),
    "hybrid, memory by v1": Tree(
        "4:memory:/job\n3:cpu,cpuacct:/\n0::/user.slice/u\n", HYBRID_MOUNTS,
        {**v1(f"{CG}/memory/job", 4 * GIB, GIB), f"{CG}/unified/user.slice/u/cgroup.procs": "1\n"},
        total=4 * GIB, available=3 * GIB,
    ),
    "hybrid, memory and cpu by v2": Tree(
        "1:name=systemd:/u\n0::/u\n", HYBRID_MOUNTS.replace("rw,memory\n", "rw,pids\n"),
        {**v2(f"{CG}/unified/u", 4 * GIB, GIB), f"{CG}/unified/u/cpu.max": "400000 200000\n"},
        total=4 * GIB, available=3 * GIB, cpus=2,
    ),
    "v2 without limits": Tree(
        "0::/user.slice/a.scope\n", V2_MOUNTS,
        {**v2(f"{CG}/user.slice/a.scope", "max", 60 * GIB),
         f"{CG}/user.slice/a.scope/cpu.max": "max 100000\n"},
    ),
    "v2, nested, the outermost is tightest": Tree(
        "0::/a/b/c\n", V2_MOUNTS,
        {**v2(f"{CG}/a", 10 * GIB, 9 * GIB, 2 * GIB), **v2(f"{CG}/a/b", "max", 8 * GIB),
         **v2(f"{CG}/a/b/c", 20 * GIB, GIB), f"{CG}/a/cpu.max": "300000 100000\n",
         f"{CG}/a/b/cpu.max": "max 100000\n", f"{CG}/a/b/c/cpu.max": "800000 100000\n"},
        total=10 * GIB, available=3 * GIB, cpus=3,
    ),
    "v2, nested, its own is tightest": Tree(
        "0::/a/b\n", V2_MOUNTS,
        {**v2(f"{CG}/a", 10 * GIB, 2 * GIB), **v2(f"{CG}/a/b", 2 * GIB, GIB, 512 * MIB),
         f"{CG}/a/cpu.max": "300000 100000\n", f"{CG}/a/b/cpu.max": "50000 100000\n"},
        total=2 * GIB, available=GIB + 512 * MIB, cpus=0,
    ),
    "systemd slice with MemoryMax": Tree(
        "0::/system.slice/llama.service\n", V2_MOUNTS,
        {**v2(f"{CG}/system.slice", 24 * GIB, 6 * GIB, 4 * GIB),
         **v2(f"{CG}/system.slice/llama.service", "max", 5 * GIB, 3 * GIB)},
        total=24 * GIB, available=22 * GIB,
    ),
    "systemd service with MemoryHigh, above which it is throttled": Tree(
        "0::/system.slice/llama.service\n", V2_MOUNTS,
        v2(f"{CG}/system.slice/llama.service", 32 * GIB, 4 * GIB, GIB, high=16 * GIB),
        total=16 * GIB, available=13 * GIB,
    ),
    "path with colons and blanks": Tree(
        "0::/user.slice/app:a b.scope\n", V2_MOUNTS,
        v2(f"{CG}/user.slice/app:a b.scope", 3 * GIB, GIB), total=3 * GIB, available=2 * GIB,
    ),
    "v2 mounted elsewhere, at a path with a blank": Tree(
        "0::/a\n", "30 24 0:26 / /run/my\\040groups rw - cgroup2 cgroup2 rw\n",
        {**v2("/run/my groups/a", 3 * GIB, GIB), **v2(f"{CG}/a", GIB, 0)}, total=3 * GIB, available=2 * GIB,
    ),
    "v1 mounted elsewhere": Tree(
        "4:memory:/a\n", "30 24 0:26 / /cgroup/mem rw - cgroup none rw,seclabel,memory\n",
        v1("/cgroup/mem/a", 3 * GIB, GIB), total=3 * GIB, available=2 * GIB,
    ),
    "mounts cannot be read, v2": Tree(
        "0::/a\n", None, v2(f"{CG}/a", 3 * GIB, GIB), total=3 * GIB, available=2 * GIB
    ),
    "mounts cannot be read, v1": Tree(
        "4:memory:/a\n", None, v1(f"{CG}/memory/a", 3 * GIB, GIB), total=3 * GIB, available=2 * GIB
    ),
    "Docker, v2, own cgroup namespace": Tree(
        "0::/\n", V2_MOUNTS,
        {**v2(CG, 4 * GIB, 3 * GIB, 2 * GIB), f"{CG}/cpu.max": "150000 100000\n"},
        total=4 * GIB, available=3 * GIB, cpus=1,
    ),
    "Docker, v2, the host's cgroup namespace": Tree(
        f"0::/system.slice{DOCKER}.scope\n",
        V2_MOUNTS.replace("0:26 / ", f"0:26 /system.slice{DOCKER}.scope "),
        {**v2(CG, 4 * GIB, 3 * GIB, 2 * GIB), f"{CG}/cpu.max": "250000 100000\n"},
        total=4 * GIB, available=3 * GIB, cpus=2,
    ),
    "Docker, v1, the host's path": Tree(
        f"4:memory:{DOCKER}\n3:cpu,cpuacct:{DOCKER}\n", DOCKER_V1_MOUNTS,
        {**v1(f"{CG}/memory", 4 * GIB, 3 * GIB, 2 * GIB), **v1_cpu(f"{CG}/cpu,cpuacct", 200000)},
        total=4 * GIB, available=3 * GIB, cpus=2,
    ),
    "Docker, v1, a group below the container's": Tree(
        f"4:memory:{DOCKER}/init\n", DOCKER_V1_MOUNTS,
        {**v1(f"{CG}/memory", 4 * GIB, 3 * GIB), **v1(f"{CG}/memory/init", 2 * GIB, GIB + 512 * MIB)},
        total=2 * GIB, available=512 * MIB,
    ),
    "a path that is not below what is mounted: the mount's root counts": Tree(
        f"0::{DOCKER}\n", V2_MOUNTS.replace("0:26 / ", "0:26 /docker/1a2 "),
        v2(CG, 4 * GIB, 3 * GIB), total=4 * GIB, available=GIB,
    ),
    "a path that is not there: the mount's root counts": Tree(
        f"0::{DOCKER}\n", V2_MOUNTS, v2(CG, 4 * GIB, 3 * GIB), total=4 * GIB, available=GIB
    ),
    "a group outside of the namespace": Tree(
        "0::/../other/a\n", V2_MOUNTS,
        {**v2(CG, 4 * GIB, 3 * GIB), **v2("/sys/fs/other/a", GIB, 0)}, total=4 * GIB, available=GIB,
    ),
    "mounted from outside of the namespace": Tree(
        "0::/../other/a\n", V2_MOUNTS.replace("0:26 / ", "0:26 /.. "),
        {**v2(CG, 4 * GIB, 3 * GIB), **v2(f"{CG}/other/a", GIB, 0)}, total=GIB, available=GIB,
    ),
    "mounted twice, once of another": Tree(
        f"0::{DOCKER}\n",
        "30 24 0:26 /docker/ffff /other rw - cgroup2 cgroup2 rw\n"
        f"31 24 0:26 {DOCKER} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        {**v2(CG, 4 * GIB, GIB), **v2("/other", GIB, 0)}, total=4 * GIB, available=3 * GIB,
    ),
    "Kubernetes, v2": Tree(
        "0::/\n", V2_MOUNTS, {**v2(CG, 12 * GIB, 11 * GIB, 9 * GIB), f"{CG}/cpu.max": "600000 100000\n"},
        total=12 * GIB, available=10 * GIB, cpus=6,
    ),
    "Kubernetes, v2, seen from the node": Tree(
        f"0::{POD_V2}/cri-containerd-9f.scope\n", V2_MOUNTS,
        {**v2(f"{CG}/kubepods.slice", 60 * GIB, 40 * GIB, 10 * GIB),
         **v2(f"{CG}{POD_V2}", 16 * GIB, 8 * GIB, GIB), f"{CG}{POD_V2}/cpu.max": "800000 100000\n",
         **v2(f"{CG}{POD_V2}/cri-containerd-9f.scope", "max", 7 * GIB),
         f"{CG}{POD_V2}/cri-containerd-9f.scope/cpu.max": "max 100000\n"},
        total=16 * GIB, available=9 * GIB, cpus=8,
    ),
    "Kubernetes, v1, the pod's limit is known by what the container's statistics say": Tree(
        f"4:memory:{POD}/9f\n3:cpu,cpuacct:{POD}/9f\n", POD_V1_MOUNTS,
        {**v1(f"{CG}/memory", V1_NO_LIMIT, 3 * GIB, 2 * GIB, around=8 * GIB),
         **v1_cpu(f"{CG}/cpu,cpuacct", -1)},
        total=8 * GIB, available=7 * GIB,
    ),
    "files that make no sense": Tree(
        "nothing\n0::/a\n\n", "what\n30 24 - cgroup2\n" + V2_MOUNTS,
        {f"{CG}/a/memory.max": "many\n", f"{CG}/a/memory.current": "-5\n", f"{CG}/a/cpu.max": "\n",
         f"{CG}/a/memory.stat": "inactive_file\nactive_file x\n", f"{CG}/memory.max": "-1\n",
         f"{CG}/cpu.max": "100000 0\n"},
    ),
    "a limit without its usage": Tree(
        "0::/\n", V2_MOUNTS, {f"{CG}/memory.max": "4096\n"}, total=4096, available=4096
    ),
    "the rest of the machine has less": Tree(
        "0::/a\n", V2_MOUNTS, v2(f"{CG}/a", 60 * GIB, GIB), total=60 * GIB, available=FREE
    ),
}  # fmt: skip


@pytest.fixture(params=TREES)
def tree(request, tmp_path):
    """The root of a tree on disk, and its Tree."""
    case = TREES[request.param]
    files = {
        "/proc/self/cgroup": case.membership,
        "/proc/self/mountinfo": case.mounts,
        "/proc/meminfo": case.meminfo,
    }
    for name, text in {**files, **case.files}.items():
        if text is not None:
            path = tmp_path / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return tmp_path, case


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """machine_host.cpp, compiled."""
    loaded = pure_logic(tmp_path_factory.mktemp("machine"), "unit/machine_host.cpp", *SOURCES)
    loaded.machine_cpu_quota.restype = ctypes.c_uint32
    loaded.machine_memory_pressure.restype = ctypes.c_double
    return loaded


def native_memory(host, root):
    total, available = ctypes.c_uint64(), ctypes.c_uint64()
    host.machine_memory(os.fsencode(root), ctypes.byref(total), ctypes.byref(available))
    return tuple(None if each.value > 1 << 63 else each.value for each in (total, available))


def test_memory_in_python(tree):
    root, case = tree
    assert (machine.total_memory(root), machine.available_memory(root)) == (case.total, case.available)


def test_memory_natively(host, tree):
    root, case = tree
    assert native_memory(host, root) == (case.total, case.available)


def test_cpu_quota_in_python(tree):
    root, case = tree
    assert machine.cpu_quota(root) == case.cpus


def test_cpu_quota_natively(host, tree):
    root, case = tree
    found = host.machine_cpu_quota(os.fsencode(root))
    assert (None if found == 0xFFFFFFFF else found) == case.cpus


@pytest.fixture
def affinity():
    """Sets which CPUs this process may run on, until the test ends."""
    before = os.sched_getaffinity(0)
    yield lambda cpus: os.sched_setaffinity(0, cpus)
    os.sched_setaffinity(0, before)


def test_cpu_count_heeds_affinity_and_quota(host, affinity, tmp_path):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/\n")
    folder = tmp_path / "sys" / "fs" / "cgroup"
    folder.mkdir(parents=True)
    allowed = sorted(os.sched_getaffinity(0))

    def counts(quota):
        (folder / "cpu.max").write_text(quota)
        return machine.cpu_count(tmp_path), host.machine_cpu_count(os.fsencode(tmp_path))

    assert counts("max 100000") == (len(allowed),) * 2
    assert counts("10000 100000") == (1, 1), "at least one"
    assert counts("100000 100000") == (1, 1)
    assert counts(f"{len(allowed)}90000 100000") == (len(allowed),) * 2, "a part of a CPU is none"
    affinity(allowed[:1])
    assert counts("max 100000") == counts("900000 100000") == (1, 1)


def test_pressure_of_the_group_or_else_of_the_machine(host, tmp_path):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "pressure").mkdir()
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/a/b\n")
    assert host.machine_memory_pressure(os.fsencode(tmp_path)) == 0
    some = "some avg10={} avg60=9.00 avg300=9.00 total=9\nfull avg10=8.00 avg60=0.00 avg300=0.00 total=0\n"
    (tmp_path / "proc" / "pressure" / "memory").write_text(some.format("3.50"))
    assert host.machine_memory_pressure(os.fsencode(tmp_path)) == 3.5
    folder = tmp_path / "sys" / "fs" / "cgroup" / "a"
    folder.mkdir(parents=True)
    (folder / "memory.pressure").write_text(some.format("1.25"))
    assert host.machine_memory_pressure(os.fsencode(tmp_path)) == 1.25


# ---- busy processors


def stat_of(root, namespace, lines):
    """Make a root with /proc/stat and a PID namespace."""
    (root / "proc" / "self" / "ns").mkdir(parents=True)
    (root / "proc" / "stat").write_text(lines)
    (root / "proc" / "self" / "ns" / "pid").symlink_to(f"pid:[{namespace}]")
    return root


def test_busy_seconds_are_of_the_processors_that_may_be_used(affinity, tmp_path):
    own = min(os.sched_getaffinity(0))
    affinity({own})
    lines = (
        f"cpu  999 999 999 999 999 999 999 999 0 0\ncpu{own} 1 2 4 900 900 8 16 32 0 0\n"
        f"cpu{own + 1} 9 9 9 9 9 9 9 9 0 0\n"
    )
    root = stat_of(tmp_path, machine.HOST_PID_NAMESPACE, lines + "intr 5\n")
    ticks = os.sysconf("SC_CLK_TCK")
    assert machine.busy_seconds(root=root) == (1 + 2 + 4 + 8 + 16 + 32) / ticks
    assert machine.busy_seconds(user=False, root=root) == (4 + 8 + 16 + 32) / ticks


def test_in_a_container_nobody_knows_how_busy_its_processors_are(tmp_path):
    own = min(os.sched_getaffinity(0))
    root = stat_of(tmp_path / "container", 4026532201, f"cpu{own} 1 2 4 900 900 8 16 32 0 0\n")
    assert machine.busy_seconds(root=root) is None, "/proc/stat counts other tenants too"
    assert machine.busy_seconds(root=stat_of(tmp_path / "odd", machine.HOST_PID_NAMESPACE, "cpu\n")) is None
    assert machine.busy_seconds(root=tmp_path / "nothing") is None


def test_the_kernels_own_work_is_counted():
    before = machine.kernel_seconds()
    with open("/dev/zero", "rb", buffering=0) as file:
        for _ in range(1024):
            file.read(MIB)
    assert machine.kernel_seconds() > before


def test_busy_seconds_of_this_machine():
    before, namespace = machine.busy_seconds(), os.readlink("/proc/self/ns/pid")
    assert (before is None) == (namespace != f"pid:[{machine.HOST_PID_NAMESPACE}]")
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass  # keeps one processor busy
    assert before is None or machine.busy_seconds() > before
