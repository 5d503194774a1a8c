"""The Modules: torch's twenty against torch, the learned ones against loops and unfolded windows
that know nothing of ours."""

import copy
import inspect
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import torchpool as tp

SAMPLES = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0))
X = {1: (2, 3, 13), 2: (2, 3, 9, 11), 3: (2, 3, 6, 7, 8)}

# name, arguments, keyword arguments
LAYERS = [
    *(
        (f"MaxPool{d}d", a, k)
        for d in (1, 2, 3)
        for a, k in [
            ((2,), {}),
            ((3, 2, 1), {"return_indices": True}),
            (
                (3,),
                {
                    "stride": 1,
                    "padding": 1,
                    "dilation": 2,
                    "ceil_mode": True,
                    "return_indices": True,
                },
            ),
            ((3, 2), {"ceil_mode": True}),
        ]
    ),
    ("MaxPool2d", ((3, 2), (2, 1), (1, 0)), {}),
    ("MaxPool3d", ((1, 2, 3),), {"stride": (1, 2, 2), "padding": (0, 1, 1)}),
    *(
        (f"AvgPool{d}d", a, k)
        for d in (1, 2, 3)
        for a, k in [
            ((2,), {}),
            ((3, 2, 1), {}),
            ((3,), {"stride": 2, "padding": 1, "ceil_mode": True}),
            ((3, 2, 1, True), {"count_include_pad": False}),
        ]
    ),
    ("AvgPool2d", ((3, 2), 2, (1, 0)), {"divisor_override": 4}),
    ("AvgPool3d", (2,), {"divisor_override": 3}),
    *(
        (f"LPPool{d}d", a, k)
        for d in (1, 2, 3)
        for a, k in [((2, 2), {}), ((2, 3), {"stride": 2, "ceil_mode": True}), ((4, 2, 1), {})]
    ),
    ("LPPool2d", (2, (3, 2)), {"stride": (2, 1)}),
    *((f"AdaptiveMaxPool{d}d", (4,), {"return_indices": True}) for d in (1, 2, 3)),
    ("AdaptiveMaxPool2d", ((None, 3),), {}),
    ("AdaptiveMaxPool3d", ((2, None, 5),), {}),
    *((f"AdaptiveAvgPool{d}d", (4,), {}) for d in (1, 2, 3)),
    ("AdaptiveAvgPool2d", ((None, 7),), {}),
    ("AdaptiveAvgPool3d", ((1, None, 5),), {}),
    ("FractionalMaxPool2d", (2,), {"output_size": (4, 5), "_random_samples": SAMPLES[..., :2]}),
    (
        "FractionalMaxPool2d",
        ((2, 3),),
        {"output_ratio": (0.5, 0.6), "return_indices": True, "_random_samples": SAMPLES[..., :2]},
    ),
    ("FractionalMaxPool3d", (2,), {"output_ratio": 0.5, "_random_samples": SAMPLES}),
    (
        "FractionalMaxPool3d",
        ((1, 2, 3),),
        {"output_size": (3, 4, 5), "return_indices": True, "_random_samples": SAMPLES},
    ),
    *((f"MaxUnpool{d}d", a, {}) for d in (1, 2, 3) for a in [(2,), (3, 2, 1)]),
]
NAMES = sorted({name for name, _, _ in LAYERS})


def pair(name, arguments, options):
    return getattr(tp.nn, name)(*arguments, **options), getattr(torch.nn, name)(
        *arguments, **options
    )


def inputs(name, layer):
    """What a layer is called with: a tensor, or pooled values with their indices."""
    d = int(name[-2])
    x = torch.randn(X[d], generator=torch.Generator().manual_seed(1))
    if not name.startswith("MaxUnpool"):
        return (x,), {}
    pool = getattr(F, f"max_pool{d}d")
    y, indices = pool(x, layer.kernel_size, layer.stride, layer.padding, return_indices=True)
    return (y, indices), {"output_size": x.shape}


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize(("name", "arguments", "options"), LAYERS)
def test_twenty_layers_equal_torch(name, arguments, options):
    ours, theirs = pair(name, arguments, options)
    (x, *rest), call = inputs(name, theirs)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = as_tuple(ours(a, *rest, **call)), as_tuple(theirs(b, *rest, **call))
    assert len(got) == len(expected)
    torch.testing.assert_close(got[0], expected[0])
    for indices, wanted in zip(got[1:], expected[1:], strict=True):
        assert indices.dtype == torch.int64
        assert torch.equal(indices, wanted)
    if name.startswith("MaxUnpool") and theirs.stride != theirs.kernel_size:
        return  # torch sends the gradient to every duplicate, test_unpool.py knows the true one
    grad = torch.randn(expected[0].shape)
    (ga,), (gb,) = torch.autograd.grad(got[0], a, grad), torch.autograd.grad(expected[0], b, grad)
    torch.testing.assert_close(ga, gb)


