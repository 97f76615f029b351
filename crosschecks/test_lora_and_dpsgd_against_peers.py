"""PEFT reads our adapter's files and computes the same outputs; Opacus computes the same clipped sums."""
import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from peft import PeftModel
from torch.func import functional_call

import ddpm
import dpsgd
import lora
from conftest import ROOT
from support import runs

path = Path(__file__).parent.parent / "tests" / "conftest.py"
spec = importlib.util.spec_from_file_location("helpers", path)
helpers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)


@pytest.fixture(params=["lora", "lora+embed", "lora+conv"])
def saved(request, tmp_path):
    """(our adapted model, the folder that its adapter is saved in)."""
    config = lora.describe(request.param, 2, 3.0, True)
    model = helpers.tiny_adapted(tuple(config["target_modules"]), rank=2, alpha=3.0)
    with torch.no_grad():
        model.class_embedding.weight.add_(torch.randn_like(model.class_embedding.weight))
    lora.save(tmp_path, lora.split(model)[0], config)
    return model, tmp_path


def test_peft_reads_our_adapter_and_computes_the_same(saved):
    ours, folder = saved
    theirs = PeftModel.from_pretrained(helpers.tiny_unet(), str(folder))
    x, labels, t, _ = helpers.examples(3, K=1)
    torch.testing.assert_close(theirs(x, t[:, 0], labels), ours(x, t[:, 0], labels), atol=1e-5, rtol=1e-3)


def test_peft_reads_the_adapter_of_latents_that_ships():
    """The public base has the table of the private classes, as sample.py makes it."""
    folder = ROOT / "assets" / "cells-eps10"
    ours = runs.load(folder).model
    theirs = PeftModel.from_pretrained(runs.load(folder, public=True).model, str(folder))
    z, t, labels = torch.randn(4, 4, 16, 16), torch.tensor([1, 300, 600, 999]), torch.tensor([0, 3, 7, 8])
    torch.testing.assert_close(theirs(z, t, labels), ours(z, t, labels), atol=1e-4, rtol=1e-3)


def test_opacus_hooks_give_our_clipped_sum(saved):
    """PEFT's adapter is made of nn.Linear, nn.Conv2d and nn.Embedding, which Opacus supports. K = 1."""
    ours, folder = saved
    theirs = PeftModel.from_pretrained(helpers.tiny_unet(), str(folder), is_trainable=True)
    x0, labels, t, noise = ex = helpers.examples(6, K=1)
    trainable, frozen = lora.split(ours)

    def losses(params, x0, labels, t, noise):
        return ddpm.loss(lambda *a: functional_call(ours, (params, frozen), a), x0, labels, t, noise)
    mine = dpsgd.per_sample_grads_by_copies(losses, trainable, *ex)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = GradSampleModule(theirs, loss_reduction="sum", strict=False)
        ddpm.loss(wrapped, x0, labels, t, noise).sum().backward()
    samples = [p.grad_sample for p in theirs.parameters()
               if p.requires_grad and getattr(p, "grad_sample", None) is not None]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples]).norm(dim=0)
    torch.testing.assert_close(norms, dpsgd.norms(mine).float(), atol=1e-5, rtol=1e-3)

    C = norms.median().item()
    factor = (C / norms).clamp(max=1)
    total = {name: (factor.view(-1, *[1] * (p.grad_sample.ndim - 1)) * p.grad_sample).sum(0)
             for name, p in theirs.named_parameters() if p.requires_grad}
    clipped = dpsgd.clip_and_sum(mine, C)
    assert sum(p.numel() for p in total.values()) == sum(p.numel() for p in clipped.values())
    torch.testing.assert_close(torch.cat([g.flatten() for g in total.values()]).sort().values,
                               torch.cat([g.flatten() for g in clipped.values()]).float().sort().values,
                               atol=1e-5, rtol=1e-3)
