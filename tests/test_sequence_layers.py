"""The layers over time: naive loops over one sample at a time, the sample alone and in a padded
batch, and what a Module owes its users."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import torchpool as tp
from torchpool.nn import SentencePool, over_time, sequence

N, C, T = 4, 6, 9
LENGTHS = torch.tensor([9, 4, 1, 6])
CLOSE = {"rtol": 1e-9, "atol": 1e-11}

# Oracles: one sample x (C, n) of valid elements, in loops that know nothing of ours.


def mean(x, weights=None):
    out = np.zeros(len(x))
    for c, row in enumerate(x):
        w = np.ones(len(row)) if weights is None else weights[c]
        out[c] = sum(wi * xi for wi, xi in zip(w, row, strict=True)) / sum(w)
    return out


def deviation(x, weights=None, correction=0.0):
    out, centre = np.zeros(len(x)), mean(x, weights)
    for c, row in enumerate(x):
        w = np.ones(len(row)) if weights is None else weights[c]
        squares = sum(wi * (xi - centre[c]) ** 2 for wi, xi in zip(w, row, strict=True))
        divisor = sum(w) - correction
        out[c] = math.sqrt(squares / divisor) if divisor > 0 else 0.0
    return out


def softmax(row):
    powers = [math.exp(v - max(row)) for v in row]
    return np.array([p / sum(powers) for p in powers])


def weighted(x, heads):
    """x (C, n) and weights (H, n) -> (C, H)."""
    out = np.zeros((len(x), len(heads)))
    for c, row in enumerate(x):
        for h, w in enumerate(heads):
            out[c, h] = sum(wi * xi for wi, xi in zip(w, row, strict=True))
    return out


def numbers(layer):
    return {name: t.detach().numpy() for name, t in layer.state_dict().items()}


def affine(p, name, v):
    weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias", 0.0)
    return weight.reshape(len(weight), -1) @ v + bias


def statistics(layer, x):
    return np.concatenate([mean(x), deviation(x, correction=layer.correction)])


def auto(layer, x):
    alpha = numbers(layer)["alpha"]
    return mean(x, [softmax(a * row) for a, row in zip(alpha, x, strict=True)])


def linear_softmax(layer, x):
    return np.array([sum(v * v for v in row) / sum(row) for row in x])


def k_max(layer, x):
    n = x.shape[1]
    kept = max(layer.k, math.ceil(round(layer.ratio * n, 9)))
    out = np.full((len(x), kept), float(layer.fill))
    for c, row in enumerate(x):
        best = sorted(range(n), key=lambda i: (-row[i], i))[:kept]
        for place, i in enumerate(sorted(best)):
            out[c, place] = row[i]
    return out


def segments(x, count, reduce):
    n, parts = x.shape[1], []
    for o in range(count):
        start, stop = math.floor(o * n / count), math.ceil((o + 1) * n / count)
        parts.append([reduce(row[start:stop]) for row in x])
    return np.array(parts).T


def pyramid(layer, x):
    return np.concatenate([segments(x, level, max) for level in layer.levels], 1)


def segment_means(layer, x):
    return segments(x, layer.num_segments, lambda part: sum(part) / len(part))


def segment_consensus(layer, x):
    return segments(x, layer.num_segments, max).mean(1)


def evolution(layer, x):
    n = x.shape[1]
    if layer.smooth:
        return np.stack([x[:, : t + 1].sum(1) / (t + 1) for t in range(n)], 1)
    return x


def rank(layer, x):
    v, n = evolution(layer, x), x.shape[1]
    total, pairs = np.zeros(len(x)), 0
    for t in range(n):
        for q in range(t + 1, n):
            total += v[:, q] - v[:, t]
            pairs += 1
    return total / max(pairs, 1)


def rank_ridge(layer, x):
    v, n = evolution(layer, x), x.shape[1]
    v = v - v.mean(1, keepdims=True)
    time = np.arange(n) - (n - 1) / 2
    square = sum(np.outer(v[:, t], v[:, t]) for t in range(n)) + layer.ridge * np.eye(len(x))
    return np.linalg.inv(square) @ sum(time[t] * v[:, t] for t in range(n))


def first(layer, x):
    return x[:, 0]


def last(layer, x):
    return x[:, -1]


def weighted_mean_tokens(layer, x):
    return mean(x, [list(range(1, x.shape[1] + 1))] * len(x))


def sqrt_len(layer, x):
    return np.array([sum(row) / math.sqrt(len(row)) for row in x])


def gated(layer, x):
    p, scores = numbers(layer), []
    for t in range(x.shape[1]):
        hidden = np.tanh(affine(p, "value", x[:, t]))
        if layer.gated:
            hidden = hidden / (1 + np.exp(-affine(p, "gate", x[:, t])))
        scores.append(affine(p, "score", hidden)[0])
    return weighted(x, [softmax(scores)])[:, 0]


def self_attentive(layer, x):
    p = numbers(layer)
    scores = [affine(p, "score", np.tanh(affine(p, "hidden", v))) for v in x.T]
    return weighted(x, [softmax(head) for head in np.array(scores).T])


def layer_norm(p, name, v):
    v = (v - v.mean()) / math.sqrt(((v - v.mean()) ** 2).mean() + 1e-5)
    return p[f"{name}.weight"] * v + p[f"{name}.bias"]


def multi_head(layer, x):
    p, size, out = numbers(layer), len(x) // layer.num_heads, []
    for seed in p["queries"]:
        q, made = affine(p, "query", seed), []
        for h in range(layer.num_heads):
            part = slice(h * size, (h + 1) * size)
            scores = [q[part] @ affine(p, "key", v)[part] / math.sqrt(size) for v in x.T]
            values = [affine(p, "value", v)[part] for v in x.T]
            made.extend(sum(w * v for w, v in zip(softmax(scores), values, strict=True)))
        y = affine(p, "out", np.array(made))
        if layer.block:
            y = layer_norm(p, "norm1", seed + y)
            y = layer_norm(p, "norm2", y + np.maximum(affine(p, "feed_forward.0", y), 0))
        out.append(y)
    return np.array(out).T if layer.num_queries else out[0]


def attentive_statistics(layer, x):
    """By SpeechBrain's parameter names; batch norm as in evaluation."""
    p = numbers(layer)
    context = [mean(x), deviation(x)] if layer.global_context else []
    norm = {key: p[f"tdnn.norm.norm.{key}"] for key in ("weight", "bias")}
    centre, spread = p["tdnn.norm.norm.running_mean"], p["tdnn.norm.norm.running_var"]
    scores = []
    for v in x.T:
        h = np.maximum(affine(p, "tdnn.conv.conv", np.concatenate([v, *context])), 0)
        h = norm["weight"] * (h - centre) / np.sqrt(spread + 1e-5) + norm["bias"]
        scores.append(affine(p, "conv.conv", np.tanh(h)))
    weights = [softmax(row) for row in np.array(scores).T]
    return np.concatenate([mean(x, weights), deviation(x, weights)])


