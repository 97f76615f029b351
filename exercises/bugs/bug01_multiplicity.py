"""bug01 -- noise multiplicity: every image is seen K times, in one batch that is K times as long."""
from torch.func import functional_call

import data
import ddpm
import dpsgd

STANDS_IN_FOR = "train.private_gradients"


def private_gradients(model, frozen, s, draws):
    """per_sample(trainable, images, labels) -> gradients, ready for dpsgd.private_gradient."""
    def losses(copies, x0, labels, t, noise):
        return ddpm.loss(lambda *a: functional_call(model, (copies, frozen), a), x0, labels, t, noise)

    def per_sample(trainable, images, labels):
        x0 = data.to_float(images).repeat_interleave(s.K, dim=0)         # (n K, C, H, W)
        t, noise = ddpm.draw_t_and_noise(x0, 1, draws)
        return dpsgd.per_sample_grads_by_copies(losses, trainable, x0, labels.repeat_interleave(s.K), t, noise)
    return per_sample
