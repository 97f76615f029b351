"""recipes.py -- the settings that follow from --data: each kind of images has its base, and what suits that.

A recipe is a public choice, made before the private images are read; a flag that is typed comes first.

  $ python -m support.recipes        # what each kind changes of train.py's defaults
"""
import data

PHOTOS = dict(base="assets/photos.pt", size=64, train="lora+embed", draws="middle", B=1024, K=1, steps=36)
B = 512                      # train.py's own expected batch size, images


def of(name: str, N: int = 0) -> dict:
    """Field of train.Settings -> its value for the data set `name`, where it is not the default.

    N: the number of images that is declared, 0: the data set's published one
    """
    kind, settings = name.split(":")[0], {}
    if kind in ("folder", "npz"):
        settings = dict(PHOTOS, out=f"runs/{kind}")
    elif kind in data.KNOWN and kind != "mnist":
        known = data.KNOWN[kind]
        settings = dict(PHOTOS if known.channels == 3 else {}, out=f"runs/{kind}")
        if known.base:
            settings["base"] = known.base
    if kind in data.KNOWN:
        N = N or data.KNOWN[kind].N
    if N >= 100_000:
        settings["delta"] = float(f"1e-{len(str(N))}")                   # below 1/N; the paper's for CelebA
    if N and max(1, N // 4) < settings.get("B", B):
        settings["B"] = max(1, N // 4)                                   # of the declared N, not the real one
    return settings


if __name__ == "__main__":
    for name in (*data.KNOWN, "folder:PATH", "npz:FILE"):
        print(f"{name:<16}", ", ".join(f"{key} {value}" for key, value in of(name).items()) or "the defaults")
