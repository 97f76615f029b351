"""ex02 -- one loss for each image, from K draws.                     [DDPM Eq. 14; DPDM Sec. 3.2; 15 minutes]

A single draw of (t, noise) says little about an image, and private training adds noise of its own. So look at
each image K times, at x_ik, which is image i noised to level t_ik:

    loss_i = (1/K) sum_k  || noise_ik - model(x_ik, t_ik, label_i) ||^2 / (CHW)

The mean over k is taken HERE, inside the loss of image i. One image then has ONE loss, one gradient, and is
made no longer than a fixed length C once (hour 2): K draws cost no privacy. (The code that the authors of
DP-LoRA published gives each image K rows and clips each of the n K rows. That mistake is bug01.)
Hint:     x0[:, None] broadcasts against K draws; the model wants (n K, C, H, W), rows i K .. i K + K - 1
          being image i
Grade:    python -m pytest exercises -k ex02
"""
import torch                                                             # noqa: F401
from torch import Tensor

from ddpm import LINEAR, Schedule, q_sample


def loss(model, x0: Tensor, labels: Tensor | None, t: Tensor, noise: Tensor,
         schedule: Schedule = LINEAR) -> Tensor:
    """Each image's loss: the mean over K draws of ||noise - model(x_t, t, label)||^2 / (CHW).  [DDPM Eq. 14]

    Shapes:  x0 (n, C, H, W), labels (n,) or None, t (n, K), noise (n, K, C, H, W) -> (n,)
             model(x (m, C, H, W), t (m,), labels (m,) or None) -> (m, C, H, W)
    Example: K = 2, squared errors 1 and 3 -> 2
    """
    raise NotImplementedError                                            # about 5 lines
