"""Max unpooling against torch, and against loops where torch has no defined answer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import torchpool as tp

CASES = [
    (1, (2, 3, 10), {"kernel_size": 2}),
    (1, (3, 11), {"kernel_size": 3, "stride": 2, "padding": 1}),
    (2, (2, 3, 8, 10), {"kernel_size": 2}),
    (2, (3, 8, 9), {"kernel_size": (2, 3), "stride": (2, 3)}),
    (2, (2, 1, 9, 7), {"kernel_size": 3, "stride": 3, "padding": 1}),
    (3, (2, 2, 4, 6, 5), {"kernel_size": 2}),
    (3, (2, 6, 4, 6), {"kernel_size": (2, 1, 3), "stride": (2, 1, 3)}),
]
UNPOOL = {d: getattr(tp, f"max_unpool{d}d") for d in (1, 2, 3)}
TORCH_UNPOOL = {d: getattr(F, f"max_unpool{d}d") for d in (1, 2, 3)}
TORCH_POOL = {d: getattr(F, f"max_pool{d}d") for d in (1, 2, 3)}


def naive_unpool(values, indices, sizes):
    """Loops in row-major order: a later value overwrites an earlier one; also who won."""
    lead = values.shape[: values.ndim - len(sizes)]
    planes, flat = values.reshape(*lead, -1), indices.reshape(*lead, -1)
    out = np.zeros((*lead, int(np.prod(sizes))), values.dtype)
    winner = np.full(out.shape, -1)
    for plane in np.ndindex(*lead):
        for position, index in enumerate(flat[plane]):
            out[plane][index] = planes[plane][position]
            winner[plane][index] = position
    return out.reshape(*lead, *sizes), winner


@pytest.mark.parametrize(("d", "shape", "options"), CASES)
def test_puts_back_what_torch_pooled(d, shape, options):
    x = torch.randn(shape, dtype=torch.double)
    y, indices = TORCH_POOL[d](x, **options, return_indices=True)
    options = {**options, "output_size": x.shape[-d:]}
    ours, theirs = y.clone().requires_grad_(), y.clone().requires_grad_()
    a, b = UNPOOL[d](ours, indices, **options), TORCH_UNPOOL[d](theirs, indices, **options)
    assert torch.equal(a, b)
    if options.get("stride", options["kernel_size"]) == options["kernel_size"]:  # no duplicates
        grad = torch.randn_like(b)
        assert torch.equal(
            *(torch.autograd.grad(z, t, grad)[0] for z, t in ((a, ours), (b, theirs)))
        )


@pytest.mark.parametrize(("d", "shape", "options"), CASES)
def test_the_usual_output_size_is_torchs(d, shape, options):
    y, _ = TORCH_POOL[d](torch.randn(shape), **options, return_indices=True)
    order = torch.arange(y[0].numel()).view(y[0].shape) % y.flatten(-d).shape[-1]
    indices = order.expand(y.shape).contiguous()
    assert torch.equal(UNPOOL[d](y, indices, **options), TORCH_UNPOOL[d](y, indices, **options))


@pytest.mark.parametrize(
    ("sizes", "lead", "count"),
    [((13,), (2, 3), (20,)), ((4, 5), (3,), (6, 7)), ((3, 2, 4), (2, 2), (3, 3, 3))],
)
def test_the_last_of_duplicates_wins_and_alone_gets_the_gradient(sizes, lead, count):
    d = len(sizes)
    x = torch.randn(*lead, *count, dtype=torch.double, requires_grad=True)
    indices = torch.randint(0, int(np.prod(sizes)), x.shape)
    kernel = tuple(size - n + 1 for size, n in zip(sizes, count, strict=True))
    stride, padding = (1,) * d, (0,) * d
    if min(kernel) < 1:  # more values than room: a stride of 1 with padding gives any output size
        padding = tuple(max(0, 1 - k) for k in kernel)
        kernel = tuple(k + 2 * p for k, p in zip(kernel, padding, strict=True))
    y = UNPOOL[d](x, indices, kernel, stride, padding)
    expected, winner = naive_unpool(x.detach().numpy(), indices.numpy(), sizes)
    np.testing.assert_array_equal(y.detach().numpy(), expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    true = np.zeros((*lead, int(np.prod(count))))
    for slot in np.ndindex(*winner.shape):
        if winner[slot] >= 0:
            true[(*slot[:-1], winner[slot])] = grad.reshape(winner.shape)[slot]
    np.testing.assert_array_equal(x.grad.numpy().reshape(true.shape), true)


def test_gradcheck_with_duplicates():
    x = torch.randn(2, 2, 3, 3, dtype=torch.double, requires_grad=True)
    indices = torch.randint(0, 9, x.shape)
    function = lambda t: tp.max_unpool2d(t, indices, 1)  # noqa: E731
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)
    _, tangent = torch.func.jvp(function, (x.detach(),), (torch.ones_like(x),))
    assert torch.equal(tangent, function(torch.ones_like(x)))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int64, torch.bool]
)
def test_any_dtype(dtype):
    y = tp.max_unpool1d(torch.tensor([[1, 0, 1]]).to(dtype), torch.tensor([[5, 0, 2]]), 2)
    assert y.dtype == dtype
    assert y.tolist() == torch.tensor([[0, 0, 1, 0, 0, 1]]).to(dtype).tolist()


@pytest.mark.parametrize(
    ("d", "memory_format"), [(2, torch.channels_last), (3, torch.channels_last_3d)]
)
def test_layout_of_the_input_is_kept(d, memory_format):
    x = torch.randn(2, 3, *(4,) * d).to(memory_format=memory_format)
    y, indices = TORCH_POOL[d](x, 2, return_indices=True)
    out = UNPOOL[d](y, indices, 2)
    assert out.is_contiguous(memory_format=memory_format)
    assert torch.equal(out, TORCH_UNPOOL[d](y.contiguous(), indices.contiguous(), 2))


def test_empty_batch_and_special_values():
    assert tp.max_unpool2d(
        torch.ones(0, 3, 2, 2), torch.zeros(0, 3, 2, 2, dtype=torch.long), 2
    ).shape == (0, 3, 4, 4)
    x = torch.tensor([[float("nan"), float("inf"), float("-inf")]])
    y = tp.max_unpool1d(x, torch.tensor([[0, 3, 5]]), 2)
    assert torch.equal(y.nan_to_num(7.0, 8.0, 9.0), torch.tensor([[7.0, 0, 0, 8.0, 0, 9.0]]))
    loser = tp.max_unpool1d(torch.tensor([[float("inf"), 1.0]]), torch.tensor([[1, 1]]), 2)
    assert loser.tolist() == [[0.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("index", [-1, 4, 99])
def test_indices_outside_of_the_output_raise(index):
    with pytest.raises(ValueError, match=f"index {index} lies outside"):
        tp.max_unpool1d(torch.ones(1, 2), torch.tensor([[0, index]]), 2)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.int32), 2), TypeError, "int64"),
        ((torch.ones(1, 2), torch.zeros(1, 3, dtype=torch.long), 2), ValueError, "shape"),
        ((torch.ones(2), torch.zeros(2, dtype=torch.long), 2), ValueError, "axes"),
        (
            (torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.long), (2, 2)),
            ValueError,
            "kernel_size",
        ),
        (
            (torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.long), 2, 2, 0, (9,)),
            ValueError,
            "output_size",
        ),
        (
            (torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.long), 2, 2, 0, (4, 4)),
            ValueError,
            "output_size",
        ),
        (([1.0], torch.zeros(1, 2, dtype=torch.long), 2), TypeError, "input"),
    ],
)
def test_errors_name_the_argument(arguments, error, match):
    with pytest.raises(error, match=match):
        tp.max_unpool1d(*arguments)


@pytest.mark.parametrize("size", [(5, 7), (5, 8), (7, 7), (6, 9)])
def test_output_sizes_that_torch_takes_or_refuses(size):
    y, indices = F.max_pool2d(torch.randn(1, 1, 6, 8), 2, return_indices=True)
    try:
        TORCH_UNPOOL[2](y, indices.clamp(max=3), 2, output_size=size)
    except ValueError:
        with pytest.raises(ValueError, match="output_size"):
            tp.max_unpool2d(y, indices.clamp(max=3), 2, output_size=size)
    else:
        assert tp.max_unpool2d(y, indices.clamp(max=3), 2, output_size=size).shape[-2:] == size


def test_compile_and_vmap():
    x = torch.randn(4, 2, 6, 6)
    y, indices = F.max_pool2d(x, 2, return_indices=True)
    function = lambda t, i: tp.max_unpool2d(t, i, 2)  # noqa: E731
    expected = function(y, indices)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(y, indices), expected)
    with pytest.raises(RuntimeError, match="outside the output"):
        compiled(y, indices + 30)
    assert torch.equal(torch.vmap(function)(y, indices), expected)
    assert torch.equal(torch.vmap(function, in_dims=(0, None))(y, indices[0])[0], expected[0])
    with pytest.raises(ValueError, match="outside"):
        torch.vmap(function)(y, indices + 30)


def test_meta_tensors_have_shapes():
    y = tp.max_unpool2d(
        torch.empty(2, 3, 4, 4, device="meta"),
        torch.empty(2, 3, 4, 4, device="meta", dtype=torch.long),
        2,
    )
    assert y.shape == (2, 3, 8, 8)
