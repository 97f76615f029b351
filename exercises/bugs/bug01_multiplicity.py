"""bug01 -- noise multiplicity: every image is seen K times, in one batch that is K times as long."""
from torch.func import functional_call

import ddpm
import dpsgd

STANDS_IN_FOR = "train.private_gradients"


def private_gradients(model, frozen, s):
    """per_sample(trainable, x0, labels, t, noise) -> gradients, ready for dpsgd.private_gradient."""
    def losses(copies, x0, labels, t, noise):
        return ddpm.loss(lambda *a: functional_call(model, (copies, frozen), a), x0, labels, t, noise)

    def per_sample(trainable, x0, labels, t, noise):
        x0, labels = x0.repeat_interleave(s.K, dim=0), labels.repeat_interleave(s.K)    # (n K, C, H, W)
        t, noise = t.view(-1, 1), noise.flatten(0, 1)[:, None]           # (n K, 1), (n K, 1, C, H, W)
        return dpsgd.per_sample_grads_by_copies(losses, trainable, x0, labels, t, noise)
    return per_sample
