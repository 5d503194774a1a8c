"""Pooling layers as Modules: torch's own twenty classes, and those with parameters to learn."""

from torchpool.nn.blur import BlurPool, MaxBlurPool
from torchpool.nn.general import Gated, Mixed, Pool
from torchpool.nn.torch_layers import *  # noqa: F403  the twenty names of its __all__
from torchpool.nn.torch_layers import __all__ as _torch_names

__all__ = ["BlurPool", "Gated", "MaxBlurPool", "Mixed", "Pool", *_torch_names]
