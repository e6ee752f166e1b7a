# SPDX-License-Identifier: MIT
"""Measuring the disk of a model, and refusing where there is none: memory, other file systems."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rotary_llamacpp.errors import RotaryError
from rotary_llamacpp.host import disk, file_systems
from rotary_llamacpp.planning import calibration
from rotary_llamacpp.runtime import doctor
from rotary_llamacpp.units import MIB
from tests.support import HANG_S, ROOT
from tests.unit.test_plan import HERE

SHM = Path("/dev/shm")
EXT4, FUSE = 0xEF53, 0x65735546


@pytest.fixture
def on_disk(tmp_path):
    """A folder on a file system whose reads the kernel counts."""
    if file_systems.storage_reads(tmp_path) is None:
        pytest.skip(
            f"{tmp_path}: file system {file_systems.magic(tmp_path):#x}, the kernel does not count its reads"
        )
    return tmp_path


@pytest.fixture
def anywhere(monkeypatch):
    """Let any file pass as one on a disk."""
    monkeypatch.setattr(file_systems, "magic", lambda path: 0)


@pytest.fixture
def in_shm():
    """A file of a MiB on a tmpfs."""
    if not SHM.is_dir() or file_systems.in_memory(SHM) != "tmpfs" or not os.access(SHM, os.W_OK):
        pytest.skip("/dev/shm: no tmpfs that can be written")
    path = SHM / f"rotary-test-{os.getpid()}.gguf"
    path.write_bytes(os.urandom(MIB))
    yield path
    path.unlink()


def write(path, n_bytes):
    path.write_bytes(os.urandom(n_bytes))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


def one_line(error):
    """The text of an error, which must be one line of several parts."""
    text = str(error.value)
    assert "\n" not in text and text.count("; ") >= 1, text
    return text


def test_the_number_is_statfs_own(tmp_path):
    said = subprocess.run(["stat", "-f", "-c", "%t", tmp_path], capture_output=True, text=True, check=False)
    if said.returncode != 0:
        pytest.skip("no stat -f to compare with")
    assert file_systems.magic(tmp_path) == int(said.stdout, 16)
    with pytest.raises(OSError, match="no/such"):
        file_systems.magic(tmp_path / "no" / "such")


def test_reads_the_whole_of_a_small_file_and_no_more_of_a_large_one(on_disk, monkeypatch):
    monkeypatch.setattr(disk, "_SAMPLE_SECONDS", HANG_S)
    small = write(on_disk / "small", 3 * MIB + 12345)
    found = disk.read_cold(small)
    assert found.n_bytes == small.stat().st_size and found.how in ("direct", "cache dropped")
    assert found.seconds > 0 and found.busy >= 0
    monkeypatch.setattr(disk, "_SAMPLE_BYTES", 4 * MIB)
    assert disk.read_cold(write(on_disk / "large", 6 * MIB)).n_bytes == 4 * MIB


# ---- in memory


def test_memory_is_not_called_a_disk(in_shm):
    with pytest.raises(RotaryError) as caught:
        disk.read_cold(in_shm)
    assert one_line(caught).startswith(f"{in_shm}: lies in memory (tmpfs)")
    check = doctor._disk(str(in_shm))
    assert check.verdict == doctor.WARN and check.advice == "keep models on a disk"
    assert check.detail.startswith(f"not measured: {in_shm}: ") and "MiB/s" not in check.detail


def test_a_plan_keeps_the_published_figure_where_nothing_can_be_measured(in_shm):
    sources = {"disk": "published, NVMe"}
    assert calibration._disk(HERE, in_shm, sources) == HERE
    assert sources["disk"].startswith(f"published, NVMe; not measured: {in_shm}: lies in memory (tmpfs)")
    sources = {"disk": "published, NVMe"}
    assert calibration._disk(HERE, Path("/no/such.gguf"), sources) == HERE
    assert "; not measured: " in sources["disk"] and "/no/such.gguf" in sources["disk"]


def test_what_comes_from_memory_although_it_is_on_a_disk(tmp_path, monkeypatch):
    path = write(tmp_path / "model", 4 * MIB)
    monkeypatch.setattr(file_systems, "magic", lambda path: EXT4)
    counted = iter([100, 100 + MIB])
    monkeypatch.setattr(file_systems, "storage_reads", lambda path: next(counted))
    with pytest.raises(RotaryError) as caught:
        disk.read_cold(path)
    assert "of 4 MiB, 1 MiB came from storage" in one_line(caught)


OVERLAY = """
import sys
from pathlib import Path
from rotary_llamacpp.host import disk, file_systems
from rotary_llamacpp.errors import RotaryError
for path in map(Path, sys.argv[1:]):
    assert file_systems.magic(path) == 0x794C7630, hex(file_systems.magic(path))
    try:
        print(disk.read_cold(path).n_bytes)
    except RotaryError as error:
        print(error)
