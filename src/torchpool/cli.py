"""The command line: `torchpool study`, `show`, `inspect`, `bench`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from torchpool.study.experiment import Plan
    from torchpool.study.task import Task

try:
    import typer
    from rich import box
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
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 140  # a file or a pipe has no columns: tables are not squeezed into 80
errors = Console(stderr=True)
SAVED = ("saved_bytes", "torch_saved_bytes")
DEFAULT_REDUCTIONS = "max,min,mean,lp,powermean,logmeanexp,softmaxmean,std"


def main() -> None:
    """Runs the command line; bad input ends with one line and status 2."""
    try:
        status = app(prog_name="torchpool", standalone_mode=False)
    except ModuleNotFoundError as missing:
        _stop(f"this needs {missing.name}: pip install 'torchpool[study]'")
    except ValueError as error:
        _stop(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _stop("stopped", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # Typer's, for what it cannot parse
            raise
        _usage(error)
    else:
        raise SystemExit(status)


def _usage(error: Any) -> None:
    """One line for a command line that cannot be parsed; the help where there is nothing on it."""
    if len(sys.argv) < 2:
        error.show()
        raise SystemExit(2)
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "torchpool"
    given = shlex.join(["torchpool", *sys.argv[1:]])
    _stop(f"{error.format_message().rstrip('.')} (in `{given}`; see `{command} --help`)")


def _stop(message: str, status: int = 2) -> None:
    line = " ".join(message.split())
    errors.print(
        f"torchpool: {line}",
        style="red",
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=True,
    )
    raise SystemExit(status)


def _say(text: str) -> None:
    """A line as it is: names may hold what Rich reads as markup."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _whole(least: int, text: str) -> Any:
    """An option that takes a whole number of at least `least`."""

    def check(parameter: typer.CallbackParam, value: int | None) -> int | None:
        if value is not None and value < least:
            raise ValueError(f"--{parameter.name} {value} must be at least {least}")
        return value

    return typer.Option(callback=check, help=text)


def _version(wanted: bool) -> None:
    if wanted:
        import torchpool

        _say(f"torchpool {torchpool.__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_version),
    ] = False,
) -> None:
    """Pooling for PyTorch: which one to use, and what it makes of a picture."""


# study


@app.command()
def study(
    task: Annotated[str, typer.Option(help="What is pooled: images or series.")] = "images",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Images: a folder of class folders; default: handwritten digits. Series: a .csv "
            "(id,time,label,features...) or .npz (x, lengths, y) file; default: JapaneseVowels "
            "and BasicMotions."
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(help="Poolings to compare, the first is the reference; default: all."),
    ] = None,
    encoders: Annotated[
        str | None, typer.Option(help="Series: networks before the pooling; default: gru,cnn.")
    ] = None,
    seeds: Annotated[
        int | None, _whole(1, "Networks trained per pooling; default: 8, series 5.")
    ] = None,
    epochs: Annotated[
        int | None, _whole(1, "Passes over the training data; default: 5, series 15.")
    ] = None,
    kernel: Annotated[
        int | None, _whole(1, "Images: window, elements per axis; default: 2.")
    ] = None,
    stride: Annotated[int | None, _whole(1, "Images: step between windows; default: 2.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, ...")] = "cpu",
    out: Annotated[
        Path, typer.Option(help="Folder for report.html, chart.png and results.json.")
    ] = Path("torchpool-study"),
    storage: Annotated[
        str | None,
        typer.Option(help="SQLAlchemy URL of the trials; processes that share one share the work."),
    ] = None,
) -> None:
    """Trains the same network once per pooling and seed, and says which differ by more than noise.

    Every finished trial is stored at once; the same command goes on where it was stopped. Series
    have one report per set of data and encoder, in folders of their own.
    """
    from torchpool.study.experiment import Plan, labels

    _check_device(device)
    if task == "images":
        _refuse("series", encoders=encoders)
        tasks = {out: _images(data, kernel or 2, stride or 2)}
        counts = (seeds or 8, epochs or 5)
    elif task == "series":
        _refuse("images", kernel=kernel, stride=stride)
        tasks = _series(data, "gru,cnn" if encoders is None else encoders, out)
        counts = (seeds or 5, epochs or 15)
    else:
        raise ValueError(f"--task {task} is not known; choose images or series")
    asked = None if arms is None else _names("--arms", arms)
    plans = {
        folder: Plan(one, labels(asked or list(one.arms), one.arms), *counts, device)
        for folder, one in tasks.items()
    }
    for folder, plan in plans.items():
        _run(plan, folder, out, storage)