@pytest.mark.parametrize(("name", "arguments", "options"), LAYERS)
def test_twenty_layers_look_like_torchs(name, arguments, options):
    ours, theirs = pair(name, arguments, options)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, getattr(torch.nn, name))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    plain = {k: v for k, v in vars(theirs).items() if not k.startswith("_")}
    assert {k: v for k, v in vars(ours).items() if not k.startswith("_")} == plain


@pytest.mark.parametrize("name", NAMES)
def test_twenty_signatures_are_torchs(name):
    ours, theirs = getattr(tp.nn, name), getattr(torch.nn, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert list(inspect.signature(ours.forward).parameters) == list(
        inspect.signature(theirs.forward).parameters
    )
    assert "Shape:" in ours.__doc__


def test_all_twenty_are_there():
    found = {name for name in dir(torch.nn) if "Pool" in name and name[-1] == "d"} | {
        f"MaxUnpool{d}d" for d in (1, 2, 3)
    }
    assert found == set(NAMES)
    assert len(NAMES) == 20
    assert found <= set(tp.nn.__all__)


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [next(layer for layer in LAYERS if layer[0] == name) for name in NAMES],
)
def test_twenty_layers_unbatched_copied_and_pickled(name, arguments, options):
    if "_random_samples" in options:
        options = {**options, "_random_samples": options["_random_samples"][:1]}
    ours, theirs = pair(name, arguments, options)
    given, call = inputs(name, theirs)
    given = tuple(t[0] for t in given)
    call = {k: v[2:] for k, v in call.items()}
    expected = as_tuple(theirs(*given, **call))
    for layer in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(layer) is getattr(tp.nn, name)
        for got, wanted in zip(as_tuple(layer(*given, **call)), expected, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("name", "arguments", "options"), [layer for layer in LAYERS if layer[0][-2] == "2"]
)
def test_twenty_layers_can_be_traced(name, arguments, options):
    ours, theirs = pair(name, arguments, options)
    given, call = inputs(name, theirs)
    traced = torch.fx.symbolic_trace(ours)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == [ours._pool]
    for got, wanted in zip(
        as_tuple(traced(*given, *call.values())), as_tuple(ours(*given, **call)), strict=True
    ):
        assert torch.equal(got, wanted)


class Marked(torch.Tensor):
    """A subclass of Tensor; its results are of its kind."""


def test_subclasses_of_tensor_keep_their_kind():
    x = torch.randn(1, 2, 6, 6)
    y = tp.nn.MaxPool2d(2)(x.as_subclass(Marked))
    assert type(y) is Marked
    assert torch.equal(y.as_subclass(torch.Tensor), F.max_pool2d(x, 2))


def test_fractional_draws_the_samples_torch_would():
    x = torch.randn(2, 3, 9, 9)
    ours, theirs = pair("FractionalMaxPool2d", (2,), {"output_size": 5})
    torch.manual_seed(3)
    got = ours(x)
    torch.manual_seed(3)
    assert torch.equal(got, theirs(x))


# Windows by hand ----------------------------------------------------------------------------------