def reduced(reduce):
    return lambda layer, x: np.array([reduce(row) for row in x])


def sentence(layer, x):
    return np.concatenate([max_over(x), mean(x), sqrt_len(layer, x), last(layer, x)])


def max_over(x):
    return np.array([max(row) for row in x])


@dataclass(frozen=True)
class Case:
    """A layer, how to build it, and what it makes of one sample."""

    kind: type[nn.Module]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    oracle: Any

    def build(self, **options: Any) -> Any:
        torch.manual_seed(3)
        layer = self.kind(*self.arguments, **self.options, **options).double().eval()
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.3 * torch.randn_like(p))
            for name, b in layer.named_buffers():
                if b.is_floating_point():
                    b.add_(0.2 * torch.rand_like(b) if "var" in name else torch.randn_like(b))
        return layer


OURS = tp.nn
CASES = {
    "mean": Case(OURS.SequencePool, (tp.Mean(),), {}, lambda layer, x: mean(x)),
    "max": Case(OURS.SequencePool, (tp.Max(),), {}, reduced(max)),
    "gem": Case(
        OURS.SequencePool,
        (tp.PowerMean(2.0, learnable=True),),
        {"channels": C},
        lambda layer, x: np.array(
            [
                (sum(max(v, 1e-6) ** p for v in row) / len(row)) ** (1 / p)
                for row, p in zip(x, layer.pool.value.detach().numpy(), strict=True)
            ]
        ),
    ),
    "statistics": Case(OURS.StatisticsPool, (), {}, statistics),
    "statistics_unbiased": Case(OURS.StatisticsPool, (), {"correction": 1.0}, statistics),
    "auto": Case(OURS.AutoPool, (C,), {}, auto),
    "linear_softmax": Case(OURS.LinearSoftmax, (), {}, linear_softmax),
    "kmax": Case(OURS.KMaxPool, (3,), {}, k_max),
    "kmax_dynamic": Case(OURS.KMaxPool, (2,), {"ratio": 2 / 3}, k_max),
    "pyramid": Case(OURS.TemporalPyramidPool, ((1, 2, 4),), {}, pyramid),
    "segments": Case(OURS.SegmentPool, (3,), {}, segment_means),
    "consensus": Case(
        OURS.SegmentPool, (3,), {"reduction": tp.Max(), "consensus": tp.Mean()}, segment_consensus
    ),
    "rank": Case(OURS.RankPool, (), {}, rank),
    "rank_raw": Case(OURS.RankPool, (), {"smooth": False}, rank),
    "rank_ridge": Case(OURS.RankPool, (), {"ridge": 0.5}, rank_ridge),
    "first": Case(OURS.FirstToken, (), {}, first),
    "last": Case(OURS.LastToken, (), {}, last),
    "weighted_mean": Case(OURS.WeightedMeanTokens, (), {}, weighted_mean_tokens),
    "sqrt_len": Case(OURS.SqrtLenMean, (), {}, sqrt_len),
    "sentence": Case(
        OURS.SentencePool, (("mean", "max", "lasttoken", "mean_sqrt_len_tokens"),), {}, sentence
    ),
    "gated": Case(OURS.GatedAttentionPool, (C, 5), {}, gated),
    "ungated": Case(OURS.GatedAttentionPool, (C, 5), {"gated": False}, gated),
    "self_attentive": Case(OURS.SelfAttentivePool, (C, 5, 3), {}, self_attentive),
    "attention": Case(OURS.AttentionPool, (C,), {}, multi_head),
    "attention_heads": Case(OURS.AttentionPool, (C, 2, 3), {}, multi_head),
    "attention_block": Case(OURS.AttentionPool, (C, None, 2), {"block": True}, multi_head),
    "attentive": Case(OURS.AttentiveStatisticsPool, (C, 5), {}, attentive_statistics),
    "attentive_plain": Case(
        OURS.AttentiveStatisticsPool, (C, 5), {"global_context": False}, attentive_statistics
    ),
}
EVERY = pytest.mark.parametrize("name", CASES)
GAUSSIAN = Case(OURS.GaussianPool, (C, 5, 2), {}, None)
ALL = {**CASES, "gaussian": GAUSSIAN}
ALSO_GAUSSIAN = pytest.mark.parametrize("name", ALL)


