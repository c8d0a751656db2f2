"""How each class of the mini world is drawn.

A drawer gets a Pen, its own generator and the object's colour (RGB in [0, 1]).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scripts.mini.pen import Array, Pen, arc, mix, rounded_box, smooth_noise

Rgb = tuple[float, float, float]
Drawer = Callable[[Pen, np.random.Generator, Rgb], None]

COLOURS: dict[str, Rgb] = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.50, 0.06),
    "yellow": (0.98, 0.84, 0.12),
    "green": (0.16, 0.62, 0.22),
    "blue": (0.12, 0.34, 0.84),
    "purple": (0.52, 0.20, 0.70),
    "pink": (0.98, 0.52, 0.70),
    "white": (0.95, 0.95, 0.93),
    "brown": (0.42, 0.23, 0.12),
}
_WHITE: Rgb = (0.97, 0.97, 0.96)
_DARK: Rgb = (0.10, 0.10, 0.12)
_BRIGHT = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")


def _pick(rng: np.random.Generator, options: list[Rgb]) -> Rgb:
    return options[int(rng.integers(len(options)))]


def _darker(colour: Rgb, factor: float) -> Rgb:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def _lighter(colour: Rgb, amount: float) -> Rgb:
    return tuple(float(c + (1 - c) * amount) for c in colour)  # type: ignore[return-value]


def draw_stop_sign(pen: Pen, rng: np.random.Generator, colour: Rgb) -> None:
    angles = np.deg2rad(np.arange(8) * 45 + 22.5)
    octagon = np.stack([np.cos(angles), np.sin(angles)], axis=1) * 1.06
    pen.paint(pen.polygon(octagon), (0.62, 0.62, 0.62))
    pen.paint(pen.polygon(octagon * 0.975), _WHITE)
    red = np.array([0.80, 0.06, 0.10]) * rng.uniform(0.9, 1.1)
    pen.paint(pen.polygon(octagon * 0.89), np.clip(mix(red * 1.12, red * 0.82, np.clip((pen.v + 1) / 2, 0, 1)), 0, 1))
    x, top, bottom, wide = (-0.66, -0.24, 0.19, 0.61), -0.31, 0.31, 0.25
    letter_s = [(x[0] + wide, top + 0.06), (x[0] + 0.16, top), (x[0] + 0.03, top + 0.06), (x[0], top + 0.16)]
    letter_s += [(x[0] + 0.04, -0.05), (x[0] + wide - 0.04, 0.05), (x[0] + wide, bottom - 0.16)]
    letter_s += [(x[0] + wide - 0.03, bottom - 0.06), (x[0] + 0.12, bottom), (x[0] - 0.01, bottom - 0.06)]
    letter_t = [
        [(x[1] - 0.08, top), (x[1] + wide + 0.02, top)],
        [(x[1] + wide / 2 - 0.03, top), (x[1] + wide / 2 - 0.03, bottom)],
    ]
    letter_o = arc((x[2] + 0.09, 0.0), (0.14, bottom), points=24)
    bowl = arc((x[3] + 0.02 - 0.08, top / 2), (0.21, -top / 2), -90, 90, 14)
    letter_p = [[(x[3] - 0.12, top), (x[3] - 0.12, bottom)], [(x[3] - 0.12, top), *bowl.tolist(), (x[3] - 0.12, 0.0)]]
    pen.paint(pen.stroke(0.10, letter_s, *letter_t, letter_o, *letter_p), _WHITE)


def draw_traffic_light(pen: Pen, rng: np.random.Generator, colour: Rgb) -> None:
    housing = _pick(rng, [(0.11, 0.12, 0.12), (0.16, 0.17, 0.16), (0.10, 0.16, 0.13), (0.80, 0.62, 0.08)])
    body = rounded_box(-0.44, -1.0, 0.44, 1.0, 0.14)
    shade = np.clip(0.5 + 0.6 * pen.u, 0, 1)
    pen.paint(pen.polygon(body), _darker(housing, 0.45))
    pen.paint(pen.polygon(body * 0.94), mix(_lighter(housing, 0.16), _darker(housing, 0.75), shade))
    lit = int(rng.choice(3, p=[0.4, 0.2, 0.4]))
    lamps: list[Rgb] = [(1.0, 0.10, 0.08), (1.0, 0.76, 0.08), (0.10, 0.92, 0.40)]
    for row, lamp in enumerate(lamps):
        centre = (0.0, (row - 1) * 0.62)
        pen.paint(pen.ellipse((centre[0], centre[1] - 0.03), 0.305), (0.03, 0.03, 0.03))
        disc = pen.ellipse(centre, 0.255)
        if row == lit:
            spot = pen.glow(pen.to_screen(centre), 0.17)
            pen.paint(disc, mix(lamp, (1.0, 1.0, 0.92), spot * 0.75))
            pen.tint(pen.polygon(body) * pen.glow(pen.to_screen(centre), 0.42), lamp, 0.35)
        else:
            pen.paint(disc, mix(_darker(lamp, 0.26), (0.08, 0.08, 0.08), 0.35))
        pen.paint(pen.stroke(0.07, arc((centre[0], centre[1] - 0.01), (0.29, 0.29), 195, 345, 20)), (0.02, 0.02, 0.02))


def draw_clock(pen: Pen, rng: np.random.Generator, colour: Rgb) -> None:
    rim = _pick(rng, [(0.10, 0.10, 0.11), (0.45, 0.27, 0.13), (0.72, 0.58, 0.24), (0.66, 0.68, 0.70)])
    pen.paint(pen.ellipse((0, 0), 1.0), mix(_darker(rim, 0.6), _lighter(rim, 0.35), pen.sphere_light()))
    pen.paint(pen.ellipse((0, 0), 0.90), _darker(rim, 0.5))
    face = _pick(rng, [(0.97, 0.97, 0.95), (0.95, 0.92, 0.84)])
    pen.paint(pen.ellipse((0, 0), 0.85), mix(_darker(face, 0.88), face, np.clip(0.5 - (pen.x + pen.y), 0, 1)))
    turns = np.deg2rad(np.arange(12) * 30.0)
    rays = np.stack([np.sin(turns), -np.cos(turns)], axis=1)
    pen.paint(pen.stroke(0.09, *[[ray * 0.58, ray * 0.76] for ray in rays[::3]]), _DARK)
    pen.paint(pen.stroke(0.05, *[[ray * 0.66, ray * 0.76] for ray in rays]), _DARK)
    minutes = rng.uniform(0, 720)
    for turn, length, width in ((minutes / 720, 0.44, 0.11), (minutes / 60, 0.66, 0.075)):
        end = np.array([np.sin(2 * np.pi * turn), -np.cos(2 * np.pi * turn)])
        pen.paint(pen.stroke(width, [-end * 0.12, end * length]), _DARK)
    pen.paint(pen.ellipse((0, 0), 0.08), _pick(rng, [_DARK, (0.75, 0.1, 0.1)]))


def draw_orange(pen: Pen, rng: np.random.Generator, colour: Rgb) -> None:
    mask = pen.ellipse((0, 0), 1.0, 0.96)
    pen.round_body(mask, colour, gloss=0.45)
    pores = smooth_noise(rng, pen.pixels, pen.pixels, 40, 40) - 0.5
    pen.rgb = np.clip(pen.rgb * (1 + 0.13 * pores[..., None]), 0, 1)
    navel = (float(rng.uniform(-0.25, 0.25)), -0.66)
    pen.tint(mask * pen.glow(pen.to_screen(navel), 0.22), _darker(colour, 0.62), 0.6)
    star = [
        (navel[0] + r * np.cos(a), navel[1] + 0.8 * r * np.sin(a))
        for a, r in zip(np.arange(10) * np.pi / 5, [0.16, 0.07] * 5, strict=True)
    ]
    pen.paint(pen.polygon(star), (0.24, 0.36, 0.12))
    if rng.random() < 0.35:
        leaf = [navel, (navel[0] + 0.16, -0.86), (navel[0] + 0.52, -0.86), (navel[0] + 0.34, -0.68)]
        pen.paint(pen.polygon(leaf), (0.22, 0.50, 0.16))


def draw_apple(pen: Pen, rng: np.random.Generator, colour: Rgb) -> None:
    turn = np.linspace(0, 2 * np.pi, 72)
    radius = 0.90 * (1 - 0.20 * np.exp(-((np.angle(np.exp(1j * (turn + np.pi / 2)))) ** 2) / 0.10))
    radius *= 1 - 0.09 * np.exp(-((np.angle(np.exp(1j * (turn - np.pi / 2)))) ** 2) / 0.06)
    outline = np.stack(
        [radius * np.cos(turn) * (1.02 - 0.07 * np.sin(turn)), 0.12 + radius * np.sin(turn) * 0.96], axis=1
    )
    mask = pen.polygon(outline)
    pen.round_body(mask, colour, gloss=0.62)
    blush: Rgb = (0.96, 0.78, 0.22) if colour[0] > 0.6 and colour[1] < 0.5 else _lighter(colour, 0.35)
    spots = smooth_noise(rng, pen.pixels, pen.pixels, 4, 18)
    pen.tint(mask * np.clip(spots * 1.3 - 0.55, 0, 1) * np.clip(0.7 - pen.v, 0, 1), blush, 0.42)
    pen.tint(mask * np.exp(-(pen.u**2) / 0.06 - ((pen.v + 0.60) ** 2) / 0.012), _darker(colour, 0.35), 0.75)
    pen.paint(pen.stroke(0.10, [(0.0, -0.58), (0.03, -0.80), (0.12, -0.98)]), (0.30, 0.19, 0.09))
    if rng.random() < 0.6:
        leaf = np.concatenate(
            [arc((0.30, -0.62), (0.30, 0.26), 190, 290, 10), arc((0.26, -0.95), (0.26, 0.22), 20, 120, 10)]
        )
        pen.paint(pen.polygon(leaf), (0.26, 0.56, 0.17))


def _banana(pen: Pen, offset: float, colour: Rgb, bend: float) -> None:
    along = np.linspace(0.0, 1.0, 40)
    angle = np.deg2rad(20 + 140 * along)
    spine = np.stack([np.cos(angle) * 0.98, np.sin(angle) * bend - bend * 0.52 + offset], axis=1)
    normal = np.gradient(spine, axis=0)[:, ::-1] * np.array([1.0, -1.0])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    width = 0.27 * np.clip(np.sin(np.pi * np.clip(along, 0.015, 0.985)), 0, 1) ** 0.55
    width[along < 0.10] = np.maximum(width[along < 0.10] * 0.62, 0.07)
    inner, outer = spine + normal * width[:, None], spine - normal * width[:, None]
    body = pen.polygon(np.concatenate([inner, outer[::-1]]))
    pen.paint(body, _darker(colour, 0.62))
    pen.paint(
        pen.polygon(np.concatenate([inner * 0.985, (spine - normal * width[:, None] * 0.86)[::-1]])),
        _darker(colour, 0.88),
    )
    pen.paint(
        pen.polygon(
            np.concatenate([spine + normal * width[:, None] * 0.92, (spine - normal * width[:, None] * 0.30)[::-1]])
        ),
        colour,
    )
    pen.tint(pen.stroke(0.06, (spine + normal * width[:, None] * 0.45)[8:32]), _lighter(colour, 0.6), 0.7)
    pen.paint(pen.stroke(0.13, spine[:4] + np.array([0.0, -0.04])), (0.44, 0.38, 0.12))
    pen.paint(pen.stroke(0.10, spine[-2:]), (0.20, 0.14, 0.08))


def draw_banana(pen: Pen, rng: np.random.Generator, colour: Rgb) -> None:
    bend = float(rng.uniform(0.62, 0.86))
    if rng.random() < 0.4:
        _banana(pen, -0.26, _darker(colour, 0.93), bend)
        _banana(pen, 0.14, colour, bend)
    else:
        _banana(pen, 0.0, colour, bend)
    freckles = smooth_noise(rng, pen.pixels, pen.pixels, 26, 26)
    pen.tint(np.clip((freckles - 0.86) * 8, 0, 1), (0.40, 0.26, 0.08), 0.5)


def draw_donut(pen: Pen, rng: np.random.Generator, colour: Rgb) -> None:
    distance = np.sqrt(pen.u**2 + pen.v**2)
    tube = np.clip(1 - ((distance - 0.64) / 0.37) ** 2, 0, 1) ** 0.5  # height of the ring's surface
    slope = (distance - 0.64) / 0.37
    light = np.clip(0.62 * tube - 0.55 * slope * (0.61 * pen.x + 0.79 * pen.y) / np.maximum(distance, 1e-3), 0, 1)
    dough: Rgb = (0.85, 0.60, 0.32)
    ring = pen.ellipse((0, 0), 1.0)
    pen.paint(ring, np.clip(np.asarray(dough) * (0.55 + 0.6 * light)[..., None], 0, 1))
    turn = np.linspace(0, 2 * np.pi, 72)
    wave = 0.86 + 0.045 * np.sin(turn * int(rng.integers(5, 9)) + rng.uniform(0, 6))
    icing = pen.polygon(np.stack([wave * np.cos(turn), wave * np.sin(turn)], axis=1))
    pen.paint(icing, np.clip(np.asarray(colour) * (0.66 + 0.48 * light)[..., None], 0, 1))
    pen.tint(icing * np.clip((light - 0.78) * 5, 0, 1), _WHITE, 0.4)
    if rng.random() < 0.6:
        for sprinkle in [(0.98, 0.9, 0.3), (0.3, 0.7, 0.95), (0.95, 0.3, 0.4), _WHITE]:
            angles, reach, lean = rng.uniform(0, 6.28, 7), rng.uniform(0.45, 0.78, 7), rng.uniform(0, 6.28, 7)
            centres = np.stack([reach * np.cos(angles), reach * np.sin(angles)], axis=1)
            tips = 0.05 * np.stack([np.cos(lean), np.sin(lean)], axis=1)
            pen.tint(pen.stroke(0.055, *[[c - t, c + t] for c, t in zip(centres, tips, strict=True)]), sprinkle)
    hole = pen.ellipse((0, 0), 0.30)
    pen.tint(pen.ellipse((0, 0), 0.34), _darker(dough, 0.62))
    pen.erase(hole)


def draw_sports_ball(pen: Pen, rng: np.random.Generator, colour: Rgb) -> None:
    mask = pen.ellipse((0, 0), 1.0)
    pen.round_body(mask, colour, gloss=0.4)
    is_white = min(colour) > 0.8
    if is_white or rng.random() < 0.4:  # football: five-cornered patches
        patch: Rgb = _DARK if is_white else _WHITE
        centres = [(0.0, 0.0, 0.29)] + [
            (0.84 * np.cos(a), 0.84 * np.sin(a), 0.25) for a in np.deg2rad(np.arange(5) * 72 - 90)
        ]
        seams = []
        for index, (cx, cy, radius) in enumerate(centres):
            base = np.deg2rad(np.arange(5) * 72 - 90) + (0 if index == 0 else np.pi)
            corners = np.stack([cx + radius * np.cos(base), cy + radius * np.sin(base)], axis=1)
            shade = (0.55 + 0.5 * pen.sphere_light())[..., None]
            pen.tint(pen.polygon(corners) * mask, np.clip(np.asarray(patch) * shade, 0, 1))
            if index:
                seams.append([(0.29 * cx / 0.84, 0.29 * cy / 0.84), (cx * 0.72, cy * 0.72)])
        pen.tint(pen.stroke(0.045, *seams) * mask, patch, 0.8)
    else:  # seams of a basket ball (dark) or a tennis ball (white)
        seam: Rgb = _WHITE if colour[1] > 0.7 or colour[2] > 0.4 or colour[1] > colour[0] else (0.16, 0.09, 0.06)
        sides = [arc((-1.28, 0.0), (0.80, 0.95), -75, 75), arc((1.28, 0.0), (0.80, 0.95), 105, 255)]
        spine = np.array([(0.0, -1.0), (0.0, 1.0)], dtype=np.float32)
        cross = [spine, arc((0.0, -1.2), (1.6, 1.2), 20, 160)] if seam[0] < 0.5 else []
        pen.tint(pen.stroke(0.07, *sides, *cross) * mask, seam, 0.9)
    rim = np.clip((np.sqrt(pen.x**2 + pen.y**2) - 0.86) * 6, 0, 1)
    pen.tint(mask * rim, (0.05, 0.05, 0.06), 0.35)


def draw_kite(pen: Pen, rng: np.random.Generator, colour: Rgb) -> None:
    top, left, right, bottom, heart = (0.0, -1.0), (-0.74, -0.30), (0.74, -0.30), (0.0, 0.66), (0.0, -0.30)
    wiggle = np.linspace(0, 1, 24)
    sway = float(rng.choice([-1.0, 1.0]))
    tail = np.stack([sway * 0.11 * np.sin(wiggle * 6.6), 0.64 + 0.32 * wiggle], axis=1)
    pen.paint(pen.stroke(0.06, tail), _darker(colour, 0.55))
    for at in (11, 22):
        x, y = tail[at]
        bow = [(x - 0.12, y - 0.07), (x + 0.12, y + 0.07), (x + 0.12, y - 0.07), (x - 0.12, y + 0.07)]
        pen.paint(pen.polygon(bow), _lighter(colour, 0.25))
    second: Rgb = _lighter(colour, 0.5) if min(colour) < 0.8 else (0.72, 0.78, 0.86)
    panels = [((top, left, heart), 1.0, colour), ((top, right, heart), 0.86, second)]
    panels += [((left, bottom, heart), 0.92, second), ((right, bottom, heart), 0.78, colour)]
    for outline, shade, panel in panels:
        pen.paint(pen.polygon(outline), _darker(panel, shade))
    pen.paint(pen.stroke(0.045, [top, bottom], [left, right]), _darker(colour, 0.45))
    pen.paint(pen.stroke(0.035, [top, right, bottom, left, top]), _darker(colour, 0.6))


def draw_umbrella(pen: Pen, rng: np.random.Generator, colour: Rgb) -> None:
    pen.paint(pen.stroke(0.085, [(0.0, -0.9), (0.0, 0.56)]), (0.20, 0.17, 0.16))
    hook = arc((-0.12, 0.56), (0.12, 0.14), 0, 180, 16)
    pen.paint(pen.stroke(0.10, hook), (0.36, 0.21, 0.12))
    dome = arc((0.0, 0.06), (1.0, 0.92), 180, 360, 40)
    scallops = [arc((0.75 - 0.5 * k, 0.06), (0.25, 0.14), 0, -180, 10) for k in range(4)]
    mask = pen.polygon(np.concatenate([dome, *scallops]))
    light = pen.sphere_light((0.0, 0.1), 1.05)
    pen.paint(mask, np.clip(np.asarray(colour) * (0.58 + 0.52 * light)[..., None], 0, 1))
    second: Rgb = _WHITE if rng.random() < 0.3 and min(colour) < 0.8 else _darker(colour, 0.80)
    slices = []
    for a, b in ((-0.5, 0.0), (0.5, 1.0)):
        height = np.linspace(0, 1, 12)
        lower, upper = np.sin(height * np.pi / 2), np.cos(height * np.pi / 2)
        left = np.stack([a * lower, 0.06 - 0.92 * upper], axis=1)
        right = np.stack([b * lower, 0.06 - 0.92 * upper], axis=1)
        slices.append(np.concatenate([left, right[::-1]]))
    pen.tint(mask * pen.polygon(*slices), np.clip(np.asarray(second) * (0.62 + 0.48 * light)[..., None], 0, 1))
    ribs = [
        np.stack([e * np.sin(np.linspace(0, 1.57, 14)), 0.06 - 0.92 * np.cos(np.linspace(0, 1.57, 14))], axis=1)
        for e in (-0.5, 0.0, 0.5)
    ]
    pen.tint(mask * pen.stroke(0.03, *ribs), _darker(colour, 0.5), 0.8)
    pen.paint(pen.stroke(0.07, [(0.0, -0.97), (0.0, -0.84)]), (0.20, 0.17, 0.16))


def draw_tv(pen: Pen, rng: np.random.Generator, colour: Rgb) -> None:
    frame = _pick(rng, [(0.07, 0.07, 0.08), (0.12, 0.12, 0.13), (0.30, 0.31, 0.33)])
    pen.paint(pen.polygon([(-0.10, 0.5), (0.10, 0.5), (0.13, 0.76), (-0.13, 0.76)]), _darker(frame, 0.8))
    pen.paint(pen.polygon(rounded_box(-0.42, 0.70, 0.42, 0.79, 0.04)), _lighter(frame, 0.10))
    pen.paint(pen.polygon(rounded_box(-1.0, -0.70, 1.0, 0.58, 0.07)), frame)
    screen = pen.polygon(rounded_box(-0.90, -0.61, 0.90, 0.46, 0.02))
    down = np.clip((pen.v + 0.61) / 1.07, 0, 1)
    kind = rng.random()
    if kind < 0.45:  # a landscape
        sky = mix((0.20, 0.48, 0.86), (0.76, 0.88, 0.98), down)
        hills = 0.08 + 0.14 * np.sin(pen.u * float(rng.uniform(2, 4)) + float(rng.uniform(0, 6)))
        land = np.clip((pen.v - hills) * 12, 0, 1)
        pen.paint(screen, mix(sky, (0.18, 0.50, 0.22), land))
    elif kind < 0.75:  # blue menu
        pen.paint(screen, mix((0.10, 0.24, 0.62), (0.26, 0.55, 0.88), down))
    else:  # off
        pen.paint(screen, mix((0.16, 0.17, 0.20), (0.05, 0.05, 0.07), down))
    glare = pen.polygon([(-0.90, 0.46), (-0.90, -0.2), (-0.45, -0.61), (0.05, -0.61)])
    pen.tint(screen * glare, _WHITE, 0.13)


def draw_vase(pen: Pen, rng: np.random.Generator, colour: Rgb) -> None:
    height = np.linspace(0, 1, 36)
    neck, belly, at = rng.uniform(0.20, 0.32), rng.uniform(0.50, 0.64), rng.uniform(0.52, 0.66)
    width = neck + (belly - neck) * np.exp(-(((height - at) / 0.25) ** 2))
    width = width + 0.16 * np.exp(-height / 0.05) + 0.05 * np.exp(-(1 - height) / 0.06)
    rows = -0.92 + 1.88 * height
    outline = np.concatenate([np.stack([width, rows], axis=1), np.stack([-width, rows], axis=1)[::-1]])
    mask = np.maximum(pen.polygon(outline), pen.ellipse((0, rows[-1]), float(width[-1]), 0.05))
    half = np.interp(pen.v, rows, width).astype(np.float32)
    across = np.clip(pen.u / np.maximum(half, 0.05), -1, 1)
    light = np.clip(0.80 * np.sqrt(1 - across**2) - 0.42 * across, 0, 1)
    base = np.clip(np.asarray(colour) * (0.42 + 0.66 * light)[..., None], 0, 1)
    pen.paint(mask, base)
    if rng.random() < 0.6:  # painted bands
        band: Rgb = _lighter(colour, 0.65) if min(colour) < 0.8 else (0.24, 0.38, 0.72)
        middle = -0.92 + 1.88 * at
        bend = 0.06 * np.sqrt(1 - across**2)
        for offset in (-0.22, 0.22):
            ring = np.clip(1.5 - np.abs(pen.v - middle - offset - bend) / 0.035, 0, 1)
            pen.tint(mask * ring, np.clip(np.asarray(band) * (0.5 + 0.55 * light)[..., None], 0, 1))
    pen.tint(mask * np.exp(-((across + 0.45) ** 2) / 0.02) * np.clip(1 - np.abs(pen.v - 0.1) * 1.1, 0, 1), _WHITE, 0.55)
    pen.paint(pen.ellipse((0, -0.92), float(width[0]), 0.10), _lighter(colour, 0.18))
    pen.paint(pen.ellipse((0, -0.92), float(width[0]) * 0.80, 0.065), _darker(colour, 0.25))


@dataclass(frozen=True)
class ObjectClass:
    """One class: COCO's id, name and supercategory, how it is drawn, and which colours it comes in."""

    id: int
    name: str
    supercategory: str
    draw: Drawer
    colours: tuple[str, ...]  # more than one: the colour is drawn at random and named in captions
    turn_deg: float  # rotation is uniform in [-turn_deg, turn_deg]
    stretch: tuple[float, float]  # range of width / height, relative to the drawer's own
    outdoors: bool

    @property
    def is_colour_named(self) -> bool:
        return len(self.colours) > 1


