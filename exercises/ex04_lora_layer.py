"""ex04 -- a LoRA layer: a frozen matrix and a small update.                       [LoRA Sec. 4.1; 10 minutes]

    y = W x + b + (lora_alpha / r) B A x,      A: (r, d_in), B: (d_out, r)

W and b are public and frozen. Only A and B are trained on private data: r (d_in + d_out) numbers instead of
d_in d_out. DP-SGD adds noise to every trained number, and the norm of that noise is about sigma C
sqrt(count), so fewer numbers mean less noise. B starts at zero, so before the first step the layer is exactly
the public one.
Look at:  `python lora.py`
Hint:     x holds vectors in its LAST dimension, so W x is x @ W.mT. Do not form B A: (x A^T) B^T is cheaper
Grade:    python -m pytest exercises -k ex04
"""
import torch                                                             # noqa: F401
from torch import Tensor


def lora_forward(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, lora_alpha: float, r: int) -> Tensor:
    """W x + b + (lora_alpha / r) B A x, as lora.LoRALinear.forward.          [LoRA, Hu et al. 2021, Sec. 4.1]

    Shapes:  x (..., d_in), W (d_out, d_in), b (d_out,), A (r, d_in), B (d_out, r) -> (..., d_out)
    Example: W = I, b = 0, A = [[1, 0]], B = [[0], [2]], lora_alpha = 3, r = 1, x = (5, 7) -> (5, 7 + 3 * 2 *
             5) = (5, 37)
    """
    raise NotImplementedError                                            # about 1 line
