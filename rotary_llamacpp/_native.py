# SPDX-License-Identifier: MIT
"""The native library through cffi: rotary.h is the single truth, read between its API markers.

The only module that touches cffi, hence its length, and the only one that talks to ggml directly. Turns
status codes into exceptions; decides nothing. Threads: ``load()`` may be called from any thread, a ``Pool``
from one at a time.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import machine, pinned
from .errors import BudgetError, DeviceError, LibraryError, ReadError, RotaryError, VersionError
from .policies import EvictionPolicy, Factory

ABI_VERSION = 4

_HERE = Path(__file__).resolve().parent
_STRUCTS = (
    "rotary_config", "rotary_stats", "rotary_layer_stats", "rotary_layer_size", "rotary_load",
    "rotary_policy",
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
    return Path(override).absolute() if override else _HERE / "lib" / "libggml-rotary.so"


def api_declarations() -> str:
    """The C declarations of rotary.h, as installed with the package or as found in a checkout."""
    for header in (_HERE / "include" / "rotary.h", _HERE.parent / "native" / "include" / "rotary.h"):
        if header.is_file():
            return header.read_text().partition("// BEGIN API\n")[2].partition("// END API")[0]
    raise LibraryError(
        f"{_HERE}: rotary.h is missing; it is part of the package; install rotary-llamacpp again"
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
    import llama_cpp.llama_cpp

    return llama_cpp.llama_cpp._lib


def ggml_build(lib: ctypes.CDLL) -> tuple[str, str]:
    """Version and commit of the ggml in this process."""
    for function in (lib.ggml_version, lib.ggml_commit):
        function.restype = ctypes.c_char_p
    return lib.ggml_version().decode(), lib.ggml_commit().decode()


def missing_cpu_features(lib: ctypes.CDLL) -> list[str]:
    """CPU features that this llama.cpp was compiled to use and this machine lacks: it would die of SIGILL."""
    flags = machine.cpu_flags()
    if not flags:
        return []
    return [
        flag
        for name, flag in machine.CPU_FEATURES.items()
        if flag not in flags and (has := getattr(lib, f"ggml_cpu_has_{name}", None)) is not None and has()
    ]


@contextlib.contextmanager
def _native_log_muted() -> Iterator[None]:
    """llama.cpp's log without what our library says in a call: its error text becomes an exception's."""
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


class Library:
    """The loaded library and its devices."""

    def __init__(self, path: Path) -> None:
        import cffi

        machine.check_library_machine(path)
        check_llama_cpp_version()
        self.path = path
        self.llama = libllama()
        missing = missing_cpu_features(self.llama)
        if missing:
            raise LibraryError(
                f"llama-cpp-python: compiled for a CPU with {', '.join(missing)}, which this one lacks; "
                "it would stop with an illegal instruction; build it here with `pip install "
                f"--no-binary :all: llama-cpp-python=={pinned.LLAMA_CPP_PYTHON}`"
            )
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

    def _register(self) -> None:
        lib = self.llama
        lib.ggml_backend_load.restype = ctypes.c_void_p
        lib.ggml_backend_load.argtypes = [ctypes.c_char_p]
        lib.ggml_backend_dev_by_name.restype = ctypes.c_void_p
        lib.ggml_backend_dev_by_name.argtypes = [ctypes.c_char_p]
        with _native_log_muted():
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
        with _native_log_muted():
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
        policy: OwnPolicy | str,
    ) -> None:
        self.lib = lib
        self.device = device
        self.policy = policy
        # The texts must outlive the call only; the library copies them.
        named, own = _policy(lib, policy)
        texts = [lib.ffi.new("char[]", text.encode()) for text in (budget, model, store, pin, named)]
        config = lib.ffi.new("rotary_config *", {
            "struct_size": lib.ffi.sizeof("rotary_config"), "budget": texts[0], "model": texts[1],
            "margin_bytes": margin_bytes, "repack": repack, "direct": direct, "store": texts[2],
            "prefetch": prefetch, "staging_bytes": staging_bytes, "pin": texts[3],
            "policy": texts[4], "own_policy": own,
        })  # fmt: skip
        with _native_log_muted():
            self._pool = lib.c.rotary_pool_open(device, config)
        if not self._pool:
            lib.check(lib.c.rotary_last_status())

    def prepare(self) -> None:
        """Resolve the budget and allocate the slots now."""
        with _native_log_muted():
            self.lib.check(self.lib.c.rotary_pool_prepare(self._pool))

    def set_budget(self, text: str) -> None:
        """Change the budget; the slots are allocated anew, cold, at the next graph or `prepare`."""
        with _native_log_muted():
            self.lib.check(self.lib.c.rotary_pool_set_budget(self._pool, text.encode()))

    def stats(self) -> dict[str, Any]:
        """The fields of struct rotary_stats, `path`, `store` and `io` by name."""
        return self._fields("rotary_stats", self.lib.c.rotary_pool_stats)

    def layer_stats(self) -> list[dict[str, Any]]:
        """The fields of struct rotary_layer_stats for each paged layer."""
        n_layers = self.stats()["n_layers"]
        return [
            self._fields("rotary_layer_stats", self.lib.c.rotary_pool_layer_stats, i) for i in range(n_layers)
        ]

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
        self.lib.c.rotary_pool_trace(self._pool, on)

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


class OwnPolicy:
    """An eviction policy that is written in Python, as the library calls it; `error`: the first it raised."""

    def __init__(self, lib: Library, factory: Factory, shape: Callable[[int], tuple[int, int]]) -> None:
        """`shape` gives n_expert and n_slots of a layer."""
        ffi = lib.ffi
        self.name = getattr(factory, "__name__", "own")
        self.error: BaseException | None = None
        self.restart()

        def of(layer: int) -> EvictionPolicy:
            if layer not in self._layers:
                self._layers[layer] = factory(layer, *shape(layer), self._shared)
            return self._layers[layer]

        def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(_: Any, layer: int, *args: Any) -> Any:
                try:
                    if self.error is None:
                        return function(of(layer), *args)
                except BaseException as error:
                    self.error = error
                return None

            return call

        def note(policy: EvictionPolicy, ids: Any, weights: Any, n_used: int, n_tokens: int) -> None:
            def rows(array: Any) -> list[list[Any]]:
                flat = ffi.unpack(array, n_used * n_tokens)
                return [flat[i : i + n_used] for i in range(0, len(flat), n_used)]

            policy.note(rows(ids), rows(weights) if weights else None)

        def choose(policy: EvictionPolicy, candidates: Any, n: int) -> int:
            return policy.choose(ffi.unpack(candidates, n))

        def enter(policy: EvictionPolicy, expert: int, wanted: int) -> None:
            policy.enter(expert, bool(wanted))

        def leave(policy: EvictionPolicy, expert: int) -> None:
            policy.leave(expert)

        chosen = guarded(choose)
        functions = {
            "note": guarded(note), "enter": guarded(enter), "leave": guarded(leave),
            "choose": lambda *args: -1 if (expert := chosen(*args)) is None else expert,
        }  # fmt: skip
        types = dict(ffi.typeof("rotary_policy").fields)
        self._callbacks = {name: ffi.callback(types[name].type, each) for name, each in functions.items()}
        self.calls = ffi.new("rotary_policy *", self._callbacks)

    def restart(self) -> None:
        """The slots are allocated anew, and empty."""
        self._shared: dict[str, Any] = {}
        self._layers: dict[int, EvictionPolicy] = {}


def _policy(lib: Library, policy: OwnPolicy | str) -> tuple[str, Any]:
    """A policy as the library takes it: its name, and its calls if it is a Python one."""
    return ("lru", policy.calls) if isinstance(policy, OwnPolicy) else (policy, lib.ffi.NULL)


class Cache:
    """Slot tables of all layers of a model with one policy, without a model: to replay traces on.

    `policy` is a name, or a class as in `rotary_llamacpp.policies`; `n_slots` those of each layer.
    """

    def __init__(self, lib: Library, policy: Factory | str, n_expert: int, n_slots: list[int]) -> None:
        self.lib, self.n_slots = lib, n_slots
        self._own = (
            policy
            if isinstance(policy, str)
            else OwnPolicy(lib, policy, lambda layer: (n_expert, n_slots[layer]))
        )
        named, own = _policy(lib, self._own)
        pointer = lib.c.rotary_cache_new(named.encode(), own, len(n_slots), n_expert, n_slots)
        if not pointer:
            lib.check(lib.c.rotary_last_status())
        self._cache = lib.ffi.gc(pointer, lib.c.rotary_cache_free)
        self._slots = [lib.c.rotary_cache_layer(self._cache, layer) for layer in range(len(n_slots))]
        self._loads = lib.ffi.new("rotary_load[]", max(n_slots))

    def resolve(self, layer: int, ids: Any, weights: Any = None) -> list[tuple[int, int, int]]:
        """Route int32 ids [n_tokens, n_used] with float32 weights: the loads (expert, slot, evicted)."""
        ffi = self.lib.ffi
        slot_ids = ffi.new("int32_t[]", ids.size)
        n = self.lib.c.rotary_cache_resolve(
            self._cache, layer, ffi.from_buffer("int32_t[]", ids),
            ffi.NULL if weights is None else ffi.from_buffer("float[]", weights),
            ids.shape[1], ids.shape[0], slot_ids, self._loads,
        )  # fmt: skip
        if isinstance(self._own, OwnPolicy) and self._own.error is not None:
            raise self._own.error
        if n < 0:
            raise RotaryError(
                f"layer {layer}: {len(ids)} tokens want more experts than its {self.n_slots[layer]} slots "
                "hold, or others than it has; a lookup must fit; replay fewer tokens at a time"
            )
        return [(load.expert, load.slot, load.evicted) for load in self._loads[0:n]]

    def replay(self, layers: Any, ids: Any, weights: Any = None) -> Any:
        """Resolve int32 rows ids [n, n_used] of `layers` [n], one by one, -1 at a row's end: misses [n]."""
        ffi = self.lib.ffi
        misses = ffi.new("int32_t[]", len(ids))
        status = self.lib.c.rotary_cache_replay(
            self._cache, len(ids), ffi.from_buffer("int32_t[]", layers), ffi.from_buffer("int32_t[]", ids),
            ffi.NULL if weights is None else ffi.from_buffer("float[]", weights), ids.shape[1], misses,
        )  # fmt: skip
        if isinstance(self._own, OwnPolicy) and self._own.error is not None:
            raise self._own.error
        if status < 0:
            raise RotaryError(
                "trace: a row wants more experts than there are slots, or others than there are; "
                f"{min(self.n_slots)} slots; replay it with more"
            )
        return ffi.unpack(misses, len(ids))

    def is_resident(self, layer: int, expert: int) -> bool:
        """Whether it is there."""
        return bool(self.lib.c.rotary_slots_slot_of(self._slots[layer], expert) >= 0)

    def reserve(self, layer: int, expert: int, keep: list[int]) -> bool:
        """Have an expert on its way, another not in `keep` evicted; False if there is no slot for it."""
        return bool(self.lib.c.rotary_slots_reserve(self._slots[layer], expert, keep, len(keep)) >= 0)

    def end_reservation(self, layer: int, expert: int, resident: bool) -> None:
        """It is there, or will not come."""
        self.lib.check(self.lib.c.rotary_slots_end_reservation(self._slots[layer], expert, resident))