def test_every_layer_over_time_has_its_cases():
    layers = [layer for layer in vars(OURS).values() if isinstance(layer, type)]
    over_time = {layer for layer in layers if issubclass(layer, OURS.OverTime)}
    assert {case.kind for case in ALL.values()} == over_time - {OURS.OverTime}


def positive(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def length_mask(side="right"):
    mask = torch.arange(T) < LENGTHS[:, None]
    return mask if side == "right" else mask.flip(1)


def with_holes():
    mask = torch.rand(N, T, generator=torch.Generator().manual_seed(5)) > 0.4
    mask[2] = False
    mask[2, 4] = True
    return mask


def padded(x, mask, what):
    return torch.where(mask[:, None], x, torch.tensor(what, dtype=x.dtype))


def turned(x, layout):
    return x.mT if layout == "NTC" and x.ndim == 3 else x


@pytest.mark.parametrize("layout", ["NCT", "NTC"])
@pytest.mark.parametrize("given", ["right", "left", "mask", "both", "none"])
@EVERY
def test_against_loops(name, given, layout):
    case = CASES[name]
    side = "left" if given == "left" else "right"
    layer = case.build(layout=layout, padding_side=side)
    mask = {"mask": with_holes(), "none": torch.ones(N, T, dtype=torch.bool)}.get(
        given, length_mask(side)
    )
    if given == "both":
        mask = mask & with_holes()
        mask[2, 0] = True
    x = padded(positive(N, C, T), mask, math.nan)
    keywords = {
        "none": {},
        "mask": {"mask": mask},
        "both": {"mask": mask | ~length_mask(), "lengths": LENGTHS},
    }.get(given, {"lengths": LENGTHS})
    with torch.no_grad():
        y = turned(layer(turned(x, layout), **keywords), layout)
    for i in range(N):
        expected = case.oracle(layer, x[i, :, mask[i]].numpy())
        got = y[i].numpy()
        if got.ndim == 2 and got.shape != expected.shape:  # dynamic k: filled up
            assert (got[:, expected.shape[1] :] == 0).all()
            got = got[:, : expected.shape[1]]
        np.testing.assert_allclose(got, expected, **CLOSE)


@EVERY
def test_the_oracles_can_fail(name):
    case = CASES[name]
    layer, x = case.build(), positive(1, C, T)
    with torch.no_grad():
        got = layer(turned(x, layer.layout))[0]
    got = turned(got[None], layer.layout)[0].numpy()
    wrong = case.oracle(layer, x[0].numpy() * np.linspace(1, 1.1, T)[::-1])
    if name == "last":
        wrong = case.oracle(layer, x[0, :, :-1].numpy())
    assert not np.allclose(got, wrong, rtol=1e-6, atol=1e-9)


def gradients(layer, x, **keywords):
    leaf = x.clone().requires_grad_()
    y = layer(leaf, **keywords)
    weights = torch.linspace(1, 2, y[0].numel(), dtype=y.dtype).reshape(y[0].shape)
    (y * weights).sum().backward()
    found = {key: p.grad.clone() for key, p in layer.named_parameters()}
    layer.zero_grad()
    return y.detach(), leaf.grad, found


@pytest.mark.parametrize("what", [math.nan, math.inf, -1e30])
@EVERY
def test_alone_is_as_in_a_batch_whatever_the_padding_holds(name, what):
    layer = CASES[name].build(layout="NCT")
    mask = length_mask()
    x = padded(positive(N, C, T), mask, what)
    y, gx, gp = gradients(layer, x, lengths=LENGTHS)
    total = {key: torch.zeros_like(g) for key, g in gp.items()}
    for i, n in enumerate(LENGTHS.tolist()):
        alone, g, p = gradients(layer, x[i : i + 1, :, :n])
        if alone.ndim == 3:
            assert not y[i, :, alone.shape[2] :].any()
            if name == "kmax_dynamic":  # its outputs differ in number, and so does the loss
                torch.testing.assert_close(y[i, :, : alone.shape[2]], alone[0], **CLOSE)
                continue
        torch.testing.assert_close(y[i], alone[0], **CLOSE)
        torch.testing.assert_close(gx[i, :, :n], g[0], **CLOSE)
        total = {key: total[key] + p[key] for key in total}
    assert not gx.masked_select(~mask[:, None]).any()
    for key, g in gp.items():
        torch.testing.assert_close(g, total[key], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf, 1e30, -1e30, 7.0])
