"""recipes.py -- the settings that follow from --data: each kind of images has its base, and what suits that.

A recipe is a public choice, made before the private images are read; a flag that is typed comes first.

  $ python -m support.recipes        # what each kind changes of train.py's defaults
"""
import data

PHOTOS = dict(base="assets/photos.pt", size=64, train="lora+embed", draws="middle", B=1024, K=1, steps=36)
MANY = dict(delta=1e-6)      # from 100,000 images on: delta has to be below 1/N; the paper's for CelebA


def of(name: str) -> dict:
    """Field of train.Settings -> its value for the data set `name`, where it is not the default."""
    kind = name.split(":")[0]
    if kind in ("folder", "npz"):
        return dict(PHOTOS, out=f"runs/{kind}")
    if kind not in data.KNOWN or kind == "mnist":
        return {}
    known = data.KNOWN[kind]
    settings = dict(PHOTOS if known.channels == 3 else {}, out=f"runs/{kind}")
    if known.N >= 100_000:
        settings |= MANY
    if known.base:
        settings["base"] = known.base
    return settings


if __name__ == "__main__":
    for name in (*data.KNOWN, "folder:PATH", "npz:FILE"):
        print(f"{name:<16}", ", ".join(f"{key} {value}" for key, value in of(name).items()) or "the defaults")
