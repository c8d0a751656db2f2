"""Does a detector trained on photographs recognise the drawn classes? AP of an ONNX model on generated scenes.

python -m scripts.mini.yolox_ap --detector yolox_nano.onnx --num_scenes 150 --size 256

Only the drawn classes are scored: what else the detector finds does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import script_parser
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import seed_int, whole


def main(argv: Sequence[str] | None = None) -> None:
    parser = script_parser("scripts.mini.yolox_ap", __doc__)
    parser.add_argument(
        "--detector", type=Path, required=True, help="ONNX file (YOLOX, YOLOv8 or DETR of COCO's classes)"
    )
    parser.add_argument("--num_scenes", type=whole(1, 10**5), default=150, help="number of scenes")
    parser.add_argument("--size", type=whole(16, 1024), default=256, help="resolution at which scenes are drawn")
    parser.add_argument("--seed", type=seed_int, default=1000, help="seed of the scenes")
    args = parse_checked(parser, argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.detector_ap import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
