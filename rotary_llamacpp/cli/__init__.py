# SPDX-License-Identifier: MIT
"""The command ``rotary``: thin click commands over the package, and nothing else; long for its many options.

Exit status: 0 done, 1 the doctor found a failure, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import click

from ..config import PINS, SPLITS, STORES, RotaryConfig
from ..errors import LibraryError, RotaryError
from ..host.interrupts import exiting
from ..policies import AUTO, NATIVE
from ..predictors import NAMES as PREDICTORS
from ..units import parse_size


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except RotaryError as error:
        line = " ".join(str(error).splitlines())  # a file's name may have any letter
        click.echo(f"rotary: {line}", err=True)
        sys.exit(2)
    except MemoryError as error:
        click.echo(f"rotary: memory: {error or 'used up'}; what this takes is not there; free some", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("rotary: interrupted", err=True)
        sys.exit(130)


def _example(line: str) -> str:
    return f"\b\nExample:\n  {line}"


class _Number(click.FloatRange):
    """A number that is one: comparisons let NaN pass, and infinity is no temperature, and no time."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not math.isfinite(number := super().convert(value, param, ctx)):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rotary-llamacpp")
def main() -> None:
    """Run Mixture-of-Experts models with only some of their experts in memory."""


@main.command(epilog=_example('rotary run model.gguf -p "Once upon a time" -n 64 --budget 25%'))
@click.argument("model")
@click.option("-p", "--prompt", required=True, help="Text to continue.")
@click.option(
    "-n",
    "--n-predict",
    default=128,
    show_default=True,
    type=click.IntRange(min=0),
    help="Tokens to generate.",
)
@click.option(
    "--budget",
    default="auto",
    show_default=True,
    help='Memory for experts: auto, min, 25% or 0.25, 8GiB, bytes, "16 slots" per layer; 0 turns paging off.',
)
@click.option("--inner", help="ggml device that computes: CPU, CUDA0, ...  [default: first GPU, else CPU]")
@click.option("--temp", default=0.8, show_default=True, type=_Number(min=0), help="0 is greedy.")
@click.option("--seed", type=click.IntRange(min=0), help="Makes sampling repeatable.  [default: random]")
@click.option(
    "--ctx", type=click.IntRange(min=1), help="Context in tokens.  [default: the model's, at most 4096]"
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads.  [default: half of the CPUs that may be used; all for the prompt]",
)
@click.option("--no-repack", is_flag=True, help="Keep the plain weight layout on the CPU.")
@click.option(
    "--no-direct", is_flag=True, help="Page long prompts too instead of computing from the mapped file."
)
@click.option(
    "--store",
    default="auto",
    show_default=True,
    metavar=f"[{'|'.join(STORES)}]",
    help="Where experts come from: the mapped file, or direct reads past the page cache; auto reads directly "
    "where they do not fit into memory.",
)
@click.option(
    "--prefetch",
    default=AUTO,
    show_default=True,
    metavar=f"[{'|'.join((AUTO, *PREDICTORS))}]",
    help="Who names what is read ahead; auto is the next layers' routers, or what can stand in for them.",
)
@click.option("--no-prefetch", is_flag=True, help="Do not read ahead what the next layers may want.")
@click.option("--staging", metavar="SIZE", help="Memory for direct reads in flight, such as 64MiB.")
@click.option(
    "--pin",
    default="auto",
    show_default=True,
    metavar=f"[{'|'.join(PINS)}]",
    help="Page-lock the experts in host memory for a GPU; auto does if they take at most 3/4 of what is "
    "available.",
)
@click.option(
    "--policy",
    default=AUTO,
    show_default=True,
    metavar=f"[{'|'.join((AUTO, *NATIVE))}]",
    help="Who leaves when a slot is wanted; auto is the best that can run where lookups are resolved.",
)
@click.option(
    "--split",
    default=SPLITS[0],
    show_default=True,
    metavar=f"[{'|'.join(SPLITS)}]",
    help="Whether slots move to the layers where they serve more, on the CPU, or stay evenly divided.",
)
@click.option(
    "--profile",
    default="auto",
    show_default=True,
    help="File of rotary profile to fill the slots with; auto is the one beside the model; off is none.",
)
@click.option("--no-mmap", is_flag=True, help="Read the file into memory instead of mapping it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option(
    "--live", is_flag=True, help="Show a panel of all figures on the terminal while the model runs."
)
@click.option("--no-progress", is_flag=True, help="Show no live figures on a terminal.")
@click.option("--verbose", is_flag=True, help="Show llama.cpp's log.")
def run(
    model: str,
    prompt: str,
    n_predict: int,
    budget: str,
    inner: str | None,
    temp: float,
    seed: int | None,
    ctx: int | None,
    threads: int | None,
    no_repack: bool,
    no_direct: bool,
    store: str,
    prefetch: str,
    no_prefetch: bool,
    staging: str | None,
    pin: str,
    policy: str,
    split: str,
    profile: str,
    no_mmap: bool,
    as_json: bool,
    live: bool,
    no_progress: bool,
    verbose: bool,
) -> None:
    """Generate text: text on stdout, then a line of figures on stderr."""
    with _one_line_errors():
        config = RotaryConfig.from_any(
            {
                "budget": budget,
                "inner": inner,
                "repack": not no_repack,
                "direct": not no_direct,
                "store": store,
                "prefetch": False if no_prefetch else prefetch,
                "staging": staging,
                "pin": pin,
                "policy": policy,
                "split": split,
                "profile": profile,
                "verbose": not as_json,
            }
        )
        # These import llama_cpp: only once the options are known to be good.
        with exiting():
            from ..display.live import watching
            from ..runtime.generation import generate, load

        options = {"seed": seed} if seed is not None else {}
        with contextlib.ExitStack() as stack:
            watcher = stack.enter_context(watching(off=no_progress or as_json or verbose, panel=live))
            llama = load(
                model,
                config,
                n_ctx=ctx,
                n_threads=threads,
                n_threads_batch=threads,
                use_mmap=not no_mmap,
                verbose=verbose,
                watcher=watcher,
                **options,
            )
            stack.enter_context(contextlib.closing(llama))
            result = generate(
                llama,
                prompt,
                n_predict,
                temp=temp,
                on_text=lambda text: None if as_json else click.echo(text, nl=False),
                watcher=watcher,
            )
        if as_json:
            click.echo(json.dumps(result.to_dict()))
        else:
            click.echo()
            click.echo(f"rotary: {result.summary()}", err=True)
        if result.interrupted:
            sys.exit(130)


