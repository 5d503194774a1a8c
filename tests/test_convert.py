"""Model surgery: what is swapped, what is left, what is reported, and the way back."""

import copy
import functools
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import max_pool2d as renamed

import torchpool as tp


class Plain(nn.MaxPool2d):
    """A subclass with a constructor and an attribute of its own."""

    def __init__(self, size):
        super().__init__(size, padding=size // 2)
        self.note = "mine"


class Overridden(nn.AvgPool2d):
    def forward(self, x):
        return super().forward(x) * 2


def helper(x):
    return F.adaptive_avg_pool2d(x, 4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.AvgPool2d(2), nn.Identity()])
        self.named = nn.ModuleDict({"lp": nn.LPPool2d(2, 2), "none": nn.Identity()})

    def forward(self, x):
        return self.named["lp"](self.layers[0](x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU()
        )
        self.shared = nn.MaxPool2d(3, 1, 1)
        self.again = self.shared
        self.block = Block()
        self.plain = Plain(3)
        self.overridden = Overridden(1)
        self.hidden = [self.shared]  # a reference that is no submodule entry
        self.partial = functools.partial(F.avg_pool2d, kernel_size=1)

    def method(self, x):
        import torch.nn.functional as inner

        return inner.max_pool2d(x, 1)

    def forward(self, x):
        x = self.features(x)
        x = self.again(self.hidden[0](self.shared(x)))
        x = self.overridden(self.plain(self.block(x)))
        x = torch.max_pool2d(renamed(F.relu(x), 1), 1)
        x = self.method(self.partial(x))
        return helper(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def test_results_state_and_look_stay(model):
    expected, look, state = (
        model(X),
        repr(model),
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    report = tp.convert(model)
    assert report.model is model
    torch.testing.assert_close(model(X), expected)
    assert repr(model) == look
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m.training for m in model.modules())


def test_the_report(model):
    report = tp.convert(model)
    assert [s.path for s in report.swapped] == [
        "features.2",
        "shared",
        "again",
        "block.layers.0",
        "block.named.lp",
        "plain",
    ]
    assert [(e.path, e.reason) for e in report.left] == [
        ("overridden", "its class Overridden has a forward of its own")
    ]
    called = sorted(call.function for call in report.functional)
    assert called == [
        "F.adaptive_avg_pool2d",
        "inner.max_pool2d",
        "renamed",
        "self.partial",
        "torch.max_pool2d",
    ]
    assert all("test_convert.py:" in call.location for call in report.functional)
    lines = Path(__file__).read_text().splitlines()
    for call in report.functional:
        assert call.function in lines[int(call.location.rsplit(":", 1)[1]) - 1]
    text = str(report)
    assert "6 swapped, 1 left, 5 functional calls not swapped" in text
    assert "features.2" in text
    assert "overridden" in text


def test_every_occurrence_is_the_same_object(model):
    tp.convert(model)
    assert model.shared is model.again
    assert model.shared is model.hidden[0]
    assert type(model.shared) is tp.nn.MaxPool2d
    assert type(model.block.layers[0]) is tp.nn.AvgPool2d
    assert type(model.block.named["lp"]) is tp.nn.LPPool2d


def test_undo(model):
    originals = {
        path: (module, type(module)) for path, module in model.named_modules(remove_duplicate=False)
    }
    report = tp.convert(model)
    model.train()
    assert report.undo() is model
    now = dict(model.named_modules(remove_duplicate=False))
    assert now.keys() == originals.keys()
    for path, (module, kind) in originals.items():
        assert now[path] is module
        assert type(module) is kind
        assert module.training
    report.undo()
    assert len(tp.convert(model).swapped) == 6


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.MaxPool2d(2), "MaxPool2d"),
        (nn.AdaptiveAvgPool3d(1), "AdaptiveAvgPool3d"),
        (nn.FractionalMaxPool2d(2, 3), "FractionalMaxPool2d"),
    ],
)
def test_a_pooling_layer_itself(layer, kind):
    report = tp.convert(layer)
    assert type(report.model) is getattr(tp.nn, kind)
    assert [s.path for s in report.swapped] == [""]
    assert "(model)" in str(report)
    assert type(report.undo()) is getattr(nn, kind)


def test_all_twenty_are_swapped():
    names = [name for name in tp.nn.__all__ if hasattr(nn, name)]
    assert len(names) == 20
    options = {"L": (2, 2), "F": (2, 2)}
    model = nn.ModuleDict({name: getattr(nn, name)(*options.get(name[0], (2,))) for name in names})
    tp.convert(model)
    assert all(type(module) is getattr(tp.nn, name) for name, module in model.items())


