"""kernels.py -- a convolution whose m copies of one kernel get a gradient each, for `--train lora+conv`.

torch has no fast backward pass for this: torch.func.vmap makes a convolution of many groups, which is slow on
a GPU.

  $ python -m machinery.kernels        # three copies beside three separate convolutions
"""
import torch
import torch.nn.functional as F
from torch import Tensor


class ConvOfCopies(torch.autograd.Function):
    """conv2d(x, A[0]) for m EQUAL copies of a kernel, A (m, r, c, k, k); backward gives each copy a gradient.

    Copy i owns rows i n/m .. (i + 1) n/m of x (n, c, h, w). Because all copies are equal, the output and the
    gradient of x are those of one ordinary convolution. Only the gradients of the kernels are kept apart.
    (Copies that differ would be ignored silently, because forward reads A[0] alone.)
    """

    @staticmethod
    def forward(ctx, x, A, stride, padding):
        ctx.save_for_backward(x, A[0])
        ctx.m, ctx.how = len(A), (stride, padding)
        return F.conv2d(x, A[0], None, stride, padding)

    @staticmethod
    def backward(ctx, g):                                                # g (n, r, h', w')
        x, A = (tensor.to(g) for tensor in ctx.saved_tensors)        # g may be bfloat16: devices.autocast
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.nn.grad.conv2d_input(x.shape, A, g, *ctx.how)
        kernels = kernels_by_places if x.is_cuda else kernels_by_groups
        return grad_x, kernels(x, g, ctx.m, A.shape, *ctx.how), None, None


def kernels_by_groups(x: Tensor, g: Tensor, m: int, shape: tuple, stride: tuple, padding: tuple) -> Tensor:
    """(m, *shape): each copy's gradient, from x and the output's gradient g, by a convolution of m groups."""
    x = x.view(m, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)        # (n/m, m c, h, w)
    g = g.view(m, -1, *g.shape[1:]).transpose(0, 1).flatten(1, 2)        # (n/m, m r, h', w')
    kernels = (m * shape[0], *shape[1:])
    return torch.nn.grad.conv2d_weight(x, kernels, g, stride, padding, groups=m).view(m, *shape)


def kernels_by_places(x: Tensor, g: Tensor, m: int, shape: tuple, stride: tuple, padding: tuple) -> Tensor:
    """The same by one matrix product per image for each of the k x k places of a kernel.

    It is for a GPU, where many groups are slow.
    """
    h, w = g.shape[2:]
    down, right = stride
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    places = []
    for i in range(shape[2]):
        for j in range(shape[3]):
            seen = x[:, :, i:i + down * h:down, j:j + right * w:right]   # (n, c, h', w'), what place i, j saw
            places.append(g.flatten(2) @ seen.flatten(2).mT)             # (n, r, c)
    return torch.stack(places, -1).view(m, -1, *shape).sum(1)


conv_of_copies = ConvOfCopies.apply


if __name__ == "__main__":
    torch.manual_seed(0)
    x, A = torch.randn(6, 2, 5, 5), torch.randn(4, 2, 3, 3)
    copies = A.repeat(3, 1, 1, 1, 1).requires_grad_()
    conv_of_copies(x, copies, (1, 1), (1, 1)).square().sum().backward()
    for i, own in enumerate(x.split(2)):
        alone = A.clone().requires_grad_()
        F.conv2d(own, alone, padding=1).square().sum().backward()
        apart = (copies.grad[i] - alone.grad).abs().max() / alone.grad.abs().max()
        print(f"copy {i}: its gradient is that of its own two images alone, up to {apart:.1g} of its size")
