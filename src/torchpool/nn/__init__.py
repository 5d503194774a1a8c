"""Pooling layers as Modules: torch's own twenty classes, those with parameters to learn, and those
over time."""

from torchpool.nn.attention import *  # noqa: F403
from torchpool.nn.attention import __all__ as _attention_names
from torchpool.nn.blur import BlurPool, MaxBlurPool
from torchpool.nn.general import Gated, Mixed, Pool
from torchpool.nn.over_time import OverTime, SequencePool
from torchpool.nn.sequence import *  # noqa: F403
from torchpool.nn.sequence import __all__ as _sequence_names
from torchpool.nn.tokens import *  # noqa: F403
from torchpool.nn.tokens import __all__ as _token_names
from torchpool.nn.torch_layers import *  # noqa: F403  the twenty names of its __all__
from torchpool.nn.torch_layers import __all__ as _torch_names

__all__ = [
    "BlurPool",
    "Gated",
    "MaxBlurPool",
    "Mixed",
    "OverTime",
    "Pool",
    "SequencePool",
    *_attention_names,
    *_sequence_names,
    *_token_names,
    *_torch_names,
]
