"""recipes.py -- train.py's defaults for each data set: a public base, and settings that suit that base.

A recipe is fixed before a run reads its private images, but these were chosen by looking at results on the
same data sets, which no epsilon covers. A flag that is typed overrides it.

  $ python -m support.recipes        # the settings in which each data set differs from train.py's defaults
"""
import data

PHOTOS = dict(base="assets/photos.pt", size=64, train="lora+embed", draws="middle", B=1024, steps=36)
B = 512                      # train.py's own expected batch size, images


def of(name: str, N: int = 0) -> dict:
    """dict of field -> value: the settings (train.Settings) in which the data set `name` differs.

    N: the declared number of images; 0 means the published size of the data set
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
        settings["delta"] = float(f"1e-{len(str(N))}")                   # below 1/N; for CelebA the paper's
    quarter = max(1, N // 4)                                             # of the declared N, which is public
    if N and quarter < settings.get("B", B):
        settings["B"] = quarter
    return settings


if __name__ == "__main__":
    for name in (*data.KNOWN, "folder:PATH", "npz:FILE"):
        print(f"{name:<16}", ", ".join(f"{key} {value}" for key, value in of(name).items()) or "the defaults")
