"""classes.py -- classes have names: those of private images are declared, never counted.

Which classes exist among private images, and in which order, may depend on a single one of them. So their
names are public constants, declared before the first private image is read, as N is; and each declared class
is found by its name among the public base's classes.

  $ python -m support.classes            # where CIFAR-10's classes lie in a base of photographs
"""
from pathlib import Path

import torch
from torch import Tensor

import data
from machinery import folders
from machinery.folders import few


def class_names(name: str) -> list[str] | None:
    """The classes of a PUBLIC data set, in the order of their labels; None if it has none or nobody knows."""
    if name.startswith("folder:"):
        return folders.subfolders(Path(name.removeprefix("folder:")))
    known = data.KNOWN[name].classes if name in data.KNOWN else None
    return known and list(known)


def declared(name: str, flag: str, base: list[str] | None) -> list[str] | None:
    """The classes of the PRIVATE data set `name` in the order of their labels: public constants, as N is.

    flag: --classes, names with commas, or their number; else those of a published data set, else the base's
    Errors: files of which nobody has said what their classes are -> ValueError
    """
    if flag:
        names = [word.strip() for word in flag.split(",")]
        if len(names) == 1 and names[0].isdecimal() and 1 <= int(names[0]) <= 10_000:
            names = [str(i) for i in range(int(names[0]))]
        if name in data.KNOWN or "" in names or len(set(names)) < len(names):
            raise ValueError(f"--classes {flag}: expected different names, with commas, for folder: or npz:")
        return names
    if name.startswith("folder:") and base is None:
        raise ValueError(f"--data {name} on a base that does not name its classes: which ones exist is "
                         f"private; declare them, --classes NAME,NAME,... (the first becomes class 0)")
    return base if name.startswith(("folder:", "npz:")) else class_names(name)


def declared_classes(name: str, flag: str, model, own: bool = False) -> dict:
    """classes: the names of the private data's classes; labels: which class of the base each is. {}: none.

    own: the classes will have a table of their own in the network (lora.new_classes), in this order
    No image is read; model: the base, a unet.UNet. Errors: as `declared` and `place`
    """
    if model.classes is None:
        return {}
    names = declared(name, flag, None if own else model.config["names"])
    if own and names is None:
        if name.startswith("npz:"):
            raise ValueError(f"--data {name}: which classes exist is private; declare them, --classes "
                             f"NAME,NAME,... or --classes 8")
        names = ["image"]                                                # no classes: all images are of one
    if own:
        return dict(classes=names, labels=list(range(len(names))))
    labels = place(names, model.config["names"], model.classes)
    return dict(classes=names or [str(i) for i in labels], labels=labels)


def in_places(images: Tensor, labels: Tensor, places: list[int] | None) -> tuple[Tensor, Tensor]:
    """The images whose label is declared, in the base's numbers: label i becomes places[i]; None: all, as is.

    An image of another label counts as no image: refusing it would tell that it is there. A class is found by
    its declared name, for the order of the sub-folders that exist would move with one image.
    """
    if places is None:
        return images, labels
    known = (labels >= 0) & (labels < len(places))
    images, labels = images[known], labels[known]
    return images, torch.tensor(places)[labels]


def table(classes: list[str], labels: list[int]) -> str:
    """At most five classes, each with the number that it has in the base: "dog = 1, horse = 2"."""
    return few([f"{name} = {label}" for name, label in zip(classes, labels)])


def place(names: list[str] | None, base: list[str] | None, classes: int) -> list[int]:
    """Which of the base's classes each of the data's is: by name if the base knows them all, else by number.

    Example: place(["dog", "horse"], ["cat", "dog", "horse"], 3) -> [1, 2]
    Errors:  some names known and some not, or more names than classes -> ValueError that names both lists
    """
    if names is None:                                                    # nothing declared: what the base has
        return list(range(classes))
    strangers = [name for name in names if name not in (base or [])]
    if base and not strangers:
        return [base.index(name) for name in names]
    if base and len(strangers) < len(names) or len(names) > classes:
        mine, its = few(names), few(base or ["without names"])
        raise ValueError(f"the classes {mine} do not fit the base's {classes}, {its}: "
                         f"expected names that it has, or at most {classes} new ones, which take its "
                         f"classes in order")
    return list(range(len(names)))


if __name__ == "__main__":
    import base
    model = base.load("assets/photos.pt").model
    for flag in ("", "sports car,bullfrog"):
        found = declared_classes("cifar10" if not flag else "folder:PHOTOS", flag, model, own=not flag)
        print(table(**found))
