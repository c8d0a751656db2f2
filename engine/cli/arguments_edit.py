"""The flags of what images start from: a picture of which a part stays, or the first tokens."""

from __future__ import annotations

import argparse

from util.config import Switch
from util.ranges import fraction, whole
from util.read import require_regular_file, short_repr

WAYS = ("mask", "edit_boxes", "keep_boxes", "outpaint", "move", "remove")
MOVE_WORDS = 5  # a name and a box


def add_start_args(parser: argparse.ArgumentParser) -> None:
    """What images start from. Each of `WAYS` says which part of --image is drawn anew."""
    group = parser.add_argument_group("what the images start from")
    group.add_argument("--image", default=None,
                       help="picture of which a part stays, of the size of the model's; alone, the --layout's objects "
                            'with "edit": true are drawn anew, or all; empty: none')  # fmt: skip
    group.add_argument("--mask", default=None, help="picture of the size of --image: light where it is drawn anew")
    group.add_argument("--edit_boxes", type=fraction, nargs="+", default=None,
                       help="x0 y0 x1 y1 of each box that is drawn anew, in [0, 1]")  # fmt: skip
    group.add_argument("--keep_boxes", type=fraction, nargs="+", default=None,
                       help="the boxes that stay; all around them is drawn")  # fmt: skip
    group.add_argument("--move", nargs="+", default=None, metavar="WORD",
                       help="LABEL:n x0 y0 x1 y1 of each object of --layout, which says where objects are in --image, "
                            "that goes to another box; n counts those of a label from 1")  # fmt: skip
    group.add_argument("--remove", nargs="+", default=None, metavar="LABEL:n",
                       help="objects of --layout that go; beside --move, too")  # fmt: skip
    group.add_argument("--outpaint", type=whole(0, 4096), nargs=4, default=None,
                       metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
                       help="cells to paint around --image, which is shrunk into the rest; a cell is drawn as one "
                            "token")  # fmt: skip
    group.add_argument("--keep_pixels", action=Switch, default=True,
                       help="what is not drawn anew is shown as it was, not as its tokens say it")  # fmt: skip
    group.add_argument("--prefix_source", default="self",
                       help="the first --prefix_k tokens: drawn one by one (self), or those of this picture, or of "
                            "this .npy file of codes, row by row")  # fmt: skip


def check_start(args: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError for a picture of which nothing is drawn anew, or that is not there, and
    for two ways to say what is."""
    given = [f"--{name}" for name in WAYS if vars(args)[name]]
    if given and not args.image:
        raise ValueError(f"{given[0]} needs --image, the picture that it changes")
    if not args.image and not args.keep_pixels:
        raise ValueError("--no-keep_pixels needs --image, the picture that it changes")
    if len(given) > 1 and set(given) != {"--move", "--remove"}:
        raise ValueError(f"say in one way what of --image is drawn anew, got {' and '.join(given)}")
    if args.image and not (args.layout or args.coco_root) and (not given or given[0] in ("--move", "--remove")):
        what = given[0] if given else f"--image without one of {', '.join(f'--{name}' for name in WAYS)}"
        raise ValueError(f"{what} needs --layout, the objects of the picture")
    if args.image and args.prefix_k:
        raise ValueError(f"--prefix_k {args.prefix_k} does not go with --image {args.image}: both say what is known")
    boxes_of(args.edit_boxes, "--edit_boxes")
    boxes_of(args.keep_boxes, "--keep_boxes")
    moves_of(args.move)
    if args.prefix_source != "self" and not args.prefix_k:
        raise ValueError(f"--prefix_source {args.prefix_source} needs --prefix_k, how many tokens of it are taken")
    files = {"--image": args.image, "--mask": args.mask, "--prefix_source": args.prefix_source}
    for flag, path in files.items():
        if path and path != "self":
            require_regular_file(path, f"{flag} file")


def boxes_of(numbers: list[float] | None, flag: str) -> list[tuple[float, float, float, float]]:
    """The boxes that a flag's numbers are. Raises ValueError unless there are four for each."""
    values = numbers or []
    if len(values) % 4:
        raise ValueError(f"{flag} takes four numbers a box, x0 y0 x1 y1, got {len(values)} numbers")
    return [(values[k], values[k + 1], values[k + 2], values[k + 3]) for k in range(0, len(values), 4)]


def moves_of(words: list[str] | None) -> list[tuple[str, list[float]]]:
    """The names and boxes that --move says. Raises ValueError unless each name has four numbers."""
    values = words or []
    if len(values) % MOVE_WORDS:
        raise ValueError(f"--move takes LABEL:n x0 y0 x1 y1 for each object, got {len(values)} words")
    moves = []
    for first in range(0, len(values), MOVE_WORDS):
        name, *numbers = values[first : first + MOVE_WORDS]
        try:
            moves.append((name, [float(number) for number in numbers]))
        except ValueError as error:
            said = " ".join(numbers)
            raise ValueError(f"--move {name} takes four numbers, x0 y0 x1 y1, got {short_repr(said)}") from error
    return moves
