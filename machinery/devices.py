"""devices.py -- which hardware a program runs on, and in which precision a network runs there.

  $ python -m machinery.devices        # what "auto" means on this machine
"""
import torch


def pick(name: str) -> torch.device:
    """The device of this name. "auto" is cuda, else mps, else cpu.

    Errors: a device that is not available -> ValueError
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        return torch.device(available[0])
    kind, _, index = name.partition(":")
    if kind not in available or index and not index.isdecimal():
        raise ValueError(f"device {name!r} is not available here, expected auto or one of "
                         f"{', '.join(available)}")
    return torch.device(name)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware is made for bfloat16. On other hardware bfloat16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(False)
    if device.type == "cpu":                                             # torch's private name may be missing
        return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return False


def kind(device: torch.device) -> dict:
    """What the rounding of a gradient depends on. All ranks have to agree on it.

    If one image is taken out of the list, all images behind it move to another rank, and they must have the
    same gradients there.
    """
    return dict(device=device.type, bfloat16=fast_bfloat16(device), torch=torch.__version__,
                processor=torch.backends.cpu.get_cpu_capability())


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 for the forward and backward pass of a network if `fast_bfloat16` says so, else float32.

    Only what runs inside is affected. Losses stay in float32, and the norms, sums and noise of dpsgd.py in
    float64.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast_bfloat16(device))


if __name__ == "__main__":
    device = pick("auto")
    precision = "bfloat16" if fast_bfloat16(device) else "float32"
    print(f"--device auto is {device} here; networks run in {precision}, sums and noise in float64")