"""


def test_an_overlay_over_memory_and_over_a_disk(on_disk):
    # In a mount namespace of its own, which disappears with the process.
    for name in ("lower", "upper", "work", "memory", "over"):
        (on_disk / name).mkdir()
    script = (
        'cd "$0" && mount -t tmpfs none memory && head -c 4194304 /dev/urandom > memory/a && '
        "mount -t overlay none over -o lowerdir=memory,upperdir=upper,workdir=work || exit 77\n"
        'head -c 4194304 /dev/urandom > over/b && sync -f over/b && exec "$@"'
    )
    command = ["unshare", "-m", "sh", "-c", script, on_disk, sys.executable, "-c", OVERLAY]
    try:
        ran = subprocess.run(
            [*command, on_disk / "over" / "a", on_disk / "over" / "b"],
            capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no unshare")
    if ran.returncode == 77 or "unshare" in ran.stderr:
        pytest.skip(f"no overlay can be mounted: {ran.stderr.strip()}")
    assert ran.returncode == 0, ran.stderr
    of_memory, of_disk = ran.stdout.splitlines()
    assert "of 4 MiB, 0 MiB came from storage" in of_memory
    assert of_disk == str(4 * MIB)


# ---- file systems without direct reads, and others


@pytest.mark.parametrize("refuses", ["open", "read"])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_direct_reads(anywhere, tmp_path, monkeypatch, refuses, code):
    path = write(tmp_path / "model", 2 * MIB)
    real_open, real_read = os.open, os.preadv
    n_open = len(os.listdir("/proc/self/fd"))

    def open_(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            if refuses == "open":
                raise OSError(code, os.strerror(code))
            flags = (
                flags & ~os.O_DIRECT | os.O_NOATIME
            )  # marks such files, as the file system here may refuse O_DIRECT
        return real_open(path, flags, *rest, **named)

    def read(descriptor, *rest):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_NOATIME:
            raise OSError(code, os.strerror(code))
        return real_read(descriptor, *rest)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", read)
    found = disk.read_cold(path)
    assert (found.n_bytes, found.how) == (2 * MIB, "cache dropped")
    assert len(os.listdir("/proc/self/fd")) == n_open


def test_other_failures_are_not_taken_for_it(anywhere, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output"):
        disk.read_cold(write(tmp_path / "model", MIB))


def test_a_server_that_answers_reads_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(file_systems, "magic", lambda path: FUSE)
    assert disk.read_cold(write(tmp_path / "model", MIB)).how.endswith(", FUSE")


@pytest.mark.parametrize("kind", ["folder", "fifo", "empty"])
def test_what_is_no_model_is_not_read(tmp_path, kind):
    path = tmp_path / kind
    {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "empty": path.touch}[kind]()
    with pytest.raises(RotaryError) as caught:
        disk.read_cold(path)
    assert one_line(caught).startswith(f"{path}: ")
    assert doctor._disk(str(path)).verdict == doctor.WARN


# ---- a temporary file


def test_a_temporary_file_is_where_there_is_a_disk(on_disk, in_shm, monkeypatch):
    monkeypatch.setattr(disk, "_SAMPLE_BYTES", 2 * MIB)
    monkeypatch.setattr(disk.tempfile, "gettempdir", lambda: str(SHM))
    monkeypatch.setattr(disk, "_folders", lambda: iter([SHM, on_disk]))
    found, place = disk.measure(None)
    assert place == on_disk and found.n_bytes == 2 * MIB
    assert list(on_disk.iterdir()) == []
    assert f"of a temporary file in {on_disk}" in doctor._disk(None).detail


def test_nowhere_to_write_a_temporary_file(in_shm, tmp_path, monkeypatch):
    full = tmp_path / "full"
    full.mkdir()
    monkeypatch.setattr(disk, "_folders", lambda: iter([SHM, full, tmp_path / "gone"]))
    monkeypatch.setattr(
        disk.os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 9, 9, 25600, 9, 9, 9, 0, 255))
    )
    real = file_systems.magic
    monkeypatch.setattr(file_systems, "magic", lambda path: real(path) if path != full else EXT4)
    with pytest.raises(RotaryError) as caught:
        disk.measure(None)
    text = one_line(caught)
    assert f"{SHM}: lies in memory (tmpfs)" in text and f"{full}: 100 MiB are free" in text
    assert f"{tmp_path / 'gone'}: No such file" in text and text.endswith("name a model to read instead")
    assert doctor._disk(None).verdict == doctor.WARN


def test_folders_are_tried_once_each(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = list(disk._folders())
    assert found[0] == tmp_path and len(found) == len(set(found)) <= 2


# ---- processor time of reading


def test_in_a_container_only_this_process_is_counted(anywhere, tmp_path, monkeypatch):
    path = write(tmp_path / "model", MIB)
    monkeypatch.setattr(disk, "busy_seconds", lambda user: None)
    spent = iter([1.0, 1.5])
    monkeypatch.setattr(disk, "kernel_seconds", lambda: next(spent))
    found = disk.read_cold(path)
    assert found.own and found.busy == 0.5
    monkeypatch.setattr(disk, "read_cold", lambda path: found)
    sources = {"disk": "published"}
    calibration._disk(HERE, path, sources)
    assert "counts this process alone" in sources["disk"]


def test_elsewhere_the_machine_is(anywhere, tmp_path, monkeypatch):
    spent = iter([0.0, 0.0, 0.25])  # at the first call, then before and after reading
    monkeypatch.setattr(disk, "busy_seconds", lambda user: next(spent))
    found = disk.read_cold(write(tmp_path / "model", MIB))
    assert not found.own and found.busy == 0.25