CLASSES: tuple[ObjectClass, ...] = (
    ObjectClass(10, "traffic light", "outdoor", draw_traffic_light, ("green",), 4, (0.9, 1.1), True),
    ObjectClass(13, "stop sign", "outdoor", draw_stop_sign, ("red",), 8, (0.9, 1.0), True),
    ObjectClass(28, "umbrella", "accessory", draw_umbrella, _BRIGHT, 20, (0.9, 1.1), True),
    ObjectClass(
        37,
        "sports ball",
        "sports",
        draw_sports_ball,
        ("red", "orange", "yellow", "green", "blue", "white"),
        180,
        (1.0, 1.0),
        True,
    ),
    ObjectClass(38, "kite", "sports", draw_kite, _BRIGHT, 35, (0.9, 1.15), True),
    ObjectClass(52, "banana", "food", draw_banana, ("yellow",), 60, (0.95, 1.05), False),
    ObjectClass(53, "apple", "food", draw_apple, ("red", "green", "yellow"), 18, (0.95, 1.05), False),
    ObjectClass(55, "orange", "food", draw_orange, ("orange",), 25, (0.97, 1.03), False),
    ObjectClass(60, "donut", "food", draw_donut, ("pink", "brown", "white"), 180, (0.9, 1.0), False),
    ObjectClass(72, "tv", "electronic", draw_tv, ("blue",), 3, (0.9, 1.05), False),
    ObjectClass(85, "clock", "indoor", draw_clock, ("white",), 0, (0.93, 1.0), False),
    ObjectClass(86, "vase", "indoor", draw_vase, _BRIGHT, 0, (0.85, 1.15), False),
)
CLASS_BY_ID: dict[int, ObjectClass] = {entry.id: entry for entry in CLASSES}


def draw_object(
    category_id: int, colour: Rgb, diameter_px: float, angle_deg: float, stretch: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """One object on a transparent patch: RGB [p, p, 3], alpha [p, p], both in [0, 1]; its longer side is near
    `diameter_px`."""
    squeeze = (stretch, 1.0) if stretch < 1 else (1.0, 1.0 / stretch)
    pen = Pen(diameter_px, angle_deg, squeeze)
    CLASS_BY_ID[category_id].draw(pen, rng, colour)
    return np.clip(pen.rgb, 0.0, 1.0), pen.alpha