@pytest.mark.parametrize(
    "layer", [tp.nn.AttentionPool, tp.nn.SelfAttentivePool, tp.nn.GatedAttentionPool]
)
def test_products_in_single_precision_do_not_meet_the_padding(layer, what):
    torch.manual_seed(0)
    built = layer(C)
    x, mask = positive(N, C, T).float(), length_mask()
    expected = gradients(built, padded(x, mask, 0.0), lengths=LENGTHS)
    got = gradients(built, padded(x, mask, what), lengths=LENGTHS)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_padding_is_cleaned_only_where_it_could_spoil_a_product():
    mask = length_mask()
    x = positive(N, C, T).float()
    valid = over_time.Valid(T, mask)
    assert over_time.harmless(x, valid) is x
    for what in (math.nan, math.inf, 1e30):
        made = over_time.harmless(padded(x, mask, what), valid)
        assert torch.equal(made, padded(x, mask, 0.0))
    recorded = make_fx(lambda x: over_time.harmless(x, valid))(x)  # for other values, too
    assert torch.equal(recorded(padded(x, mask, math.nan)), padded(x, mask, 0.0))


@ALSO_GAUSSIAN
def test_gradients_are_the_derivatives(name):
    layer, x = ALL[name].build(layout="NCT"), positive(2, C, 4).requires_grad_()
    mask = torch.tensor([[True, True, True, False], [True, False, True, True]])
    parameters = tuple(layer.parameters())

    def run(t, *_):
        return layer(t, mask)

    assert torch.autograd.gradcheck(run, (x, *parameters), eps=1e-6, atol=1e-5)


@ALSO_GAUSSIAN
def test_empty_samples_are_filled(name):
    layer = ALL[name].build(layout="NCT", fill=-2.5)
    x = torch.full((2, C, 4), math.nan, dtype=torch.float64)
    x[0] = positive(C, 4)
    y, gx, gp = gradients(layer, x, lengths=torch.tensor([4, 0]))
    assert (y[1] == -2.5).all()
    assert y[0].isfinite().all()
    assert not gx[1].any()
    assert gx.isfinite().all()
    assert all(g.isfinite().all() for g in gp.values())
    assert (layer(x, mask=torch.zeros(2, 4, dtype=torch.int64)) == -2.5).all()


@pytest.mark.parametrize("training", [False, True])
@ALSO_GAUSSIAN
def test_a_batch_without_any_element_is_filled(name, training):
    layer = ALL[name].build(layout="NCT", fill=-2.5).train(training)
    x = torch.full((3, C, 4), math.nan, dtype=torch.float64)
    for keywords in (
        {"lengths": torch.zeros(3, dtype=torch.int64)},
        {"mask": torch.zeros(3, 4, dtype=torch.bool)},
    ):
        y, gx, gp = gradients(layer, x, **keywords)
        assert (y == -2.5).all()
        assert not gx.any()
        assert not any(g.any() for g in gp.values())
    assert all(b.isfinite().all() for b in layer.buffers())


