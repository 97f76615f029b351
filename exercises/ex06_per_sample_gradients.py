"""ex06 -- one gradient for each example.                                          [DP-SGD Alg. 1; 15 minutes]

    g_i = gradient of loss(params, example_i) with respect to params,      i = 1 .. n

loss.backward() gives the SUM over the lot, the batch of a step, and in a sum nobody can be clipped any more.
torch.func has what we need: grad(f) is the function that computes the gradient of f with respect to its first
argument, and vmap(f) is the function that runs f on each row.
Look at:  `python dpsgd.py`, which compares it with a loop
Hint:     in_dims says which arguments are cut into rows: None (whole) for params, 0 for each of the examples
Grade:    python -m pytest exercises -k ex06
"""
from typing import Callable

from torch import Tensor
from torch.func import grad, vmap                                        # noqa: F401

Params = dict[str, Tensor]
Grads = dict[str, Tensor]


def per_sample_grads(loss: Callable, params: Params, *examples: Tensor) -> Grads:
    """g_i = gradient of loss(params, *example_i) with respect to params: vmap(grad), the definition.

    Shapes:  loss(params, *one_example) -> scalar; examples (n, ...) each -> dict of (n, *shape)
    An example whose gradient is NaN makes its own row NaN and no other.
    Example: loss = (w x)^2, w = 1, x = (1, 3) -> g = (2, 18)
    """
    raise NotImplementedError                                            # about 1 line
