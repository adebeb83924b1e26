"""The processes of one attempt: who this one is, and what they tell one another.

torchrun starts one process a GPU, on any number of hosts; each is a rank. Rank 0 is the only one that writes. What a
decision hangs on goes over a group of its own on the CPU (gloo), so that agreeing never waits for a GPU; only gradients
and weights go over the devices' own network (NCCL).
"""

import datetime
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from g4trainer.vram import BUCKET_BYTES

PATIENCE = datetime.timedelta(days=7)
"""How long a rank waits for the others: rank 0 may write for minutes, and who died is found out by the lifeline."""
MESSAGE_BYTES = 256 * 2**20

T = TypeVar("T")


@dataclass
class Ranks:
    """This process among those of its attempt.

    All must call its methods alike, but for `device` and the properties.
    """

    size: int = 1
    rank: int = 0
    local_rank: int = 0
    _control: Any = field(default=None, repr=False)

    @classmethod
    def of_environment(cls, environ: Mapping[str, str] = os.environ) -> "Ranks":
        """As torchrun's variables say; a single process without them."""
        return cls(*(int(environ.get(name, default)) for name, default in _VARIABLES))

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def device(self) -> torch.device:
        """The device that this process computes on; from here on torch's current one."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.size == 1:
            return torch.device("cuda")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def join(self) -> None:
        """Returns when all ranks have met."""
        if self.size == 1:
            return
        if not dist.is_initialized():
            # Who died is found out by the lifeline; NCCL's own watchdog might end rank 0 before it has written it down.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            dist.init_process_group("nccl" if self.device().type == "cuda" else "gloo", timeout=PATIENCE)
        self._control = dist.new_group(backend="gloo", timeout=PATIENCE)

    def connect(self, device: torch.device) -> None:
        """Has the devices' network connect, and take the memory that it holds beside torch's, before anybody asks how
        much is free. Where one rank died the others wait here, until the lifeline ends them."""
        if self.size == 1 or device.type != "cuda":
            return
        # As large as a bucket of gradients, for NCCL connects each of its ways of summing when it takes it.
        dist.all_reduce(torch.zeros(BUCKET_BYTES // torch.float32.itemsize, device=device))
        dist.broadcast(torch.zeros(1, device=device), src=0)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def leave(self) -> None:
        """Ends the groups, after an end that all ranks came to together."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank; what the others give is not looked at."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Everybody's value by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def total(self, *numbers: float) -> list[float]:
        """Sums over the ranks, in double precision."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def most(self, number: float) -> float:
        """The largest of the ranks' numbers."""
        return self._reduced((number,), dist.ReduceOp.MAX)[0]

    def least(self, number: float) -> float:
        """The smallest of the ranks' numbers."""
        return self._reduced((number,), dist.ReduceOp.MIN)[0]

    def any(self, flag: bool) -> bool:
        """Whether one of the ranks says so."""
        return self.most(float(flag)) > 0

    def agree(self, reason: str | None) -> str | None:
        """A reason that one of the ranks gives, the lowest one's; None where none does."""
        if self.size == 1 or not self.any(reason is not None):
            return reason
        return next(one for one in self.gather(reason) if one is not None)

    def share_files(self, files: dict[str, bytes] | None) -> dict[str, bytes]:
        """Rank 0's files, on every rank; the others give None."""
        if self.size == 1:
            return files or {}
        sizes = self.share({name: len(content) for name, content in files.items()} if files is not None else None)
        return {name: self._share_bytes((files or {}).get(name), size) for name, size in (sizes or {}).items()}

    def share_tensors(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrites tensors of the device, in place, with rank 0's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def _reduced(self, numbers: Iterable[float], operation: Any) -> list[float]:
        values = [float(number) for number in numbers]
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=operation, group=self._control)
        return [float(value) for value in tensor]

    def _share_bytes(self, content: bytes | None, size: int) -> bytes:
        whole = torch.empty(size, dtype=torch.uint8)
        if content is not None and size:
            whole = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        for part in whole.split(MESSAGE_BYTES) if size else ():
            dist.broadcast(part, src=0, group=self._control)
        return content if content is not None else whole.numpy().tobytes()


_VARIABLES = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
ALONE = Ranks()
"""A run of one process."""
