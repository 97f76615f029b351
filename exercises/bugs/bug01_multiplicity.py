"""bug01 -- Noise multiplicity: every image is seen K times, in one batch that is K times as long."""
import train

STANDS_IN_FOR = "train.per_image_gradients"
gradients_of = train.per_image_gradients                                   # the repository's


def per_image_gradients(model, frozen, s):
    """per_sample(trainable, x0, labels, t, noise) -> gradients, ready for dpsgd.private_gradient."""
    of_rows = gradients_of(model, frozen, s)

    def per_sample(trainable, x0, labels, t, noise):
        x0, labels = x0.repeat_interleave(s.K, dim=0), labels.repeat_interleave(s.K)    # (n K, C, H, W)
        t, noise = t.view(-1, 1), noise.flatten(0, 1)[:, None]           # (n K, 1), (n K, 1, C, H, W)
        return of_rows(trainable, x0, labels, t, noise)
    return per_sample
