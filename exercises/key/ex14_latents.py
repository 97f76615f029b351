"""ex14, as a student may write it."""
import torch                                                             # noqa: F401

from data import to_float


def private_latents(encode, public, private):
    scale = encode(to_float(public))[0].std()
    mu, log_var = encode(to_float(private))
    return mu / scale
