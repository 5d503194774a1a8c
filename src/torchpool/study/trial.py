"""One trial: train the network of an arm from a seed and score it. One measurement: what an arm
costs per training step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchpool.analysis import saved_bytes
from torchpool.study.task import Examples, Inputs, Task

LEARNING_RATE = 3e-3
DISTURBANCES = (11, 12, 13)
"""Seeds of the disturbances that consistency is measured with."""


@dataclass(frozen=True)
class Score:
    """What a trained network reaches on the held-out examples."""

    accuracy: float
    """Share of correct predictions."""
    consistency: float
    """Share of predictions that a disturbance which should not matter leaves unchanged."""
    parameters: int
    seconds: float
    """Time of training and scoring."""


@dataclass(frozen=True)
class Cost:
    """What an arm's pooling layer and a training step of its network cost."""

    before_bytes: int
    """Activation of one batch that enters the pooling layer."""
    after_bytes: int
    """Activation that leaves it."""
    step_ms: float
    """Median time of a training step with torchpool."""
    torch_step_ms: float
    """The same with torch's own operators."""
    saved_bytes: int
    """Kept for the backward pass by the pooling layer with torchpool."""
    torch_saved_bytes: int
    """The same with torch's own operators."""


def _initialise(net: nn.Module, seed: int) -> None:
    """Gives layer i of every arm the same start from the same seed, whatever the pooling between
    them holds."""
    for i, layer in enumerate(net.children()):
        torch.manual_seed(seed * 1000 + i)
        for module in layer.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()


def train(
    arm: str,
    seed: int,
    task: Task,
    epochs: int,
    device: str = "cpu",
    tick: Callable[[], None] = lambda: None,
) -> Score:
    """Trains and scores one network; the same arguments give the same score.

    Args:
        tick: called after each epoch.
    """
    began = time.perf_counter()
    net = task.network(arm)
    _initialise(net, seed)
    net = net.to(device)
    examples = task.train.to(device)
    steps = epochs * -(-len(examples) // task.batch)
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE * 3, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        net.train()
        for index in torch.randperm(len(examples), generator=order).to(device).split(task.batch):
            batch = examples.part(index)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(net(*batch.inputs), batch.labels).backward()
            optimizer.step()
            schedule.step()
        tick()
    accuracy, consistency = _score(net.eval(), task, device)
    parameters = sum(p.numel() for p in net.parameters())
    return Score(accuracy, consistency, parameters, time.perf_counter() - began)


@torch.no_grad()
def _score(net: nn.Module, task: Task, device: str) -> tuple[float, float]:
    def predict(inputs: Inputs) -> Tensor:
        parts = zip(*(t.split(256) for t in inputs), strict=True)
        return torch.cat([net(*(t.to(device) for t in part)).argmax(1).cpu() for part in parts])

    still = predict(task.test.inputs)
    moved = [predict(task.disturbed(seed)) for seed in DISTURBANCES]
    unchanged = torch.stack([(m == still).float().mean() for m in moved]).mean()
    return float((still == task.test.labels).float().mean()), float(unchanged)


def measure(arm: str, task: Task, device: str = "cpu", repeats: int = 12) -> Cost:
    """Times training steps with both engines side by side (alternating, medians) and counts the
    bytes the pooling layer keeps."""
    engines = ("torchpool", "torch")
    nets = {engine: task.network(arm, engine).to(device).train() for engine in engines}
    batch = task.train.part(slice(task.batch)).to(device)
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    for repeat in range(repeats + 2):
        for engine in engines:
            elapsed = _step(nets[engine], batch)
            if repeat >= 2:  # the first two warm up: kernels are compiled or loaded there
                times[engine].append(elapsed)
    inputs = tuple(t.to(device) for t in task.pooled_inputs())
    pooling = {engine: task.pooling(net) for engine, net in nets.items()}
    saved = {engine: saved_bytes(layer, *inputs) for engine, layer in pooling.items()}
    return Cost(
        inputs[0].nbytes,
        pooling["torchpool"](*inputs).nbytes,
        median(times["torchpool"]) * 1e3,
        median(times["torch"]) * 1e3,
        saved["torchpool"],
        saved["torch"],
    )


def _step(net: nn.Module, batch: Examples) -> float:
    _synchronise(batch.labels)
    began = time.perf_counter()
    net.zero_grad(set_to_none=True)
    F.cross_entropy(net(*batch.inputs), batch.labels).backward()
    _synchronise(batch.labels)
    return time.perf_counter() - began


def _synchronise(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
