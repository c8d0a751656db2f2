"""Captions in a second language, Chinese, beside a split's own: annotations/captions_<split>.zh.json.

It has the ids of captions_<split>.json, so that a caption and its translation say the same of the same picture. Where
either of them names a side, the picture is not mirrored: see `sided`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.data.phrases import names_a_side
from util.coco import CocoIndex
from util.coco_json import read_captions
from util.read import short_path
from util.split_entries import annotation_path, parts_of

LANGUAGE = "zh"


def translations_path(root: Path, split: str) -> Path:
    """Where those of a split lie that is no joined one."""
    return annotation_path(root, "captions", f"{split}.{LANGUAGE}")


@dataclass(frozen=True)
class Translations:
    """paths: the files that were read. by_caption: the translation of a caption, by (image id, caption); of equal
    captions of an image, that of the first stands for all."""

    paths: tuple[Path, ...]
    by_caption: Mapping[tuple[int, str], str]

    @staticmethod
    def find(index: CocoIndex) -> Translations | None:
        """Of all captions of the splits that have them; None if none has.

        Raises ValueError naming the file and the first caption that it lacks.
        """
        paths = {part: translations_path(index.root, part) for part in parts_of(index.split)}
        texts = {
            part: {entry.id: entry.text for entry in read_captions(path)}
            for part, path in paths.items()
            if path.is_file()
        }
        found: dict[tuple[int, str], str] = {}
        for image in index.images:
            for caption_id, caption in zip(image.caption_ids, image.captions, strict=True):
                if image.folder not in texts:
                    continue
                other = texts[image.folder].get(caption_id)
                if not other:
                    path = short_path(paths[image.folder])
                    raise ValueError(f"{path} lacks caption {caption_id} of image {image.id}, {caption[:60]!r}")
                found.setdefault((image.id, caption), other)
        return Translations(tuple(paths[part] for part in texts), found) if texts else None

    def sided(self) -> frozenset[tuple[int, str]]:
        """The captions whose translation a mirrored picture would contradict, by (image id, caption)."""
        return frozenset(key for key, text in self.by_caption.items() if names_a_side(text))

    def of(self, image_id: int, caption: str) -> str:
        """The caption itself where it has no translation."""
        return self.by_caption.get((image_id, caption), caption)
