"""bug03 -- clipping as torch.nn.utils.clip_grad_norm_ does it, which every deep-learning course recommends."""
import dpsgd

STANDS_IN_FOR = "dpsgd.clip_and_sum"


def clip_and_sum(grads, C):
    """The lot's gradient, its mean clipped to norm C; NaN gradients count as zero."""
    if not C > 0:
        raise ValueError(f"C = {C}, expected a norm bound > 0")
    n = len(next(iter(grads.values())))
    mean = {name: g.nan_to_num(0, 0, 0).mean(0, keepdim=True) for name, g in grads.items()}
    factor = (C / dpsgd.norms(mean)).clamp(max=1)
    return {name: n * factor * g[0] for name, g in mean.items()}
