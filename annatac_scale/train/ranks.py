"""The processes that train together: sums over them, and gradients summed while backward still runs."""

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

COLLECTIVE_TIMEOUT_S = 6 * 3600
"""Ranks wait for the first one, which computes the positions. Ray and torchrun end a group that lost a member."""

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process that it starts."""


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, and the device of this one; alone by default."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=default_device)

    @classmethod
    @contextmanager
    def launched(cls, environment: Mapping[str, str] = os.environ) -> Iterator["Ranks"]:
        """The ranks that torchrun started, joined for the time of the context; alone where it did not."""
        if not all(name in environment for name in _LAUNCHED) or dist.is_initialized():
            yield cls()
            return
        device = default_device()
        if device.type == "cuda":
            device = torch.device("cuda", int(environment["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        )
        yield cls(dist.get_rank(), dist.get_world_size(), device)
        # Not where an error ends this rank alone: NCCL would wait for the others, which wait for this one.
        dist.destroy_process_group()

    @property
    def threads_of_first(self) -> int:
        """Threads for what rank 0 does while the others wait: all CPUs of its machine that it may use; alone, torch's.

        Started together, ranks have a thread or two each.
        """
        return torch.get_num_threads() if self.world_size == 1 else len(os.sched_getaffinity(0))

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        if self.world_size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def sum_counts(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Elementwise sums over all ranks, exact."""
        if self.world_size == 1:
            return counts
        sums = torch.from_numpy(counts).to(self.device)
        dist.all_reduce(sums)
        return sums.cpu().numpy()

    def gather(self, value: Any) -> list[Any]:
        """What each rank holds, in order of ranks; for small things."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def bytes_of_first(self, data: bytes | None) -> bytes | None:
        """What rank 0 holds, on every rank."""
        if self.world_size == 1:
            return data
        size = torch.tensor([-1 if data is None else len(data)], device=self.device)
        dist.broadcast(size, src=0)
        if size.item() < 0:
            return None
        if self.rank == 0:
            assert data is not None
            sent = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        else:
            sent = torch.empty(int(size.item()), dtype=torch.uint8, device=self.device)
        dist.broadcast(sent, src=0)
        return data if self.rank == 0 else sent.cpu().numpy().tobytes()

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module as all ranks train it: a backward outside ``no_sync`` leaves gradients summed over the ranks.

        They are summed, not averaged, bucket by bucket while backward still runs. All ranks start from the weights
        and buffers of rank 0.
        """
        if self.world_size == 1:
            return module
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)
        # No buffer ever changes: they need not be sent in each forward. torch 2.13 has another name for that.
        names = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        unsent: dict[str, Any] = {buffers: False}
        parallel = DistributedDataParallel(module, gradient_as_bucket_view=True, init_sync=False, **unsent)
        parallel.register_comm_hook(None, _sum_bucket)
        return parallel

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


# DDP compares the annotation with the class, which torch's own types leave out.
def _sum_bucket(_state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
