"""denoising.py -- how well the adapter of a run denoises real test images, at several noise levels t.

This is the cheapest way to compare settings; docs/recipes.md says what was chosen by it. It reads real
images, so no guarantee covers its figures.

  $ python benchmarks/denoising.py assets/fashion-eps10 runs/other
"""
import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import ddpm  # noqa: E402
import unet  # noqa: E402
from machinery import devices  # noqa: E402
from support import runs  # noqa: E402

TIMESTEPS = (50, 100, 200, 300, 400)                             # noise levels that decide shape and texture


@torch.no_grad()
def denoising_losses(model: unet.UNet, images: Tensor, labels: Tensor, batch: int = 256) -> list[float]:
    """The mean squared error of the predicted noise at each of TIMESTEPS. All models see the same noise.

    Shapes: images uint8 (n, C, H, W), labels (n,)
    """
    x0, losses, generator = data.to_float(images), [], torch.Generator().manual_seed(0)
    for t in TIMESTEPS:
        noise = torch.randn((len(x0), 1, *x0.shape[1:]), generator=generator)                  # K = 1
        times = torch.full((len(x0), 1), t)
        parts = zip(*(part.split(batch) for part in (x0, labels, times, noise)))
        with devices.autocast(x0.device, model):
            losses.append(torch.cat([ddpm.loss(model, *part) for part in parts]).mean().item())
    return losses


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: p.exit(2, f"{p.prog}: {message}\n")
    p.add_argument("runs", nargs="+",
                   help="folders of finished runs; the base of the first one is measured, too")
    p.add_argument("--n", type=int, default=1024, help="number of test images")
    p.add_argument("--data-dir",
                   help="folder with the files of the data set (default: assets/ or ./datasets)")
    a = p.parse_args()
    try:
        if a.n < 1:
            raise ValueError(f"--n {a.n}: expected at least 1")
        rows = [("base", runs.load(a.runs[0], public=True).model)]
        rows += [(run, runs.load(run).model) for run in a.runs]
        name = runs.read_config(Path(a.runs[0]))["data"]
        if name not in data.KNOWN or data.KNOWN[name].channels != 1:
            raise ValueError(f"{a.runs[0]} was trained on {name}; expected a run on a known data set of grey "
                             f"images")
        images, labels = data.load(name, "test", a.data_dir)
    except (ValueError, OSError) as e:
        p.error(str(e))
    print("loss at t =".ljust(30) + "".join(f"{t:>9}" for t in TIMESTEPS) + "     mean")
    for name, model in rows:
        losses = denoising_losses(model, images[:a.n], labels[:a.n])
        mean = sum(losses) / len(losses)
        print(f"{name:<30}" + "".join(f"{loss:>9.4f}" for loss in [*losses, mean]), flush=True)


if __name__ == "__main__":
    main()
