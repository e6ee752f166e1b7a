# SPDX-License-Identifier: MIT
"""The fuzzed inputs: one class for each kind, which damages inputs and gives them to all their readers.

`case` handles one damaged input and returns "accepted" or "refused"; any exception is a fault. A reader may
refuse only with a RotaryError of one line. Commands run in this process, through click, as a user would type
them; cases that read the environment or load a model have a process of their own.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
from click.testing import CliRunner
from gguf import GGUFWriter

from models.synth import synthesize
from rotary_llamacpp import traces
from rotary_llamacpp.cli import main
from rotary_llamacpp.config import Budget, RotaryConfig
from rotary_llamacpp.conversion import journal
from rotary_llamacpp.errors import RotaryError
from rotary_llamacpp.gguf_files import imatrices
from rotary_llamacpp.gguf_files.header import read_header
from rotary_llamacpp.native import binding as _native
from rotary_llamacpp.policies import NATIVE
from rotary_llamacpp.predictors import NAMES as PREDICTORS
from rotary_llamacpp.traces import profiles
from rotary_llamacpp.units import parse_bytes, parse_size
from tests.fuzz.damage import FLOATS, TEXTS, Header, number, spoiled, spoiled_text, text
from tests.support import write_all

ACCEPTED, REFUSED, UPSTREAM = "accepted", "refused", "upstream's"
SMALL = {
    "layers": 2,
    "embd": 96,
    "heads": 2,
    "heads_kv": 1,
    "head_dim": 32,
    "ff": 32,
    "experts": 8,
    "used": 2,
}


class Fault(Exception):
    """Behaviour that no damaged input may cause."""


def one_line(said: str) -> None:
    """Check that the text of a refusal is one printable line."""
    if len(said.splitlines()) != 1 or not said.isprintable():
        raise Fault(f"a refusal that is not one line of text: {said[:300]!r}")


def refused(call: Callable[[], Any]) -> str:
    """Call a reader; returns whether it accepted or refused."""
    try:
        call()
    except RotaryError as error:
        one_line(str(error))
        return REFUSED
    return ACCEPTED


def command(*arguments: object) -> str:
    """Run ``rotary`` in this process; returns whether it accepted or refused."""
    ran = CliRunner().invoke(main, [str(each) for each in arguments])
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    if ran.exit_code == 0:
        return ACCEPTED
    said = ran.stderr
    if arguments[0] == "convert" and not said.startswith("Usage: "):
        said = said[said.rfind("rotary: ") :]  # after the line that announces the plan
    if ran.exit_code != 2 or not said.startswith(("rotary: ", "Usage: ")):
        raise Fault(f"{arguments[0]}: exit status {ran.exit_code}, {ran.stderr[:300]!r}")
    if said.startswith("rotary: "):
        one_line(said.rstrip("\n"))
    return REFUSED


def worst(*outcomes: str) -> str:
    """Return ACCEPTED if all outcomes are, else REFUSED."""
    return REFUSED if REFUSED in outcomes else ACCEPTED


def forked(work: Callable[[], str], seconds: float = 20) -> str:
    """Run `work` in a child process; returns its outcome, or raises a Fault if it raised or died."""
    there, here = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(seconds))
        said = b""
        try:
            os.close(there)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            said = work().encode()
        except BaseException:
            said = traceback.format_exc()[-3000:].encode("utf-8", "replace")
        finally:
            os.write(here, said)
            os._exit(0)
    os.close(here)
    with os.fdopen(there, "rb") as pipe:
        said = pipe.read().decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise Fault(f"died of {signal.Signals(os.WTERMSIG(status)).name}")
    if said not in (ACCEPTED, REFUSED):
        raise Fault(said)
    return said


class Target:
    """One kind of input; `folder` is for this target alone."""

    share = 1.0  # of the requested cases; smaller for targets that load a model in each

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        warnings.simplefilter("error")  # users would see an unintended line on stderr
        warnings.simplefilter("ignore", ResourceWarning)  # numpy's, for damaged archives; not shown to users

    def case(self, rng: Random) -> str:
        raise NotImplementedError


# ---- model files -------------------------------------------------------------------------------------


def write(path: Path, header: bytes, n_bytes: int) -> Path:
    """Write a file of `n_bytes` that begins with `header`; the rest is a hole."""
    path.write_bytes(header)
    os.truncate(path, max(len(header), n_bytes))
    return path


def one_tensor_an_expert(path: Path) -> Path:
    """Write a model with one tensor per expert, as Mixtral's files had until April 2024."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    for il in range(2):
        for name in ("gate", "up", "down"):
            for expert in range(4):
                writer.add_tensor(f"blk.{il}.ffn_{name}.{expert}.weight", np.ones((32, 32), np.float32))
    return written(writer, path)