@main.command(epilog=_example("rotary info model.gguf"))
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(model: str, as_json: bool) -> None:
    """Show a model's experts and what paging takes, without loading weights."""
    with _one_line_errors():
        with exiting():
            from ..gguf_files.info import ModelInfo

        found = ModelInfo.read(model)
        click.echo(json.dumps(found.to_dict()) if as_json else found.describe())


@main.command(epilog=_example("rotary plan qwen3-30b-a3b --vram 12GiB --ram 64GiB --link pcie4x16"))
@click.argument("model")
@click.option("--type", "type_name", help="Of a named shape: q4_k_m, q8_0, ...  [default: the usual one]")
@click.option("--vram", help="GPU memory, such as 24GiB; 0 is none.  [default: what is free here]")
@click.option("--ram", help="Memory that can be taken, such as 64GiB.  [default: what is available here]")
@click.option(
    "--link", default="auto", show_default=True, help="Memory to GPU: pcie4x16, 25GB/s; auto is PCIe 4 x16."
)
@click.option("--disk", default="auto", show_default=True, help="Direct reads: 3.5GB/s; auto is that.")
@click.option("--ram-rate", help="At which the CPU reads weights: 58GB/s.  [default: that, or measured]")
@click.option("--vram-rate", help="At which the GPU reads weights.  [default: 936GB/s, an RTX 3090]")
@click.option("--ctx", type=click.IntRange(min=1), help="Context in tokens.  [default: as rotary run]")
@click.option("--prompt", type=click.IntRange(min=1), help="Its tokens.  [default: 512, or half the context]")
@click.option("--answer", type=click.IntRange(min=1), help="Its tokens.  [default: 128, or a quarter of it]")
@click.option("--budget", default="auto", show_default=True, help="Rotary's, as for rotary run.")
@click.option("--store", default="auto", show_default=True, help="On the CPU, as for rotary run.")
@click.option("--trace", help="File of rotary trace: hit rates by replaying it.")
@click.option(
    "--profile",
    default="auto",
    show_default=True,
    help="File of rotary profile; auto: beside the model; off.",
)
@click.option("--measure", is_flag=True, help="Calibrate CPU, memory and disk on this machine, in seconds.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads.  [default with --measure: all that may be used]",
)
@click.option("--plot", "plot_file", type=click.Path(), help="SVG to write: tok/s against budget.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    model: str, type_name: str | None, vram: str | None, ram: str | None, link: str, disk: str,
    ram_rate: str | None, vram_rate: str | None, ctx: int | None, prompt: int | None, answer: int | None,
    budget: str, store: str, trace: str | None, profile: str, measure: bool, threads: int | None,
    plot_file: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Foretell speed and memory of a model, a file or a named shape, and say how to run it.

    \b
    Shapes: mixtral-8x7b, mixtral-8x22b, qwen3-30b-a3b, qwen3-235b-a22b,
    gpt-oss-20b, gpt-oss-120b, deepseek-v3.
    """
    with _one_line_errors():
        with exiting():
            from ..planning.plan import describe, make, to_dict, write_plot

        found = make(
            model, type_name=type_name, vram=vram, ram=ram, link=link, disk=disk, ram_rate=ram_rate,
            vram_rate=vram_rate, n_ctx=ctx, prompt=prompt, answer=answer, budget=budget, store=store,
            trace=trace, profile=profile, measure=measure, threads=threads,
        )  # fmt: skip
        if plot_file is not None:
            write_plot(found, plot_file)
        click.echo(json.dumps(to_dict(found)) if as_json else describe(found))


@main.command(epilog=_example("rotary trace model.gguf --prompts prompts.txt -o model.trace"))
@click.argument("model")
@click.option("--prompts", required=True, help="Text file, one prompt a line.")
@click.option(
    "-o", "--output", required=True, help="Trace to write; CSV if it ends in .csv.", type=click.Path()
)
@click.option(
    "-n", "--n-predict", default=128, show_default=True, type=click.IntRange(min=0), help="Tokens a prompt."
)
@click.option("--budget", default="auto", show_default=True, help="As for rotary run.")
@click.option("--inner", help="ggml device that computes.  [default: first GPU, else CPU]")
@click.option(
    "--temp", default=0.8, show_default=True, type=_Number(min=0), help="Sampling temperature; 0 is greedy."
)
@click.option("--seed", type=click.IntRange(min=0), help="Makes sampling repeatable.  [default: random]")
@click.option("--ctx", type=click.IntRange(min=1), help="Context in tokens.  [default: as rotary run]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: as rotary run]")
def trace(
    model: str, prompts: str, output: str, n_predict: int, budget: str, inner: str | None, temp: float,
    seed: int | None, ctx: int | None, threads: int | None,
) -> None:  # fmt: skip
    """Record which experts a model chooses while it answers prompts."""
    with _one_line_errors():
        config = RotaryConfig(budget=budget, inner=inner, verbose=True)
        with exiting():
            from ..runtime.recording import read_prompts, record
            from ..traces.archive import check_writable

        texts = read_prompts(prompts)
        check_writable(output)

        def on_prompt(number: int, n_tokens: int) -> None:
            click.echo(f"rotary: prompt {number + 1} of {len(texts)}, {n_tokens} tokens", err=True)

        found = record(
            model, texts, n_predict, config, temp=temp, seed=seed, n_ctx=ctx, n_threads=threads,
            on_prompt=on_prompt,
        )  # fmt: skip
        found.save(output)
        click.echo(
            f"{output}: {found.tokens()} tokens in {len(found.layers)} layers, "
            f"{found.experts.shape[1]} of {found.n_expert} experts each"
        )
        interrupted = found.about.get("interrupted")
        if interrupted or "failed" in found.about:
            reason = "interrupted" if interrupted else found.about["failed"]
            click.echo(
                f"rotary: {reason}; {found.about['prompts']} of {len(texts)} prompts are in {output}",
                err=True,
            )
            sys.exit(130 if interrupted else 2)


@main.command("profile", epilog=_example("rotary profile model.gguf a.trace b.trace"))
@click.argument("model")
@click.argument("trace_files", metavar="TRACE...", nargs=-1, required=True)
@click.option("-o", "--output", help="Where to write it.  [default: beside the model]", type=click.Path())
def profile_(model: str, trace_files: tuple[str, ...], output: str | None) -> None:
    """Learn from traces which experts a model wants most, to begin runs with."""
    with _one_line_errors():
        with exiting():
            from ..traces import archive as traces
            from ..traces import profiles

        found = profiles.learn([traces.load(path) for path in trace_files])
        path = output or profiles.beside(model)
        found.save(path)
        click.echo(f"{path}: {found.n_tokens} tokens, {len(found.layers)} layers of {found.n_expert} experts")


@main.command(epilog=_example("rotary simulate model.trace --budgets 12.5,25 --link pcie4x16 --compute 3"))
@click.argument("trace_file", metavar="TRACE")
@click.option("--policies", default="all", show_default=True, help=f"Of {', '.join(NATIVE)}, by commas.")
@click.option(
    "--budgets", default="5,12.5,25,50", show_default=True, help="Percent of all experts, by commas."
)
@click.option("--link", help="Bandwidth to the slots: 25GB/s, 500MiB/s, pcie4x16, ...  [default: no time]")
@click.option(
    "--compute",
    default=3.0,
    show_default=True,
    type=_Number(min=0, min_open=True),
    help="Milliseconds of a token whose experts are all there.",
)
@click.option("--latency", default=0.0, type=_Number(min=0), help="Microseconds of a lookup that waits.")
@click.option("--predictors", default="none", show_default=True, help="none or what comes ahead, by commas.")
@click.option("--profile", help="File of rotary profile: what the transition predictor begins with.")
@click.option("--depth", default=1, show_default=True, type=click.IntRange(1, 8), help="Layers ahead.")
@click.option("--split", default=SPLITS[0], show_default=True, type=click.Choice(SPLITS), help="As for run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def simulate(
    trace_file: str, policies: str, budgets: str, link: str | None, compute: float, latency: float,
    predictors: str, profile: str | None, depth: int, split: str, as_json: bool,
) -> None:  # fmt: skip
    """Replay a trace under eviction policies, budgets, links and predictors."""
    with _one_line_errors():
        with exiting():
            from ..simulation.comparison import compare, shares, table

        rows = compare(
            trace_file, NATIVE if policies == "all" else policies.split(","), shares(budgets),
            link=link, compute_us=1000 * compute, latency_us=latency, predictors=predictors.split(","),
            profile=profile, depth=depth, adaptive=split == "adaptive",
        )  # fmt: skip
        if as_json:
            click.echo(json.dumps(rows))
        else:
            click.echo("\n".join(table(rows)))


@main.command("convert", epilog=_example("rotary convert model-00001-of-00009.gguf paged.gguf --dry-run"))
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT")
@click.option("--split-size", metavar="SIZE", help="Most bytes of a file, such as 40GB.  [default: one file]")
@click.option("--alignment", default=4096, show_default=True, help="Of every tensor, in bytes.")
@click.option(
    "--profile",
    default="auto",
    show_default=True,
    help="File of rotary profile to store; auto is the one beside IN, or what IN has; off is none.",
)
@click.option(
    "--experts", metavar="TYPE", help="Quantise the experts: Q3_K, IQ4_XS, ...  [default: as they are]"
)
@click.option("--rest", metavar="TYPE", help="Quantise all other weights.  [default: as they are]")
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="PATTERN=TYPE",
    help="Type of tensors whose name has this regular expression; the first that fits counts, before the two "
    "above.",
)
@click.option(
    "--imatrix", type=click.Path(), help="Importance matrix to quantise with, a GGUF of llama-imatrix."
)
@click.option("--verify", is_flag=True, help="Read all of it again and compare every tensor.")
@click.option("--force", is_flag=True, help="Replace OUT.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@click.option("--no-progress", is_flag=True, help="Show no progress on a terminal.")
def convert_(
    source: str, out: str, split_size: str | None, alignment: int, profile: str, experts: str | None,
    rest: str | None, types: tuple[str, ...], imatrix: str | None, verify: bool, force: bool, dry_run: bool,
    no_progress: bool,
) -> None:  # fmt: skip
    """Write a model again as paging wants it: experts together and page-aligned.

    IN is a GGUF, the first of its shards, or a Hugging Face folder of safetensors. OUT is a GGUF that stock
    llama.cpp loads too, with the same output unless it is quantised. Interrupted, the same
    command goes on where it was; quantising itself begins again.
    """
    with _one_line_errors():
        with exiting():
            from ..conversion.convert import Options, convert
            from ..conversion.quantising import Wish
            from ..display.bars import bars

        options = Options(
            alignment=alignment,
            split_bytes=None if split_size is None else parse_size(split_size),
            profile=profile,
            wish=Wish(experts, rest, types, imatrix),
            verify=verify,
            force=force,
        )
        paths = convert(
            source, out, options, dry_run=dry_run, say=lambda line: click.echo(line, err=not dry_run),
            bar=bars(off=no_progress),
        )  # fmt: skip
        if not dry_run:
            click.echo(str(paths[0]))


@main.command("report", epilog=_example("rotary report model.trace -o report.html"))
@click.argument("trace_file", metavar="TRACE")
@click.option("-o", "--output", required=True, type=click.Path(), help="HTML file to write.")
@click.option("--policies", default="lru,lfu,recall", show_default=True, help="The last one with prefetch.")
@click.option("--budgets", default="5,12.5,25,50,75", show_default=True, help="Percent of all experts.")
@click.option("--link", default="pcie4x16", show_default=True, help="As for rotary simulate.")
@click.option(
    "--compute",
    default=3.0,
    show_default=True,
    type=_Number(min=0, min_open=True),
    help="As for rotary simulate.",
)
@click.option("--depth", default=2, show_default=True, type=click.IntRange(1, 8), help="Layers ahead.")
def report_(
    trace_file: str, output: str, policies: str, budgets: str, link: str, compute: float, depth: int
) -> None:
    """Write one HTML page about a trace: what is chosen, policies, prefetch, time."""
    with _one_line_errors():
        with exiting():
            from ..display.report import write_report

        write_report(trace_file, output, policies.split(","), budgets, link, 1000 * compute, depth)
        click.echo(f"{output}: written")


@main.command(epilog=_example("rotary doctor"))
@click.option("--model", help="Measure the disk with this file instead of a temporary one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def doctor(model: str | None, as_json: bool) -> None:
    """Check versions, devices, memory and disk, and say what to do."""
    with _one_line_errors():
        with exiting():
            from dataclasses import asdict

            from ..runtime.doctor import FAIL, examine

        checks = []
        for check in examine(model):
            checks.append(check)
            if not as_json:
                advice = f" -> {check.advice}" if check.advice else ""
                click.echo(f"{check.verdict:<4}  {check.name:<17} {check.detail}{advice}")
        if as_json:
            click.echo(json.dumps([asdict(check) for check in checks]))
        if any(check.verdict == FAIL for check in checks):
            sys.exit(1)


@main.command(
    "backend-path",
    epilog=_example('GGML_BACKEND_PATH="$(rotary backend-path)" llama-cli -m model.gguf -ngl 99'),
)
def backend_path() -> None:
    """Print the native library's path, for GGML_BACKEND_PATH."""
    with _one_line_errors():
        with exiting():
            from ..native.binding import library_path

        path = library_path()
        if not path.is_file():
            raise LibraryError(
                f"{path}: no such file; the library is built when the package is installed; "
                "run `pip install .` again"
            )
        click.echo(str(path))


if __name__ == "__main__":
    main()
