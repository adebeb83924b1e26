"""The mean of all ranks' gradients, sent while the backward pass still computes others.

They are copied into a few buffers in turn, which are summed and copied back: no memory is taken while a pass is at
work, however slow the network. Rather than DistributedDataParallel: that would split the compiled layers' graphs at its
buckets, and expects every rank to use the same adapters.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from g4trainer import vram
from g4trainer.ranks import Ranks


class GradientMean:
    """Between `begin` and `finish` of a pass, every gradient becomes its mean over the ranks.

    A context manager: it watches the parameters from its beginning to its end.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], ranks: Ranks, *, early: bool = True) -> None:
        """
        early: send during the pass. Not where ranks share the base model: their gathering of weights would have to
        be in the same order among these sums on all ranks, and is not where they use other adapters.
        """
        self._parameters, self._ranks, self._early = list(parameters), ranks, early
        sizes = [parameter.numel() for parameter in self._parameters]
        self._buffers, self._numbers = vram.gradient_buffers(sum(sizes), max(sizes, default=0))
        self._fill(self._parameters)
        self._order: list[torch.nn.Parameter] = []
        self._learned = False
        self._next = 0
        self._watching = False
        self._hooks: list[Any] = []
        self._free: list[torch.Tensor] = []
        self._under_way: deque[_Sum] = deque()

    def __enter__(self) -> Self:
        self._free = self.new_buffers()
        if self._early and self._ranks.size > 1:
            self._hooks = [one.register_post_accumulate_grad_hook(self._made) for one in self._parameters]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._watching = False
        self._under_way.clear()
        self._free.clear()

    def new_buffers(self) -> list[torch.Tensor]:
        """As much memory as it holds between its beginning and its end; none for one rank."""
        if self._ranks.size == 1:
            return []
        one = self._parameters[0]
        return [torch.empty(self._numbers, dtype=one.dtype, device=one.device) for _ in range(self._buffers)]

    def begin(self) -> None:
        """The pass that follows is the last one of an optimizer step. All ranks must call it, and `finish`, alike."""
        self._watching, self._next = True, 0
        for bucket in self._buckets:
            bucket.awaited = set(bucket.parameters)

    def finish(self) -> None:
        """Returns once the device has been asked for all means. Of ranks that have no gradient it counts as zero."""
        self._watching = False
        used = [parameter.grad is not None for parameter in self._parameters]
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        while self._next < len(self._buckets):
            self._send_next()
        while self._under_way:
            self._receive()
        if self._ranks.any(not all(used)):
            for parameter, by in zip(self._parameters, self._ranks.total(*used), strict=True):
                if not by:
                    parameter.grad = None
        if self._early and not self._learned:
            self._learn()

    @property
    def order(self) -> list[int]:
        """Of the parameters, as they are sent; empty while that is not learned."""
        numbers = {parameter: number for number, parameter in enumerate(self._parameters)}
        return [numbers[one] for bucket in self._buckets for one in bucket.parameters] if self._learned else []

    def follow(self, order: Sequence[int]) -> None:
        """Sends in the order that an earlier attempt learned: of three ranks or more, sums in another one round
        otherwise. order: the same on all ranks; where it is empty, one is learned.
        """
        if order:
            self._fill([self._parameters[number] for number in order])
            self._learned = True

    def _learn(self) -> None:
        """From the first pass on, buckets are filled in the order in which rank 0 made its gradients."""
        numbers = {parameter: number for number, parameter in enumerate(self._parameters)}
        order = self._ranks.share([numbers[parameter] for parameter in self._order])
        self.follow([*order, *sorted(set(numbers.values()) - set(order))])

    def _fill(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._buckets = list(_buckets(parameters, self._numbers))
        self._bucket_of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}

    def _made(self, parameter: torch.nn.Parameter) -> None:
        """Called by the backward pass when a gradient is whole."""
        if not self._watching:
            return
        if not self._learned:
            self._order.append(parameter)
        else:
            self._bucket_of[parameter].awaited.discard(parameter)
            self._send_what_is_ready()

    def _send_what_is_ready(self) -> None:
        """Starts sums in the order that all ranks have."""
        while self._next < len(self._buckets) and not self._buckets[self._next].awaited:
            self._send_next()

    def _send_next(self) -> None:
        if not self._free:
            self._receive()
        self._under_way.append(_send(self._buckets[self._next].parameters, self._free.pop()))
        self._next += 1

    def _receive(self) -> None:
        """Takes in the sum that was sent first; the device waits for it, the host does not."""
        self._free.append(self._under_way.popleft().receive(self._ranks.size))


@dataclass(eq=False)
class _Bucket:
    parameters: list[torch.nn.Parameter]
    awaited: set[torch.nn.Parameter] = field(default_factory=set)
    """Whose gradients the pass has yet to make."""


@dataclass
class _Sum:
    """Under way, of a bucket's gradients."""

    parameters: Sequence[torch.nn.Parameter]
    buffer: torch.Tensor
    """What it is made in, from the beginning; they may not fill it."""
    work: Any

    def receive(self, ranks: int) -> torch.Tensor:
        """Gives every gradient the mean. Returns the buffer, for another sum."""
        self.work.wait()
        sizes = [parameter.numel() for parameter in self.parameters]
        flat = self.buffer[: sum(sizes)].div_(ranks)
        gradients = [parameter.grad for parameter in self.parameters]
        parts = [part.view_as(own) for part, own in zip(flat.split(sizes), gradients, strict=True)]
        torch._foreach_copy_(gradients, parts)
        return self.buffer


def _send(parameters: Sequence[torch.nn.Parameter], buffer: torch.Tensor) -> _Sum:
    gradients = [parameter.grad.reshape(-1) for parameter in parameters]
    flat = buffer[: sum(one.numel() for one in gradients)]
    torch.cat(gradients, out=flat)
    return _Sum(parameters, buffer, dist.all_reduce(flat, async_op=True))


def _buckets(parameters: Sequence[torch.nn.Parameter], numbers: int) -> Iterator[_Bucket]:
    """In their order, each with as many as have `numbers` gradients or fewer."""
    bucket: list[torch.nn.Parameter] = []
    count = 0
    for parameter in parameters:
        if bucket and count + parameter.numel() > numbers:
            yield _Bucket(bucket)
            bucket, count = [], 0
        bucket.append(parameter)
        count += parameter.numel()
    if bucket:
        yield _Bucket(bucket)
