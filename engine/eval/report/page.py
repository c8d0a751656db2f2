"""The evaluation's table for a terminal or a README, and its report: one HTML file, no scripts, no outside resources.

Both read `results.json` (format structmar-eval-1) and show the same numbers. AP, mIoU, success rates, precision and
distances are written in percent. A figure that is undefined or was not measured is a dash, never a zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from engine.eval.report.charts import DASH, Bar, bar_chart, format_number
from engine.eval.report.gallery import Entry, PictureOf, choose_cases, gallery
from engine.eval.report.markdown import markdown_table, one_line
from engine.eval.report.style import LEGEND, STYLE

RESULTS_FORMAT = "structmar-eval-1"
SOURCE_FACTS = ("folder", "stage", "step", "weights")  # of "source", in the heading; the settings hold the rest
REAL_IMAGES = "real images"  # the row that is the bound of the others
MAX_CLASSES = 80  # of a chart
AREAS = (("small", "APs"), ("medium", "APm"), ("large", "APl"))
NOT_EVIDENCE = "the model was trained on this detector's verdict, so these numbers are not evidence of quality"
EXPLANATION = (
    "AP, AP50 and AP75 count only the boxes that the model was given; other objects of the picture are neither "
    "wanted nor wrong. AP full counts every object. mIoU: overlap of each wanted box with its own detection of the "
    "same class, 0 where it was missed. SR50: share of wanted boxes with an IoU of 0.5 or more; SR50 image: share "
    "of images where all have it. Extra: detections per image that fulfil no wish. % of bound: relative to the real "
    "images. In percent, extra per image apart; 95 % intervals in brackets."
)

Row = Mapping[str, Any]
Results = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table: `row[part][key] * factor` with so many digits, and its 95 % interval where asked for."""

    head: str
    part: str
    key: str
    has_interval: bool = False
    factor: float = 100.0
    digits: int = 1

    def read(self, row: Row) -> tuple[str, str]:
        """(value, "[low, high]" or ""). What a row does not have is a dash."""
        found = (row[self.part] or {}).get(self.key)
        low = high = None
        if isinstance(found, Mapping):
            found, low, high = found["value"], found["low"], found["high"]
        value, *ends = (format_number(each, self.factor, self.digits) for each in (found, low, high))
        has_interval = self.has_interval and DASH not in (value, *ends)
        return value, f"[{ends[0]}, {ends[1]}]" if has_interval else ""


MAIN = (
    Column("AP", "conditioned", "AP"),
    Column("AP50", "conditioned", "AP50", has_interval=True),
    Column("AP75", "conditioned", "AP75"),
    Column("AP full", "full", "AP"),
    Column("mIoU", "layout", "mIoU", has_interval=True),
    Column("SR50", "layout", "SR50"),
    Column("SR50 image", "layout", "SR50_image"),
    Column("extra/image", "layout", "extra_rate", factor=1.0, digits=2),
    Column("% of bound (AP50)", "percent_of_bound", "AP50", factor=1.0),
    Column("% of bound (mIoU)", "percent_of_bound", "mIoU", factor=1.0),
)
FULL = tuple(
    Column(key, "full", key, has_interval=key in ("AP", "AP50", "AP75"))
    for key in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
)
MORE = (
    *(Column(key, "conditioned", key) for key in ("APs", "APm", "APl", "AR100")),
    Column("mIoU image", "layout", "mIoU_image", has_interval=True),
    Column("precision", "layout", "precision", has_interval=True),
    Column("confidence", "layout", "confidence", has_interval=True, factor=1.0, digits=3),
    Column("centroid distance", "layout", "centroid_distance", has_interval=True),
)


def format_table(results: Results) -> str:
    """The main table as Markdown that is also readable in a terminal: heading, units, one line per row."""
    _check_format(results)
    lines = [_heading(results), ""]
    if results["detector"]["is_reward"]:
        lines = [f"**REWARD DETECTOR: {NOT_EVIDENCE}.**", "", *lines]
    body = [[row["name"], *(" ".join(filter(None, c.read(row))) for c in MAIN)] for row in results["rows"]]
    lines += markdown_table(["", *(column.head for column in MAIN)], body)
    resamples = f"{results['num_resamples']} bootstrap resamples of the images"
    unit = f"In percent, extra/image apart; [95 % interval, {resamples}]."
    return "\n".join([*lines, "", unit, *_not_measured(results)])


def _heading(results: Results) -> str:
    profile, dataset, detector = results["profile"], results["dataset"], results["detector"]
    kind = "reward detector" if detector["is_reward"] else "detector"
    return (
        f"profile {profile['name']} ({profile['hash']}) · {dataset['num_images']} images of {dataset['split']} "
        f"(ids {dataset['ids_hash']}) · {kind} {detector['arch']} {detector['id'][:8]}"
    )