def importance_matrix(path: Path) -> Path:
    """Write an importance matrix as llama-imatrix does."""
    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    for name, n_mat in (("blk.0.attn_q.weight", 1), ("blk.0.ffn_up_exps.weight", 8)):
        writer.add_tensor(f"{name}.in_sum2", np.ones((n_mat, 64), np.float32))
        writer.add_tensor(f"{name}.counts", np.ones((n_mat, 1), np.float32))
    return written(writer, path)


def written(writer: GGUFWriter, path: Path) -> Path:
    write_all(writer)
    return path


class Gguf(Target):
    """Headers of models, whole and split, and of importance matrices, for all that reads headers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        models = [
            synthesize(folder / "qwen.gguf", "test", **SMALL),
            synthesize(folder / "oss.gguf", "test-gpt-oss", **SMALL),
            one_tensor_an_expert(folder / "one.gguf"),
            importance_matrix(folder / "imatrix.gguf"),
            synthesize(folder / "split", "test", shards=2, **SMALL),
        ]
        profile = folder / "small.profile"
        profiles.learn([small_trace(Random(1))]).save(profile)
        with_profile = folder / "stored.gguf"
        command("convert", models[0], with_profile, "--profile", profile, "--no-progress")
        models.append(with_profile)
        self.bases = [(path, read_header(path)) for path in models]
        self.made = [(path, Header(header), header.n_bytes) for path, header in self.bases]

    def damaged(self, rng: Random) -> Path:
        """A file with a damaged header, perhaps the first of two shards."""
        base, header, n_bytes = rng.choice(self.made)
        first = base.name.startswith("split")
        path = self.folder / (f"damaged-{base.name}" if first else "damaged.gguf")
        if first:
            other = base.name.replace("-00001-", "-00002-")
            shutil.copyfile(base.with_name(other), path.with_name(f"damaged-{other}"))
        raw = header.encoded(rng)
        return write(path, raw, len(raw) + header.data_bytes if rng.random() < 0.9 else n_bytes)

    def case(self, rng: Random) -> str:
        path = self.damaged(rng)
        memory = ("--vram", rng.choice(("0", "8GiB")), "--ram", rng.choice(("1GiB", "64GiB")))
        refused(lambda: imatrices.load(str(path)))
        refused(lambda: profiles.stored(path))
        command("info", path, "--json")
        command("plan", path, *memory, "--json")
        command("plan", path, *memory, "--ctx", number(rng) % (1 << 31) + 1)
        command("convert", path, self.folder / "out.gguf", "--dry-run")
        return command("info", path)


class Load(Gguf):
    """Damaged headers loaded by llama.cpp with the library, without the package's own reader before."""

    share = 0.1

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import llama_cpp

        os.environ["OMP_NUM_THREADS"] = "1"
        self.llama_cpp = llama_cpp
        self.library = _native.load()

    def load(self, path: Path, paged: bool) -> str:
        """Load and compute a few tokens."""
        api = self.llama_cpp.llama_cpp
        params = api.llama_model_default_params()
        if not paged:
            devices = self.library.devices_without_rotary()
            params.devices = ctypes.cast(devices, ctypes.c_void_p)
        api.llama_model_default_params = lambda: params
        try:
            llama = self.llama_cpp.Llama(
                str(path),
                n_ctx=64,
                n_batch=16,
                n_threads=1,
                n_threads_batch=1,
                n_gpu_layers=-1,
                verbose=False,
            )
        except (ValueError, RuntimeError):
            return REFUSED
        try:
            llama.eval([1, 2, 3])
            llama.eval([4])
        except RuntimeError:
            return REFUSED
        llama.close()
        return ACCEPTED

    def case(self, rng: Random) -> str:
        path = self.damaged(rng)
        if rng.random() < 0.5:
            with path.open("r+b") as file:  # random bytes instead of weights
                file.seek(min(path.stat().st_size, 20000))
                file.write(rng.randbytes(min(1 << 16, max(0, path.stat().st_size - 20000))))
        environment = {"ROTARY_BUDGET": rng.choice(("min", "50%", "auto", "3 slots"))}
        environment["ROTARY_STORE"] = rng.choice(("mmap", "direct"))
        os.environ.update(environment)  # the pool reads it anew; see Environment for what registration reads
        try:
            return forked(lambda: self.load(path, True))
        except Fault as fault:
            try:
                forked(lambda: self.load(path, False))
            except Fault:
                return UPSTREAM  # stock llama.cpp does not survive it either
            raise fault from None


