"""Placeholder until the unpooling functions land."""

from torch.nn.functional import max_unpool1d as max_unpool1d
from torch.nn.functional import max_unpool2d as max_unpool2d
from torch.nn.functional import max_unpool3d as max_unpool3d
