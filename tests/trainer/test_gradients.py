"""Two processes: every gradient becomes the mean of both ranks', and is sent as soon as the pass has made it."""

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from g4trainer import vram
from g4trainer.gradients import GradientMean
from g4trainer.ranks import Ranks
from g4trainer.rundir import read_json, write_json

LAYERS = 4
PASSES = 3
BUCKET = 20
"""Numbers at most: the gradients of 6 and 9 that come first, then two of 9, then those of 6 and 3 that come last."""
AS_MADE = ["made", "made", "sent"] * 2 + ["sent"]


def test_gradients_become_their_mean_and_are_sent_during_the_pass(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank_of_two, (port, str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        found = read_json(tmp_path / f"{rank}.json")
        assert found["errors"] == [0.0] * PASSES, "the mean, where a rank has no gradient too"
        assert found["unused"] == [True] * PASSES, "what no rank uses has no gradient"
        learning, *others = found["events"]
        assert learning == ["made"] * (2 * LAYERS + (rank == 0)) + ["sent"] * 3, "the order is learned"
        for events in others:
            assert events == ["made"] * (LAYERS + (rank == 0)) + AS_MADE, "sums start before the pass has ended"
        assert found["held"] == [2] * PASSES, "few gradients are held twice at any time"
        assert len(found["places"]) == 2, "and always in the same memory"
        assert found["buffers"] == [[BUCKET], [BUCKET]]
        assert found["after"] == ["made"] * LAYERS, "once closed, it sees nothing"
        assert found["order"] == [*range(LAYERS, 0, -1), 0, LAYERS + 1], "as rank 0 made them"
        assert found["order_resumed"] == found["order"]
        assert found["resumed"] == AS_MADE


def rank_of_two(rank: int, port: int, folder: str) -> None:
    """Three steps of two passes each over a chain of layers, one of which rank 0 uses alone and one nobody."""
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = Ranks.of_environment()
    ranks.join()
    vram.BUCKET_BYTES, vram.BUCKETS_UNDER_WAY = BUCKET * 4, 2
    torch.manual_seed(0)
    chain, lonely, idle = (
        nn.ModuleList(nn.Linear(3, 2 if last else 3, bias=False) for last in (False, False, False, True)),
        nn.Linear(2, 3),
        nn.Linear(3, 1),
    )
    parameters = [lonely.weight, *(layer.weight for layer in chain), idle.weight]
    events: list[str] = []
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda _: events.append("made"))
    found: dict[str, Any] = {"errors": [], "unused": [], "events": [], "held": []}
    places: set[int] = set()
    sums = dist.all_reduce

    def noted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if options.get("async_op"):
            events.append("sent")
            places.add(tensor.data_ptr())
            held.append(1 + len(mean._under_way))
        return sums(tensor, *arguments, **options)

    dist.all_reduce = noted
    with GradientMean(parameters, ranks) as mean:
        for step in range(PASSES):
            own = [gradient_of(parameter, rank, step, chain, lonely) for parameter in parameters]
            events.clear()
            held: list[int] = []
            for number in (0, 1):
                if number == 1:
                    mean.begin()
                loss(rank, step, number, chain, lonely).backward()
            mean.finish()
            found["events"].append(list(events))
            found["held"].append(max(held))
            found["places"] = sorted(places)
            expected = [sum(parts) / 2 for parts in zip(*ranks.gather(own), strict=True)]
            means = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            found["errors"].append(max(float((a - b).abs().max()) for a, b in zip(means, expected, strict=True)))
            found["unused"].append(idle.weight.grad is None)
            for parameter in parameters:
                parameter.grad = None
    events.clear()
    loss(1, 0, 0, chain, lonely).backward()
    found |= {"after": list(events), "order": mean.order, "buffers": [one.shape for one in mean.new_buffers()]}
    with GradientMean(parameters, ranks) as resumed:
        resumed.follow(mean.order)
        events.clear()
        resumed.begin()
        loss(rank, 0, 1, chain, lonely).backward()
        resumed.finish()
    write_json(Path(folder) / f"{rank}.json", found | {"resumed": events, "order_resumed": resumed.order})
    ranks.leave()


def loss(rank: int, step: int, number: int, chain: nn.ModuleList, lonely: nn.Linear) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank + 10 * step + 100 * number)
    x = torch.randint(-3, 4, (2, 3), generator=generator).float()
    for layer in chain:
        x = layer(x)
    return x.sum() + (lonely(x.detach()).sum() if rank == 0 and number == 0 else 0.0)


def gradient_of(parameter: nn.Parameter, rank: int, step: int, chain: nn.ModuleList, lonely: nn.Linear) -> torch.Tensor:
    """What this rank's two passes come to by themselves."""
    both = sum(loss(rank, step, number, chain, lonely) for number in (0, 1))
    [made] = torch.autograd.grad(both, [parameter], allow_unused=True)
    return torch.zeros_like(parameter) if made is None else made