CHOOSING = ("first", "last", "kmax_dynamic")
"""Layers that look at chosen elements only."""


@pytest.mark.parametrize("name", [name for name in ALL if name not in CHOOSING])
def test_nan_of_a_valid_element_is_seen(name):
    layer, x = ALL[name].build(layout="NCT"), positive(1, C, T)
    x[0, :, 3] = math.nan
    y = layer(x, lengths=torch.tensor([7]))
    assert y.isnan().any(-1).all() if y.ndim == 3 else y.isnan().any()


@ALSO_GAUSSIAN
def test_compiled_equals_eager(name):
    layer = ALL[name].build(layout="NCT")
    x = padded(positive(N, C, T), length_mask(), math.nan)
    for dynamic, keywords in ((True, {"lengths": LENGTHS}), (None, {"mask": length_mask().long()})):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        got, expected = gradients(compiled, x, **keywords), gradients(layer, x, **keywords)
        torch.testing.assert_close(got[:2], expected[:2])
        for a, b in zip(got[2].values(), expected[2].values(), strict=True):
            torch.testing.assert_close(a, b)


@ALSO_GAUSSIAN
def test_exported_equals_eager(name):
    layer = ALL[name].build(layout="NCT")
    x = padded(positive(N, C, T), length_mask(), math.nan)
    program = torch.export.export(layer, (x,), {"lengths": LENGTHS})
    torch.testing.assert_close(program.module()(x, lengths=LENGTHS), layer(x, lengths=LENGTHS))
    other = torch.tensor([2, 9, 0, 5])
    y = torch.nan_to_num(x)
    torch.testing.assert_close(program.module()(y, lengths=other), layer(y, lengths=other))
    own = [n for n in program.graph.nodes if "torchpool" in str(n.target)]
    assert not own, "an exported graph holds torch's operators only"


@ALSO_GAUSSIAN
def test_a_good_module(name):
    layer = ALL[name].build(layout="NCT", padding_side="left", fill=1.0)
    x = positive(N, C, T)
    expected = layer(x, lengths=LENGTHS)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x, lengths=LENGTHS), expected)
    fresh = (
        ALL[name]
        .kind(
            *ALL[name].arguments, **ALL[name].options, layout="NCT", padding_side="left", fill=1.0
        )
        .double()
    )
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh.eval()(x, lengths=LENGTHS), expected)
    text = repr(layer)
    assert type(layer).__name__ in text
    assert "padding_side='left'" in text
    assert "fill=1.0" in text
    assert "layout" not in text or isinstance(layer, SentencePool)


@ALSO_GAUSSIAN
def test_autocast(name):
    layer = ALL[name].build(layout="NCT").float()
    x = padded(positive(N, C, T).float(), length_mask(), math.nan).requires_grad_()
    expected = layer(x, lengths=LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, lengths=LENGTHS)
    assert y.dtype == torch.float32
    tolerance = 0.15 if name == "attention_block" else 0.05  # layer norms enlarge the rounding
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    y.sum().backward()
    assert x.grad.isfinite().all()


WITHOUT_PARAMETERS = [name for name, case in ALL.items() if not list(case.build().parameters())]


@pytest.mark.parametrize("name", WITHOUT_PARAMETERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(name, dtype):
    layer = ALL[name].build(layout="NCT")
    x = positive(N, C, T).to(dtype)
    y = layer(x, lengths=LENGTHS)
    assert y.dtype == dtype
    exact = layer(x.double(), lengths=LENGTHS)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance * 0.6)


def test_the_input_is_not_written_to():
    x = padded(positive(N, C, T), length_mask(), math.nan)
    before = x.clone()
    for case in ALL.values():
        case.build(layout="NCT")(x, lengths=LENGTHS)
        assert torch.equal(x.isnan(), before.isnan())
        assert torch.equal(x.nan_to_num(), before.nan_to_num())


# Layer by layer


def test_gaussian_window_against_loops():
    layer = GAUSSIAN.build(fill=-1.0)
    x, mask = positive(N, C, T), length_mask()
    mask[1] = False
    y = layer(padded(x, mask, math.nan), mask)
    sigma = layer.sigma.detach().numpy().clip(2 / 5, 0.5)
    assert y.shape == (N, C, 5)
    for n in range(N):
        for c in range(C):
            for o in range(5):
                num = den = 0.0
                for tap in range(5):
                    t = 2 * o + tap - 2
                    if 0 <= t < T and mask[n, t]:
                        w = math.exp(-0.5 * ((tap - 2) / (sigma[c] * 2)) ** 2)
                        num, den = num + w * x[n, c, t].item(), den + w
                assert y[n, c, o].item() == pytest.approx(num / den if den else -1.0)


