"""Property tests of the adapters: they start as nothing, stay low-rank, and nothing else is trained."""
import pytest
import torch
import torch.nn.functional as F

import lora
import unet
from conftest import examples, tiny_adapted, tiny_unet
from machinery import kernels

BOTH = lora.ATTENTION + lora.CONVOLUTIONS


@pytest.mark.parametrize("targets", [lora.ATTENTION, BOTH])
def test_adapter_is_the_identity_at_the_start(targets):
    model, (x, labels, t, _) = tiny_unet(), examples(3, K=1)
    before = model(x, t[:, 0], labels)
    lora.inject(model, 2, 3.0, targets)
    adapters = [m for m in model.modules() if isinstance(m, (lora.LoRALinear, lora.LoRAConv2d))]
    assert not any(m.delta().any() for m in adapters)
    after = model(x, t[:, 0], labels)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)      # not bit for bit: CPUs round


@pytest.mark.parametrize("targets", [lora.ATTENTION, BOTH])
def test_merged_equals_unmerged_with_alpha_not_r_and_B_not_zero(targets):
    model, (x, labels, t, _) = tiny_adapted(targets, rank=2, alpha=3.0), examples(3, K=1)
    plain = tiny_unet()
    unmerged = model(x, t[:, 0], labels)
    merged = lora.merge(model)
    assert not any(isinstance(m, (lora.LoRALinear, lora.LoRAConv2d)) for m in merged.modules())
    torch.testing.assert_close(merged(x, t[:, 0], labels), unmerged, atol=1e-4, rtol=1e-4)
    moved = (plain(x, t[:, 0], labels) - unmerged).abs().max()
    assert moved > 1e-2, "the adapter must have changed something"


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_update_has_rank_r_and_size_lora_alpha_over_r(rank):
    layer = lora.LoRALinear(torch.nn.Linear(12, 9), rank, alpha=3.0)
    torch.nn.init.normal_(layer.lora_B)
    assert torch.linalg.matrix_rank(layer.delta()) == rank
    x = torch.randn(4, 12)
    update = 3.0 / rank * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x) - layer.base(x), x @ update.T, atol=1e-5, rtol=1e-4)


def test_A_has_the_papers_spread_and_B_is_zero():
    layer = lora.LoRALinear(torch.nn.Linear(4000, 30), rank=8, alpha=8)
    assert layer.lora_A.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert (layer.lora_B == 0).all()


def test_the_papers_celeba_64_adapter_has_479232_weights():
    with torch.device("meta"):
        model = unet.UNet(image_channels=3, channels=128, multipliers=(1, 2, 4), blocks=2,
                          attention_levels=(0, 1, 2), heads=8, classes=None, patch=2)
        adapted = lora.inject(model, rank=16, alpha=16)
    trainable, _ = lora.split(model)
    assert adapted == 2 * 16, "qkv and proj of 16 attention blocks"
    assert sum(p.numel() for p in trainable.values()) == 479_232


def test_inject_freezes_all_but_the_factors_and_the_class_embedding():
    model = tiny_unet()
    assert lora.inject(model, 2, 2.0) == 2 * sum(isinstance(m, unet.Attention) for m in model.modules())
    trainable, frozen = lora.split(model)
    assert all(name.endswith(("lora_A", "lora_B")) or name == "class_embedding.weight" for name in trainable)
    assert "class_embedding.weight" in trainable
    assert not any(p.requires_grad for p in frozen.values())
    assert trainable.keys() | frozen.keys() == set(dict(model.named_parameters()))


def test_a_target_that_matches_nothing_is_an_error_not_a_silence():
    with pytest.raises(ValueError, match="to_out"):
        lora.inject(tiny_unet(), 2, 2.0, ("qkv", "to_out"))


@pytest.mark.parametrize("rank", [0, -1, 17])
def test_a_rank_outside_the_layer_is_refused(rank):
    with pytest.raises(ValueError, match="rank"):
        lora.inject(tiny_unet(), rank, 2.0)


@pytest.mark.parametrize("each", [kernels.kernels_by_groups, kernels.kernels_by_places])
@pytest.mark.parametrize("k, stride, padding", [
    (3, (1, 1), (1, 1)), (3, (2, 1), (0, 2)), (1, (1, 1), (0, 0))])
