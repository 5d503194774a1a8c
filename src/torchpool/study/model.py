"""The arms of a study: poolings by name, each with torchpool's layers and with torch's own
operators, and the network around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchpool as tp
from torchpool.study.data import Images, shifted
from torchpool.study.task import Arm, Examples, Inputs, Task, Words

WIDTHS = (8, 16, 32)
"""Channels of the three stages."""


@dataclass(frozen=True)
class Geometry:
    """The window that every arm shares."""

    kernel: int = 2
    stride: int = 2

    @property
    def padding(self) -> int:
        """Keeps the size of the output near size / stride for kernels larger than the stride."""
        return (self.kernel - 1) // 2 if self.kernel > self.stride else 0

    @property
    def window(self) -> tp.Window:
        """As torchpool's window."""
        return tp.Window(self.kernel, self.stride, self.padding)


class _Torch(nn.Module):
    """A composition of torch's own operators, with a parameter where the pooling learns one."""

    def __init__(self, function: Callable[..., Tensor], start: float | None = None) -> None:
        super().__init__()
        self.function = function
        self.p = None if start is None else nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if self.p is None else self.function(x, self.p)


def _avg(x: Tensor, g: Geometry) -> Tensor:
    return F.avg_pool2d(x, g.kernel, g.stride, g.padding, count_include_pad=False)


def _softmax_mean(x: Tensor, g: Geometry) -> Tensor:
    e = torch.exp(x)
    return _avg(e * x, g) / _avg(e, g)


def _power_mean(x: Tensor, p: Tensor, g: Geometry) -> Tensor:
    return _avg(x.clamp(min=1e-6).pow(p), g).pow(1 / p)


def _log_mean_exp(x: Tensor, beta: Tensor, g: Geometry) -> Tensor:
    return torch.log(_avg(torch.exp(beta * x), g)) / beta


def _mixed(x: Tensor, a: Tensor, g: Geometry) -> Tensor:
    share = torch.sigmoid(a)
    return share * F.max_pool2d(x, g.kernel, g.stride, g.padding) + (1 - share) * _avg(x, g)


class _TorchGated(nn.Module):
    def __init__(self, channels: int, g: Geometry) -> None:
        super().__init__()
        self.g = g
        self.gate = nn.Conv2d(
            channels, channels, g.kernel, g.stride, g.padding, groups=channels, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        share = torch.sigmoid(self.gate(x))
        largest = F.max_pool2d(x, self.g.kernel, self.g.stride, self.g.padding)
        return share * largest + (1 - share) * _avg(x, self.g)


class _TorchBlurredMax(nn.Module):
    def __init__(self, channels: int, g: Geometry) -> None:
        super().__init__()
        self.g = g
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("blur", (row[:, None] * row).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(x, self.g.kernel, 1, self.g.padding)
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        assert isinstance(self.blur, Tensor)
        return F.conv2d(padded, self.blur, stride=self.g.stride, groups=x.shape[1])


def _strided(channels: int, g: Geometry) -> nn.Module:
    return nn.Conv2d(channels, channels, g.kernel, g.stride, g.padding)


def _pool(reduction: tp.Reduction) -> Callable[[int, Geometry], nn.Module]:
    return lambda channels, g: tp.nn.Pool(reduction, g.window)


ARMS: dict[str, Arm] = {
    "max": Arm(
        "max",
        lambda c, g: tp.nn.MaxPool2d(g.kernel, g.stride, g.padding),
        lambda c, g: nn.MaxPool2d(g.kernel, g.stride, g.padding),
    ),
    "average": Arm(
        "average",
        lambda c, g: tp.nn.AvgPool2d(g.kernel, g.stride, g.padding, count_include_pad=False),
        lambda c, g: nn.AvgPool2d(g.kernel, g.stride, g.padding, count_include_pad=False),
    ),
    "softmax": Arm(
        "SoftmaxMean (SoftPool)",
        _pool(tp.SoftmaxMean(1.0)),
        lambda c, g: _Torch(lambda x: _softmax_mean(x, g)),
    ),
    "powermean": Arm(
        "PowerMean, learned p (GeM)",
        _pool(tp.PowerMean(3.0, learnable=True)),
        lambda c, g: _Torch(lambda x, p: _power_mean(x, p, g), 3.0),
    ),
    "logmeanexp": Arm(
        "LogMeanExp, learned beta",
        _pool(tp.LogMeanExp(1.0, learnable=True)),
        lambda c, g: _Torch(lambda x, p: _log_mean_exp(x, p, g), 1.0),
    ),
    "mixed": Arm(
        "mixed max-average",
        lambda c, g: tp.nn.Mixed(g.window),
        lambda c, g: _Torch(lambda x, p: _mixed(x, p, g), 0.0),
    ),
    "gated": Arm(
        "gated max-average",
        lambda c, g: tp.nn.Gated(g.window, channels=c),
        lambda c, g: _TorchGated(c, g),
    ),
    "blurred": Arm(
        "anti-aliased max",
        lambda c, g: tp.nn.MaxBlurPool(g.kernel, g.stride, padding=g.padding),
        lambda c, g: _TorchBlurredMax(c, g),
    ),
    "strided": Arm("strided convolution (no pooling)", _strided, _strided),
}
"""Every arm by its name."""


def network(
    arm: str, geometry: Geometry, in_channels: int, num_classes: int, engine: str = "torchpool"
) -> nn.Module:
    """Three convolution stages with the arm's pooling after the first two, a global average and a
    linear layer.

    Args:
        engine: "torchpool", or "torch" for the same arm out of torch's own operators.
    Shape:
        (N, in_channels, 32, 32) -> (N, num_classes)
    """
    layers: list[nn.Module] = []
    previous = in_channels
    for stage, width in enumerate(WIDTHS):
        layers += [nn.Conv2d(previous, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers.append(nn.ReLU(inplace=False))
        if stage < len(WIDTHS) - 1:
            layers.append(getattr(ARMS[arm], engine)(width, geometry))
        previous = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(previous, num_classes)]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class ImageTask(Task):
    """Classification of images by a small convolutional network."""

    images: Images
    geometry: Geometry = Geometry()
    kind: ClassVar[str] = "images"
    arms: ClassVar[dict[str, Arm]] = ARMS

    @property
    def data(self) -> str:
        return self.images.name

    @property
    def digest(self) -> str:
        return self.images.digest

    @property
    def classes(self) -> tuple[str, ...]:
        return self.images.classes

    @property
    def skipped(self) -> tuple[str, ...]:
        return self.images.skipped

    @property
    def setting(self) -> dict[str, Any]:
        return asdict(self.geometry)

    @property
    def words(self) -> Words:
        return Words(
            "images",
            f"window {self.geometry.kernel}, stride {self.geometry.stride}",
            "shift consistency",
            "the image moves by up to 4 pixels",
            "the first pooling layer",
            self.batch,
        )

    @property
    def train(self) -> Examples:
        return Examples((self.images.train,), self.images.train_labels)

    @property
    def test(self) -> Examples:
        return Examples((self.images.test,), self.images.test_labels)

    def network(self, arm: str, engine: str = "torchpool") -> nn.Module:
        return network(arm, self.geometry, self.images.channels, len(self.classes), engine)

    def disturbed(self, seed: int) -> Inputs:
        return (shifted(self.images.test, seed),)

    def pooling(self, net: nn.Module) -> nn.Module:
        return net[3]  # type: ignore[index, no-any-return]

    def pooled_inputs(self) -> Inputs:
        return (torch.randn(self.batch, WIDTHS[0], *self.images.train.shape[-2:]),)
