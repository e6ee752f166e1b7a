# SPDX-License-Identifier: MIT
"""The native library through cffi: rotary.h is the single truth, read between its API markers.

The only module that talks to ggml directly. Turns status codes into exceptions; decides nothing. What the
library calls back is _own.py, what it replays _replay.py. Threads: ``load()`` may be called from any
thread, a ``Pool`` from one at a time.

Order matters when loading. llama_cpp comes first, so that our library binds to the ggml it brought. The
backend is then registered through libllama's own handle: ``llama_cpp._ggml`` would load a second libggml with
a second registry, where the device is listed but never used.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import pinned
from ..errors import BudgetError, DeviceError, LibraryError, ReadError, RotaryError, VersionError
from ..host import machine

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
    """Where libggml-rotary.so is, whether or not it exists; the variable ROTARY_LIBRARY overrides it."""
    override = os.environ.get("ROTARY_LIBRARY")
    return Path(override).absolute() if override else _PACKAGE / "lib" / "libggml-rotary.so"


def api_declarations() -> str:
    """The C declarations of rotary.h, as installed with the package or as found in a checkout."""
    for header in (_PACKAGE / "include" / "rotary.h", _PACKAGE.parent / "native" / "include" / "rotary.h"):
        if header.is_file():
            return header.read_text().partition("// BEGIN API\n")[2].partition("// END API")[0]
    raise LibraryError(
        f"{_PACKAGE}: rotary.h is missing; it is part of the package; install rotary-llamacpp again"
    )


def loaded() -> Library | None:
    """The library if it has been loaded in this process; loads nothing."""
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


def check_llama_cpp_version() -> str:
    """Version of the installed llama-cpp-python, which must be the pinned one."""
    try:
        found = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise VersionError(
            f"llama-cpp-python: not installed; {pinned.LLAMA_CPP_PYTHON} is needed; run `pip install "
            f"llama-cpp-python=={pinned.LLAMA_CPP_PYTHON}`"
        ) from None
    if found != pinned.LLAMA_CPP_PYTHON:
        raise VersionError(
            f"llama-cpp-python: version {found} is installed; rotary-llamacpp is made for "
            f"{pinned.LLAMA_CPP_PYTHON}; run `pip install llama-cpp-python=={pinned.LLAMA_CPP_PYTHON}`"
        )
    return found


def libllama() -> ctypes.CDLL:
    """libllama's handle, through which ggml's symbols resolve too. Imports llama_cpp."""
    from .stock import llama_api

    return llama_api._lib


def ggml_build(lib: ctypes.CDLL) -> tuple[str, str]:
    """Version and commit of the ggml in this process."""
    for function in (lib.ggml_version, lib.ggml_commit):
        function.restype = ctypes.c_char_p
    return lib.ggml_version().decode(), lib.ggml_commit().decode()


class _Mutable:
    """What makes a logger's level unreachable in threads that are muted, and what it was set to in others."""

    muted = threading.local()

    @property
    def level(self) -> int:
        return logging.CRITICAL + 1 if getattr(self.muted, "depth", 0) else self.__dict__["level"]

    @level.setter
    def level(self, level: int) -> None:
        self.__dict__["level"] = level