def test_each_copy_of_a_kernel_gets_the_gradient_of_its_own_images(each, k, stride, padding):
    """By groups, as on a CPU, and by matrix products, as on a GPU; 3 copies, 2 images each."""
    x, A = torch.randn(6, 4, 9, 8), torch.randn(5, 4, k, k)
    g = torch.randn_like(F.conv2d(x, A, None, stride, padding))
    found = each(x, g, 3, A.shape, stride, padding)
    for i, own in enumerate((slice(0, 2), slice(2, 4), slice(4, 6))):
        A.requires_grad_()
        (expected,) = torch.autograd.grad(F.conv2d(x[own], A, None, stride, padding), A, g[own])
        torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-4)


def test_baselines_train_what_they_say():
    full, attention = tiny_unet(), tiny_unet()
    lora.train_only(full, "full")
    lora.train_only(attention, "attention")
    assert not lora.split(full)[1]
    names = lora.split(attention)[0]
    assert all("qkv" in name or "proj" in name or name == "class_embedding.weight" for name in names)
    assert len(names) == 4 * sum(isinstance(m, unet.Attention) for m in attention.modules()) + 1


@pytest.mark.parametrize("what", ["lora", "lora+embed", "lora+conv", "attention", "full"])
def test_a_saved_adapter_loads_to_the_same_function(what, tmp_path):
    config, (x, labels, t, _) = lora.describe(what, 2, 3.0, True), examples(2, K=1)
    model = tiny_unet()
    lora.attach(model, config)
    trainable, _ = lora.split(model)
    with torch.no_grad():
        for p in trainable.values():
            p.add_(0.1 * torch.randn_like(p))
    lora.save(tmp_path, trainable, config)
    again = lora.load(tiny_unet(), tmp_path)
    torch.testing.assert_close(again(x, t[:, 0], labels), model(x, t[:, 0], labels), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_network_or_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="adapter_config.json is missing"):
        lora.load(tiny_unet(), tmp_path)
    model = tiny_adapted()
    lora.save(tmp_path, lora.split(model)[0], lora.describe("lora", 2, 3.0, True))
    with pytest.raises(ValueError, match="another network"):
        lora.load(unet.UNet(channels=16), tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="no readable adapter"):
        lora.load(tiny_unet(), tmp_path)


@pytest.mark.parametrize("start, first", [
    ("own", lambda old: [old[:10].mean(0), old[7], old[2]]), ("null", lambda old: [old[10]] * 3),
    ("mean", lambda old: [old[:10].mean(0)] * 3), ("seven,two,seven", lambda old: [old[7], old[2], old[7]])])
def test_private_classes_start_from_public_knowledge_and_the_null_class_stays(start, first):
    model = tiny_unet()
    model.config["names"] = "zero one two three four five six seven eight nine".split()
    old = model.class_embedding.weight.detach().clone()
    lora.new_classes(model, ["eleven", "seven", "two"], start)
    table = model.class_embedding.weight.detach()
    assert model.classes == model.config["classes"] == 3 and len(table) == 4
    torch.testing.assert_close(table[:3], torch.stack(first(old)))
    assert torch.equal(table[3], old[10]), "the null class has moved"
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 500])
    null = torch.tensor([3, 3])                                          # label 3 is the null class now
    torch.testing.assert_close(model(x, t, null), model(x, t))


@pytest.mark.parametrize("start", ["seven", "seven,two,eleven", "seven,two,two,two"])
def test_names_that_the_base_does_not_know_are_refused(start):
    model = tiny_unet()
    model.config["names"] = "zero one two three four five six seven eight nine".split()
    with pytest.raises(ValueError, match="public classes"):
        lora.new_classes(model, ["a", "b", "c"], start)


def test_only_the_private_rows_and_the_null_row_are_trained_and_the_adapter_loads_again(tmp_path):
    """The table that is trained, and gets noise, has one row a private class and one for null.

    However many classes were public.
    """
    model = tiny_unet()
    lora.new_classes(model, ["a", "b", "c"])
    lora.inject(model, 2, 2.0)
    trainable, _ = lora.split(model)
    assert trainable["class_embedding.weight"].shape[0] == 4
    with torch.no_grad():
        for p in trainable.values():
            p.normal_()
    lora.save(tmp_path, trainable, lora.describe("lora", 2, 2.0, True))
    again = tiny_unet()
    lora.new_classes(again, ["a", "b", "c"])
    lora.load(again, tmp_path)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.arange(4) * 200, torch.arange(4)
    assert torch.equal(again(x, t, labels), model(x, t, labels))
