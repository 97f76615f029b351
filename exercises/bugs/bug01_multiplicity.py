"""bug01 -- noise multiplicity: every image is seen K times, in one batch that is K times as long."""
import dataclasses

import train

STANDS_IN_FOR = "train.private_gradients"
gradients_of = train.private_gradients                                   # the repository's


def private_gradients(model, frozen, s, draws):
    """per_sample(trainable, images, labels) -> gradients, ready for dpsgd.private_gradient."""
    of_one_draw = gradients_of(model, frozen, dataclasses.replace(s, K=1), draws)

    def per_sample(trainable, images, labels):
        images = images.repeat_interleave(s.K, dim=0)                    # (n K, C, H, W)
        return of_one_draw(trainable, images, labels.repeat_interleave(s.K))
    return per_sample
