"""private_step.py -- draws one private step of a model with two weights as a picture.

Every arrow is a computed result. dpsgd.py draws the lot, computes one gradient for each image, and clips it
to the circle of radius C. This file sums them, adds noise once, and divides by the declared B. The seed is
fixed, so the picture is always the same.

  $ python benchmarks/private_step.py                               # docs/private-step.svg
"""
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dpsgd  # noqa: E402

N, Q, C, SIGMA, B = 24, 0.25, 1.0, 0.6, 6            # images, q, gradient units, no unit, images
PANEL, HIGH, UNIT = 200, 250, 40                     # width and height of a panel, pixels per gradient unit
STYLE = """<style>
  text { font: 13px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 11px; fill: #59636e }
  .line { stroke: #59636e; fill: none } .mark { stroke: #0969da; fill: none; stroke-width: 2 }
  .dot { fill: #d1d9e0 } .in { fill: #0969da } .noise { fill: #bc4c00; opacity: .35 } .sum { stroke: #bc4c00 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .small { fill: #9198a1 } .line { stroke: #9198a1 } .mark { stroke: #4493f8 }
    .dot { fill: #3d444d } .in { fill: #4493f8 } .noise { fill: #f0883e } .sum { stroke: #f0883e }
  }
</style>"""


def arrow(x: float, y: float, v: torch.Tensor, kind: str = "mark") -> str:
    """An arrow from (x, y) along the gradient v, (2,), in gradient units; y points up."""
    dx, dy = v[0].item() * UNIT, -v[1].item() * UNIT
    angle = math.atan2(dy, dx)
    head = " ".join(f"L{x + dx - 8 * math.cos(angle + turn):.1f},{y + dy - 8 * math.sin(angle + turn):.1f} "
                    f"M{x + dx:.1f},{y + dy:.1f}" for turn in (0.4, -0.4))
    shaft = f"M{x:.1f},{y:.1f} L{x + dx:.1f},{y + dy:.1f}"
    return f'<path class="{kind}" stroke-width="2" fill="none" d="{shaft} {head}"/>'


def panel(i: int, title: str, below: list[str], inside: list[str]) -> str:
    """Panel number i: its title, the lines of text below, and the shapes inside."""
    words = [f'<text x="{PANEL * i + 10}" y="22">{title}</text>']
    for j, line in enumerate(below):
        words.append(f'<text class="small" x="{PANEL * i + 10}" y="{HIGH - 34 + 15 * j}">{line}</text>')
    return "\n".join(words + inside)


def main() -> None:
    g = torch.Generator().manual_seed(268)
    x = torch.randn(N, 2, generator=g)
    y = x @ torch.tensor([1.2, 0.7]) + 0.3 * torch.randn(N, generator=g)
    w = {"w": torch.zeros(2)}
    lot = dpsgd.poisson_sample(torch.rand(N, dtype=torch.float64, generator=g), Q)

    def loss(params, x, y):
        return (x @ params["w"] - y).square() / 2

    grads = dpsgd.per_sample_grads(loss, w, x[lot], y[lot])              # {"w": (m, 2)}
    clipped = torch.stack([dpsgd.clip_and_sum({"w": one[None]}, C)["w"] for one in grads["w"]]).float()
    total = clipped.sum(0)
    noise = SIGMA * C * torch.randn(2, generator=g)

    centres = [PANEL * i + PANEL / 2 for i in range(5)]
    middle = HIGH / 2 - 5
    dots = []
    for i in range(N):
        kind = "in" if i in lot else "dot"
        dots.append(f'<circle class="{kind}" r="8" cx="{22 + 29 * (i % 6)}" cy="{62 + 32 * (i // 6)}"/>')

    def ball(i: int, radius: float, kind: str = "line") -> str:
        return f'<circle class="{kind}" cx="{centres[i]}" cy="{middle}" r="{radius * UNIT:.1f}"/>'

    def arrows(i: int, vectors) -> list[str]:
        return [arrow(centres[i], middle, v) for v in vectors]

    # the end of the arrow that is the sum
    at = (centres[3] + total[0].item() * UNIT / 2, middle - total[1].item() * UNIT / 2)
    cloud = []
    for std in (1, 2):
        radius = std * SIGMA * UNIT / 2
        cloud.append(f'<circle class="noise" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:.1f}"/>')
    parts = [
        panel(0, "(i) draw a lot",
              [f"each image: probability q = {Q}", f"here {len(lot)} of {N}; 0 is legal"], dots),
        panel(1, "(ii) one gradient each", ["the mean over an image's K", "draws of (t, noise): one arrow"],
              arrows(1, grads["w"])),
        panel(2, "(iii) clipped to C", ["no image moves the sum by", "more than the circle's radius"],
              [ball(2, C), *arrows(2, clipped)]),
        panel(3, "(iv) sum, and noise once", ["std sigma C, also for an empty", "lot (drawn at half scale)"],
              [*cloud, arrow(centres[3], middle, total / 2), arrow(*at, noise / 2, "sum")]),
        panel(4, "(v) / B, (vi) one step",
              [f"B = {B} is declared; the lot's", f"actual size, {len(lot)}, is private"],
              [arrow(centres[4], middle, -(total + noise) / B, "sum")]),
    ]
    rules = []
    for x in range(PANEL, 5 * PANEL, PANEL):
        rules.append(f'<line class="line" x1="{x}" x2="{x}" y1="10" y2="{HIGH - 10}" opacity=".4"/>')
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {5 * PANEL} {HIGH}" role="img" '
           f'aria-label="One private step: lot, gradients, clipping, noise, division by B">\n{STYLE}\n'
           + "\n".join(parts + rules) + "\n</svg>\n")
    (ROOT / "docs" / "private-step.svg").write_text(svg)
    print(f"docs/private-step.svg: lot of {len(lot)}, "
          f"norm of the sum {total.norm():.2f} C, of the noise {noise.norm():.2f} C")


if __name__ == "__main__":
    main()
