# SPDX-License-Identifier: MIT
"""The native library through cffi, with the declarations between the API markers of rotary.h.

The only module that imports cffi. Turns status codes into exceptions; decides nothing. Callbacks
into Python are in own.py, replays in replay.py, the pools of a model in pools.py. ``load()`` may be called
from any thread.

Order matters when loading. llama_cpp comes first, so that our library binds to the ggml it brought. The
backend is then registered through libllama's own handle: ``llama_cpp._ggml`` would load a second libggml with
a second registry, where the device is listed but never used.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import pinned
from ..errors import BudgetError, DeviceError, LibraryError, ReadError, RotaryError, VersionError
from ..host import machine
from .stock_version import check_llama_cpp_version

ABI_VERSION = 6

_PACKAGE = Path(__file__).resolve().parent.parent
_STRUCTS = (
    "rotary_config", "rotary_stats", "rotary_layer_stats", "rotary_layer_size", "rotary_load",
    "rotary_policy", "rotary_predictor",
)  # fmt: skip
_ERRORS: dict[str, type[RotaryError]] = {  # by name in enum rotary_status
    "ROTARY_ERR_ARG": RotaryError,
    "ROTARY_ERR_VERSION": VersionError,
    "ROTARY_ERR_DEVICE": DeviceError,
    "ROTARY_ERR_BUDGET": BudgetError,
    "ROTARY_ERR_MEMORY": LibraryError,
    "ROTARY_ERR_STATE": DeviceError,
    "ROTARY_ERR_READ": ReadError,
}
_DEVICE_TYPE_GPU, _DEVICE_TYPE_IGPU = 1, 2

_load_lock = threading.RLock()
_loaded: Library | None = None


def library_path() -> Path:
    """Path of libggml-rotary.so, whether or not it exists; the variable ROTARY_LIBRARY overrides it."""
    override = os.environ.get("ROTARY_LIBRARY")
    return Path(override).absolute() if override else _PACKAGE / "lib" / "libggml-rotary.so"


def api_declarations() -> str:
    """C declarations of rotary.h, as installed with the package or as found in a checkout."""
    for header in (_PACKAGE / "include" / "rotary.h", _PACKAGE.parent / "native" / "include" / "rotary.h"):
        if header.is_file():
            return header.read_text().partition("// BEGIN API\n")[2].partition("// END API")[0]
    raise LibraryError(f"{_PACKAGE}: rotary.h is missing; install rotary-llamacpp again")


def loaded() -> Library | None:
    """Return the library if it is loaded in this process, else None; load nothing."""
    return _loaded


def load() -> Library:
    """Load the native library and register its devices with ggml, once per process.

    Raises
    ------
    LibraryError
        The library is missing, built for another CPU, or was refused by ggml.
    VersionError
        llama-cpp-python, ggml or the library is of another version than this package is made for.
    """
    global _loaded
    with _load_lock:
        if _loaded is None:
            _loaded = Library(library_path())
        return _loaded


def libllama() -> ctypes.CDLL:
    """Return the handle of libllama, through which symbols of ggml resolve too. Imports llama_cpp."""
    from .stock import llama_api

    return llama_api._lib


def ggml_build(lib: ctypes.CDLL) -> tuple[str, str]:
    """Version and commit of the ggml in this process."""
    for function in (lib.ggml_version, lib.ggml_commit):
        function.restype = ctypes.c_char_p
    return lib.ggml_version().decode(), lib.ggml_commit().decode()


class _Mutable:
    """Mixin that makes a logger log nothing in threads that are muted; its level stays as set in others."""

    muted = threading.local()

    @property
    def level(self) -> int:
        return logging.CRITICAL + 1 if getattr(self.muted, "depth", 0) else self.__dict__["level"]

    @level.setter
    def level(self, level: int) -> None:
        self.__dict__["level"] = level


@contextlib.contextmanager
def native_log_muted() -> Iterator[None]:
    """Keep errors of our library out of llama.cpp's log, because exceptions carry their text.

    Mutes this thread alone. Changing and restoring the level of llama-cpp-python's logger would race with
    other threads, which set and read it.
    """
    logger = logging.getLogger("llama-cpp-python")
    with _load_lock:
        if not isinstance(logger, _Mutable):
            logger.__class__ = type(type(logger).__name__, (_Mutable, type(logger)), {})
    muted = _Mutable.muted
    muted.depth = getattr(muted, "depth", 0) + 1
    try:
        yield
    finally:
        muted.depth -= 1


# Names in ggml_cpu_has_<name>(); only for the text of an error.
_CPU_FEATURES = [
    "sse3", "ssse3", "avx", "avx_vnni", "avx2", "f16c", "fma", "bmi2", "avx512", "avx512_vbmi",
    "avx512_vnni", "avx512_bf16", "amx_int8", "neon", "fp16_va", "dotprod", "matmul_int8", "sve", "sme",
]  # fmt: skip


class Library:
    """The loaded library and its devices."""

    def __init__(self, path: Path) -> None:
        try:
            import cffi
        except ImportError as error:
            raise LibraryError(
                f"cffi: cannot be imported, {error}; install it "
                "again with `pip install --force-reinstall cffi`"
            ) from error
        machine.check_library_machine(path)
        check_llama_cpp_version()
        self.path = path
        self.llama = libllama()
        self.ffi = cffi.FFI()
        self.ffi.cdef(api_declarations())
        try:
            self.c: Any = self.ffi.dlopen(str(path))
        except OSError as error:
            raise LibraryError(
                f"{path}: cannot be loaded, {error}; build it again with `pip install .`"
            ) from None
        self._check_abi()
        self._check_ggml()
        self._check_processor()
        self._register()
        self.default_inner = [self.inner(device) for device in range(self.device_count())]

    def _check_abi(self) -> None:
        found = self.c.rotary_abi_version()
        if found != ABI_VERSION:
            raise VersionError(
                f"{self.path}: its ABI is {found}; this package is made for {ABI_VERSION}; "
                "build it again with `pip install .`"
            )
        for name in _STRUCTS:
            theirs, ours = self.c.rotary_sizeof(name.encode()), self.ffi.sizeof(name)
            if theirs != ours:
                raise VersionError(
                    f"{self.path}: its {name} has {theirs} bytes; rotary.h says {ours}; "
                    "build it again with `pip install .`"
                )

    def built_ggml(self) -> tuple[str, str]:
        """Version and commit of the ggml this library was compiled against."""
        return self.text(self.c.rotary_built_ggml_version()), self.text(self.c.rotary_built_ggml_commit())

    def _check_ggml(self) -> None:
        # The library itself compares commits, because it knows how a build without git names them.
        (here, _), (built, _) = ggml_build(self.llama), self.built_ggml()
        if here != built:
            raise VersionError(
                f"{self.path}: compiled against ggml {built}, llama-cpp-python brings {here}; "
                "build it again with `pip install .`"
            )

    def _check_processor(self) -> None:
        if not self.c.rotary_cpu_runs():
            # Constants of the build; llama_print_system_info() would run the CPU backend.
            answers = {name: getattr(self.llama, f"ggml_cpu_has_{name}", None) for name in _CPU_FEATURES}
            built_for = " ".join(name for name, has in answers.items() if has is not None and has())
            raise LibraryError(
                "llama-cpp-python: a trial run died of an illegal instruction on this processor; "
                f"it was compiled for {built_for or 'another'}; "
                f"build it here with `{pinned.REBUILD_LLAMA_CPP}`"
            )

    def _register(self) -> None:
        lib = self.llama
        lib.ggml_backend_load.restype = ctypes.c_void_p
        lib.ggml_backend_load.argtypes = [ctypes.c_char_p]
        lib.ggml_backend_dev_by_name.restype = ctypes.c_void_p
        lib.ggml_backend_dev_by_name.argtypes = [ctypes.c_char_p]
        with native_log_muted():
            registered = lib.ggml_backend_load(os.fsencode(self.path))
        if not registered:
            self.check(self.c.rotary_last_status())
            raise LibraryError(f"{self.path}: refused by ggml; run `rotary doctor`")
        lib.llama_supports_gpu_offload.restype = ctypes.c_bool
        if not lib.llama_supports_gpu_offload() or self.device_count() < 1:
            raise LibraryError(
                f"{self.path}: loaded, but llama.cpp sees no device of it; a second copy of libggml "
                "took the registration; load rotary_llamacpp before other users of ggml"
            )

    def text(self, pointer: Any) -> str:
        """A C string as str, "" for NULL."""
        return self.ffi.string(pointer).decode("utf-8", "replace") if pointer else ""

    def last_error(self) -> str:
        """Text of this thread's last failed call."""
        return self.text(self.c.rotary_last_error()).replace("\n", " ").strip()

    def check(self, status: int) -> int:
        """Return the status; raise the error that it stands for if it is negative."""
        if status < 0:
            kind = _ERRORS.get(self.ffi.typeof("enum rotary_status").elements.get(status, ""), LibraryError)
            raise kind(self.last_error() or f"{self.path}: failed with status {status}") from None
        return status

    def divide_budget(self, n_bytes: int, layers: list[tuple[int, int, int]]) -> list[int]:
        """Divide a budget into slots of layers, given as (bytes of an expert, experts, experts used)."""
        n_slots, taken = self.ffi.new("int32_t[]", len(layers)), self.ffi.new("uint64_t *")
        sizes = self.ffi.new("rotary_layer_size[]", layers)
        text = str(n_bytes).encode()
        self.check(self.c.rotary_budget_divide(text, sizes, len(layers), 0, n_slots, taken))
        return list(n_slots)

    # ---- devices

    def device_count(self) -> int:
        """Number of ROTARY devices."""
        return self.c.rotary_device_count()

    def inner(self, device: int) -> str:
        """Name of the ggml device that a ROTARY device wraps."""
        return self.text(self.c.rotary_device_inner(device))

    def name(self, device: int) -> str:
        """Name of a ROTARY device in ggml."""
        return self.text(self.c.rotary_device_name(device))

    def device_memory(self, inner: str) -> tuple[int, int]:
        """Free and total bytes of memory of an inner device; 0 if there is no such device."""
        lib, free, total = self.llama, ctypes.c_size_t(), ctypes.c_size_t()
        device = lib.ggml_backend_dev_by_name(inner.encode())
        if not device:
            return 0, 0
        pointer = ctypes.POINTER(ctypes.c_size_t)
        lib.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, pointer, pointer]
        lib.ggml_backend_dev_memory.restype = None
        lib.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        return min(free.value, total.value), total.value

    def devices_for(self, inner: str | None) -> list[int]:
        """ROTARY devices over inner devices, separated by commas; by default over those chosen at load.

        Raises
        ------
        DeviceError
            An inner device does not exist, or every ROTARY device is in use over another one.
        """
        chosen: list[int] = []
        for wanted in inner.split(",") if inner else self.default_inner:
            chosen.append(self._device_for(wanted.strip(), chosen))
        return chosen

    def _device_for(self, wanted: str, taken: list[int]) -> int:
        devices = [device for device in range(self.device_count()) if device not in taken]
        for device in devices:
            if self.inner(device).lower() == wanted.lower():
                return device
        with native_log_muted():
            for device in devices:
                status = self.c.rotary_device_set_inner(device, wanted.encode())
                in_use = status == self.c.ROTARY_ERR_STATE
                if not in_use or device == devices[-1]:
                    self.check(status)
                    return device
        raise DeviceError(
            f"{wanted}: no ROTARY device is left for it, there are {self.device_count()}; set ROTARY_INNER "
            "to all inner devices before the library is loaded"
        )

    def device_list(self, devices: list[int]) -> ctypes.Array[ctypes.c_void_p]:
        """NULL-terminated list of ROTARY devices, for ``llama_model_params.devices``."""
        handles = [self.llama.ggml_backend_dev_by_name(self.name(device).encode()) for device in devices]
        return (ctypes.c_void_p * (len(handles) + 1))(*handles, None)

    def devices_without_rotary(self) -> ctypes.Array[ctypes.c_void_p]:
        """List of devices that llama.cpp would choose by default if this library had not been loaded."""
        lib = self.llama
        lib.ggml_backend_dev_count.restype = ctypes.c_size_t
        lib.ggml_backend_dev_get.restype = ctypes.c_void_p
        lib.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
        lib.ggml_backend_dev_type.argtypes = lib.ggml_backend_dev_name.argtypes = [ctypes.c_void_p]
        lib.ggml_backend_dev_name.restype = ctypes.c_char_p
        found: dict[int, list[int]] = {_DEVICE_TYPE_GPU: [], _DEVICE_TYPE_IGPU: []}
        for i in range(lib.ggml_backend_dev_count()):
            device = lib.ggml_backend_dev_get(i)
            if not lib.ggml_backend_dev_name(device).startswith(b"ROTARY"):
                found.get(lib.ggml_backend_dev_type(device), []).append(device)
        # llama.cpp puts RPC servers first, and uses an integrated GPU only if there is nothing else.
        gpus = sorted(
            found[_DEVICE_TYPE_GPU], key=lambda dev: not lib.ggml_backend_dev_name(dev).startswith(b"RPC")
        )
        chosen = gpus or found[_DEVICE_TYPE_IGPU][:1]
        return (ctypes.c_void_p * (len(chosen) + 1))(*chosen, None)