def _refuse(other: str, **options: Any) -> None:
    """Options of another task are not ignored in silence."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name} {value} goes with --task {other} only; leave it out")


def _names(option: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(
            f"{option} {text!r} names no {option[2:-1]}; give at least one, or more "
            f"with commas between"
        )
    return names


def _images(data: Path | None, kernel: int, stride: int) -> Task:
    from torchpool.study import data as sources
    from torchpool.study.model import Geometry, ImageTask

    _check_geometry(kernel, stride)
    images = sources.digits() if data is None else sources.folder(data)
    if images.skipped:
        _say(f"Skipped {len(images.skipped)} unreadable images:")
        for name in images.skipped:
            _say(f"  {name}")
    return ImageTask(images, Geometry(kernel, stride))


def _series(data: Path | None, encoders: str, out: Path) -> dict[Path, Task]:
    """One task for each set of data and encoder, by the folder of its report."""
    from torchpool.study.series import ENCODERS, SeriesTask
    from torchpool.study.series_data import DEFAULTS, load

    chosen = dict.fromkeys(_names("--encoders", encoders))
    for name in chosen:
        if name not in ENCODERS:
            raise ValueError(
                f"--encoders {name}: there is no such encoder; choose from {', '.join(ENCODERS)}"
            )
    loaded = [load(None, name) for name in DEFAULTS] if data is None else [load(data)]
    return {
        out / f"{Path(series.name).stem}-{encoder}": SeriesTask(series, encoder)
        for series in loaded
        for encoder in chosen
    }


def _check_geometry(kernel: int, stride: int) -> None:
    from torchpool.study.data import CANVAS

    size = CANVAS
    for _ in range(2):
        size = -(-size // stride)
    if kernel > CANVAS // stride or size < 2:
        raise ValueError(
            f"--kernel {kernel} --stride {stride} leaves nothing of a {CANVAS}x{CANVAS} image "
            "after two poolings; use smaller ones"
        )


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used: {reason}; try --device cpu") from None


def _run(plan: Plan, folder: Path, out: Path, storage: str | None) -> None:
    """Runs what a plan misses, and reports into `folder`; trials lie in `out`."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from torchpool.study import report
    from torchpool.study.experiment import Experiment

    _make_folder(out)
    _make_folder(folder)
    where = (
        f"--storage {storage}" if storage else f"{out / 'trials.db'}, the trials of --out {out},"
    )
    remedy = "name another --storage" if storage else "move the file away or name another --out"
    try:
        experiment = Experiment(plan, storage or f"sqlite:///{out / 'trials.db'}")
        stored = experiment.results().scores
    except Exception as error:  # every database has exceptions of its own
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where} cannot be opened: {reason}; {remedy}") from None
    if plan.task.threads is not None:
        torch.set_num_threads(plan.task.threads)
    done = sum(len(by_seed) for by_seed in stored.values())
    _say(f"{plan.task.data}: {plan.task.words.setting}")
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
            experiment.run(on_trial, lambda: progress.advance(epoch))
            progress.update(total, completed=len(plan.trials))
        except KeyboardInterrupt:
            progress.stop()
            console.print(
                "[yellow]Stopped. What has finished is stored; the same command goes on.[/yellow]"
            )
    results = experiment.results()
    path = report.write(results, folder)
    _print_table(results)
    for line in report.verdict(results):
        console.print(line, markup=False, highlight=False)
    _say(f"Report: {path}")
    if not results.is_complete:
        raise typer.Exit(130)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out {out} cannot be made: {error.strerror}; name a folder that you may write to"
        ) from None
    if not os.access(out, os.W_OK):
        raise ValueError(f"--out {out} cannot be written to; name a folder that you may write to")


