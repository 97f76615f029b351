"""classes.py -- the names of the classes, which for private images are declared and never read from them.

Which classes exist among private images, and in which order, may depend on a single image. So their names are
public constants, declared, like N, before the first private image is read. On a base in pixels each declared
class then takes the row of the class of that name, or, if the base knows none of the names, they take its
rows in order. On a base in latents the declared classes get a table of their own (lora.new_classes).

  $ python -m support.classes     # CIFAR-10's classes in a table of their own; two by their numbers in a base
"""
import csv
import re
from pathlib import Path

import torch
from torch import Tensor

import data
from machinery import folders, screen
from machinery.folders import few


def class_names(name: str) -> list[str] | None:
    """The classes of a PUBLIC data set in the order of their labels; None if they have no known names."""
    if name.startswith("folder:"):
        return [folders.alike(n) for n in folders.subfolders(Path(name.removeprefix("folder:")))]
    known = data.KNOWN[name].classes if name in data.KNOWN else None
    return None if known is None else list(known)


def declared(name: str, flag: str, base: list[str] | None) -> list[str] | None:
    """The declared classes of the PRIVATE data set `name` in the order of their labels. No image is read.

    They are those of `flag` (--classes, see `listed`), else those of a published data set, else the base's.
    Errors: --classes for a published data set, or a folder whose classes nobody has declared -> ValueError
    """
    if flag and name in data.KNOWN:
        raise ValueError(f"--classes {flag}: expected only for folder: or npz:, because {name} has its own "
                         f"classes; leave --classes out")
    if flag:
        return listed(flag)
    if name.startswith("folder:") and base is None:
        raise ValueError(f"--data {name} on a base without class names: which classes exist in the folder is "
                         f"private, so declare them, --classes NAME,NAME,... (the first becomes class 0)")
    return base if name.startswith(("folder:", "npz:")) else class_names(name)


def listed(flag: str) -> list[str]:
    """The class names that --classes declares: names with commas between, or a number of classes.

    A name that holds a comma stands in quotes, and so does a single name that has no letters.
    Example: listed("cat,dog") -> ["cat", "dog"];  listed("2") -> ["0", "1"];  listed('"2"') -> ["2"]
    Errors:  a name that occurs twice, an empty name, a range such as 0-3 -> ValueError
    """
    word = flag.strip()
    if word.isdecimal() and 1 <= int(word) <= 10_000:
        return [str(i) for i in range(int(word))]
    if not any(c.isalpha() or c in ',"' for c in word) or re.fullmatch(r"\d+ *(to|bis) *\d+", word):
        raise ValueError(f"--classes {flag}: expected the names of the classes, with commas between, or "
                         f"their number, 1 to 10000 (4 means the labels 0 to 3); a single class that is "
                         f"really called so needs quotes, --classes '\"{word}\"'")
    try:
        names = [folders.alike(name.strip()) for name in next(csv.reader([word], skipinitialspace=True))]
    except csv.Error:
        names = [""]
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"--classes {flag}: expected different names, with commas between, none empty")
    return names


def declared_classes(name: str, flag: str, model, own: bool = False) -> dict:
    """dict(classes=the declared names, labels=their numbers in the network); {} for a base without classes.

    model: the base, a unet.UNet
    own:   the classes get a table of their own in the network (lora.new_classes), in this order
    No image is read.
    Errors: those of `declared` and `place`, or an npz: file whose classes nobody has declared -> ValueError
    """
    if model.classes is None:
        return {}
    names = declared(name, flag, None if own else model.config["names"])
    if own and names is None:
        if name.startswith("npz:"):
            raise ValueError(f"--data {name}: which classes exist in the file is private, so declare them, "
                             f"--classes NAME,NAME,... or their number, such as --classes 8")
        names = ["image"]                                                # one class for all images
    if own:
        return dict(classes=names, labels=list(range(len(names))))
    labels = place(names, model.config["names"], model.classes)
    return dict(classes=names or [str(i) for i in labels], labels=labels)


def in_places(images: Tensor, labels: Tensor, places: list[int] | None,
              names: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """The images whose label is declared, and their labels in the network's numbering.

    Label i becomes places[i]; with places = None all images and labels are returned as they are. An image
    with another label counts as no image. A note says how many there are: it is for the screen, which only
    the person who holds the images sees, and nothing that is published depends on it.
    Shapes: images (N, C, H, W), labels (N,) -> (n, C, H, W), (n,), n <= N
    Errors: no image is left, or the labels begin at 1 instead of 0 -> ValueError, for the same screen
    """
    if places is None:
        return images, labels
    known = (labels >= 0) & (labels < len(places))
    if not known.all():
        outside = f"{int((~known).sum())} of {screen.count(len(labels), 'image')}"
        lowest, highest = int(labels.min()), int(labels.max())
        if highest == len(places) and not (labels == 0).any():
            raise ValueError(f"the labels go from {lowest} to {highest}, but those of {len(places)} declared "
                             f"classes go from 0 to {len(places) - 1}, so {outside} would not count; save "
                             f"the file with labels - 1, or declare {len(places) + 1} classes, of which the "
                             f"first has no images")
        if not known.any():
            raise ValueError(f"none of {screen.count(len(labels), 'image')} has the label of a declared "
                             f"class, 0 to {len(places) - 1}: the labels go from {lowest} to {highest}; "
                             f"correct --classes or the labels")
        folders.note(f"{outside} have labels outside the declared classes and count as none")
    images, labels = images[known], labels[known]
    absent = sorted(set(range(len(places))) - set(labels.tolist()))
    if absent:
        which = few([names[i] if names else i for i in absent])
        folders.note(f"no image is of the declared {'class' if len(absent) == 1 else 'classes'} {which}")
    return images, torch.tensor(places)[labels]


def table(classes: list[str], labels: list[int]) -> str:
    """At most five classes as text, each with its number in the network: "dog = 1, horse = 2"."""
    return few([f"{name} = {label}" for name, label in zip(classes, labels)])


def place(names: list[str] | None, base: list[str] | None, classes: int) -> list[int]:
    """The number of each class in the base: by name if the base knows all names, in order if it knows none.

    Example: place(["dog", "horse"], ["cat", "dog", "horse"], 3) -> [1, 2]
    Errors:  the base knows only some of the names, or has fewer classes -> ValueError with both lists
    """
    if names is None:                                                    # the classes of the base
        return list(range(classes))
    strangers = [name for name in names if name not in (base or [])]
    if base and not strangers:
        return [base.index(name) for name in names]
    knows_some = bool(base) and len(strangers) < len(names)
    if knows_some or len(names) > classes:
        mine, its = few(names), few(base or ["without names"])
        raise ValueError(f"the classes {mine} do not fit the {classes} classes of the base, {its}: expected "
                         f"names that it has, or at most {classes} new ones, which take the places of its "
                         f"classes in order")
    return list(range(len(names)))


if __name__ == "__main__":
    import base
    model = base.load("assets/photos.pt").model
    for flag in ("", "sports car,bullfrog"):
        found = declared_classes("cifar10" if not flag else "folder:PHOTOS", flag, model, own=not flag)
        print(table(**found))