def windows_of(x, kernel, stride, before=0, after=0, dilation=1):
    """Every window of (N, C, *S) as loops: yields output position, values and whether each is
    inside the input; float64."""
    d = x.ndim - 2
    sizes = x.shape[2:]
    outs = [(n + before + after - dilation * (kernel - 1) - 1) // stride + 1 for n in sizes]
    for place in np.ndindex(*x.shape[:2], *outs):
        values, inside = [], []
        for taps in itertools.product(range(kernel), repeat=d):
            spot = [
                o * stride - before + j * dilation for o, j in zip(place[2:], taps, strict=True)
            ]
            is_inside = all(0 <= p < n for p, n in zip(spot, sizes, strict=True))
            values.append(x[(*place[:2], *spot)] if is_inside else 0.0)
            inside.append(is_inside)
        yield place, np.array(values), np.array(inside)


def out_shape(x, kernel, stride, before, after, dilation):
    return (
        *x.shape[:2],
        *((n + before + after - dilation * (kernel - 1) - 1) // stride + 1 for n in x.shape[2:]),
    )


def naive_mixture(x, share, kernel, stride=None, before=0, after=0, dilation=1, mask=None):
    """share(channel, window) * max + (1 - share) * mean, over the elements that are inside and not
    masked."""
    stride = kernel if stride is None else stride
    seen = x if mask is None else np.where(mask, x, np.nan)
    y = np.zeros(out_shape(x, kernel, stride, before, after, dilation))
    for place, values, inside in windows_of(seen, kernel, stride, before, after, dilation):
        valid = values[inside & ~np.isnan(values)]
        if valid.size:
            a = share(place[1], np.nan_to_num(values))
            y[place] = a * valid.max() + (1 - a) * valid.mean()
    return y


GEOMETRIES = [
    {"kernel": 2},
    {"kernel": 3, "stride": 2, "before": 1, "after": 1},
    {"kernel": 2, "stride": 1, "before": 1, "after": 0},
    {"kernel": 2, "stride": 3, "before": 2, "after": 3, "dilation": 2},
]


def window(kernel, stride=None, before=0, after=0, dilation=1):
    return tp.Window(kernel, stride, padding=[(before, after)], dilation=dilation)


def sample(d):
    return torch.randn(
        (2, 3, *(7, 6, 5)[:d]), dtype=torch.double, generator=torch.Generator().manual_seed(d)
    )


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_mixed_against_loops(d, geometry):
    x = sample(d)
    layer = tp.nn.Mixed(window(**geometry), 0.3, channels=3).double()
    with torch.no_grad():
        layer.raw_mix.copy_(torch.tensor([-1.0, 0.5, 2.0]))
    shares = 1 / (1 + np.exp(-layer.raw_mix.detach().numpy()))
    expected = naive_mixture(x.numpy(), lambda c, _: shares[c], **geometry)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    mask = torch.rand(x.shape) > 0.4
    expected = naive_mixture(x.numpy(), lambda c, _: shares[c], **geometry, mask=mask.numpy())
    np.testing.assert_allclose(
        layer(x, mask=mask).detach().numpy(), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_gated_against_loops(d, geometry, channels):
    x = sample(d)
    layer = tp.nn.Gated(window(**geometry), channels=channels, num_axes=d).double()
    with torch.no_grad():
        layer.weight.normal_()
    masks = layer.weight.detach().flatten(1).expand(3, -1).numpy()
    share = lambda c, values: 1 / (1 + np.exp(-(masks[c] @ values)))  # noqa: E731
    expected = naive_mixture(x.numpy(), share, **geometry)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-11, atol=1e-12)
    mask = torch.rand(x.shape) > 0.4
    expected = naive_mixture(x.numpy(), share, **geometry, mask=mask.numpy())
    np.testing.assert_allclose(
        layer(x, mask=mask).detach().numpy(), expected, rtol=1e-11, atol=1e-12
    )


def test_gated_ceil_mode_and_causal():
    x = sample(2)
    layer = tp.nn.Gated(tp.Window(2, 2, ceil_mode=True)).double()
    with torch.no_grad():
        layer.weight.normal_()
    unfolded = F.unfold(F.pad(x, (0, 0, 0, 1)).flatten(0, 1)[:, None], 2, stride=2)  # (NC, 4, O)
    gate = torch.sigmoid(layer.weight.flatten() @ unfolded).reshape(2, 3, 4, 3)
    expected = gate * F.max_pool2d(x, 2, ceil_mode=True) + (1 - gate) * F.avg_pool2d(
        x, 2, ceil_mode=True, count_include_pad=False
    )
    torch.testing.assert_close(layer(x), expected)
    causal = tp.nn.Gated(tp.Window(3, 1, "causal"), num_axes=1).double()
    assert causal(sample(1)).shape == sample(1).shape


def naive_blur(x, kernel, stride, mode):
    """The filter from repeated convolution with [1, 1], applied position by position."""
    row = np.ones(1)
    for _ in range(kernel - 1):
        row = np.convolve(row, [0.5, 0.5])
    before, after = (kernel - 1) // 2, kernel // 2
    pads = [(0, 0), (0, 0)] + [(before, after)] * (x.ndim - 2)
    padded = np.pad(
        x,
        pads,
        mode={"reflect": "reflect", "replicate": "edge", "circular": "wrap", "zeros": "constant"}[
            mode
        ],
    )
    y = np.zeros((*x.shape[:2], *(-(-n // stride) for n in x.shape[2:])))
    for place in np.ndindex(*y.shape):
        for taps in itertools.product(range(kernel), repeat=x.ndim - 2):
            spot = tuple(o * stride + j for o, j in zip(place[2:], taps, strict=True))
            y[place] += np.prod([row[j] for j in taps]) * padded[(*place[:2], *spot)]
    return y


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "zeros"])
@pytest.mark.parametrize(
    ("d", "kernel", "stride"),
    [(1, k, s) for k in range(1, 8) for s in (1, 2, 3)]
    + [(2, 3, 2), (2, 4, 2), (2, 5, 1), (3, 2, 2), (3, 3, 2)],
)
def test_blur_against_loops(d, kernel, stride, mode):
    x = sample(d)
    y = tp.nn.BlurPool(kernel, stride, padding_mode=mode).double()(x)
    np.testing.assert_allclose(
        y.numpy(), naive_blur(x.numpy(), kernel, stride, mode), rtol=1e-12, atol=1e-12
    )


def test_max_blur_against_torch_and_loops():
    x = sample(2)
    expected = naive_blur(F.max_pool2d(x, 3, 1, 1).numpy(), 3, 2, "reflect")
    y = tp.nn.MaxBlurPool(3, 2, blur=3, padding=1).double()(x)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert y.shape == F.max_pool2d(x, 3, 2, 1).shape
    assert tp.nn.MaxBlurPool(2)(torch.randn(1, 1, 32, 32)).shape == (1, 1, 16, 16)


def test_blur_keeps_constants_has_no_state_and_reduces_aliasing():
    layer = tp.nn.BlurPool(5)
    assert torch.equal(layer(torch.ones(1, 2, 9, 9)), torch.ones(1, 2, 5, 5))
    assert not list(layer.parameters())
    assert not layer.state_dict()
    assert layer.half().taps.dtype == torch.float16
    wave = torch.tensor([1.0, -1.0]).repeat(16).view(1, 1, -1)
    assert wave[..., ::2].abs().max() == 1
    assert tp.nn.BlurPool(3)(wave).abs().max() == 0


def test_blurring_other_axes():
    x = torch.randn(2, 8, 6, 3)
    y = tp.nn.BlurPool(3, dims=(1, 2))(x)
    assert torch.equal(y.movedim(-1, 1), tp.nn.BlurPool(3)(x.movedim(-1, 1)))


# Pool ---------------------------------------------------------------------------------------------

LEARNABLE = [
    tp.PowerMean(3.0, learnable=True),
    tp.LogMeanExp(0.5, learnable=True),
    tp.SoftmaxMean(-1.5, learnable=True),
    tp.Lp(1.5, learnable=True),
]


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("reduction", LEARNABLE, ids=str)
def test_pool_starts_at_the_given_value_and_learns(reduction, channels):
    x = torch.rand(2, 3, 8, 8) + 0.1
    layer = tp.nn.Pool(reduction, tp.Window(2), channels=channels)
    torch.testing.assert_close(
        layer.value, torch.full((channels,) if channels else (), reduction.value), rtol=2e-7, atol=0
    )
    fixed = type(reduction)(reduction.value)
    torch.testing.assert_close(layer(x), tp.pool(x, fixed, tp.Window(2)))
    target = tp.pool(x, tp.Max(), tp.Window(2))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("value", [1e-3, 0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 7.25, 100.0])
def test_the_start_is_kept_by_the_constraint(value):
    layer = tp.nn.Pool(tp.PowerMean(value, learnable=True), tp.Global())
    assert layer.value.item() == pytest.approx(value, rel=1e-6)
    if value >= 2:
        assert layer.value.item() == value


@pytest.mark.parametrize("raw", [-50.0, -1.0, 0.0, 30.0])
def test_parameters_stay_in_their_domain(raw):
    layer = tp.nn.Pool(tp.PowerMean(2.0, learnable=True), tp.Window(2))
    with torch.no_grad():
        layer.raw_p.fill_(raw)
    assert layer.value >= 0
    assert layer(torch.randn(1, 1, 4, 4)).isfinite().all()


def test_pool_state_copies_and_repr():
    x = torch.rand(2, 3, 8, 8)
    layer = tp.nn.Pool(tp.PowerMean(2.5, learnable=True), tp.Adaptive(2), channels=3)
    with torch.no_grad():
        layer.raw_p.add_(torch.tensor([0.0, 1.0, 2.0]))
    expected = layer(x)
    other = tp.nn.Pool(tp.PowerMean(9.0, learnable=True), tp.Adaptive(2), channels=3)
    other.load_state_dict(layer.state_dict())
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for again in (
        other,
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(again(x), expected)
    assert (
        repr(layer) == "Pool(PowerMean(p=2.5, learnable=True), Adaptive(output_size=2), channels=3)"
    )
    names = {**vars(tp), **vars(tp.nn)}
    assert repr(eval(repr(layer), names)) == repr(layer)
    assert list(layer.state_dict()) == ["raw_p"]


def test_pool_moves_given_tensors_with_the_module():
    values = torch.tensor([1.0, 2.0, 3.0])
    x = torch.rand(2, 3, 4, 4)
    layer = tp.nn.Pool(tp.PowerMean(values), tp.Window(2))
    assert list(layer.state_dict()) == ["p"]
    assert not list(layer.parameters())
    assert layer.double().value.dtype == torch.float64
    torch.testing.assert_close(layer.float()(x), tp.pool(x, tp.PowerMean(values), tp.Window(2)))
    trained = tp.nn.Pool(tp.PowerMean(torch.nn.Parameter(values)), tp.Window(2))
    trained(x).sum().backward()
    assert trained.p.grad.isfinite().all()


def test_pool_takes_masks_weights_dims_and_fill():
    tokens = torch.rand(2, 7, 3)
    mask = torch.tensor([[True] * 4 + [False] * 3, [False] * 7])[..., None]
    layer = tp.nn.Pool(tp.Mean(), tp.Global(), dims=(1,), fill=-1.0)
    y = layer(tokens, mask=mask)
    torch.testing.assert_close(y[0, 0], tokens[0, :4].mean(0))
    assert torch.equal(y[1, 0], torch.full((3,), -1.0))
    weights = torch.rand(2, 7, 1)
    torch.testing.assert_close(
        layer(tokens, weights=weights)[:, 0], (weights * tokens).sum(1) / weights.sum(1)
    )
    assert (
        repr(layer)
        == "Pool(Mean(count_include_pad=False, divisor=None), Global(), dims=(1,), fill=-1.0)"
    )


def test_half_precision_modules():
    x = torch.rand(2, 3, 8, 8).bfloat16()
    for layer in (
        tp.nn.Pool(tp.PowerMean(3.0, learnable=True), tp.Window(2)),
        tp.nn.Mixed(tp.Window(2)),
        tp.nn.Gated(tp.Window(2)),
        tp.nn.BlurPool(3),
    ):
        layer = layer.bfloat16()
        y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer.float()(x.float()), rtol=2e-2, atol=2e-2)


# All learned layers -------------------------------------------------------------------------------


def learned_layers():
    return [
        tp.nn.Pool(tp.PowerMean(3.0, learnable=True), tp.Window(3, 2, 1), channels=3),
        tp.nn.Pool(tp.SoftmaxMean(1.0, learnable=True), tp.Window(3, 2, 1)),
        tp.nn.Mixed(tp.Window(3, 2, 1), channels=3),
        tp.nn.Mixed(tp.Adaptive(2), 0.25, learnable=False),
        tp.nn.Gated(tp.Window(3, 2, 1)),
        tp.nn.Gated(tp.Window(3, 2, [(1, 2)]), channels=3),
        tp.nn.BlurPool(4),
        tp.nn.MaxBlurPool(3, 2, padding=1),
    ]


@pytest.mark.parametrize("layer", learned_layers(), ids=repr)
def test_gradients(layer):
    layer = layer.double()
    x = (torch.rand(1, 3, 4, 5, dtype=torch.double) + 0.1).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone() + 0.1 * torch.randn_like(p) for p in layer.parameters()]

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    given = (x, *(v.requires_grad_() for v in values))
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize("layer", learned_layers(), ids=repr)
def test_compile_copy_pickle_and_unbatched(layer):
    x = torch.rand(2, 3, 8, 9)
    expected = layer(x)
    for dynamic, backend in ((False, "eager"), (True, "aot_eager")):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
        torch.testing.assert_close(compiled(x), expected)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), expected)
    wide = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(wide), expected)