def _print_table(results: Any) -> None:
    """Fits 80 columns: arms by the names that --arms takes, torch's numbers in brackets."""
    from torchpool.study import report

    reference = results.plan.arms[0]
    rows = report.rows(results)
    unit = _unit(rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("pooling", no_wrap=True)
    for name in (
        "accuracy\n% ± sd",
        f"vs. {reference},\npoints\n± 95 %",
        "p",
        f"{results.plan.task.words.consistency.split()[0]}\ncons.\n%",
        "para-\nmeters",
        "step,\nms\n(torch)",
        f"saved,\n{unit}\n(torch)",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    compared = {c.arm: c for c in report.comparisons(results)}
    for row in rows:
        c = compared.get(row["arm"])
        is_clear = c is not None and c.is_significant
        table.add_row(*_cells(row, c, unit), style="bold" if is_clear else None)
    console.print(table)


def _unit(rows: list[dict[str, Any]]) -> str:
    """In which the bytes of every row take few digits."""
    kept = [row["cost"][key] for row in rows if row["cost"] for key in SAVED]
    return "MiB" if max(kept, default=0) >= 10_000 * 2**10 else "KiB"


def _bytes(count: int, unit: str) -> str:
    return f"{count / 2**20:.1f}" if unit == "MiB" else f"{count / 2**10:.0f}"


def _cells(row: dict[str, Any], c: Any, unit: str) -> list[str]:
    accuracy = f"{100 * row['accuracy']:.1f}"
    if row["seeds"] > 1:
        accuracy += f" ± {100 * row['accuracy_sd']:.1f}"
    difference = "reference"
    if c is not None:
        reach = f" ± {100 * (c.high - c.difference):.1f}" if c.seeds > 1 else ""
        difference = f"{100 * c.difference:+.1f}{reach}"
    cells = [
        row["arm"],
        accuracy,
        difference,
        "" if c is None else "<0.001" if c.p_holm < 0.001 else f"{c.p_holm:.2g}",
        f"{100 * row['consistency']:.1f}",
        f"{row['parameters']:,}",
    ]
    cost = row["cost"]
    if cost is None:
        return [*cells, "", ""]
    kept, torch_kept = (_bytes(cost[key], unit) for key in SAVED)
    step, torch_step = (
        f"{ms:.1f}" if ms < 100 else f"{ms:.0f}" for ms in (cost["step_ms"], cost["torch_step_ms"])
    )
    return [*cells, f"{step} ({torch_step})", f"{kept} ({torch_kept})"]


# show


@app.command()
def show(
    picture: Annotated[
        Path | None,
        typer.Argument(help="An image file; default: a photograph that ships with scikit-learn."),
    ] = None,
    kernel: Annotated[int, _whole(1, "Window, pixels per axis.")] = 8,
    stride: Annotated[int | None, _whole(1, "Step between windows; default: the kernel.")] = None,
    padding: Annotated[int, _whole(0, "Pixels of padding on each side.")] = 0,
    reductions: Annotated[
        str, typer.Option(help="What to show, in this order.")
    ] = DEFAULT_REDUCTIONS,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("gallery.png"),
) -> None:
    """Draws what each pooling makes of a picture, at its reduced size, beside the original."""
    from torchpool import gallery

    names = [name.strip() for name in reductions.split(",") if name.strip()]
    drawn = gallery.draw(picture, names, kernel, stride, padding, out)
    (height, width), (small_height, small_width) = drawn.shape, drawn.pooled
    _say(f"{width} x {height} pixels became {small_width} x {small_height}.")
    _say(f"Gallery: {out}")


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
    try:
        found = analysis.inspect(model, torch.randn(shape))
    except Exception as error:  # the user's own model
        raise ValueError(
            f"--input {input}: the model fails on an input of this shape: {error}; give the shape "
            "that it takes"
        ) from error
    if not found:
        _say(f"{target} calls no pooling layers; functional calls and convolutions are not listed.")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("layer", "what", "input", "output"):
        table.add_column(name, overflow="fold")
    for name in ("field", "step", "saved,\nKiB", "torchpool,\nKiB"):
        table.add_column(name, justify="right")
    for layer in found:
        table.add_row(
            layer.path,
            layer.kind,
            "x".join(map(str, layer.in_shape)),
            "x".join(map(str, layer.out_shape)),
            "x".join(map(str, layer.receptive_field)) or "?",
            "x".join(map(str, layer.jump)) or "?",
            f"{layer.saved_bytes / 1024:,.1f}",
            f"{layer.torchpool_saved_bytes / 1024:,.1f}",
        )
    console.print(table)
    _say("field: receptive field in elements of the input; step: between neighbouring outputs;")
    _say("saved: kept for the backward pass, as the model is and after torchpool.convert.")


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
    update: Annotated[
        bool,
        typer.Option("--update", help="Keep the rows of that JSON that are not measured again."),
    ] = False,
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

    measuring = {
        "--update": update, "--group": group, "--filter": filter, "--quick": quick,
        "--peers": peers, "--threads": threads,
    }  # fmt: skip
    for option, given in measuring.items():
        if saved is not None and given:
            raise ValueError(f"{option} is about measuring; --from shows a run that was measured")
    if saved is None:
        threads = threads or torch.get_num_threads()
        if out is None and (update or not (group or filter or quick or peers)):
            out = Path("benchmarks/results/cpu.json")
        earlier = report.read(out, "--update") if update and out is not None else None
        if earlier is not None:  # asked first, so that nothing measured is lost
            about = {"machine": report.machine(), "threads": threads, "quick": quick}
            report.check_alike(earlier, about)
        made = _measure(group, filter, quick, threads, peers)
        if earlier is not None:
            made = report.updated(earlier, made)
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
