"""What `test_segments.py` runs in a process of its own: the Triton kernels for windows of a table
against the reference, on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import interpreter
import torch

import torchpool as tp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = torch.tensor([5, 0, 19, 1], device=DEVICE)
SIZE, CHANNELS = 19, 3
WINDOWS = [
    tp.Global(),
    tp.Adaptive(3),
    tp.Window(3, 2, padding=((2, 1),), ceil_mode=True),
    tp.Window(4, 1, padding="same", dilation=2),
]
REDUCTIONS = [
    tp.Max(),
    tp.Min(),
    tp.Sum(),
    tp.Mean(count_include_pad=True),
    tp.Mean(divisor=3.0),
    tp.SoftmaxMean(1.5),
    tp.LogMeanExp(-0.5),
    tp.PowerMean(2.0),
    tp.Std(1.0),
]


def outputs(name, reduction, windows, layout, kind):
    """Value and gradients of one case on one backend."""
    os.environ["TORCHPOOL_BACKEND"] = name
    generator = torch.Generator().manual_seed(3)
    dim = 2 if layout == "nct" else 1
    shape = (4, CHANNELS, SIZE) if layout == "nct" else (4, SIZE, CHANNELS)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    w = torch.rand(shape, generator=generator, dtype=torch.float64)
    mask = (torch.rand(shape, generator=generator) > 0.3).to(DEVICE)
    real = tp.length_mask(LENGTHS.cpu(), SIZE).unsqueeze(3 - dim)
    x = torch.where(real, x, torch.nan).to(DEVICE).requires_grad_()
    w = torch.where(w < 0.2, 0.0, w).to(DEVICE).requires_grad_()
    inputs, options = [x], {}
    if kind == "weights" and isinstance(reduction, tp.Accumulation):
        inputs.append(w)
        options["weights"] = w
    elif kind == "mask":
        options["mask"] = mask
    if kind != "plain" and reduction.parameter not in (None, "correction"):
        values = [1.3] if kind == "mask" else [0.7, 1.3, 2.1]
        p = torch.tensor(values, dtype=torch.float64, device=DEVICE, requires_grad=True)
        inputs.append(p)
        reduction = reduction.replace(p)
    y = tp.pool(x, reduction, windows, lengths=LENGTHS, dims=dim, **options)
    slope = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=DEVICE).reshape(y.shape)
    return [y, *torch.autograd.grad(y, inputs, slope)]


def cases():
    """Every reduction plain, with weights and with a mask, in both layouts; all pairs of windows,
    layout and kind among them. The interpreter is slow: every combination takes a minute."""
    return [
        (reduction, WINDOWS[(i + j) % 4], ("nct", "ntc")[(i // 2 + j) % 2], kind)
        for i, reduction in enumerate(REDUCTIONS)
        for j, kind in enumerate(("plain", "weights", "mask"))
    ]


def main():
    count = 0
    for case in cases():
        made, wanted = outputs("gpu", *case), outputs("reference", *case)
        for a, b in zip(made, wanted, strict=True):
            assert not a.isnan().any(), case
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        count += 1
    os.environ["TORCHPOOL_BACKEND"] = "gpu"
    rows = torch.randn(23, 70, device=DEVICE, requires_grad=True)
    offsets = torch.tensor([0, 9, 9, 23], device=DEVICE)
    y, where = tp.segment_pool(rows, tp.Max(), offsets=offsets, return_indices=True)
    assert torch.equal(y[0], rows[:9].amax(0))
    assert torch.equal(where[2], rows[9:].argmax(0) + 9)
    assert (where[1] == -1).all()
    print(f"checked {count} cases on {DEVICE}")


if __name__ == "__main__":
    interpreter.hasten(checks_overflow=False)
    main()