@pytest.mark.parametrize(
    ("name", "arguments", "options"), [layer for layer in LAYERS if layer[0][-2] == "2"]
)
def test_compiled_drop_ins_equal_eager(name, arguments, options):
    torch._dynamo.reset()
    layer, theirs = pair(name, arguments, options)
    given, call = inputs(name, theirs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((9, 11), (12, 14)):
        if not name.startswith("MaxUnpool"):
            given = (torch.randn(2, 3, *size),)
        for got, wanted in zip(
            as_tuple(compiled(*given, **call)), as_tuple(layer(*given, **call)), strict=True
        ):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("layer", learned_layers()[::-2], ids=repr)
def test_export_with_dynamic_sizes(layer):
    sizes = dict.fromkeys((2, 3), torch.export.Dim.AUTO)
    exported = torch.export.export(layer, (torch.rand(2, 3, 9, 11),), dynamic_shapes=(sizes,))
    assert not [node for node in exported.graph.nodes if "torchpool" in str(node.target)]
    for size in ((9, 11), (12, 14)):
        x = torch.rand(2, 3, *size)
        torch.testing.assert_close(exported.module()(x), layer(x))


def test_mixtures_on_tokens():
    tokens = torch.randn(2, 12, 3)
    for layer in (
        tp.nn.Mixed(tp.Window(3), channels=3, dims=(1,)),
        tp.nn.Gated(tp.Window(3), channels=3, dims=(1,)),
    ):
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_()
        y = layer(tokens)
        layer.dims = None
        torch.testing.assert_close(y, layer(tokens.movedim(-1, 1)).movedim(1, -1))


MIXED, X4 = tp.nn.Mixed(tp.Window(2)), torch.ones(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: tp.nn.Pool(tp.Max(), tp.Window(2), channels=3), ValueError, "learnable"),
        (
            lambda: tp.nn.Pool(tp.PowerMean(-1.0, learnable=True), tp.Window(2)),
            ValueError,
            "greater than",
        ),
        (
            lambda: tp.nn.Pool(
                tp.PowerMean(torch.ones(2), learnable=True), tp.Window(2), channels=3
            ),
            ValueError,
            "channels=3",
        ),
        (lambda: tp.nn.Mixed(tp.Window(2), 1.5), ValueError, "mix=1.5"),
        (lambda: tp.nn.Mixed(tp.Window(2), 1), ValueError, "mix=1"),
        (lambda: tp.nn.Mixed(tp.Window(2), learnable=False, channels=3), ValueError, "channels=3"),
        (
            lambda: tp.nn.Mixed(tp.Window(2), channels=4)(torch.ones(1, 3, 4, 4)),
            ValueError,
            "channels=4",
        ),
        (lambda: MIXED(X4, mask=torch.ones(5, dtype=torch.bool)), ValueError, "mask of shape"),
        (lambda: MIXED(X4, mask=torch.ones(1, 3, 4, 4)), TypeError, "mask has dtype"),
        (lambda: MIXED(X4, weights=torch.ones(5)), ValueError, "weights of shape"),
        (lambda: tp.nn.Mixed(2), TypeError, "windows=2"),
        (lambda: tp.nn.Pool(tp.Max(), 2), TypeError, "windows=2"),
        (lambda: tp.nn.Pool(tp.Max, tp.Window(2)), TypeError, "reduction="),
        (lambda: tp.nn.Gated(tp.Adaptive(2)), TypeError, "Window"),
        (lambda: tp.nn.Gated(tp.Window((2, 2)), num_axes=3), ValueError, "num_axes"),
        (lambda: tp.nn.Gated(tp.Window(2), num_axes=4), ValueError, "not 4"),
        (lambda: tp.nn.Gated(tp.Window(2))(torch.ones(1, 3, 4)), ValueError, "num_axes=1"),
        (
            lambda: tp.nn.Gated(tp.Window(2), channels=4)(torch.ones(1, 3, 4, 4)),
            ValueError,
            "channels=4",
        ),
        (lambda: tp.nn.BlurPool(8), ValueError, "kernel=8"),
        (lambda: tp.nn.BlurPool(3, padding_mode="same"), ValueError, "padding_mode='same'"),
        (lambda: tp.nn.BlurPool(5)(torch.ones(1, 1, 2, 2)), ValueError, "replicate"),
        (lambda: tp.nn.BlurPool(3)(torch.ones(1, 1, 4, 4, dtype=torch.int64)), TypeError, "float"),
        (lambda: tp.nn.BlurPool(3)(torch.ones(1, 1, 4, 4, 4, 4)), ValueError, "dims="),
    ],
)
def test_errors_name_the_argument(build, error, match):
    with pytest.raises(error, match=match):
        build()
