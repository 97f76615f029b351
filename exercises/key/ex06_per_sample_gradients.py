"""ex06, as a student may write it."""
from torch.func import grad, jacrev, vmap                                # noqa: F401


def per_sample_grads(loss, params, *examples):
    each = (None,) + (0,) * len(examples)
    return vmap(grad(loss), in_dims=each)(params, *examples)
