"""recipes.py -- the settings that follow from --data: each kind of images has its base, and what suits that.

A recipe is a public choice, made before the private images are read; a flag that is typed comes first.

  $ python -m machinery.recipes        # what each kind changes of train.py's defaults
"""
import data

PHOTOS = dict(base="assets/photos.pt", size=64, train="lora+embed", draws="middle", B=1024, K=1, steps=36)
GARMENTS = dict(base="assets/base-clothes.pt")
SMEARS = dict(base="assets/smears.pt")


def of(name: str) -> dict:
    """Field of train.Settings -> its value for the data set `name`, where it is not the default."""
    kind = name.split(":")[0]
    if kind in ("folder", "npz"):
        return dict(PHOTOS, out=f"runs/{kind}")
    if kind not in data.KNOWN or kind == "mnist":
        return {}
    if data.KNOWN[kind][1] == 3:
        return dict(PHOTOS, **(SMEARS if kind == "cells" else {}), out=f"runs/{kind}")
    return dict(GARMENTS if kind == "fashion-mnist" else {}, out=f"runs/{kind}")


if __name__ == "__main__":
    for name in (*data.KNOWN, "folder:PATH", "npz:FILE"):
        print(f"{name:<16}", ", ".join(f"{key} {value}" for key, value in of(name).items()) or "the defaults")
