"""bug03 -- The gradient is clipped as torch.nn.utils.clip_grad_norm_ does it, which courses recommend."""
import torch

import dpsgd

STANDS_IN_FOR = "dpsgd.clip_and_count"
clip_each = dpsgd.clip_and_count                                         # the repository's


def clip_and_count(grads, C):
    """The lot's gradient, its mean clipped to norm C, in multiples of unit(C).

    An image whose gradient is not finite counts as zero.
    """
    finite, mean = dpsgd.norms(grads).isfinite(), {}
    for name, g in grads.items():
        rows = torch.where(finite[:, None], g.flatten(1), 0)
        mean[name] = rows.mean(0, keepdim=True).view(1, *g.shape[1:])
    return {name: len(finite) * g for name, g in clip_each(mean, C).items()}