def test_gaussian_window_stands_where_it_stands_in_the_sample_alone():
    layer = GAUSSIAN.build()
    x = padded(positive(N, C, T), length_mask(), math.inf)
    y, gx, _ = gradients(layer, x, lengths=LENGTHS)
    kept = layer.windows.pool_mask(length_mask()[:, None])[:, 0]
    for i, n in enumerate(LENGTHS.tolist()):
        alone = layer(x[i : i + 1, :, :n])[0]
        torch.testing.assert_close(y[i, :, : alone.shape[1]], alone)
        assert not y[i].masked_select(~kept[i]).any()
    assert gx.isfinite().all()


def test_leaf_is_the_plain_sum():
    layer = OURS.GaussianPool(2, 7, 3, padding="same", normalise=False)
    x = torch.randn(1, 2, 20)
    taps = torch.tensor([math.exp(-0.5 * ((i - 3) / (0.4 * 3)) ** 2) for i in range(7)])
    y = nn.functional.conv1d(nn.functional.pad(x, (2, 3)), taps.expand(2, 1, 7), None, 3, groups=2)
    torch.testing.assert_close(layer(x), y)
    masked = layer(x, lengths=torch.tensor([8]))
    torch.testing.assert_close(
        masked[..., :3], layer(x.masked_fill(torch.arange(20) >= 8, 0))[..., :3]
    )
    assert not masked[..., 5:].any()


def test_kmax_order_ties_and_short_samples():
    layer = OURS.KMaxPool(3, fill=9.0)
    x = torch.tensor([[[1.0, 5.0, 5.0, 0.0, 5.0, 5.0]]])
    assert layer(x).tolist() == [[[5.0, 5.0, 5.0]]]
    x = x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.tolist() == [[[0, 1, 1, 0, 1, 0]]], "ties go to the earlier element"
    assert layer(torch.tensor([[[2.0, 1.0]]])).tolist() == [[[2.0, 1.0, 9.0]]]
    low = torch.tensor([[[-torch.inf, 7.0, 3.0, -torch.inf]]])
    mask = torch.tensor([[True, False, True, True]])
    assert layer(low, mask).tolist() == [[[-torch.inf, 3.0, -torch.inf]]]


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_kmax_among_many_equals(readable, ratio, monkeypatch):
    """Whether values may be looked at, as on the CPU, or not, as in a compiled graph."""
    monkeypatch.setattr(sequence, "is_readable", lambda x: readable)
    generator = torch.Generator().manual_seed(0)
    for t, k in itertools.product((1, 2, 5, 9), (1, 2, 6)):
        x = torch.randint(-2, 3, (40, 3, t), generator=generator).float()
        x[torch.rand(x.shape, generator=generator) < 0.2] = math.nan
        x[torch.rand(x.shape, generator=generator) < 0.2] = -math.inf
        mask = torch.rand(40, t, generator=generator) < 0.7
        layer = OURS.KMaxPool(k, ratio=ratio, fill=7.0)
        y = layer(x, mask)
        for n, c in np.ndindex(40, 3):
            row = x[n, c, mask[n]].tolist()
            kept = max(k, math.ceil(ratio * len(row)))
            value = [math.inf if math.isnan(v) else v for v in row]
            best = sorted(range(len(row)), key=lambda i: (-value[i], i))[:kept]
            expected = [row[i] for i in sorted(best)]
            expected += [7.0] * (y.shape[-1] - len(expected))
            np.testing.assert_array_equal(y[n, c].numpy(), expected)


def test_kmax_counts_by_the_samples_own_length():
    layer = OURS.KMaxPool(2, ratio=2 / 3)
    assert layer.pool_lengths(torch.tensor([9, 6, 3, 1, 0])).tolist() == [6, 4, 2, 1, 0]
    assert layer(torch.randn(1, 1, 9)).shape == (1, 1, 6)


def test_statistics_survive_a_large_mean():
    x = torch.tensor([[[1e4, 1e4 + 1.0]]])
    torch.testing.assert_close(OURS.StatisticsPool()(x), torch.tensor([[1e4 + 0.5, 0.5]]))
    one = torch.tensor([[[3.0]]], requires_grad=True)
    y = OURS.StatisticsPool()(one)
    y.sum().backward()
    assert y.tolist() == [[3.0, 0.0]]
    assert one.grad.tolist() == [[[1.0]]]


def test_linear_softmax_of_silence():
    x = torch.zeros(1, 2, 3, requires_grad=True)
    y = OURS.LinearSoftmax(fill=5.0)(x)
    y.sum().backward()
    assert y.tolist() == [[0.0, 0.0]]
    assert x.grad.isfinite().all()