# ---- traces and profiles -----------------------------------------------------------------------------


def small_trace(rng: Random) -> traces.Trace:
    """A random trace of two layers of eight experts."""
    random = np.random.default_rng(rng.getrandbits(32))
    rows = [(s, int(t > 3), t, il) for s in range(2) for t in range(8) for il in range(2)]
    head = np.array(rows, np.int32)
    experts = np.array([random.permutation(8)[:2] for _ in rows], np.int32)
    return traces.Trace(
        *head.T, experts, random.random(experts.shape).astype(np.float32), random.random(experts.shape) < 0.5,
        8, {0: 4096, 1: 4096}, {"model": "small"},
    )  # fmt: skip


class Archives(Target):
    """Damaged NumPy archives: damaged bytes, or archives written from damaged arrays and JSON."""

    def spoiled_archive(self, rng: Random, arrays: dict[str, np.ndarray]) -> bytes:
        out = io.BytesIO()
        arrays = dict(arrays)
        how = rng.random()
        if how < 0.7:
            for _ in range(rng.choice((1, 1, 2, 3))):
                self.wrong_array(rng, arrays)
        save = rng.choice((np.savez, np.savez, np.savez_compressed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(out, **arrays)
        return spoiled(rng, out.getvalue()) if how > 0.55 else out.getvalue()

    def wrong_array(self, rng: Random, arrays: dict[str, np.ndarray]) -> None:
        if not arrays:
            return
        name = rng.choice(sorted(arrays))
        array = arrays[name]
        if name == "meta" and rng.random() < 0.9:
            try:
                raw = spoiled_json(rng, json.loads(array.tobytes())).encode("utf-8", "replace")
            except (ValueError, TypeError, IndexError, RecursionError):  # spoiled before
                return
            arrays[name] = np.frombuffer(raw, np.uint8)
            return
        how = rng.randrange(7)
        with np.errstate(all="ignore"):
            if how == 0:
                del arrays[name]
            elif how == 1 and array.size:
                array = array.copy()
                values = FLOATS if array.dtype.kind == "f" else (number(rng) % 256 - 128,)
                array.flat[rng.randrange(array.size)] = np.array(rng.choice(values)).astype(array.dtype)
                arrays[name] = array
            elif how == 2:
                if array.dtype.kind not in "iufb":
                    return
                kinds = ("u1", "i1", "i8", "u8", "f2", "f8", "c8", "?", "S3", "U2", "M8[s]", ">i4", ">f4")
                arrays[name] = array.astype(rng.choice(kinds))
            elif how == 3:
                arrays[name] = array[: rng.randrange(len(array) + 1)] if array.ndim else array
            elif how == 4:
                arrays[name] = rng.choice((array.reshape(-1), array[None], np.array(number(rng) % 2**31)))
            elif how == 5:
                arrays[name] = np.repeat(array, 2, axis=rng.randrange(array.ndim)) if array.ndim else array
            else:
                arrays[name] = np.array([{"a": 1}, None], object)


def wrong_json(rng: Random) -> Any:
    """A value of any type."""
    return rng.choice((
        None, True, -1, 0, number(rng), -number(rng), 0.5, 1e300, text(rng), "1", [], {}, [number(rng)],
        {"0": number(rng)}, [[[1]]],
    ))  # fmt: skip


def spoiled_json(rng: Random, found: Any) -> str:
    """JSON with changed values or damaged text."""
    if rng.random() < 0.2:
        return spoiled_text(rng, json.dumps(found))
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                walk(value[key])

    walk(found)
    for inside, key in rng.sample(places, min(len(places), rng.choice((1, 1, 2)))):
        how = rng.random()
        if how < 0.15 and isinstance(inside, dict):
            inside.pop(key, None)
        elif how < 0.3 and isinstance(inside, dict):
            inside[text(rng)] = inside.get(key)
        else:
            inside[key] = wrong_json(rng)
    whole = json.dumps(found)
    return (
        whole
        if rng.random() < 0.95
        else rng.choice((f"[{whole}]", whole * 2, "[" * 100000, '{"a":' * 100000))
    )


class Traces(Archives):
    """Damaged traces of both formats, for replays, profiles and plans."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        _native.load()
        self.model = synthesize(folder / "model.gguf", "test", **SMALL)
        self.bases = [small_trace(Random(seed)) for seed in range(4)]

    def damaged(self, rng: Random) -> Path:
        base = rng.choice(self.bases)
        if rng.random() < 0.6:
            path = self.folder / "damaged.trace"
            path.write_bytes(self.spoiled_archive(rng, base._archive()))
            return path
        path = self.folder / "damaged.csv"
        lines = base._csv().splitlines(keepends=True)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(len(lines))
            how = rng.random()
            if how < 0.6:
                cells = lines[at].split(",")
                cells[rng.randrange(len(cells))] = rng.choice(
                    (str(number(rng)), f"-{number(rng)}", text(rng))
                )
                lines[at] = ",".join(cells)
            elif how < 0.8:
                lines[at] = spoiled_text(rng, lines[at])
            else:
                del lines[at]
        raw = "".join(lines).encode("utf-8", "replace")
        path.write_bytes(spoiled(rng, raw) if rng.random() < 0.2 else raw)
        return path

    def case(self, rng: Random) -> str:
        path = self.damaged(rng)
        how = ["--policies", rng.choice(NATIVE), "--budgets", rng.choice(("25", "0.1,100"))]
        if rng.random() < 0.5:
            how += ["--link", "25GB/s", "--predictors", rng.choice(("none", *PREDICTORS))]
        return worst(
            command("simulate", path, *how),
            command("profile", self.model, path, "-o", self.folder / "out.profile"),
            command("plan", self.model, "--trace", path, "--vram", "0", "--ram", "1GiB"),
            refused(lambda: traces.load(path).save(self.folder / rng.choice(("again.csv", "again.trace")))),
        )


class Profiles(Archives):
    """Damaged profiles, for replays, plans, conversions and runs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        _native.load()
        self.model = synthesize(folder / "model.gguf", "test", **SMALL)
        self.trace = folder / "good.trace"
        trace = small_trace(Random(1))
        trace.save(self.trace)
        good = folder / "good.profile"
        profiles.learn([trace]).save(good)
        with np.load(good) as archive:
            self.arrays = {name: archive[name] for name in archive.files}

    def run(self, path: Path, predictor: str) -> str:
        """Run a model that begins with the profile."""
        from rotary_llamacpp import Llama

        rotary = {"budget": "min", "store": "direct", "prefetch": predictor, "profile": str(path)}
        try:
            llama = Llama(
                str(self.model), rotary=rotary, n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False
            )
        except RotaryError as error:
            one_line(str(error))
            return REFUSED
        llama.eval([1, 2, 3])
        llama.eval([4])
        llama.close()
        return ACCEPTED

    def case(self, rng: Random) -> str:
        path = self.folder / "damaged.profile"
        path.write_bytes(self.spoiled_archive(rng, self.arrays))
        outcomes = [
            command("plan", self.model, "--profile", path, "--vram", "0", "--ram", "1GiB"),
            command(
                "simulate", self.trace, "--policies", "lru", "--budgets", "25", "--link", "1GB/s",
                "--predictors", rng.choice(PREDICTORS), "--profile", path,
            ),
            command("convert", self.model, self.folder / "out.gguf", "--profile", path, "--dry-run"),
        ]  # fmt: skip
        if rng.random() < 0.05:
            outcomes.append(forked(lambda: self.run(path, rng.choice(("transition", "popular", "mixed")))))
        return worst(*outcomes)


# ---- journals ----------------------------------------------------------------------------------------


class Journals(Target):
    """Damaged journals of interrupted conversions, found by the same conversion and by others."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.source = synthesize(folder / "model.gguf", "test", **SMALL)
        self.place = folder / "out"
        self.place.mkdir()
        self.out = self.place / "out.gguf"
        self.note = journal.note_path(self.out)
        self.known: bytes = b""
        self.part: bytes = b""
        write = journal.Journal.note

        def noted(own: journal.Journal, file: int, n_bytes: int) -> None:
            write(own, file, n_bytes)
            self.known, self.part = self.note.read_bytes(), journal.part(self.out).read_bytes()

        journal.Journal.note = noted  # type: ignore[method-assign]
        command("convert", self.source, self.out, "--no-progress")
        journal.Journal.note = write  # type: ignore[method-assign]
        if not self.known:
            raise Fault("no journal was written")

    def case(self, rng: Random) -> str:
        shutil.rmtree(self.place)
        self.place.mkdir()
        raw = self.known
        if rng.random() < 0.7:
            raw = spoiled_json(rng, json.loads(raw)).encode("utf-8", "replace")
            if not raw.startswith(b'{"subject": ') and rng.random() < 0.5:
                raw = b'{"subject": ' + raw
        if rng.random() < 0.4:
            raw = spoiled(rng, raw)
        self.note.write_bytes(raw)
        if rng.random() < 0.8:
            journal.part(self.out).write_bytes(self.part if rng.random() < 0.7 else spoiled(rng, self.part))
        more = rng.choice(((), (), ("--alignment", "512"), ("--verify",)))
        found = command("convert", self.source, self.out, "--no-progress", *more)
        left = sorted(path.name for path in self.place.iterdir())
        if found == ACCEPTED and self.out.name not in left:
            raise Fault(f"done, and there is {left}")
        return found


# ---- texts -------------------------------------------------------------------------------------------

WORDS = (*TEXTS, *("25%", "8GiB", "16 slots", "1.5", "25GB/s", "100", "12", "512MiB", " "))


class Budgets(Target):
    """Budgets, sizes and bandwidths, for the readers of the package and of the library."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.library = _native.load()

    def divide(self, text: bytes, layers: list[tuple[int, int, int]]) -> int:
        """Divide a budget by the library; returns its status, and checks that an error's text is one line."""
        ffi, c = self.library.ffi, self.library.c
        slots, taken = ffi.new("int32_t[]", len(layers)), ffi.new("uint64_t *")
        sizes = ffi.new("rotary_layer_size[]", layers)
        status = c.rotary_budget_divide(text, sizes, len(layers), rng_free(layers), slots, taken)
        if status < 0:
            said = self.library.text(c.rotary_last_error())
            if len(said.encode().splitlines()) != 1:
                raise Fault(f"a refusal that is not one line of text: {said[:300]!r}")
            one_line(str(RotaryError(said)))
        elif not all(used <= n <= all_ for n, (_, all_, used) in zip(slots, layers, strict=True)):
            raise Fault(f"{text[:100]!r}: {list(slots)} slots of {layers}")
        return status

    def case(self, rng: Random) -> str:
        good = rng.choice(("25%", "8GiB", "16 slots", "1000000", "0.5", "auto", "12.5 %", "1.5KiB"))
        said = spoiled_text(rng, good) if rng.random() < 0.6 else text(rng, WORDS)
        value: Any = said
        if rng.random() < 0.2:
            value = rng.choice(
                (number(rng), -number(rng), rng.choice(FLOATS), rng.random(), None, [], True, b"")
            )
        layers = []
        for _ in range(rng.randint(1, 6)):
            n = rng.choice((1, 2, 8, 128, rng.randint(1, 65536)))
            layers.append((rng.choice((1, 4096, 1 << 20, rng.getrandbits(36) + 1)), n, rng.randint(1, n)))
        outcomes = [
            refused(lambda: RotaryConfig.from_any(value)),
            refused(lambda: RotaryConfig.from_any({"budget": value, "margin": said, "staging": value})),
            refused(lambda: parse_bytes(said)),
            refused(lambda: parse_size(said)),
        ]
        try:
            budget = Budget.parse(value)
        except RotaryError:
            pass
        else:
            if self.divide(budget.text.encode(), layers) not in (0, -4):
                raise Fault(
                    f"{value!r} is {budget.text!r} to Python; the library: {self.library.last_error()!r}"
                )
        self.divide(said.replace("\x00", "").encode("utf-8", "replace"), layers)
        if rng.random() < 0.1:
            which = rng.choice(
                ("vram", "ram", "link", "disk", "ram-rate", "vram-rate", "budget", "store", "type")
            )
            there = {"vram": "8GiB", "ram": "64GiB"} | {which: said.replace("\x00", "")}
            options = [f"--{name}={its}" for name, its in there.items()]
            outcomes.append(command("plan", "mixtral-8x7b", *options))
        return worst(*outcomes)


def rng_free(layers: list[tuple[int, int, int]]) -> int:
    """Memory for half of all experts."""
    return sum(n_bytes * n for n_bytes, n, _ in layers) // 2


class Environment(Target):
    """Environment variables, two on average, at registration in a process of its own; some cases also run."""

    VALUES: ClassVar = {
        "ROTARY_BUDGET": ("25%", "auto", "min", "off", "3 slots", "1MiB", "100%"),
        "ROTARY_MARGIN": ("512MiB", "1"),
        "ROTARY_STAGING": ("1MiB", "64MiB", "1"),
        "ROTARY_RAM": ("1GiB", "1"),
        "ROTARY_POLICY": ("lru", "recall", "auto", "s3fifo"),
        "ROTARY_PREFETCH": ("0", "1", "auto", "router", "mixed", "popular"),
        "ROTARY_SPLIT": ("even", "adaptive"),
        "ROTARY_STORE": ("auto", "mmap", "direct"),
        "ROTARY_PIN": ("auto", "on", "off"),
        "ROTARY_INNER": ("CPU", "CPU,CPU", "cpu"),
        "ROTARY_REPACK": ("0", "1"),
        "ROTARY_DIRECT": ("0", "1"),
        "ROTARY_IO": ("threads", "io_uring", "uring"),
        "ROTARY_STATS": ("0", "1"),
        "ROTARY_DEVICE_LOOKUPS": ("0", "1"),
        "ROTARY_LINK": ("/dev/null", "nothing.so"),
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import llama_cpp

        self.llama_cpp = llama_cpp
        self.model = synthesize(folder / "model.gguf", "test", **SMALL)
        os.environ["OMP_NUM_THREADS"] = "1"

    def run(self, chosen: dict[str, str], compute: bool) -> str:
        os.environ.update(chosen)
        try:
            library = _native.load()
        except RotaryError as error:
            one_line(str(error))
            return REFUSED
        if compute:
            llama = self.llama_cpp.Llama(
                str(self.model), n_ctx=64, n_threads=1, n_threads_batch=1, n_gpu_layers=-1, verbose=False
            )
            try:
                llama.eval([1, 2, 3])
                llama.eval([4])
            except RuntimeError:  # a budget below one token's experts is refused at the allocation of slots
                said = library.text(library.c.rotary_last_error())
                if not said:
                    raise
                one_line(said)
                return REFUSED
            llama.close()
        return ACCEPTED

    def case(self, rng: Random) -> str:
        chosen = {}
        for name in rng.sample(sorted(self.VALUES), rng.choice((1, 1, 2, 4))):
            good = rng.choice(self.VALUES[name])
            value = rng.choice((good, spoiled_text(rng, good), spoiled_text(rng, good), text(rng, WORDS)))
            chosen[name] = value.replace("\x00", "").encode("utf-8", "replace").decode()
        if chosen.get("ROTARY_INNER", "").find("rpc:") >= 0:
            del chosen["ROTARY_INNER"]
        compute = rng.random() < 0.2
        return forked(lambda: self.run(chosen, compute))


TARGETS: dict[str, type[Target]] = {
    "gguf": Gguf,
    "load": Load,
    "traces": Traces,
    "profiles": Profiles,
    "journals": Journals,
    "budgets": Budgets,
    "environment": Environment,
}
