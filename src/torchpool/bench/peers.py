"""Other libraries' forward pooling, each with inputs in its own form and the same number of
threads. A peer that cannot do a problem raises `NotOffered` with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchpool import __version__, functional
from torchpool.bench.shapes import Problem

NAIVE = 1e10
"""Taps beyond which libraries that look at every element of every window would take minutes."""


class NotOffered(Exception):
    """Why a peer takes no part in a row."""


class Offer(NamedTuple):
    """A peer that is ready to run."""

    run: Callable[[int], Any]
    """Pools the i-th input, counting round."""
    read: Callable[[Any], Tensor]
    """What `run` returned, as a tensor (N, C, *O)."""


Peer = Callable[[Problem, Sequence[Tensor], int], Offer]


def _rotating(function: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[int], Any]:
    count = len(inputs)
    if count == 1:
        only = inputs[0]
        return lambda i: function(only)
    return lambda i: function(inputs[i % count])


def _same(result: Any) -> Tensor:
    tensor: Tensor = result
    return tensor


def function(p: Problem, names: Any) -> Callable[[Tensor], Tensor]:
    """The problem as a function of x, by the functions of torch.nn.functional or of torchpool.

    Args:
        names: the module that has `max_pool2d` and the like.
    """
    d, op = p.num_axes, "max" if p.op == "max" else "avg"
    if p.is_adaptive:
        call = getattr(names, f"adaptive_{op}_pool{d}d")
        return lambda x: call(x, p.output)
    call = getattr(names, f"{op}_pool{d}d")
    if op == "max":
        return lambda x: call(x, p.kernel, p.stride, p.padding, p.dilation, p.ceil)
    if d == 1 or p.divisor is None:
        return lambda x: call(x, p.kernel, p.stride, p.padding, p.ceil, p.count_include_pad)
    return lambda x: call(x, p.kernel, p.stride, p.padding, p.ceil, p.count_include_pad, p.divisor)


def ours(p: Problem, inputs: Sequence[Tensor], threads: int) -> Offer:
    """torchpool."""
    return Offer(_rotating(function(p, functional), inputs), _same)


def eager(p: Problem, inputs: Sequence[Tensor], threads: int) -> Offer:
    """torch's own operator."""
    _refuse_naive(p)
    return Offer(_rotating(function(p, F), inputs), _same)


def compiled(p: Problem, inputs: Sequence[Tensor], threads: int) -> Offer:
    """torch's operator under torch.compile."""
    _refuse_naive(p)
    torch._dynamo.reset()
    return Offer(_rotating(torch.compile(function(p, F), dynamic=False), inputs), _same)


def onednn(p: Problem, inputs: Sequence[Tensor], threads: int) -> Offer:
    """oneDNN through torch's mkldnn tensors."""
    _refuse_naive(p)
    _only_contiguous(p, "mkldnn tensors")
    if not torch.backends.mkldnn.is_available():
        raise NotOffered("this torch has no oneDNN")
    if p.num_axes == 1:
        raise NotOffered("mkldnn tensors pool two or three axes")
    call = function(p, F)
    dense = [x.to_mkldnn() for x in inputs]
    try:
        call(dense[0])
    except RuntimeError as error:
        raise NotOffered(str(error).splitlines()[0]) from None
    return Offer(_rotating(call, dense), lambda y: y.to_dense())


def _refuse_naive(p: Problem) -> None:
    if p.taps > NAIVE:
        raise NotOffered("looks at every element of every window: minutes for this row")


def _only_contiguous(p: Problem, who: str) -> None:
    if p.layout != "contiguous":
        raise NotOffered(f"{who} hold channels before space")


# ONNX Runtime


def onnxruntime(p: Problem, inputs: Sequence[Tensor], threads: int) -> Offer:
    """ONNX Runtime's MaxPool, AveragePool and GlobalAveragePool on bound memory."""
    import onnxruntime as ort

    _only_contiguous(p, "ONNX tensors")
    _refuse_naive(p)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # the next one's turn
    session = ort.InferenceSession(_onnx_model(p), options, providers=["CPUExecutionProvider"])
    bindings = []
    for x in inputs:
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x.numpy()))
        binding.bind_output("y")
        bindings.append(binding)

    def run(binding: Any) -> Any:
        session.run_with_iobinding(binding)
        return binding

    return Offer(_rotating(run, bindings), lambda b: torch.from_numpy(b.get_outputs()[0].numpy()))


def _onnx_model(p: Problem) -> bytes:
    from onnx import TensorProto, helper

    name, attributes = _onnx_node(p)
    node = helper.make_node(name, ["x"], ["y"], **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, p.shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "pool", [x], [y])
    opset = helper.make_opsetid("", 22)
    made: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    return made


