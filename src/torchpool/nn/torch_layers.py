"""The twenty pooling classes of `torch.nn`, computed by torchpool.

Each class is torch's own (constructor, attributes, repr, state_dict, `isinstance`) with another
`forward`; one mixin per family holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from torchpool import functional

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "FractionalMaxPool2d",
    "FractionalMaxPool3d",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
]


class TorchLayer:
    """A mixin that gives a torch pooling class the `forward` of its family.

    Mix it in before torch's class, so that only `forward` changes.
    """

    _pool: ClassVar[Callable[..., Any]]
    """The function of `torchpool.functional` that computes the layer."""

    def _run(self, input: Tensor, *arguments: Any, **options: Any) -> Any:
        """Calls the function; a tracer's Proxy or a subclass of Tensor may answer for it."""
        if has_torch_function_unary(input):
            return handle_torch_function(self._pool, (input,), input, *arguments, **options)
        return self._pool(input, *arguments, **options)


class _MaxPool(TorchLayer):
    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    ceil_mode: bool
    return_indices: bool

    def forward(self, input: Tensor) -> Any:
        return self._run(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class MaxPool1d(_MaxPool, torch.nn.MaxPool1d):
    """The largest element of each window of a sequence; arguments as `torch.nn.MaxPool1d`.

    Shape:
        (N, C, L) -> (N, C, O) or (C, L) -> (C, O) with O = floor((L + 2 padding - dilation
        (kernel_size - 1) - 1) / stride) + 1;
        ceil instead of floor with ceil_mode, where a window that would start beyond L + padding is
        dropped.
        With return_indices a pair (values, indices): indices int64, flat positions over L.

    >>> MaxPool1d(2)(torch.tensor([[[1.0, 3.0, 2.0, 0.0]]]))
    tensor([[[3., 2.]]])
    """

    _pool = staticmethod(functional.max_pool1d)


class MaxPool2d(_MaxPool, torch.nn.MaxPool2d):
    """The largest element of each window of an image; arguments as `torch.nn.MaxPool2d`.

    Shape:
        (N, C, H, W) -> (N, C, OH, OW) or (C, H, W) -> (C, OH, OW), each size as in `MaxPool1d`.
        With return_indices a pair (values, indices): indices int64, flat positions h * W + w.
    """

    _pool = staticmethod(functional.max_pool2d)


class MaxPool3d(_MaxPool, torch.nn.MaxPool3d):
    """The largest element of each window of a volume; arguments as `torch.nn.MaxPool3d`.

    Shape:
        (N, C, D, H, W) -> (N, C, OD, OH, OW) or (C, D, H, W) -> (C, OD, OH, OW), each size as in
        `MaxPool1d`.
        With return_indices a pair (values, indices): indices int64, flat positions (d * H + h) * W
        + w.
    """

    _pool = staticmethod(functional.max_pool3d)


class _AvgPool1d(TorchLayer):
    kernel_size: Any
    stride: Any
    padding: Any
    ceil_mode: bool
    count_include_pad: bool

    def forward(self, input: Tensor) -> Any:
        return self._run(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
        )


class _AvgPool(_AvgPool1d):
    divisor_override: int | None

    def forward(self, input: Tensor) -> Any:
        return self._run(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AvgPool1d(_AvgPool1d, torch.nn.AvgPool1d):
    """The mean of each window of a sequence; arguments as `torch.nn.AvgPool1d`.

    Shape:
        (N, C, L) -> (N, C, O) or (C, L) -> (C, O) with O = floor((L + 2 padding - kernel_size) /
        stride) + 1;
        ceil instead of floor with ceil_mode, where a window that would start beyond L + padding is
        dropped.
    """

    _pool = staticmethod(functional.avg_pool1d)


class AvgPool2d(_AvgPool, torch.nn.AvgPool2d):
    """The mean of each window of an image; arguments as `torch.nn.AvgPool2d`.

    Shape:
        (N, C, H, W) -> (N, C, OH, OW) or (C, H, W) -> (C, OH, OW), each size as in `AvgPool1d`.
    """

    _pool = staticmethod(functional.avg_pool2d)


class AvgPool3d(_AvgPool, torch.nn.AvgPool3d):
    """The mean of each window of a volume; arguments as `torch.nn.AvgPool3d`.

    Shape:
        (N, C, D, H, W) -> (N, C, OD, OH, OW) or (C, D, H, W) -> (C, OD, OH, OW), each size as in
        `AvgPool1d`.
    """

    _pool = staticmethod(functional.avg_pool3d)


class _LPPool(TorchLayer):
    norm_type: float
    kernel_size: Any
    stride: Any
    ceil_mode: bool

    def forward(self, input: Tensor) -> Any:
        return self._run(
            input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode
        )


class LPPool1d(_LPPool, torch.nn.LPPool1d):
    """The norm (sum of |x|^p)^(1/p) of each window of a sequence; arguments as `torch.nn.LPPool1d`.

    Shape:
        (N, C, L) -> (N, C, O) or (C, L) -> (C, O) with O = floor((L - kernel_size) / stride) + 1;
        ceil instead of floor with ceil_mode.
    """

    _pool = staticmethod(functional.lp_pool1d)


class LPPool2d(_LPPool, torch.nn.LPPool2d):
    """The norm (sum of |x|^p)^(1/p) of each window of an image; arguments as `torch.nn.LPPool2d`.

    Shape:
        (N, C, H, W) -> (N, C, OH, OW) or (C, H, W) -> (C, OH, OW), each size as in `LPPool1d`.
    """

    _pool = staticmethod(functional.lp_pool2d)


class LPPool3d(_LPPool, torch.nn.LPPool3d):
    """The norm (sum of |x|^p)^(1/p) of each window of a volume; arguments as `torch.nn.LPPool3d`.

    Shape:
        (N, C, D, H, W) -> (N, C, OD, OH, OW) or (C, D, H, W) -> (C, OD, OH, OW), each size as in
        `LPPool1d`.
    """

    _pool = staticmethod(functional.lp_pool3d)


class _MaxUnpool(TorchLayer):
    kernel_size: Any
    stride: Any
    padding: Any

    def forward(
        self, input: Tensor, indices: Tensor, output_size: Sequence[int] | None = None
    ) -> Any:
        return self._run(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class MaxUnpool1d(_MaxUnpool, torch.nn.MaxUnpool1d):
    """Puts pooled values back where `MaxPool1d` found them; arguments as `torch.nn.MaxUnpool1d`.

    Where an index occurs more than once the last of its values wins, and only that one gets the
    gradient.

    Shape:
        input and indices (N, C, O) -> (N, C, L) or (C, O) -> (C, L) with L = (O - 1) stride - 2
        padding + kernel_size, or output_size.
    """

    _pool = staticmethod(functional.max_unpool1d)


class MaxUnpool2d(_MaxUnpool, torch.nn.MaxUnpool2d):
    """Puts pooled values back where `MaxPool2d` found them; arguments as `torch.nn.MaxUnpool2d`,
    duplicates as in `MaxUnpool1d`.

    Shape:
        input and indices (N, C, OH, OW) -> (N, C, H, W) or (C, OH, OW) -> (C, H, W), each size as
        in `MaxUnpool1d`.
    """

    _pool = staticmethod(functional.max_unpool2d)


class MaxUnpool3d(_MaxUnpool, torch.nn.MaxUnpool3d):
    """Puts pooled values back where `MaxPool3d` found them; arguments as `torch.nn.MaxUnpool3d`,
    duplicates as in `MaxUnpool1d`.

    Shape:
        input and indices (N, C, OD, OH, OW) -> (N, C, D, H, W) or (C, OD, OH, OW) -> (C, D, H, W),
        each size as in `MaxUnpool1d`.
    """

    _pool = staticmethod(functional.max_unpool3d)


class _FractionalMaxPool(TorchLayer):
    kernel_size: Any
    output_size: Any
    output_ratio: Any
    return_indices: bool
    _random_samples: Any

    def forward(self, input: Tensor) -> Any:
        return self._run(
            input,
            self.kernel_size,
            self.output_size,
            self.output_ratio,
            self.return_indices,
            _random_samples=self._random_samples,
        )


class FractionalMaxPool2d(_FractionalMaxPool, torch.nn.FractionalMaxPool2d):
    """The largest element of windows at random steps in an image; arguments as
    `torch.nn.FractionalMaxPool2d`.

    Shape:
        (N, C, H, W) -> (N, C, OH, OW) or (C, H, W) -> (C, OH, OW), where (OH, OW) is output_size or
        floor((H, W) * output_ratio).
    Source:
        Graham, Fractional max-pooling, 1412.6071.
    """

    _pool = staticmethod(functional.fractional_max_pool2d)


class FractionalMaxPool3d(_FractionalMaxPool, torch.nn.FractionalMaxPool3d):
    """The largest element of windows at random steps in a volume; arguments as
    `torch.nn.FractionalMaxPool3d`.

    Shape:
        (N, C, D, H, W) -> (N, C, OD, OH, OW) or (C, D, H, W) -> (C, OD, OH, OW), each size as in
        `FractionalMaxPool2d`.
    Source:
        Graham, Fractional max-pooling, 1412.6071.
    """

    _pool = staticmethod(functional.fractional_max_pool3d)


class _AdaptiveMaxPool(TorchLayer):
    output_size: Any
    return_indices: bool

    def forward(self, input: Tensor) -> Any:
        return self._run(input, self.output_size, self.return_indices)


class AdaptiveMaxPool1d(_AdaptiveMaxPool, torch.nn.AdaptiveMaxPool1d):
    """The largest element of output_size windows over a sequence; arguments as
    `torch.nn.AdaptiveMaxPool1d`.

    Shape:
        (N, C, L) -> (N, C, O) or (C, L) -> (C, O) with O = output_size; output o reads floor(o L /
        O) up to ceil((o + 1) L / O) - 1.
        With return_indices a pair (values, indices): indices int64, flat positions over L.
    """

    _pool = staticmethod(functional.adaptive_max_pool1d)


class AdaptiveMaxPool2d(_AdaptiveMaxPool, torch.nn.AdaptiveMaxPool2d):
    """The largest element of output_size windows over an image; arguments as
    `torch.nn.AdaptiveMaxPool2d`.

    Shape:
        (N, C, H, W) -> (N, C, OH, OW) or (C, H, W) -> (C, OH, OW) with (OH, OW) = output_size; None
        keeps a size of the input.
        With return_indices a pair (values, indices): indices int64, flat positions h * W + w.
    """

    _pool = staticmethod(functional.adaptive_max_pool2d)


class AdaptiveMaxPool3d(_AdaptiveMaxPool, torch.nn.AdaptiveMaxPool3d):
    """The largest element of output_size windows over a volume; arguments as
    `torch.nn.AdaptiveMaxPool3d`.

    Shape:
        (N, C, D, H, W) -> (N, C, OD, OH, OW) or (C, D, H, W) -> (C, OD, OH, OW) with (OD, OH, OW) =
        output_size; None keeps a size.
        With return_indices a pair (values, indices): indices int64, flat positions (d * H + h) * W
        + w.
    """

    _pool = staticmethod(functional.adaptive_max_pool3d)


class _AdaptiveAvgPool(TorchLayer):
    output_size: Any

    def forward(self, input: Tensor) -> Any:
        return self._run(input, self.output_size)


class AdaptiveAvgPool1d(_AdaptiveAvgPool, torch.nn.AdaptiveAvgPool1d):
    """The mean of output_size windows over a sequence; arguments as `torch.nn.AdaptiveAvgPool1d`.

    Shape:
        (N, C, L) -> (N, C, O) or (C, L) -> (C, O) with O = output_size; output o reads floor(o L /
        O) up to ceil((o + 1) L / O) - 1.
    """

    _pool = staticmethod(functional.adaptive_avg_pool1d)


class AdaptiveAvgPool2d(_AdaptiveAvgPool, torch.nn.AdaptiveAvgPool2d):
    """The mean of output_size windows over an image; arguments as `torch.nn.AdaptiveAvgPool2d`.

    Shape:
        (N, C, H, W) -> (N, C, OH, OW) or (C, H, W) -> (C, OH, OW) with (OH, OW) = output_size; None
        keeps a size of the input.
    """

    _pool = staticmethod(functional.adaptive_avg_pool2d)


class AdaptiveAvgPool3d(_AdaptiveAvgPool, torch.nn.AdaptiveAvgPool3d):
    """The mean of output_size windows over a volume; arguments as `torch.nn.AdaptiveAvgPool3d`.

    Shape:
        (N, C, D, H, W) -> (N, C, OD, OH, OW) or (C, D, H, W) -> (C, OD, OH, OW) with (OD, OH, OW) =
        output_size; None keeps a size.
    """

    _pool = staticmethod(functional.adaptive_avg_pool3d)