def _not_measured(results: Results) -> list[str]:
    return [f"Not measured: {one_line(name)} ({one_line(why)})." for name, why in results["skipped"].items()]


def _check_format(results: Results) -> None:
    if results.get("format") != RESULTS_FORMAT:
        raise ValueError(f"results have format {results.get('format')!r}, the report reads {RESULTS_FORMAT!r}")


def write_report(
    results: dict[str, Any], per_image: Sequence[Entry], folder: Path, path: Path, picture_of: PictureOf
) -> None:
    """Writes the self-contained report to `path`.

    results: the dict of results.json. per_image: entries of per_image.jsonl; those of rows of kind "model" make the
    gallery. folder: the evaluation's folder, named in the heading. picture_of: the picture of an entry as uint8
    [H, W, 3], None where it was not kept; asked only for the cases shown. Raises ValueError for another format.
    """
    _check_format(results)
    resolution = results["profile"]["settings"].get("resolution")
    models = [row for row in results["rows"] if row["kind"] == "model"]
    is_reward = results["detector"]["is_reward"]
    title = f"Layout evaluation: {results['profile']['name']}" + (" (reward detector)" if is_reward else "")
    body = [_header(results, folder), _main_section(results), _more_section(results)]
    body += [_charts(row, results["rows"]) for row in models or results["rows"][:1]]
    for row in models:
        cases = choose_cases(per_image, row["name"])
        if cases.random:
            body.append(
                f"<section>\n<h2>Cases: {escape(row['name'])}</h2>\n{LEGEND}\n"
                f"{gallery(cases, picture_of, resolution)}\n</section>"
            )
    body.append(_settings(results))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(title, "\n".join(body)), encoding="utf-8")


def _page(title: str, body: str) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(results: Results, folder: Path) -> str:
    profile, dataset, detector = results["profile"], results["dataset"], results["detector"]
    kind = "reward detector" if detector["is_reward"] else "detector"
    identity = {key: value for key, value in results["source"].items() if key in SOURCE_FACTS}
    source = ", ".join(f"{key} {_plain(value)}" for key, value in identity.items())
    facts = {
        "profile": f"{profile['name']} · {profile['hash']}",
        "images": f"{dataset['num_images']} of {dataset['split']} · ids {dataset['ids_hash']}",
        "boxes": f"{dataset['num_boxes']}, of them {dataset['num_conditioned']} given to the model",
        kind: f"{detector['arch']} · {detector['id'][:8]}",
        "source": f"{results['source']['kind']}" + (f" · {source}" if source else ""),
        "seeds": ", ".join(str(seed) for seed in results["seeds"]) or DASH,
        "intervals": f"95 %, {results['num_resamples']} bootstrap resamples of the images",
        "folder": folder.name,
    }
    lines = ["<header>", f"<h1>Layout evaluation: {escape(profile['name'])}</h1>"]
    if detector["is_reward"]:
        lines.append(f'<p class="warning" role="note"><strong>REWARD DETECTOR</strong>: {NOT_EVIDENCE}.</p>')
    lines.append(f"<p>{escape(profile['description'])}</p>\n{_definitions(facts, 'facts')}\n</header>")
    if profile["unknown"]:
        items = "".join(f"<li>{escape(each)}</li>" for each in profile["unknown"])
        lines.append(f"<section>\n<h2>What the protocol leaves unknown</h2>\n<ul>{items}</ul>\n</section>")
    return "\n".join(lines)


def _main_section(results: Results) -> str:
    lines = ["<section>", f"<h2>Results{_mark(results)}</h2>", _table(MAIN, results["rows"], "Main results")]
    lines.append(f'<p class="quiet">{EXPLANATION}</p>')
    lines += [f'<p class="quiet">{escape(line)}</p>' for line in _not_measured(results)]
    return "\n".join([*lines, "</section>"])


def _more_section(results: Results) -> str:
    rows = results["rows"]
    names = dict.fromkeys(name for row in rows for name in row["quality"])
    quality = tuple(Column(name, "quality", name, factor=1.0, digits=3) for name in names)
    mark = _mark(results)
    lines = ["<section>", f"<h2>All objects{mark}</h2>", _table(FULL, rows, "Average precision, full ground truth")]
    lines += [f"<h2>Wanted objects in detail{mark}</h2>", _table(MORE, rows, "Wanted objects in detail")]
    lines.append(
        '<p class="quiet">APs, APm, APl: small, medium and large objects of the output picture. Centroid distance: '
        "percent of the picture's diagonal, over matched boxes. Confidence: of the matched detection, missed: 0.</p>"
    )
    if quality:
        lines += ["<h2>Image quality</h2>", _table(quality, rows, "Image quality")]
    return "\n".join([*lines, "</section>"])


def _mark(results: Results) -> str:
    return ' <span class="mark">reward detector</span>' if results["detector"]["is_reward"] else ""