def test_converting_twice_changes_nothing(model):
    tp.convert(model)
    report = tp.convert(model)
    assert not report.swapped
    assert [e.path for e in report.left if "already" in e.reason] == [
        "features.2",
        "shared",
        "again",
        "block.layers.0",
        "block.named.lp",
        "plain",
    ]


def test_subclass_keeps_class_attributes_copies_and_pickles(model):
    expected = model.plain(X)
    tp.convert(model)
    for layer in (model.plain, copy.deepcopy(model.plain), pickle.loads(pickle.dumps(model.plain))):
        assert isinstance(layer, Plain)
        assert isinstance(layer, tp.nn.torch_layers.TorchLayer)
        assert layer.note == "mine"
        assert layer.kernel_size == 3
        assert torch.equal(layer(X), expected)


def test_a_converted_model_copies_and_pickles():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), Plain(3), nn.AdaptiveAvgPool2d(1))
    expected = model(X)
    tp.convert(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again[1]) is tp.nn.MaxPool2d
        torch.testing.assert_close(again(X), expected)


def test_hooks_stay_and_can_be_removed():
    model = nn.Sequential(nn.MaxPool2d(2))
    seen = []
    handle = model[0].register_forward_hook(
        lambda module, args, output: seen.append(type(module)) or output + 1
    )
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    expected = model(X)
    report = tp.convert(model)
    torch.testing.assert_close(model(X), expected)
    assert seen == [nn.MaxPool2d, tp.nn.MaxPool2d]
    handle.remove()
    torch.testing.assert_close(model(X), expected - 1)
    report.undo()
    torch.testing.assert_close(model(X), expected - 1)


def test_gradients_through_a_converted_model():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(3)
    ).double()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(X.double()).square().sum().backward()
        gradients.append(model[0].weight.grad.clone())
        tp.convert(model)
    torch.testing.assert_close(*gradients)


def test_instances_and_models_that_cannot_be_swapped():
    layer = nn.MaxPool2d(2)
    layer.forward = lambda x: x
    compiled = nn.AvgPool2d(2)
    compiled.compile(backend="eager")
    model = nn.Sequential(layer, compiled)
    report = tp.convert(model)
    assert not report.swapped
    assert [e.reason.split(";")[0] for e in report.left] == [
        "this instance has a forward of its own",
        "it is compiled",
    ]


def test_scripted_layers_are_left_and_compiled_models_go_on():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2))
    report = tp.convert(torch.jit.script(model))
    assert [(e.path, e.reason.split(";")[0]) for e in report.left] == [("1", "it is scripted")]
    compiled = torch.compile(model, backend="eager")
    expected = compiled(X)
    assert [s.path for s in tp.convert(compiled).swapped] == ["_orig_mod.1"]
    torch.testing.assert_close(compiled(X), expected)


def test_a_traced_graph():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.MaxPool2d(2)

        def forward(self, x):
            return F.avg_pool2d(self.pool(x), 2)

    graph = torch.fx.symbolic_trace(Small())
    expected = graph(X)
    report = tp.convert(graph)
    assert [s.path for s in report.swapped] == ["pool"]
    assert [call.function for call in report.functional] == ["avg_pool2d"]
    torch.testing.assert_close(graph(X), expected)


def test_code_without_source_is_named():
    scope = {"nn": nn, "F": F}
    exec(
        "class Hidden(nn.Module):\n    def forward(self, x):\n        return F.max_pool2d(x, 2)",
        scope,
    )
    report = tp.convert(nn.Sequential(scope["Hidden"]()))
    assert report.unread == ("0",)
    assert "source not at hand" in str(report)


def test_the_same_names_elsewhere_are_no_pooling_calls():
    class Other(nn.Module):
        def max_pool2d(self, x):
            return x

        def forward(self, x):
            renamed = self.max_pool2d
            return tp.max_pool2d(renamed(x), 2)

    assert not tp.convert(Other()).functional


def test_a_module_inside_itself_ends():
    model = nn.Sequential(nn.MaxPool2d(2))
    model.append(nn.Module())
    model[1].parent = model
    assert [s.path for s in tp.convert(model).swapped] == ["0"]


def test_models_only():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, not type"):
        tp.convert(nn.MaxPool2d)