def test_autopool_between_minimum_and_maximum():
    x = torch.rand(2, 3, 7)
    for alpha, expected in ((0.0, x.mean(-1)), (1e6, x.amax(-1)), (-1e6, x.amin(-1))):
        torch.testing.assert_close(OURS.AutoPool(3, alpha=alpha)(x), expected)


def test_attention_weights_sum_to_one_and_their_redundancy():
    layer = OURS.SelfAttentivePool(C, 5, 2).double()
    x = padded(positive(N, C, T), length_mask(), math.nan)
    weights = layer.attention(x, lengths=LENGTHS)
    assert weights.shape == (N, 2, T)
    torch.testing.assert_close(weights.sum(-1), torch.ones(N, 2, dtype=torch.float64))
    assert not weights.masked_select(~length_mask()[:, None]).any()
    apart = torch.eye(2)[None]
    assert layer.redundancy(apart).tolist() == [0.0]
    assert layer.redundancy(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])).tolist() == [2.0]


def test_attentive_statistics_take_speechbrains_weights():
    layer = OURS.AttentiveStatisticsPool(C, 5)
    shapes = {key: tuple(t.shape) for key, t in layer.state_dict().items()}
    assert shapes == {
        "tdnn.conv.conv.weight": (5, 3 * C, 1),
        "tdnn.conv.conv.bias": (5,),
        "tdnn.norm.norm.weight": (5,),
        "tdnn.norm.norm.bias": (5,),
        "tdnn.norm.norm.running_mean": (5,),
        "tdnn.norm.norm.running_var": (5,),
        "tdnn.norm.norm.num_batches_tracked": (),
        "conv.conv.weight": (C, 5, 1),
        "conv.conv.bias": (C,),
    }


@pytest.mark.parametrize("steps", [1, 3])
def test_batch_norm_learns_from_valid_elements_only(steps):
    from torchpool.nn.attention import _MaskedBatchNorm

    ours, theirs = _MaskedBatchNorm(C).double(), nn.BatchNorm1d(C).double()
    mask = length_mask()
    for step in range(steps):
        x = positive(N, C, T, seed=step)
        frames = x.mT[mask]
        got, expected = ours(x.masked_fill(~mask[:, None], 7.0), mask), theirs(frames)
        torch.testing.assert_close(got.mT[mask], expected)
        assert got.isfinite().all()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_training_attentive_statistics_does_not_see_the_padding():
    layer = CASES["attentive"].build().train()
    x = positive(N, C, T)
    twin = copy.deepcopy(layer)
    a = gradients(layer, padded(x, length_mask(), math.nan), lengths=LENGTHS)
    b = gradients(twin, padded(x, length_mask(), 3.0), lengths=LENGTHS)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_context_equals_the_concatenation_that_it_avoids():
    layer = CASES["attentive"].build()
    x = positive(2, C, T)
    context = torch.cat([x.mean(2), x.std(2, correction=0)], 1)[..., None].expand(-1, -1, T)
    first, norm = layer.tdnn["conv"]["conv"], layer.tdnn["norm"]["norm"]
    scores = layer.conv["conv"](torch.tanh(norm(torch.relu(first(torch.cat([x, context], 1))))))
    w = scores.softmax(-1)
    m = (w * x).sum(-1)
    s = (w * (x - m[..., None]).square()).sum(-1).sqrt()
    torch.testing.assert_close(layer(x), torch.cat([m, s], 1))


# sentence-transformers: its documented formulas, in loops


def sentence_transformers(mode, tokens, mask):
    """tokens (T, C), mask (T,) of 0 and 1 for one sentence."""
    t, c = tokens.shape
    if mode == "cls":
        return tokens[0]
    if mode == "max":
        filled = [[tokens[i, j] if mask[i] else -1e9 for j in range(c)] for i in range(t)]
        return np.array(filled).max(0)
    weights = [m * (i + 1) if mode == "weightedmean" else m for i, m in enumerate(mask)]
    if mode == "lasttoken":
        valid = [i for i in range(t) if mask[i]]
        return tokens[valid[-1]] if valid else np.zeros(c)
    total = sum(w * v for w, v in zip(weights, tokens, strict=True))
    count = max(sum(weights), 1e-9)
    return total / (math.sqrt(count) if mode == "mean_sqrt_len_tokens" else count)