def _onnx_node(p: Problem) -> tuple[str, dict[str, Any]]:
    if p.is_adaptive and set(p.output) == {1}:
        return "GlobalMaxPool" if p.op == "max" else "GlobalAveragePool", {}
    if p.divisor is not None:
        raise NotOffered("ONNX has no divisor")
    if p.is_adaptive:
        if not p.tiling:
            raise NotOffered("ONNX has no adaptive pooling")
        numbers: dict[str, Any] = {"kernel_shape": p.tiling, "strides": p.tiling}
    else:
        numbers = {
            "kernel_shape": p.kernel,
            "strides": p.stride,
            "pads": (*p.padding, *p.padding),
            "dilations": p.dilation,
            "ceil_mode": int(p.ceil),
        }
    if p.op == "max":
        return "MaxPool", numbers
    return "AveragePool", {**numbers, "count_include_pad": int(p.count_include_pad)}


# OpenVINO


def openvino(p: Problem, inputs: Sequence[Tensor], threads: int) -> Offer:
    """OpenVINO's CPU plugin in float32, tensors shared with torch."""
    import openvino as ov

    _refuse_naive(p)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = ov.Core().compile_model(_openvino_model(p, ov), "CPU", settings)
    last = p.layout == "channels_last"
    requests = []
    for x in inputs:
        request = model.create_infer_request()
        array = (x.movedim(1, -1) if last else x).numpy()
        request.set_input_tensor(ov.Tensor(array, shared_memory=True))
        requests.append(request)

    def run(request: Any) -> Any:
        request.infer()
        return request

    def read(request: Any) -> Tensor:
        y = torch.from_numpy(request.get_output_tensor(0).data.copy())
        return y.movedim(-1, 1) if last else y

    return Offer(_rotating(run, requests), read)


def _openvino_model(p: Problem, ov: Any) -> Any:
    import numpy as np
    from openvino import opset8 as ops
    from openvino.preprocess import PrePostProcessor

    x = ops.parameter(p.shape, np.float32)
    model = ov.Model([_openvino_node(p, x, ops).output(0)], [x], "pool")
    if p.layout == "channels_last":
        first, last = ov.Layout("NC..."), ov.Layout("N...C")
        process = PrePostProcessor(model)
        process.input().tensor().set_layout(last)
        process.input().model().set_layout(first)
        process.output().model().set_layout(first)
        process.output().tensor().set_layout(last)
        model = process.build()
    return model


def _openvino_node(p: Problem, x: Any, ops: Any) -> Any:
    import numpy as np

    if p.divisor is not None:
        raise NotOffered("OpenVINO has no divisor")
    if p.is_adaptive:
        pool = ops.adaptive_max_pool if p.op == "max" else ops.adaptive_avg_pool
        return pool(x, np.array(p.output, dtype=np.int64))
    rounding = "ceil" if p.ceil else "floor"
    pads = [list(p.padding)] * 2
    if p.op == "max":
        dilations = list(p.dilation)
        return ops.max_pool(x, list(p.stride), dilations, *pads, list(p.kernel), rounding)
    kernel = list(p.kernel)
    return ops.avg_pool(x, list(p.stride), *pads, kernel, not p.count_include_pad, rounding)


# JAX


