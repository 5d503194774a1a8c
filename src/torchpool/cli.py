"""The command line: `torchpool study`, `show`, `inspect`, `bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from torchpool.study.experiment import Plan

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as missing:  # pragma: no cover - only without the extra
    sys.exit(f"torchpool's command line needs {missing.name}: pip install 'torchpool[study]'")

app = typer.Typer(
    help="Pooling for PyTorch: which one to use, and what it makes of a picture.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)
DEFAULT_REDUCTIONS = "max,min,mean,lp,powermean,logmeanexp,softmaxmean,std"
DEFAULT_ARMS = "max,average,softmax,powermean,logmeanexp,mixed,gated,blurred,strided"


def main() -> None:
    """Runs the command line; bad input ends with one line and status 2."""
    try:
        app()
    except ModuleNotFoundError as missing:
        _stop(f"this needs {missing.name}: pip install 'torchpool[study]'")
    except ValueError as error:
        _stop(str(error))


def _stop(message: str) -> None:
    errors.print(
        f"torchpool: {message}", style="red", markup=False, highlight=False, soft_wrap=True
    )
    raise SystemExit(2)


@app.callback()
def _commands() -> None:
    """Keeps the command's name even while there is only one."""


# study


@app.command()
def study(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of class folders of images; default: handwritten digits."),
    ] = None,
    arms: Annotated[
        str, typer.Option(help="Poolings to compare, the first is the reference.")
    ] = DEFAULT_ARMS,
    seeds: Annotated[int, typer.Option(min=1, help="Networks trained per pooling.")] = 5,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 6,
    kernel: Annotated[int, typer.Option(min=1, help="Window, elements per axis.")] = 2,
    stride: Annotated[int, typer.Option(min=1, help="Step between windows.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for report.html and results.json.")] = Path(
        "torchpool-study"
    ),
    storage: Annotated[
        str | None,
        typer.Option(help="SQLAlchemy URL of the trials; processes that share one share the work."),
    ] = None,
) -> None:
    """Trains the same network once per pooling and seed, and says which differ by more than noise.

    Every finished trial is stored at once; the same command goes on where it was stopped.
    """
    from torchpool.study import data as sources
    from torchpool.study.experiment import Plan, labels
    from torchpool.study.model import Geometry

    names = labels([name.strip() for name in arms.split(",") if name.strip()])
    if not names:
        raise ValueError(f"--arms {arms!r} names no arm; give at least one, as --arms max,average")
    _check_device(device)
    _check_geometry(kernel, stride)
    images = sources.digits() if data is None else sources.folder(data)
    if images.skipped:
        console.print(f"[yellow]Skipped {len(images.skipped)} unreadable images:[/yellow]")
        for name in images.skipped:
            console.print(f"  {name}", markup=False, highlight=False)
    plan = Plan(names, seeds, epochs, Geometry(kernel, stride), device, images.name)
    _run(plan, images, out, storage)


