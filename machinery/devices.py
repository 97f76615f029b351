"""devices.py -- which hardware a program runs on, and in which precision a network runs there.

  $ python -m machinery.devices        # what "auto" means on this machine
"""
import hashlib
import platform
from typing import Callable

import torch

from machinery import folders


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
    if "cuda" in available:
        available += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in available:
        raise ValueError(f"device {name!r} is not available here, expected auto or one of "
                         f"{', '.join(available)}")
    return torch.device(name)


PRECISIONS = ("auto", "bfloat16", "float32")


def hardware(device: torch.device) -> str:
    """What the device has to multiply matrices of bfloat16: "units" made for it, "instructions" only, or "".

    A CPU has units with AMX (Intel since 2023), and instructions with AVX512-BF16 alone (AMD since 2022).
    """
    if device.type == "cuda":
        return "units" if torch.cuda.is_bf16_supported(False) else ""
    if device.type != "cpu":
        return ""
    # torch's names for these questions are private, so they may be missing
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    if amx is not None and amx():
        return "units"
    avx512 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if avx512 is not None and avx512():
        return "instructions"
    return ""


def precision(device: torch.device, network: torch.nn.Module, asked: str = "auto") -> str:
    """"bfloat16" or "float32": in which precision `network` runs forward and backward on this device.

    With matrix units, bfloat16 takes about half the time of float32. With instructions alone it is faster
    only for the UNet that works on patches of pixels; on the 256 positions of a latent it is 1.1 to 1.3 times
    slower. The choice follows from the hardware and the network, never from a measurement, so a run that is
    repeated or resumed makes the same choice.
    """
    if asked != "auto":
        return asked
    has, in_patches = hardware(device), getattr(network, "patch", 1) > 1
    if has == "units" or (has == "instructions" and in_patches):
        return "bfloat16"
    return "float32"


def processor() -> str:
    """The model of the processor and its features, by which a matrix library chooses its code."""
    names = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features")  # the last two: ARM
    try:
        with open("/proc/cpuinfo") as file:
            first = file.read().partition("\n\n")[0].splitlines()
    except OSError:                                                      # not Linux
        return platform.processor()
    return ", ".join(" ".join(line.split()) for line in first if line.startswith(names))


def threads(device: torch.device) -> int:
    """How many CPU threads share a batch on this device; 1 on others than a CPU."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def one_thread_unless_equal(device: torch.device, rows: Callable) -> None:
    """Go on with one CPU thread if several threads do not round equal examples equally.

    If they did not, taking one image away would change how those behind it are rounded.
    rows: () -> tensors of shape (n, ...), made from n equal examples that are not private
    """
    if threads(device) > 1 and not all(torch.equal(r, r[:1].expand_as(r)) for r in rows()):
        torch.set_num_threads(1)
        folders.note("with several CPU threads an image would be rounded in a way that depends on its place "
                     "in the batch, so the run goes on with one thread")


def kind(device: torch.device) -> dict:
    """What the rounding of a gradient depends on. All ranks have to agree on it.

    If one image is taken out of the list, all images behind it move to another rank, and they must have the
    same gradients there.
    """
    build = hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16]    # with its matrix library
    facts = dict(device=device.type, bfloat16=hardware(device), torch=torch.__version__, build=build,
                 processor=processor(), capability=torch.backends.cpu.get_cpu_capability(),
                 threads=torch.get_num_threads())
    if device.type == "cuda":
        facts |= dict(gpu=torch.cuda.get_device_name(device), cuda=torch.version.cuda,
                      cudnn=torch.backends.cudnn.version())
    return facts


def autocast(device: torch.device, network: torch.nn.Module, asked: str = "auto") -> torch.autocast:
    """The context in which `network` runs forward and backward in the chosen `precision`.

    Only what runs inside is affected. Losses stay in float32, and the norms, sums and noise of dpsgd.py in
    float64.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16,
                          enabled=precision(device, network, asked) == "bfloat16")


if __name__ == "__main__":
    device = pick("auto")
    made = {"units": "has matrix units for bfloat16", "instructions": "has instructions for bfloat16",
            "": "computes in float32"}
    print(f"--device auto is {device} here, which {made[hardware(device)]}; sums and noise are in float64")
