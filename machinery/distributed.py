"""distributed.py -- several processes run one mechanism.

Each process is a rank and keeps its own share of the private images. All ranks have the same secret key. Each
draws the coins of the whole Poisson lot and uses those of its share, so the lot does not depend on the number
of ranks. The ranks' exact sums are added by one all-reduce and the noise is added once to the total
(dpsgd.private_gradient), so the release does not depend on it either. Rank 0 writes the files.

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
    """Join the group that torchrun has announced: (rank, ranks, device); without a group (0, 1, device).

    Errors: mps, which several processes cannot share; fewer GPUs than processes on a machine; one GPU by its
            number -> ValueError
    """
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        return 0, 1, device
    if device.type == "mps":                     # gloo, the library that sends the sums, does not know mps
        raise ValueError(f"{ranks} processes cannot share mps; expected --device cpu")
    if device.type == "cuda":
        here, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if device.index is not None or here >= gpus:
            raise ValueError(f"--device {device}: each of {ranks} processes takes a GPU of its own, and here "
                             f"are {gpus}; expected --device cuda and as many processes, or --device cpu")
        device = torch.device("cuda", here)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    signal.signal(signal.SIGTERM, lost)                          # torchrun sends it when a rank has died
    return dist.get_rank(), ranks, device


def rank() -> int:
    """The number of this process in the group, or 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """The number of processes in the group, or 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def lost(*_) -> None:
    """End this rank because another one has died, or because torchrun was told to end them all."""
    sys.exit("another rank died, or all were told to end, so the run ends here; the last checkpoint is "
             "intact, so start again with --resume")


def sum_over_ranks(total: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sum over all ranks, by one all-reduce. Without a group it is `total` itself."""
    if not dist.is_initialized():
        return total
    flat = torch.cat([g.flatten() for g in total.values()])
    answered(dist.all_reduce, flat)
    parts = flat.split([g.numel() for g in total.values()])
    return {name: part.view(g.shape) for (name, g), part in zip(total.items(), parts)}


@contextlib.contextmanager
def answering():
    """Inside the `with`, a collective that nobody answers ends this rank. Other errors are passed on."""
    try:
        yield
    except ConnectionError:
        lost()


def same_everywhere(params: dict[str, torch.Tensor]) -> None:
    """Give all ranks the values of rank 0, in place: the random start of the adapters, and the keys."""
    if dist.is_initialized():
        for p in params.values():
            answered(dist.broadcast, p.data, 0)


def of_the_first(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rank 0's values on every rank, to the last bit, by one broadcast. Without a group they are `params`."""
    if not dist.is_initialized():
        return params
    flat = torch.cat([p.flatten() for p in params.values()])
    answered(dist.broadcast, flat, 0)
    parts = flat.split([p.numel() for p in params.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(params.items(), parts)}


def bytes_of_the_first(secret: bytes) -> bytes:
    """Rank 0's bytes on every rank. They are the secret key, which crosses the network between the ranks."""
    if not dist.is_initialized():
        return secret
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flat = torch.tensor(list(secret), dtype=torch.uint8, device=device)
    answered(dist.broadcast, flat, 0)
    return bytes(flat.tolist())


def agree(facts: dict) -> None:
    """Refuse to start when ranks differ in any of these facts (numbers, strings) about data and settings.

    If one rank's copy of the private images lacked the first image, images behind it would be in the shares
    of two ranks.
    Errors: a difference -> ValueError on every rank, with the names of what differs but not the values
    """
    if not dist.is_initialized():
        return
    everyone = [None] * dist.get_world_size()
    answered(dist.all_gather_object, everyone, facts)
    first_rank = everyone[0]
    different = [name for name in facts if any(other.get(name) != first_rank.get(name) for other in everyone)]
    if different:
        raise ValueError(f"the ranks differ in {', '.join(different)}; expected the same flags, files and "
                         f"processors on every machine, since each rank takes a share of one list of images")


def answered(collective, *args) -> None:
    """Call a collective. If it fails, another rank is gone, and this raises ConnectionError."""
    try:
        collective(*args)
    except NotImplementedError:                                          # is a RuntimeError, too
        raise
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