def _check_geometry(kernel: int, stride: int) -> None:
    from torchpool.study.data import CANVAS

    size = CANVAS
    for _ in range(2):
        size = -(-size // stride)
    if kernel > CANVAS // stride or size < 2:
        raise ValueError(
            f"--kernel {kernel} --stride {stride} leaves nothing "
            f"of a {CANVAS}x{CANVAS} image after two "
            "poolings; use smaller ones"
        )


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used: {reason}; try --device cpu") from None


def _run(plan: Plan, images: Any, out: Path, storage: str | None) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from torchpool.study import report
    from torchpool.study.experiment import Experiment

    _make_folder(out)
    try:
        experiment = Experiment(plan, storage or f"sqlite:///{out / 'trials.db'}")
    except Exception as error:  # every database has exceptions of its own
        reason = str(error).splitlines()[0]
        raise ValueError(f"--storage {storage} cannot be opened: {reason}") from None
    done = sum(len(by_seed) for by_seed in experiment.results().scores.values())
    if done:
        console.print(f"Going on: {done} of {len(plan.trials)} trials are stored already.")
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        total = progress.add_task("trials", total=len(plan.trials), completed=done)
        epoch = progress.add_task("epochs", total=plan.epochs)

        def on_trial(arm: str, seed: int) -> None:
            stored = sum(len(s) for s in experiment.results().scores.values())
            progress.update(total, completed=stored)
            progress.reset(epoch, description=f"{arm}, seed {seed}", total=plan.epochs)

        try:
            experiment.run(images, on_trial, lambda: progress.advance(epoch))
            progress.update(total, completed=len(plan.trials))
        except KeyboardInterrupt:
            progress.stop()
            console.print(
                "[yellow]Stopped. What has finished is stored; the same command goes on.[/yellow]"
            )
    results = experiment.results()
    path = report.write(results, images, out)
    _print_table(results)
    for line in report.verdict(results):
        console.print(line, markup=False, highlight=False)
    console.print(f"Report: {path}", markup=False, highlight=False, soft_wrap=True)
    if not results.is_complete:
        raise typer.Exit(130)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be made: {error.strerror}") from None


def _print_table(results: Any) -> None:
    from torchpool.study import report

    table = Table(title="Which pooling?", title_justify="left")
    table.add_column("pooling")
    for name in (
        "accuracy %",
        "points vs. reference",
        "p",
        "shift cons. %",
        "parameters",
        "step ms (torch)",
        "saved KiB (torch)",
    ):
        table.add_column(name, justify="right")
    compared = {c.arm: c for c in report.comparisons(results)}
    for row in report.rows(results):
        c, cost = compared.get(row["arm"]), row["cost"]
        table.add_row(
            row["title"],
            f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_sd']:.1f}"
            if row["seeds"] > 1
            else f"{100 * row['accuracy']:.1f}",
            "reference"
            if c is None
            else f"{100 * c.difference:+.1f} [{100 * c.low:+.1f}, {100 * c.high:+.1f}]",
            "" if c is None else f"{c.p_holm:.3g}",
            f"{100 * row['consistency']:.1f}",
            f"{row['parameters']:,}",
            "" if cost is None else f"{cost['step_ms']:.1f} ({cost['torch_step_ms']:.1f})",
            ""
            if cost is None
            else f"{cost['saved_bytes'] / 1024:,.0f} ({cost['torch_saved_bytes'] / 1024:,.0f})",
            style="bold" if c is not None and c.is_significant else None,
        )
    console.print(table)


# show


@app.command()
def show(
    picture: Annotated[
        Path | None,
        typer.Argument(help="An image file; default: a photograph that ships with scikit-learn."),
    ] = None,
    kernel: Annotated[int, typer.Option(min=1, help="Window, pixels per axis.")] = 8,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Step between windows; default: the kernel.")
    ] = None,
    padding: Annotated[int, typer.Option(min=0, help="Pixels of padding on each side.")] = 0,
    reductions: Annotated[
        str, typer.Option(help="What to show, in this order.")
    ] = DEFAULT_REDUCTIONS,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("gallery.png"),
) -> None:
    """Draws what each pooling makes of a picture: the original and the pooled images at their
    reduced size."""
    from torchpool import gallery

    names = [name.strip() for name in reductions.split(",") if name.strip()]
    drawn = gallery.draw(picture, names, kernel, stride, padding, out)
    console.print(
        f"{drawn.shape[0]} x {drawn.shape[1]} pixels became {drawn.pooled[0]} x {drawn.pooled[1]}."
    )
    console.print(f"Gallery: {out}", markup=False, highlight=False, soft_wrap=True)


# inspect


