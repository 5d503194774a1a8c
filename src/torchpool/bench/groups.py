"""The rows of every group: what is compared with what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchpool import functional
from torchpool.bench import truth
from torchpool.bench.compositions import COMPOSITIONS
from torchpool.bench.contest import (
    COPY,
    OURS,
    Contender,
    Row,
    copy,
    difference,
    input_sets,
    unchecked,
)
from torchpool.bench.peers import Peer, function, ours
from torchpool.bench.shapes import LAYOUTS, Problem, problems, window
from torchpool.reductions import Max, Mean, Min, Reduction, SoftmaxMean, Sum
from torchpool.windows import Window

MIB = 1 << 20
TOLERANCE = {
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (2e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}
"""rtol and atol of a right result."""
Makers = Mapping[str, Callable[[], Contender]]


@dataclass(frozen=True)
class Settings:
    """What a run is made of."""

    threads: int
    peers: Mapping[str, Peer]
    quick: bool = False

    @property
    def largest(self) -> int:
        """Bytes that a row moves at most; longer batches are cut."""
        return 24 * MIB if self.quick else 160 * MIB

    @property
    def budget(self) -> float:
        """Seconds of timing for each contender of a row."""
        return 0.05 if self.quick else 0.15


def laid_out(shape: Sequence[int], layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers in a memory layout."""
    generator = torch.Generator().manual_seed(seed)
    n, c, *sizes = shape
    if layout == "channels_last":
        return torch.randn((n, *sizes, c), generator=generator).to(dtype).movedim(-1, 1)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def inputs(p: Problem, dtype: torch.dtype = torch.float32, sets: int | None = None) -> list[Tensor]:
    """As many inputs as a row rotates over."""
    count = input_sets(p.traffic(dtype.itemsize)) if sets is None else sets
    return [laid_out(p.shape, p.layout, dtype, seed) for seed in range(count)]


def in_layouts(found: Sequence[Problem]) -> Iterator[Problem]:
    """Each problem in the layouts that torch has for it."""
    for p in found:
        for layout in LAYOUTS if p.num_axes > 1 else LAYOUTS[:1]:
            yield replace(p, layout=layout)


def _about(p: Problem, **more: Any) -> dict[str, Any]:
    window = (
        {"output": p.output}
        if p.is_adaptive
        else {"kernel": p.kernel, "stride": p.stride, "padding": p.padding}
    )
    return {"op": p.op, "shape": p.shape, **window, "layout": p.layout, "source": p.source, **more}


# forward, adaptive


def _forward_makers(p: Problem, settings: Settings) -> Makers:
    xs, traffic = inputs(p), p.traffic()

    @lru_cache(maxsize=1)
    def expected() -> Tensor:
        return function(p, functional)(xs[0])

    def check_ours(y: Tensor) -> str | None:
        return difference(truth.few(y), truth.pooled(p, xs[0]), *TOLERANCE[torch.float32])

    def entry(peer: Peer, check: Callable[[Tensor], str | None]) -> Contender:
        offer = peer(p, xs, settings.threads)
        return Contender(offer.run, lambda y: check(offer.read(y)), traffic)

    def check_peer(y: Tensor) -> str | None:
        return difference(y, expected(), *TOLERANCE[torch.float32])

    rivals = {name: partial(entry, peer, check_peer) for name, peer in settings.peers.items()}
    fresh = partial(_fresh_copy, traffic, len(xs))
    return {
        OURS: partial(entry, ours, check_ours),
        **rivals,
        COPY: copy(traffic, len(xs)),
        f"{COPY} (fresh)": fresh,
    }


