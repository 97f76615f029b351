"""ex05 -- merge the adapter: one matrix instead of three.                          [LoRA Sec. 4.1; 5 minutes]

    W' = W + (lora_alpha / r) B A

The merged layer computes the same function at the price of a plain one. Merging reads only weights that the
private run has released, so it is post-processing and spends no epsilon. It also shows what was published: an
update of W of rank at most r.
Look at:  `python lora.py`
Hint:     which of B A and A B has the shape of W?
Grade:    python -m pytest exercises -k ex05
"""
import torch                                                             # noqa: F401
from torch import Tensor


def merged_weight(W: Tensor, A: Tensor, B: Tensor, lora_alpha: float, r: int) -> Tensor:
    """The weight that lora.merge leaves behind, as a new tensor: W itself stays as it was.

    Shapes:  W (d_out, d_in), A (r, d_in), B (d_out, r) -> (d_out, d_in)
    Example: W = 0, A = [[1, 2]], B = [[3], [4]], lora_alpha = 1, r = 1 -> [[3, 6], [4, 8]]
    """
    raise NotImplementedError                                            # about 1 line