@app.command()
def inspect(
    target: Annotated[
        str, typer.Argument(metavar="MODULE:FACTORY", help="A callable that returns a model.")
    ],
    input: Annotated[str, typer.Option(help="Shape of an input, as 1,3,224,224.")] = "1,3,224,224",
) -> None:
    """Lists the pooling of a model: shapes, receptive field, bytes kept for the backward pass."""
    import torch

    from torchpool import analysis

    model = analysis.load(target)
    shape = _shape(input)
    found = analysis.inspect(model, torch.randn(shape))
    table = Table(title=f"Pooling of {target}", title_justify="left")
    for name in ("layer", "what", "input", "output"):
        table.add_column(name)
    for name in ("receptive field", "step", "saved KiB", "with torchpool"):
        table.add_column(name, justify="right")
    for layer in found:
        table.add_row(
            layer.path,
            layer.kind,
            "x".join(map(str, layer.in_shape)),
            "x".join(map(str, layer.out_shape)),
            " x ".join(map(str, layer.receptive_field)) or "?",
            " x ".join(map(str, layer.jump)) or "?",
            f"{layer.saved_bytes / 1024:,.1f}",
            f"{layer.torchpool_saved_bytes / 1024:,.1f}",
        )
    console.print(table if found else f"{target} has no pooling layers.")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--input {text}: give whole numbers with commas, as 1,3,224,224"
        ) from None
    if any(size < 1 for size in shape):
        raise ValueError(f"--input {text}: every size must be at least 1")
    return shape


# bench


@app.command()
def bench(
    group: Annotated[
        str, typer.Option(help="Groups of rows, with commas, as forward,training; default: all.")
    ] = "",
    filter: Annotated[str, typer.Option(help="Only rows that contain all of these words.")] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer and smaller rows, without torch.compile.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of every contender; default: torch's number.")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(help="Contenders besides torchpool, as torch,onednn; default: all installed."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The JSON to write; default: benchmarks/results/cpu.json, if every row is run."
        ),
    ] = None,
    saved: Annotated[
        Path | None,
        typer.Option("--from", help="Show the JSON of an earlier run instead of measuring."),
    ] = None,
    chart: Annotated[
        Path | None, typer.Option(help="An SVG to draw of the rows of the group forward.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="Instead: a model of yours before and after torchpool.convert.",
        ),
    ] = None,
    input: Annotated[str, typer.Option(help="Shape of the model's input.")] = "8,3,224,224",
) -> None:
    """Times torchpool beside other libraries and beside a copy of as many bytes; every result is
    checked before it is timed."""
    import torch

    if model is not None:
        _bench_model(model, _shape(input), threads)
        return
    from torchpool.bench import report, tables

    if saved is None:
        threads = threads or torch.get_num_threads()
        made = _measure(group, filter, quick, threads, peers)
        if out is None and not (group or filter or quick or peers):
            out = Path("benchmarks/results/cpu.json")
        if out is not None:
            report.write(made, out)
    else:
        made = report.read(saved)
    for table in tables.tables(made):
        console.print(table)
    for fault in tables.faults(made):
        console.print(fault, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if saved is None and out is not None:
        console.print(f"Results: {out}", markup=False, highlight=False, soft_wrap=True)
    if chart is not None:
        from torchpool import plot

        _write_text(chart, plot.shares_of_copy(tables.bars(made)).svg, "--chart")


def _measure(group: str, words: str, quick: bool, threads: int, named: str | None) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from torchpool.bench import groups, peers, report

    names = named.split(",") if named is not None else list(peers.PEERS)
    if quick and named is None:
        names.remove("torch.compile")
    settings = groups.Settings(threads, peers.chosen(list(filter(None, names))), quick)
    picked = [name.strip() for name in group.split(",") if name.strip()]
    steps = report.plan(settings, picked, words)
    if not steps:
        raise ValueError(f"--filter {words!r} leaves no row; drop a word")
    columns = (
        TextColumn("{task.description:48.48}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    results = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(steps))
        try:
            for found in report.measure(
                steps, lambda name: progress.update(task, description=name)
            ):
                results += found
                progress.advance(task)
        except KeyboardInterrupt:
            progress.stop()
            console.print("[yellow]Stopped: the rows that were finished follow.[/yellow]")
    return report.report(results, settings)


def _bench_model(target: str, shape: tuple[int, ...], threads: int | None) -> None:
    import torch

    from torchpool import analysis
    from torchpool.bench import model, tables

    loaded = analysis.load(target)
    torch.set_num_threads(threads or torch.get_num_threads())
    found = model.compare(loaded, torch.randn(shape))
    console.print(str(found.report), markup=False, highlight=False)
    console.print(tables.model_table(target, found))
    if found.difference is not None:
        console.print(f"The results differ: {found.difference}", style="bold red", markup=False)


def _write_text(path: Path, text: str, option: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror}") from None
