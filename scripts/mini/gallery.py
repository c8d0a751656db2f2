"""Draws and puts together the pictures of scripts/mini/control_gallery.py, which says what they are of."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from engine.data.scenes import KnownLabels, Scene, read_layout_file
from engine.sample.generate import image_generator, scene_conditions
from engine.sample.grid import caption_bands
from engine.sample.output import LIST_NAME
from engine.sample.pipeline import StructMARPipeline
from models.sampling.auto_layout import EPSILON, build_auto_layout
from models.sampling.config import SamplingConfig
from models.sampling.sampler import sample
from scripts.mini.control_gallery import CONFIG, FIGURES, Figure, command_of
from util.images import Picture, draw_boxes, load_image, make_grid
from util.output import write_atomic
from util.read import read_json

CELL = 128  # pixels along the side of a picture
FONT = 11
MAPS_TITLE = "where the words for the first box (red), second (green) and third (blue) are looked at"


def run(args: argparse.Namespace) -> None:
    """Prints each column's command, and runs it unless its pictures are there. Then the pictures of all columns."""
    for figure in (each for each in FIGURES if each.name in args.names):
        for column in figure.columns:
            command = command_of(figure, column, args.runs)
            print(command, flush=True)
            if not (args.runs / figure.name / column.folder / LIST_NAME).is_file():
                words = [*shlex.split(command)[1:], "--num_threads", str(args.num_threads)]
                subprocess.run([sys.executable, *words], check=True)
        path = args.output / f"{figure.name}.png"
        save_small(figure_picture(figure, args.runs), path)
        print(f"wrote {path}", flush=True)


def figure_picture(figure: Figure, runs: Path) -> Picture:
    """The titles, and a row for each scene."""
    titles = [column.title or column.flags for column in figure.columns]
    folders = [runs / figure.name / column.folder for column in figure.columns]
    columns = [column_pictures(folder, figure.num_rows, folder == folders[0]) for folder in folders]
    if figure.maps_of is not None:
        titles.insert(1, MAPS_TITLE)
        columns.insert(1, map_pictures(figure, folders[0]))
    bands = caption_bands(titles, CELL, FONT)
    cells = [[np.concatenate([band, column[0]]) for band, column in zip(bands, columns, strict=True)]]
    cells += [[column[row] for column in columns] for row in range(1, figure.num_rows)]
    rows = [make_grid(row, len(row)) for row in cells]
    return np.concatenate(rows)


def column_pictures(folder: Path, num_rows: int, with_boxes: bool) -> list[Picture]:
    """The first images of a run of `scripts.sample`, with the boxes that its list names."""
    pictures = []
    for image in read_json(folder / LIST_NAME, "list of images")["images"][:num_rows]:
        objects = image["objects"] if with_boxes else []
        names, boxes = [item["label"] for item in objects], [item["bbox"] for item in objects]
        pictures.append(draw_boxes(np.asarray(load_image(folder / image["file"])), np.array(boxes), names, CELL))
    return pictures


def map_pictures(figure: Figure, plain: Path) -> list[Picture]:
    """The maps of auto layout guidance in the iterations of `figure.maps_of`, as one colour a box."""
    settings = yaml.safe_load(Path(CONFIG).read_text(encoding="utf-8"))
    pipe = StructMARPipeline.from_checkpoint(settings["resume"], settings["vae_path"], settings["clip_path"])
    assert pipe.identity is not None, "the committed weights say what they are made for"
    known = KnownLabels.of(pipe.model.config, pipe.identity.categories)
    scenes = read_layout_file(figure.layout, known)[: figure.num_rows]
    seeds = [image["seed"] for image in read_json(plain / LIST_NAME, "list of images")["images"]]
    config = replace(pipe.own_sampling, mask_threshold=0.5, start_step=figure.maps_of)
    maps = observed_maps(pipe, scenes, config, seeds)  # [B, L, N]
    pictures = []
    for scene, own in zip(scenes, maps, strict=True):
        count = len(scene.layout)
        levels = (255 * own[:, :3].clamp(0, 1)).reshape(*pipe.model.config.grid, -1)  # [h, w, up to 3]
        cells = np.zeros((*pipe.model.config.grid, 3), dtype=np.uint8)
        cells[..., :count] = levels[..., :count].to(torch.uint8).numpy()
        pictures.append(cv2.resize(cells, (CELL, CELL), interpolation=cv2.INTER_NEAREST))
    return pictures


@torch.no_grad()
def observed_maps(
    pipe: StructMARPipeline, scenes: Sequence[Scene], config: SamplingConfig, seeds: Sequence[int]
) -> Tensor:
    """What the boxes' words are looked at by before the start step, each scaled to [0, 1]: [B, L, N]."""
    model = pipe.model
    given = scene_conditions(model, pipe.caption_encoder, scenes, config)
    controls = build_auto_layout(model, config, given.text, given.layout, given.phrase_weights, model.config.grid)
    plain = replace(config, mask_threshold=None, start_step=None)
    generators = [image_generator(seed) for seed, _ in zip(seeds, scenes, strict=False)]
    sample(model, plain, generators, given.text, given.layout, controls=controls)
    assert controls.mean is not None, "iterations were observed"
    low, high = controls.mean.amin(1, keepdim=True), controls.mean.amax(1, keepdim=True)  # [B, 1, N]
    return (controls.mean - low) / (high - low + EPSILON)  # [B, L, N]


def save_small(picture: Picture, path: Path) -> None:
    """A PNG in a palette of 256 colours, dithered: half the bytes."""
    image = Image.fromarray(picture)
    palette = image.quantize(256, kmeans=3)
    few = image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    write_atomic(path, lambda file: few.save(file, format="PNG", optimize=True), is_durable=False)