@pytest.mark.parametrize("side", ["right", "left", "prompt left out"])
@pytest.mark.parametrize("mode", SentencePool.MODES)
def test_modes_of_sentence_transformers(mode, side):
    mask = length_mask("left" if side == "left" else "right").long()
    mask = mask.masked_fill(torch.tensor([[False], [False], [True], [False]]), 1)
    if side == "prompt left out":
        mask[:, :2] = 0
    tokens = torch.randn(N, T, C, dtype=torch.float64)
    if mode == "cls" and side != "right":
        mask[:, 0] = 1  # where the first token is padding, sentence-transformers takes the padding
    before = tokens.clone()
    y = SentencePool(mode)(tokens, mask)
    assert torch.equal(tokens, before), "the caller's tensor is not written to"
    for i in range(N):
        expected = sentence_transformers(mode, tokens[i].numpy(), mask[i].tolist())
        np.testing.assert_allclose(y[i].numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("mode", [m for m in SentencePool.MODES if m not in ("cls", "max")])
def test_sentences_without_tokens_as_in_sentence_transformers(mode):
    tokens, mask = torch.randn(1, 3, 2), torch.zeros(1, 3, dtype=torch.int64)
    expected = sentence_transformers(mode, tokens[0].double().numpy(), mask[0].tolist())
    np.testing.assert_allclose(SentencePool(mode)(tokens, mask)[0].numpy(), expected)


def test_modes_stand_in_their_order():
    tokens = torch.randn(2, 5, 3)
    together = SentencePool(["lasttoken", "mean", "cls"])(tokens)
    alone = [SentencePool(mode)(tokens) for mode in ("cls", "mean", "lasttoken")]
    torch.testing.assert_close(together, torch.cat(alone, 1))


# Bad input


X = torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: OURS.StatisticsPool(layout="TNC"), "layout='TNC' must be one of 'NCT', 'NTC'"),
        (lambda: OURS.StatisticsPool(padding_side="up"), "padding_side='up'"),
        (lambda: OURS.StatisticsPool()(X[0]), "must have three axes, (N, C, T)"),
        (lambda: OURS.StatisticsPool(layout="NTC")(X[0]), "(N, T, C)"),
        (lambda: OURS.StatisticsPool()(X.long()), "x.float()"),
        (lambda: OURS.StatisticsPool()([1.0]), "not list"),
        (lambda: OURS.StatisticsPool()(X[..., :0]), "T must be >= 1"),
        (lambda: OURS.StatisticsPool()(X, torch.ones(2, 4) > 0), "shape (N, T) = (2, 5)"),
        (lambda: OURS.StatisticsPool()(X, torch.ones(2, 5)), "it must be bool"),
        (lambda: OURS.StatisticsPool()(X, [True]), "mask must be a torch.Tensor"),
        (lambda: OURS.StatisticsPool()(X, lengths=[3, 2]), "torch.tensor(lengths)"),
        (lambda: OURS.StatisticsPool()(X, lengths=torch.ones(3).long()), "shape (N,) = (2,)"),
        (lambda: OURS.StatisticsPool()(X, lengths=torch.ones(2)), "integer type"),
        (lambda: OURS.StatisticsPool()(X, torch.ones(2, 5, device="meta") > 0), "lies on meta"),
        (lambda: OURS.KMaxPool(0), "k=0"),
        (lambda: OURS.KMaxPool(2, ratio=1.5), "ratio=1.5"),
        (lambda: OURS.TemporalPyramidPool(()), "at least one level"),
        (lambda: OURS.TemporalPyramidPool((1, 0)), "levels=0"),
        (lambda: OURS.SegmentPool(True), "num_segments=True"),
        (lambda: OURS.RankPool(ridge=0.0), "ridge=0.0"),
        (lambda: OURS.GaussianPool(3, 1), "kernel=1"),
        (lambda: OURS.GaussianPool(4, 3)(X), "channels=4, but x has 3"),
        (lambda: OURS.AutoPool(4)(X), "channels=4, but x has 3"),
        (lambda: OURS.AttentionPool(5, num_heads=2), "multiple of num_heads=2"),
        (lambda: OURS.AttentionPool(5)(X), "channels=5, but x has 3"),
        (lambda: OURS.GatedAttentionPool(5)(X), "channels=5, but x has 3"),
        (lambda: OURS.AttentiveStatisticsPool(5)(X), "channels=5, but x has 3"),
        (lambda: OURS.WeightedMeanTokens(positions="last"), "positions='last'"),
        (lambda: SentencePool("median"), "modes='median'"),
        (lambda: SentencePool([]), "at least one of"),
        (lambda: OURS.SequencePool(tp.Max), "torchpool.Max()"),
    ],
)
def test_bad_input_names_the_remedy(call, text):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert text in str(caught.value)


def test_compiled_with_inductor():
    torch._dynamo.reset()
    layer = OURS.AttentiveStatisticsPool(C, 5).eval()
    x = torch.rand(N, C, T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(layer, fullgraph=True)
        y = compiled(x, lengths=LENGTHS)
    torch.testing.assert_close(y, layer(x, lengths=LENGTHS), rtol=1e-4, atol=1e-5)