def jax(p: Problem, inputs: Sequence[Tensor], threads: int) -> Offer:
    """XLA's windows by jax.lax, jitted, on JAX's own arrays in the same layout."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax as library

    _refuse_naive(p)
    if threads != _usable_cores():
        raise NotOffered(f"XLA takes every core ({_usable_cores()}), not {threads}")
    last = p.layout == "channels_last"
    arrays = [library.numpy.asarray((x.movedim(1, -1) if last else x).numpy()) for x in inputs]
    pool = library.jit(_jax_function(p, library))

    def read(y: Any) -> Tensor:
        tensor = torch.utils.dlpack.from_dlpack(y)
        return tensor.movedim(-1, 1) if last else tensor

    return Offer(_rotating(lambda x: pool(x).block_until_ready(), arrays), read)


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _jax_function(p: Problem, library: Any) -> Callable[[Any], Any]:
    numpy, lax = library.numpy, library.lax
    axes = tuple(
        range(1, 1 + p.num_axes) if p.layout == "channels_last" else range(2, len(p.shape))
    )
    if set(p.out_sizes) == {1} and p.tiling:
        reduce = numpy.max if p.op == "max" else numpy.mean
        return lambda x: reduce(x, axis=axes, keepdims=True)
    if p.is_adaptive and not p.tiling:
        raise NotOffered("JAX has no adaptive pooling")
    if p.op == "mean" and (p.ceil or p.divisor is not None):
        raise NotOffered("JAX has no divisor rules of its own")
    kernel, stride = (p.tiling, p.tiling) if p.is_adaptive else (p.kernel, p.stride)
    padding = p.padding or (0,) * p.num_axes
    dilation = p.dilation or (1,) * p.num_axes

    def spread(values: Sequence[Any], neutral: Any) -> tuple[Any, ...]:
        made = [neutral] * len(p.shape)
        for axis, value in zip(axes, values, strict=True):
            made[axis] = value
        return tuple(made)

    pads = []
    rows = zip(p.shape[2:], p.out_sizes, kernel, stride, padding, dilation, strict=True)
    for size, out, k, step, before, spacing in rows:
        end = (out - 1) * step + (k - 1) * spacing + 1
        pads.append((before, max(before, end - size - before)))
    geometry = {
        "window_dimensions": spread(kernel, 1),
        "window_strides": spread(stride, 1),
        "padding": spread(pads, (0, 0)),
        "window_dilation": spread(dilation, 1),
    }
    if p.op == "max":
        return lambda x: lax.reduce_window(x, -numpy.inf, lax.max, **geometry)
    taps = 1
    for k in kernel:
        taps *= k
    if p.count_include_pad:
        return lambda x: lax.reduce_window(x, 0.0, lax.add, **geometry) / taps
    plane = [1 if axis not in axes else size for axis, size in enumerate(_jax_shape(p))]
    counts = lax.reduce_window(numpy.ones(plane), 0.0, lax.add, **geometry)
    return lambda x: lax.reduce_window(x, 0.0, lax.add, **geometry) / counts


def _jax_shape(p: Problem) -> tuple[int, ...]:
    n, c, *sizes = p.shape
    return (n, *sizes, c) if p.layout == "channels_last" else p.shape


# OpenCV

CHANNELS = 128
"""Channels of an image that OpenCV 5 takes."""


def opencv(p: Problem, inputs: Sequence[Tensor], threads: int) -> Offer:
    """OpenCV where pooling is what it has: dilate, boxFilter, resize by area. Planes one by one, or
    images of up to 128 channels."""
    import cv2

    cv2.setNumThreads(threads)
    apply = _opencv_function(p, cv2)
    last = p.layout == "channels_last"
    if last and p.shape[1] > CHANNELS:
        raise NotOffered(f"images of OpenCV have at most {CHANNELS} channels")
    order = [x.movedim(1, -1).numpy() if last else x.flatten(0, 1).numpy() for x in inputs]
    outs = p.out_sizes
    result = torch.empty((p.shape[0], *outs, p.shape[1]) if last else (*p.shape[:2], *outs))
    into = (result if last else result.flatten(0, 1)).numpy()

    def run(images: Any) -> Tensor:
        for source, target in zip(images, into, strict=True):
            apply(source, target)
        return result

    return Offer(_rotating(run, order), lambda y: (y.movedim(-1, 1) if last else y).clone())


def _opencv_function(p: Problem, cv2: Any) -> Callable[[Any, Any], Any]:
    import numpy as np

    if p.num_axes != 2:
        raise NotOffered("OpenCV filters images")
    if p.op == "mean" and p.tiling:
        size = p.out_sizes[::-1]
        return lambda x, y: cv2.resize(x, size, dst=y, interpolation=cv2.INTER_AREA)
    same = not p.is_adaptive and all(
        (k, s, d) == (2 * pad + 1, 1, 1)
        for k, s, d, pad in zip(p.kernel, p.stride, p.dilation, p.padding, strict=True)
    )
    if not same or p.divisor is not None:
        raise NotOffered("OpenCV has no windows with such steps")
    kernel = p.kernel[::-1]
    if p.op == "max":
        ones = np.ones(p.kernel, np.uint8)
        return lambda x, y: cv2.dilate(x, ones, dst=y)
    if p.count_include_pad:
        return lambda x, y: cv2.boxFilter(x, -1, kernel, dst=y, borderType=cv2.BORDER_CONSTANT)
    plain = {"normalize": False, "borderType": cv2.BORDER_CONSTANT}
    counts = cv2.boxFilter(np.ones(p.shape[2:], np.float32), -1, kernel, **plain)
    if p.layout == "channels_last" and p.shape[1] > 1:
        counts = np.repeat(counts[..., None], p.shape[1], axis=2)

    def mean(x: Any, y: Any) -> None:
        cv2.boxFilter(x, -1, kernel, dst=y, **plain)
        cv2.divide(y, counts, dst=y)

    return mean


PEERS: dict[str, Peer] = {
    "torch": eager,
    "torch.compile": compiled,
    "oneDNN": onednn,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
    "JAX": jax,
    "OpenCV": opencv,
}
"""Every contender but torchpool, in the order of the table's columns."""


def chosen(names: Sequence[str]) -> dict[str, Peer]:
    """The peers of some names, however they are written.

    Raises:
        ValueError: a name is not that of a peer.
    """
    plain = {_plain(name): name for name in PEERS}
    wrong = [name for name in names if _plain(name) not in plain]
    if wrong:
        raise ValueError(f"--peers {wrong[0]} is not one of {', '.join(map(_plain, PEERS))}")
    return {plain[_plain(name)]: PEERS[plain[_plain(name)]] for name in names}


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "").replace("torch.compile", "compile")


def versions() -> dict[str, str]:
    """Versions of what is installed of torchpool, its peers and what they run on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"torchpool": __version__}
    for name in ("torch", "numpy", "numba", "onnxruntime", "openvino", "jax", "jaxlib"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    for name in ("opencv-python-headless", "opencv-python"):
        try:
            found["opencv"] = version(name)
        except PackageNotFoundError:
            continue
    return found
