"""The mean of all ranks' gradients, sent while the backward pass still computes others.

With the 2.1 GB of 31B's LoRA (r=64) sent after the pass, a step of 0.72 s took another 0.21 s on two H200s
(benchmarks/README.md). Rather than DistributedDataParallel: that would split the compiled layers' graphs at its
buckets, and expects every rank to use the same adapters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from g4trainer.ranks import Ranks

BUCKET_BYTES = 64 * 2**20
"""Gradients that are sent at once: enough to fill the network, and the last of them, for which all wait, is little."""
UNDER_WAY = 4
"""Sums at most, each with a bucket's copy, once the pass has ended: all at once would hold every gradient twice."""


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
        self._fill(self._parameters)
        self._order: list[torch.nn.Parameter] = []
        self._learned = False
        self._next = 0
        self._watching = False
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        if self._early and self._ranks.size > 1:
            self._hooks = [one.register_post_accumulate_grad_hook(self._made) for one in self._parameters]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

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
            self._receive(self._next + 1 - UNDER_WAY)
            self._send_next()
        self._receive(len(self._buckets))
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
        self._buckets = list(_buckets(parameters))
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
        """Starts sums in the order that all ranks have, and takes in what has come."""
        while self._next < len(self._buckets) and not self._buckets[self._next].awaited:
            self._send_next()
            for bucket in self._buckets[: self._next - 1]:
                if bucket.work is not None and bucket.work.is_completed():
                    bucket.receive(self._ranks.size)

    def _send_next(self) -> None:
        self._buckets[self._next].send()
        self._next += 1

    def _receive(self, count: int) -> None:
        """Takes in the first so many buckets; the device waits for them, the host does not."""
        for bucket in self._buckets[: max(0, count)]:
            bucket.receive(self._ranks.size)


@dataclass(eq=False)
class _Bucket:
    parameters: list[torch.nn.Parameter]
    awaited: set[torch.nn.Parameter] = field(default_factory=set)
    """Whose gradients the pass has yet to make."""
    work: Any = None
    """The sum under way."""
    flat: torch.Tensor | None = None

    def send(self) -> None:
        self.flat = torch.cat([parameter.grad.reshape(-1) for parameter in self.parameters])
        self.work = dist.all_reduce(self.flat, async_op=True)

    def receive(self, ranks: int) -> None:
        if self.flat is None:
            return
        self.work.wait()
        self.flat.div_(ranks)
        parts = self.flat.split([parameter.numel() for parameter in self.parameters])
        gradients = [parameter.grad for parameter in self.parameters]
        torch._foreach_copy_(gradients, [part.view_as(own) for part, own in zip(parts, gradients, strict=True)])
        self.work = self.flat = None


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[_Bucket]:
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        bucket.append(parameter)
        if sum(one.nbytes for one in bucket) >= BUCKET_BYTES:
            yield _Bucket(bucket)
            bucket = []
    if bucket:
        yield _Bucket(bucket)
