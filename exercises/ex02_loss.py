"""ex02 -- one loss for each image, from K draws.                     [DDPM Eq. 14; DPDM Sec. 3.2; 15 minutes]

A single draw of (t, noise) says little about an image, and private training adds noise of its own. So look at
each image K times. Draw k of image i is x_ik, the image noised to level t_ik:

    loss_i = (1/K) sum_k  || noise_ik - model(x_ik, t_ik, label_i) ||^2 / (CHW)

The mean over k is taken HERE, inside the loss of image i. So an image has ONE loss and ONE gradient, which
ex07 shortens to length C if it is longer. That is why K draws cost no privacy. (The code that the authors of
DP-LoRA published clips the gradient of each draw by itself and adds all K up. What follows from that is a
question of track 2.)
Hint:     x0[:, None] broadcasts against K draws. The model wants (n K, C, H, W), where the rows i K to
          i K + K - 1 belong to image i
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
