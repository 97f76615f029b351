"""bug14 -- Latents have standard deviation 1: the first batch sets their scale, as is usual."""
import torch

import autoencoder

STANDS_IN_FOR = "autoencoder.to_latents"
scaled_latents = autoencoder.to_latents                                  # the repository's


@torch.no_grad()
def to_latents(model, images, batch=64):
    """z = scale * mu(x), scale = 1 / std of mu over the first batch; the model keeps it, so D undoes it."""
    mu = scaled_latents(model, images, batch) / model.scale
    model.scale.fill_(1 / mu[:batch].std())
    return model.scale * mu
