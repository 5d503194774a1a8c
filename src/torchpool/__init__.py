"""torchpool: pooling layers for PyTorch. Any windows × any reduction, over images, volumes and
sequences."""

from torchpool import nn
from torchpool.convert import convert
from torchpool.functional import *  # noqa: F403  the names of its __all__: pool, explain and torch's functions
from torchpool.ragged import length_mask
from torchpool.reductions import (
    Accumulation,
    LogMeanExp,
    Lp,
    Max,
    Mean,
    Min,
    PowerMean,
    Reduction,
    Selection,
    SoftmaxMean,
    Std,
    Sum,
    Var,
)
from torchpool.segments import segment_median, segment_pool, segment_quantile
from torchpool.streaming import Stream, streaming
from torchpool.windows import Adaptive, Axis, Fractional, Global, Window, Windows

__version__ = "0.1.0"

__all__ = [
    "Accumulation",
    "Adaptive",
    "Axis",
    "Fractional",
    "Global",
    "LogMeanExp",
    "Lp",
    "Max",
    "Mean",
    "Min",
    "PowerMean",
    "Reduction",
    "Selection",
    "SoftmaxMean",
    "Std",
    "Stream",
    "Sum",
    "Var",
    "Window",
    "Windows",
    "convert",
    "length_mask",
    "nn",
    "segment_median",
    "segment_pool",
    "segment_quantile",
    "streaming",
]
