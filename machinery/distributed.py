"""distributed.py -- several processes, one mechanism.

Each rank keeps its own share of the private images and draws its own Poisson lot from it with the same q:
together that is one Poisson lot. Clipped sums are added by one all-reduce, rank 0 alone adds the noise
(dpsgd.private_gradient), so the noise and the epsilon do not depend on the number of ranks. Rank 0 writes.

  $ torchrun --standalone --nproc-per-node=2 train.py --device cpu --out runs/two
"""
import contextlib
import datetime
import os
import signal
import sys

import torch
import torch.distributed as dist


def start(device: torch.device) -> tuple[int, int, torch.device]:
    """(rank, ranks, device): joins the group that torchrun has announced; (0, 1, device) without one."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    signal.signal(signal.SIGTERM, lost)                          # torchrun's word that another rank has died
    return dist.get_rank(), ranks, device


def first() -> bool:
    """Whether this process is rank 0, the one that writes; before or after `start`."""
    return int(os.environ.get("RANK", 0)) == 0


def rank() -> int:
    """This process's number in the group, 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def lost(*_) -> None:
    """End this rank because another one has died."""
    sys.exit("another rank died, so the run ends here; the last checkpoint is intact: "
             "start again with --resume")


def sum_over_ranks(total: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sum over all ranks, in one all-reduce; `total` itself without a group."""
    if not dist.is_initialized():
        return total
    flat = torch.cat([g.flatten() for g in total.values()])
    answered(dist.all_reduce, flat)
    parts = flat.split([g.numel() for g in total.values()])
    return {name: part.view(g.shape) for (name, g), part in zip(total.items(), parts)}


@contextlib.contextmanager
def answering():
    """Inside the `with`, a collective that nobody answers ends this rank. No other error is a lost rank."""
    try:
        yield
    except ConnectionError:
        lost()


def same_everywhere(params: dict[str, torch.Tensor]) -> None:
    """Give all ranks rank 0's values: the adapters' random start, the key of the draws."""
    if dist.is_initialized():
        for p in params.values():
            answered(dist.broadcast, p.data, 0)


def states(generator: torch.Generator) -> list[torch.Tensor]:
    """[rank] -> its generator's state, for a checkpoint that all ranks can resume from. All must call it."""
    mine = generator.get_state()
    if not dist.is_initialized():
        return [mine]
    everyone = [None] * dist.get_world_size()
    answered(dist.all_gather_object, everyone, mine)
    return everyone


def answered(collective, *args) -> None:
    """Call a collective; ConnectionError if it fails, because another rank is gone."""
    try:
        collective(*args)
    except RuntimeError as e:
        raise ConnectionError("a collective that nobody answered") from e


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