def _table(columns: Sequence[Column], rows: Sequence[Row], caption: str) -> str:
    head = "".join(f'<th scope="col">{escape(column.head)}</th>' for column in columns)
    kind = ' class="narrow"' if len(columns) < 4 else ""
    lines = [
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">\n<table{kind}>',
        f'<thead><tr><th scope="col">row</th>{head}</tr></thead>\n<tbody>',
    ]
    for row in rows:
        cells = "".join(_cell(*column.read(row)) for column in columns)
        lines.append(f'<tr class="{escape(row["kind"])}"><th scope="row">{escape(row["name"])}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody>\n</table>\n</div>"])


def _cell(value: str, interval: str) -> str:
    return f"<td>{value}" + (f' <span class="interval">{interval}</span>' if interval else "") + "</td>"


def _charts(row: Row, rows: Sequence[Row]) -> str:
    """Per class and per size: the row beside the real images (alone, if it is them or they are missing)."""
    bound = next((each for each in rows if each["name"] == REAL_IMAGES and each is not row), None)
    name = str(row["name"])
    bound_name = None if bound is None else REAL_IMAGES
    classes = sorted(row["per_class"], key=lambda each: (-row["per_class"][each]["count"], each))
    lines = [f"<section>\n<h2>By size: {escape(name)}</h2>", _chart_legend(name, bound), '<div class="charts">']
    for title, bars in _size_charts(row, bound).items():
        lines.append(bar_chart(title, bars, name, bound_name))
    lines.append("</div>")
    if classes:
        left_out = len(classes) - MAX_CLASSES
        note = f" {left_out} rarer classes stand in results.json only." if left_out > 0 else ""
        lines.append(f'<h2>By class: {escape(name)}</h2>\n<div class="charts">')
        for key in ("AP50", "mIoU"):
            bars = [_class_bar(each, key, row, bound) for each in classes[:MAX_CLASSES]]
            lines.append(bar_chart(f"{key} by class", bars, name, bound_name))
        lines.append(f'</div>\n<p class="quiet">In brackets: number of wanted objects, most frequent first.{note}</p>')
    return "\n".join([*lines, "</section>"])


def _chart_legend(name: str, bound: Row | None) -> str:
    def swatch(kind: str, y: int, height: int) -> str:
        bar = f'<rect class="{kind}" y="{y}" width="24" height="{height}"/>'
        return f'<svg class="swatch" viewBox="0 0 24 14" aria-hidden="true">{bar}</svg>'

    front = f"<span>{swatch('bar-value', 4, 6)} {escape(name)}</span>"
    behind = "" if bound is None else f"<span>{swatch('bar-bound', 0, 14)} {REAL_IMAGES} (bound)</span>"
    return f'<p class="legend">{front}{behind}</p>'


def _size_charts(row: Row, bound: Row | None) -> dict[str, list[Bar]]:
    """AP, mIoU and SR50 of small, medium and large objects. A size without objects has no figures."""

    def figure(each: Row | None, area: str, ap_name: str, metric: str) -> float | None:
        if each is None:
            return None
        return each["conditioned"][ap_name]["value"] if metric == "AP" else each["per_size"].get(area, {}).get(metric)

    def bar(area: str, ap_name: str, metric: str) -> Bar:
        count = row["per_size"].get(area, {}).get("count", 0)
        return Bar(area, figure(row, area, ap_name, metric), figure(bound, area, ap_name, metric), f"({count})")

    return {f"{metric} by size": [bar(*area, metric) for area in AREAS] for metric in ("AP", "mIoU", "SR50")}


def _class_bar(name: str, key: str, row: Row, bound: Row | None) -> Bar:
    figures = row["per_class"][name]
    reference = None if bound is None else bound["per_class"].get(name, {}).get(key)
    return Bar(name, figures.get(key), reference, f"({figures['count']})")


def _settings(results: Results) -> str:
    parts = {
        "Profile": results["profile"]["settings"],
        "Data": results["dataset"],
        "Detector": results["detector"],
        "Source": results["source"],
        "Sampling": results["sampling"] or {},
    }
    lines = ["<section>\n<details>\n<summary>All settings</summary>"]
    for title, values in parts.items():
        if values:
            lines.append(f"<h3>{title}</h3>\n{_definitions(values, 'settings')}")
    return "\n".join([*lines, "</details>\n</section>"])


def _definitions(values: Mapping[str, Any], kind: str) -> str:
    items = "".join(
        f"<div><dt>{escape(str(key))}</dt><dd>{escape(_plain(value))}</dd></div>\n" for key, value in values.items()
    )
    return f'<dl class="{kind}">\n{items}</dl>'


def _plain(value: Any) -> str:
    """Text as it is, nothing as a dash, everything else as JSON."""
    if value is None or value == [] or value == {}:
        return DASH
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