def _fresh_copy(traffic: int, sets: int) -> Contender:
    """A copy into memory that the system has to hand out each time, as a pooling call's output."""
    sources = [torch.zeros(max(1, traffic // 2), dtype=torch.uint8) for _ in range(sets)]
    return Contender(lambda i: sources[i % sets].clone(), unchecked, traffic)


def _forward_rows(group: str, found: Sequence[Problem], settings: Settings) -> list[Row]:
    rows = []
    for p in in_layouts([p.within(settings.largest) for p in found]):
        rows.append(Row(group, p.name, _about(p), partial(_forward_makers, p, settings)))
    return rows


def _few(found: list[Problem], settings: Settings, every: int) -> list[Problem]:
    return found[::every] if settings.quick else found


def forward(settings: Settings) -> list[Row]:
    """Max and mean over 2-D windows, every shape in both layouts."""
    found = [p for p in problems() if p.num_axes == 2 and not p.is_adaptive]
    return _forward_rows("forward", _few(found, settings, 7), settings)


def adaptive(settings: Settings) -> list[Row]:
    """Adaptive and global windows, 1-D and 3-D shapes."""
    found = [p for p in problems() if p.num_axes != 2 or p.is_adaptive]
    return _forward_rows("adaptive", _few(found, settings, 8), settings)


# training step


def _step(call: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(call(leaf), leaf, upstream)
    return grad


def _training_makers(p: Problem, settings: Settings, with_copy: bool = True) -> Makers:
    xs, traffic = inputs(p), 2 * p.traffic()
    shape = (*p.shape[:2], *p.out_sizes)
    upstream = laid_out(shape, p.layout, torch.float32, 99)
    pools = {OURS: function(p, functional), "torch": function(p, F)}

    def check_ours(grad: Tensor) -> str | None:
        wanted, terms = (truth.gradient(p, xs[0], g) for g in (upstream, upstream.abs()))
        return difference(truth.few(grad), wanted, *TOLERANCE[torch.float32], terms)

    def check_torch(grad: Tensor) -> str | None:
        wanted, terms = (_step(pools[OURS], xs[0], g) for g in (upstream, upstream.abs()))
        return difference(grad, wanted, *TOLERANCE[torch.float32], terms)

    def entry(name: str, check: Callable[[Tensor], str | None]) -> Contender:
        pool = pools[name]
        return Contender(lambda i: _step(pool, xs[i % len(xs)], upstream), check, traffic)

    made: dict[str, Callable[[], Contender]] = {OURS: partial(entry, OURS, check_ours)}
    if "torch" in settings.peers:
        made["torch"] = partial(entry, "torch", check_torch)
    return {**made, COPY: copy(traffic, len(xs))} if with_copy else made


def training(settings: Settings) -> list[Row]:
    """Forward and backward on every shape, beside torch."""
    found = [p.within(min(settings.largest, 48 * MIB)) for p in _few(problems(), settings, 12)]
    return [
        Row("training", p.name, _about(p), partial(_training_makers, p, settings))
        for p in in_layouts(found)
    ]


# very small inputs

SMALL = ((1, 1, 4, 4), (1, 1, 8, 8), (1, 3, 14, 14), (1, 16, 14, 14), (1, 16, 28, 28))


def small(settings: Settings) -> list[Row]:
    """Inputs so small that a call is all overhead, with and without gradients."""
    rows = []
    for shape in SMALL[:: 2 if settings.quick else 1]:
        for op in ("max", "mean"):
            p = window("x".join(map(str, shape)), op, shape, 2, 2)
            for grad in (False, True):
                makers = partial(_small_makers, p, settings, grad)
                rows.append(Row("small", p.name, _about(p, grad=grad), makers))
    return rows


def _small_makers(p: Problem, settings: Settings, grad: bool) -> Makers:
    if grad:
        return _training_makers(p, settings, with_copy=False)
    torch_only = {name: peer for name, peer in settings.peers.items() if name == "torch"}
    made = _forward_makers(p, replace(settings, peers=torch_only))
    return {name: make for name, make in made.items() if not name.startswith(COPY)}


# formulas beside compositions


def formulas(settings: Settings) -> list[Row]:
    """Reductions that torch does not have, forward and backward, beside compositions of its
    operators, eager and compiled."""
    shape = (2 if settings.quick else 8, 64, 112, 112)
    p = window(f"{'x'.join(map(str, shape))} 3x3/2", "mean", shape, 3, 2, 1)
    p = replace(p, count_include_pad=False)
    layouts = LAYOUTS[:1] if settings.quick else LAYOUTS
    return [
        Row(
            "formulas",
            str(reduction),
            _about(replace(p, layout=layout), reduction=str(reduction)),
            partial(_formula_makers, replace(p, layout=layout), reduction, written, settings),
        )
        for reduction, written in COMPOSITIONS.items()
        for layout in layouts
    ]


def _formula_makers(
    p: Problem, reduction: Reduction, written: Sequence[Any], settings: Settings
) -> Makers:
    x = laid_out(p.shape, p.layout, torch.float32, 0).abs_().add_(0.1)
    upstream = laid_out((*p.shape[:2], *p.out_sizes), p.layout, torch.float32, 99)
    windows = Window(p.kernel, p.stride, p.padding)
    mean = function(p, F)
    mean_few = function(replace(p, shape=tuple(truth.few(x).shape), layout="contiguous"), F)

    def pool(t: Tensor) -> Tensor:
        made: Tensor = functional.pool(t, reduction, windows)
        return made

    def check_ours(grad: Tensor) -> str | None:
        t, g = (truth.few(a).double().contiguous() for a in (x, upstream))
        return difference(
            truth.few(grad), _step(lambda t: written[0](t, mean_few), t, g), 1e-3, 1e-4
        )

    def check(grad: Tensor) -> str | None:
        return difference(grad, _step(pool, x, upstream), 2e-3, 1e-3)

    def entry(call: Callable[[Tensor], Tensor], judge: Callable[[Tensor], str | None]) -> Contender:
        return Contender(lambda i: _step(call, x, upstream), judge, 2 * p.traffic())

    def compile_composition(compose: Any) -> Contender:
        torch._dynamo.reset()
        return entry(torch.compile(lambda t: compose(t, mean), dynamic=False), check)

    made: dict[str, Callable[[], Contender]] = {OURS: partial(entry, pool, check_ours)}
    for compose in written if "torch" in settings.peers else ():
        name = f"torch: {compose.__name__}"
        made[name] = partial(entry, partial(_composed, compose, mean), check)
    if "torch.compile" in settings.peers:
        made["torch.compile"] = partial(compile_composition, written[0])
    return {**made, COPY: copy(2 * p.traffic())}


def _composed(compose: Any, mean: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    made: Tensor = compose(x, mean)
    return made


# series: torchpool beside itself

REDUCTIONS: dict[str, Reduction] = {"max": Max(), "mean": Mean(count_include_pad=True)}


def growth(settings: Settings) -> list[Row]:
    """Windows of 3, 31 and 127 elements per axis, stride 1."""
    shape = (1, 2 if settings.quick else 16, 512, 512)
    return [
        Row(
            "growth",
            f"{op} {phase}",
            {"op": op, "shape": shape, "layout": layout, "phase": phase},
            partial(_growth_makers, op, shape, layout, phase),
        )
        for op in REDUCTIONS
        for phase in ("forward", "backward")
        for layout in LAYOUTS
    ]


def _growth_makers(op: str, shape: tuple[int, ...], layout: str, phase: str) -> Makers:
    x = laid_out(shape, layout, torch.float32, 0)
    upstream = laid_out(shape, layout, torch.float32, 1)

    def entry(k: int) -> Contender:
        p = replace(window(f"k={k}", op, shape, k, 1, k // 2), layout=layout)
        call = function(p, functional)
        if phase == "forward":
            run: Callable[[int], Any] = lambda i: call(x)  # noqa: E731
            wanted: Callable[[], Tensor] = lambda: truth.pooled(p, x)  # noqa: E731
        else:
            leaf = x.detach().requires_grad_()
            y = call(leaf)
            run = lambda i: torch.autograd.grad(y, leaf, upstream, retain_graph=True)[0]  # noqa: E731
            wanted = lambda: truth.gradient(p, x, upstream)  # noqa: E731
        check = lambda got: difference(truth.few(got), wanted(), 1e-4, 1e-4)  # noqa: E731
        return Contender(run, check, p.traffic())

    return {f"k={k}": partial(entry, k) for k in (3, 31, 127)}


def half(settings: Settings) -> list[Row]:
    """bfloat16 and float16 beside float32 on rows that no cache holds."""
    found = [p for p in problems() if p.traffic() >= 32 * MIB and p.num_axes == 2]
    found = [
        p.within(settings.largest) for p in _few(found[:: 1 if settings.quick else 3], settings, 6)
    ]
    return [Row("half", p.name, _about(p), partial(_half_makers, p)) for p in in_layouts(found)]


def _half_makers(p: Problem) -> Makers:
    def entry(dtype: torch.dtype) -> Contender:
        xs, call = inputs(p, dtype), function(p, functional)

        def check(y: Tensor) -> str | None:
            return difference(truth.few(y).double(), truth.pooled(p, xs[0]), *TOLERANCE[dtype])

        return Contender(lambda i: call(xs[i % len(xs)]), check, p.traffic(dtype.itemsize))

    return {str(dtype).removeprefix("torch."): partial(entry, dtype) for dtype in TOLERANCE}


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def integers(settings: Settings) -> list[Row]:
    """Integers and bool beside float32, by the bytes that they move."""
    shape = (1 if settings.quick else 8, 64, 112, 112)
    reductions: tuple[Reduction, ...] = (Max(), Min(), Sum(), Mean())
    return [
        Row(
            "integers",
            type(reduction).__name__.lower(),
            {
                "shape": shape,
                "kernel": (3, 3),
                "stride": (2, 2),
                "padding": (1, 1),
                "layout": layout,
            },
            partial(_integer_makers, reduction, shape, layout),
        )
        for reduction in reductions
        for layout in LAYOUTS
    ]


def _integer_makers(reduction: Reduction, shape: tuple[int, ...], layout: str) -> Makers:
    windows = Window(3, 2, 1)

    def entry(dtype: torch.dtype) -> Contender:
        x = laid_out(shape, layout, torch.float32, 0).mul_(20).abs_().clamp_(max=100)
        x = x.gt(20) if dtype == torch.bool else x.round().to(dtype)

        def check(y: Tensor) -> str | None:
            wanted: Tensor = functional.pool(truth.few(x).double(), reduction, windows)
            return difference(
                truth.few(y), wanted if dtype.is_floating_point else wanted.trunc(), 1e-5, 1e-5
            )

        y: Tensor = functional.pool(x, reduction, windows)
        traffic = x.nbytes + y.nbytes
        return Contender(lambda i: functional.pool(x, reduction, windows), check, traffic)

    dtypes = [torch.float32, *INTEGERS]
    if not isinstance(reduction, Max):
        dtypes.remove(torch.bool)
    return {str(dtype).removeprefix("torch."): partial(entry, dtype) for dtype in dtypes}


# a second thread


def scaling(settings: Settings) -> list[Row]:
    """One thread and two, on rows that a core's own cache does not hold."""
    if settings.threads < 2:
        return []
    by_name = {p.name: p.within(settings.largest) for p in problems()}
    plane = window("one plane 3x3/1", "max", (1, 1, 2048, 2048), 3, 1, 1)
    wide = window("one plane 31x31/1", "max", (1, 1, 1024, 1024), 31, 1, 15)
    names = (
        "resnet_stem_n1",
        "fasterrcnn_stem_800",
        "yolo_sppf5_n32_c256",
        "inception3_avg_c768_17",
    )
    found = [*(by_name[name] for name in names), plane, wide]
    rows = [
        Row(
            "scaling",
            f"{p.name} {phase}",
            _about(p, phase=phase),
            partial(_scaling_makers, p, phase),
        )
        for p in in_layouts(_few(found, settings, 3))
        for phase in ("forward", "training")
    ]
    soft = window("SoftmaxMean 3x3/2", "mean", (2, 64, 112, 112), 3, 2, 1)
    rows.append(
        Row(
            "scaling",
            soft.name,
            _about(soft, phase="forward"),
            partial(_scaling_makers, soft, "softmax"),
        )
    )
    return rows


def _scaling_makers(p: Problem, phase: str) -> Makers:
    xs = inputs(p)
    upstream = laid_out((*p.shape[:2], *p.out_sizes), p.layout, torch.float32, 99)
    call = function(p, functional)
    if phase == "softmax":
        windows = Window(p.kernel, p.stride, p.padding)
        call = lambda x: functional.pool(x, SoftmaxMean(), windows)  # noqa: E731
    times = 2 if phase == "training" else 1

    def work(i: int) -> Tensor:
        x = xs[i % len(xs)]
        return _step(call, x, upstream) if phase == "training" else call(x)

    @lru_cache(maxsize=1)
    def bits() -> Tensor:
        torch.set_num_threads(1)
        return work(0)

    def entry(threads: int) -> Contender:
        same = lambda y: None if torch.equal(y, bits()) else "other bits than one thread gives"  # noqa: E731
        return Contender(work, same, times * p.traffic(), partial(torch.set_num_threads, threads))

    def copies(threads: int) -> Contender:
        made = copy(times * p.traffic(), len(xs))()
        return replace(made, before=partial(torch.set_num_threads, threads))

    made: dict[str, Callable[[], Contender]] = {}
    for threads, label in ((1, "1 thread"), (2, "2 threads")):
        made[label] = partial(entry, threads)
        made[f"{COPY}, {label}"] = partial(copies, threads)
    return made


GROUPS: dict[str, Callable[[Settings], list[Row]]] = {
    "forward": forward,
    "adaptive": adaptive,
    "training": training,
    "half": half,
    "growth": growth,
    "formulas": formulas,
    "small": small,
    "scaling": scaling,
    "integers": integers,
}
"""Groups of timed rows, in the order of the report. `processes` has those that need processes of
their own."""
