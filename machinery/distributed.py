"""distributed.py -- several processes, one mechanism.

Each rank keeps its own share of the private images. All ranks have one secret key, so each makes the coins of
the whole Poisson lot and takes those of its share: the lot does not depend on the number of ranks. Exact
sums are added by one all-reduce, and the noise is added once to the whole (dpsgd.private_gradient), so
neither does the release. Rank 0 writes the files.

  $ torchrun --standalone --nproc-per-node=2 train.py --device cpu --out runs/two
  $ python -m machinery.distributed       # one lot, on one, two and three ranks
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


def ranks() -> int:
    """How many processes the group has, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def lost(*_) -> None:
    """End this rank because another one has died, or because torchrun was told to end them all."""
    sys.exit("another rank died, or all were told to end, so the run ends here; the last checkpoint is "
             "intact: start again with --resume")


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
    """Give all ranks rank 0's values: the adapters' random start, the keys."""
    if dist.is_initialized():
        for p in params.values():
            answered(dist.broadcast, p.data, 0)


def of_the_first(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rank 0's values, on every rank and to the last bit, in one broadcast; without a group `params`."""
    if not dist.is_initialized():
        return params
    flat = torch.cat([p.flatten() for p in params.values()])
    answered(dist.broadcast, flat, 0)
    parts = flat.split([p.numel() for p in params.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(params.items(), parts)}


def bytes_of_the_first(secret: bytes) -> bytes:
    """Rank 0's bytes on every rank: the secret key, which crosses the network between the ranks."""
    if not dist.is_initialized():
        return secret
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flat = torch.tensor(list(secret), dtype=torch.uint8, device=device)
    answered(dist.broadcast, flat, 0)
    return bytes(flat.tolist())


def agree(facts: dict) -> None:
    """Refuse to start when ranks differ in any of these facts (numbers, strings): their data or settings.

    If one rank's copy of the private images lacks the first, every image behind it is in two ranks' shares.
    Errors: a difference -> ValueError on every rank, with the names of what differs and no value
    """
    if not dist.is_initialized():
        return
    everyone = [None] * dist.get_world_size()
    answered(dist.all_gather_object, everyone, facts)
    first_rank = everyone[0]
    different = [name for name in facts if any(other.get(name) != first_rank.get(name) for other in everyone)]
    if different:
        raise ValueError(f"the ranks differ in {', '.join(different)}; expected the same flags and the same "
                         f"files on every machine, since each rank takes its share of one list of images")


def answered(collective, *args) -> None:
    """Call a collective; ConnectionError if it fails, because another rank is gone."""
    try:
        collective(*args)
    except RuntimeError as e:
        raise ConnectionError("a collective that nobody answered") from e


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    from machinery.secret import Secret, new_key
    coins, q = Secret(new_key()).coins(step=1, n=30), 0.2
    for ranks in (1, 2, 3):
        shares = [(coins[r::ranks] < q).nonzero()[:, 0] * ranks + r for r in range(ranks)]
        said = [f"rank {r} has images {mine.tolist()}" for r, mine in enumerate(shares)]
        print(f"{ranks} ranks: " + "; ".join(said))