@contextlib.contextmanager
def native_log_muted() -> Iterator[None]:
    """llama.cpp's log without what our library says in a call: its error text becomes an exception's.

    In this thread alone: llama-cpp-python shows what the level of its logger lets through, which others set
    and read at the same time, so that it cannot be changed and put back.
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


# As ggml calls them in ggml_cpu_has_<name>(); only for the text of an error.
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
                f"cffi: cannot be imported, {error}; the native library is called through it; install it "
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
        # The commit is compared by the library itself, which knows what a build without git calls it.
        (here, _), (built, _) = ggml_build(self.llama), self.built_ggml()
        if here != built:
            raise VersionError(
                f"{self.path}: compiled against ggml {built}, llama-cpp-python brings {here}; they must be "
                "the same; build it again with `pip install .`"
            )

    def _check_processor(self) -> None:
        if not self.c.rotary_cpu_runs():
            # Constants of the build; llama_print_system_info() would run the CPU backend.
            answers = {name: getattr(self.llama, f"ggml_cpu_has_{name}", None) for name in _CPU_FEATURES}
            built_for = " ".join(name for name, has in answers.items() if has is not None and has())
            raise LibraryError(
                "llama-cpp-python: a trial run dies of an illegal instruction on this processor; "
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
        """Text of this thread's last failing call."""
        return self.text(self.c.rotary_last_error()).replace("\n", " ").strip()

    def check(self, status: int) -> int:
        """Raise what a negative status stands for."""
        if status < 0:
            kind = _ERRORS.get(self.ffi.typeof("enum rotary_status").elements.get(status, ""), LibraryError)
            raise kind(self.last_error() or f"{self.path}: failed with status {status}") from None
        return status

    def divide_budget(self, n_bytes: int, layers: list[tuple[int, int, int]]) -> list[int]:
        """Slots of layers, each (bytes of an expert, experts, experts used), as a pool of that budget has."""
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
        """Name of the ggml device that `device` wraps."""
        return self.text(self.c.rotary_device_inner(device))

    def name(self, device: int) -> str:
        """ggml's name of a ROTARY device."""
        return self.text(self.c.rotary_device_name(device))

    def device_memory(self, inner: str) -> tuple[int, int]:
        """Bytes of memory of an inner device, free and in all; 0 if there is no such device."""
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
        """ROTARY devices over the inner devices named, comma separated; by default over those chosen at load.

        Raises
        ------
        DeviceError
            There is no such inner device, or every ROTARY device is in use over another one.
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
        """The list llama.cpp would choose by default if this library had not been loaded."""
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


class Pool:
    """The slots of one model on one device. Close it after the model's buffers are gone."""

    def __init__(
        self,
        lib: Library,
        device: int,
        *,
        budget: str,
        model: str,
        margin_bytes: int,
        repack: bool,
        direct: bool,
        store: str,
        prefetch: bool,
        staging_bytes: int,
        pin: str,
        policy: tuple[str, Any],
        predictor: tuple[str, Any],
        adaptive: bool,
    ) -> None:
        """`policy` and `predictor`: a name, and the caller's own calls or NULL, which must live as long."""
        self.lib = lib
        self.device = device
        self._own = (policy[1], predictor[1])
        # The texts must outlive the call only; the library copies them.
        named = (budget, model, store, pin, policy[0], predictor[0])
        texts = [lib.ffi.new("char[]", text.encode()) for text in named]
        config = lib.ffi.new("rotary_config *", {
            "struct_size": lib.ffi.sizeof("rotary_config"), "budget": texts[0], "model": texts[1],
            "margin_bytes": margin_bytes, "repack": repack, "direct": direct, "store": texts[2],
            "prefetch": prefetch, "staging_bytes": staging_bytes, "pin": texts[3],
            "policy": texts[4], "own_policy": policy[1],
            "predictor": texts[5], "own_predictor": predictor[1], "adaptive": adaptive,
        })  # fmt: skip
        with native_log_muted():
            self._pool = lib.c.rotary_pool_open(device, config)
        if not self._pool:
            lib.check(lib.c.rotary_last_status())

    def prepare(self) -> None:
        """Resolve the budget and allocate the slots now."""
        with native_log_muted():
            self.lib.check(self.lib.c.rotary_pool_prepare(self._pool))

    def set_budget(self, text: str) -> None:
        """Change the budget; the slots are allocated anew, cold, at the next graph or `prepare`."""
        with native_log_muted():
            self.lib.check(self.lib.c.rotary_pool_set_budget(self._pool, text.encode()))

    def stats(self) -> dict[str, Any]:
        """The fields of struct rotary_stats, `path`, `store` and `io` by name."""
        return self._fields("rotary_stats", self.lib.c.rotary_pool_stats)

    def layer_stats(self) -> list[dict[str, Any]]:
        """The fields of struct rotary_layer_stats for each paged layer.

        Of fewer while another thread's loading, as of an adapter, makes this pool form its layers anew.
        """
        layers: list[dict[str, Any]] = []
        with native_log_muted(), contextlib.suppress(RotaryError):
            for i in range(self.stats()["n_layers"]):
                layers.append(self._fields("rotary_layer_stats", self.lib.c.rotary_pool_layer_stats, i))
        return layers

    def _fields(self, struct: str, function: Any, *args: int) -> dict[str, Any]:
        ffi = self.lib.ffi
        out = ffi.new(f"{struct} *")
        self.lib.check(function(self._pool, *args, out))
        fields = {name: getattr(out, name) for name, _ in ffi.typeof(struct).fields if name != "reserved"}
        for name in fields.keys() & {"path", "store", "io"}:
            constant = ffi.typeof(f"enum rotary_{name}").elements[fields[name]]
            fields[name] = constant.removeprefix(f"ROTARY_{name.upper()}_").lower()
        return fields

    def trace(self, on: bool) -> None:
        """Record routings from now on, or stop."""
        self.lib.check(self.lib.c.rotary_pool_trace(self._pool, on))

    def read_trace(self) -> tuple[list[int], int]:
        """Take what has been recorded, as numbers (rotary.h), and how many lookups were dropped so far."""
        ffi, dropped = self.lib.ffi, self.lib.ffi.new("uint64_t *")
        n = self.lib.c.rotary_pool_trace_read(self._pool, ffi.NULL, -1, dropped)
        records = ffi.new("int32_t[]", max(n, 1))
        n = self.lib.c.rotary_pool_trace_read(self._pool, records, n, dropped)
        return ffi.unpack(records, n) if n else [], dropped[0]

    def warm(self, layer: int, experts: list[int]) -> None:
        """What a layer's slots begin with, the most wanted first. Before they are allocated."""
        self.lib.check(self.lib.c.rotary_pool_warm(self._pool, layer, experts, len(experts)))

    def learn(self, layer: int, popularity: Any, pairs: Any, n_tokens: int) -> None:
        """What a profile says of a layer, float32 [n_expert], [n_expert, n_expert] or None; before that."""
        ffi = self.lib.ffi
        self.lib.check(
            self.lib.c.rotary_pool_learn(
                self._pool, layer, ffi.from_buffer("float[]", popularity),
                ffi.NULL if pairs is None else ffi.from_buffer("float[]", pairs), len(popularity), n_tokens,
            )
        )  # fmt: skip

    def predictor_name(self) -> str:
        """Who names what comes ahead; empty where nothing does."""
        text = self.lib.ffi.new("char[]", 64)
        self.lib.c.rotary_pool_predictor(self._pool, text, len(text))
        return self.lib.text(text)

    def policy_name(self) -> str:
        """The eviction policy that was chosen."""
        return self.lib.text(self.lib.c.rotary_pool_policy(self._pool))

    def notices(self) -> list[str]:
        """Fallbacks and choices worth saying, in the order they were made."""
        texts: list[str] = []
        while pointer := self.lib.c.rotary_pool_notice(self._pool, len(texts)):
            texts.append(self.lib.text(pointer))
        return texts

    def reset_counters(self) -> None:
        """Start counting anew."""
        self.lib.c.rotary_pool_reset_counters(self._pool)

    def close(self) -> None:
        """Drop the pool. Idempotent."""
        if self._pool:
            pool, self._pool = self._pool, None
            self.lib.c.rotary_pool_close(pool)
