"""The evaluation's table and report: the same numbers in both, nothing from outside, nothing unescaped."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.eval.report.charts import DASH, Bar, bar_chart, format_number
from engine.eval.report.gallery import CASES, case_svg, choose_cases, data_uri
from engine.eval.report.page import format_table, write_report
from tests.helpers.report_data import entry, results, row
from util.images import Picture

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Raises AssertionError where a tag is not closed or closes another; gathers tags, texts and addresses."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on") and name != "style"
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value or "")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open:
            self.cells[-1] += data


def grey(each: dict[str, Any]) -> Picture:
    return np.full((64, 64, 3), each["image_id"] % 256, dtype=np.uint8)


def written(tmp_path: Path, data: dict[str, Any], entries: list[dict[str, Any]], picture_of: Any = grey) -> str:
    path = tmp_path / "new" / "report.html"
    write_report(data, entries, Path("output/run-7"), path, picture_of)
    return path.read_text(encoding="utf-8")


def test_the_table_has_a_line_per_row_with_intervals_and_shares_of_the_bound() -> None:
    data = results()
    model = data["rows"][2]
    model["conditioned"]["AP50"] = {"value": 0.39, "low": 0.371, "high": 0.4084}
    model["layout"]["extra_rate"]["value"] = 1.256
    model["percent_of_bound"]["mIoU"] = 71.25
    lines = format_table(data).splitlines()
    assert lines[0] == (
        "profile mini (0a1b2c3d4e5f) · 500 images of val2017 (ids 91bc02d7aa10) · detector fasterrcnn_mini feedc0de"
    )
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [line[0] for line in table[2:]] == [each["name"] for each in data["rows"]]
    cells = dict(zip(table[0], table[4], strict=True))
    assert cells["AP50"] == "39.0 [37.1, 40.8]" and cells["extra/image"] == "1.26" and cells["AP"] == "63.7"
    assert cells["% of bound (mIoU)"] == "71.2" and cells["% of bound (AP50)"] == "63.7"
    assert dict(zip(table[0], table[2], strict=True))["% of bound (AP50)"] == DASH
    assert len({len(line) for line in lines if line.startswith("|")}) == 1  # aligned
    assert all(re.fullmatch("-+:", each) for each in table[1][1:])  # numbers stand on the right
    assert lines[-1] == "Not measured: FID (no Inception weights (--inception))."


def test_names_cannot_break_the_markdown_table() -> None:
    data = results()
    data["rows"][2]["name"] = "a|b\nc"
    assert "| a\\|b c " in format_table(data)


@pytest.mark.parametrize("missing", [None, math.nan])
def test_undefined_figures_are_dashes_not_zeros(tmp_path: Path, missing: float | None) -> None:
    data = results()
    model = data["rows"][2]
    model["conditioned"]["AP50"] = {"value": missing, "low": missing, "high": missing}
    model["layout"]["mIoU"] = {"value": 0.5, "low": missing, "high": missing}
    model["per_class"]["kite"]["AP50"] = missing
    model["full"]["APs"]["value"] = missing
    line = next(line for line in format_table(data).splitlines() if line.startswith("| model"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[2] == DASH and cells[5] == "50.0"
    html = written(tmp_path, data, [])
    assert not re.search(r"\b(nan|None|null)\b", html)
    assert "kite: –, bound 95.3" in html


def test_the_report_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    html = written(tmp_path, results(), [entry(index, index / 40) for index in range(40)])
    page = Page(html)
    assert len(page.addresses) == 3 * CASES and all(each.startswith("data:image/") for each in page.addresses)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert "http://" not in html and "https://" not in html and "@import" not in html and "url(" not in html
    assert "default-src 'none'" in html


def test_the_report_has_every_number_of_the_table_and_the_protocol(tmp_path: Path) -> None:
    data = results()
    page = Page(written(tmp_path, data, []))
    table = format_table(data)
    for name in (each["name"] for each in data["rows"]):
        line = next(line for line in table.splitlines() if line.startswith(f"| {name} "))
        for cell in line.split("|")[2:-1]:
            assert cell.strip() in page.cells
    for fact in (
        "0a1b2c3d4e5f",
        "91bc02d7aa10",
        "feedc0de",
        "checkpoint-last.pth",
        "0, 1, 2",
        "center_crop",
        "num_iter",
    ):
        assert fact in page.text
    assert "The detector's <threshold> is not published" in page.text and "smaller than min_area" in page.text
    full = data["rows"][2]["full"]
    assert format_number(full["APl"]["value"]) in page.cells and format_number(full["AR100"]["value"]) in page.cells
    assert "0.198" in page.cells  # the CLIP score of the model row


def test_what_users_wrote_is_escaped(tmp_path: Path) -> None:
    attack = "\"><script>alert('x')</script> & more"
    data = results()
    data["source"] = {"kind": "images", "folder": attack}
    data["rows"][2]["name"] = attack
    data["rows"][2]["per_class"] = {attack: {"count": 1, "AP50": 0.5, "mIoU": 0.5, "SR50": 0.5}}
    data["skipped"] = {attack: attack}
    data["rows"][2]["quality"] = {attack: 1.0}
    case = entry(1, 0.5, row=attack)
    case["prompt"] = case["wanted"][0]["name"] = case["detected"][0]["name"] = attack
    html = written(tmp_path, data, [case])
    page = Page(html)
    assert "script" not in page.tags and attack in page.text
    assert "<p>&quot;&gt;&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; more</p>" in html


def test_the_report_is_deterministic_and_independent_of_the_order_of_entries(tmp_path: Path) -> None:
    entries = [entry(index, (index * 7 % 5) / 5, seed) for index in range(30) for seed in (0, 1)]
    assert written(tmp_path, results(), entries) == written(tmp_path, results(), entries[::-1])


def test_numbers_of_the_reward_detector_are_marked(tmp_path: Path) -> None:
    plain, marked = results(), results(is_reward=True)
    for text in (format_table(plain), Page(written(tmp_path, plain, [])).text):
        assert "reward detector" not in text.lower() and "evidence" not in text
    lines = format_table(marked).splitlines()
    assert lines[0].startswith("**REWARD DETECTOR") and "not evidence" in lines[0]
    assert "reward detector fasterrcnn_mini" in lines[2]
    html = written(tmp_path, marked, [])
    assert "<title>Layout evaluation: mini (reward detector)</title>" in html
    assert "<strong>REWARD DETECTOR</strong>" in html and html.count('class="mark"') == 3  # beside each AP table


def test_cases_are_sorted_with_ties_by_image_and_one_per_image() -> None:
    entries = [entry(index, 0.5) for index in range(20, 0, -1)]
    entries += [entry(30, 0.9, seed) for seed in (1, 0)] + [entry(31, 0.1), entry(40, None), entry(41, math.nan)]
    entries += [entry(50, 1.0, row="real images")]
    cases = choose_cases(entries, "model")
    assert [each["image_id"] for each in cases.best] == [30, 1, 2, 3, 4, 5, 6, 7] and cases.best[0]["seed"] == 0
    assert [each["image_id"] for each in cases.worst] == [31, 1, 2, 3, 4, 5, 6, 7]
    random = [each["image_id"] for each in cases.random]
    assert len(set(random)) == CASES and not {40, 41, 50} & set(random)
    better = choose_cases([{**each, "mIoU": 0.7} if each["mIoU"] == 0.5 else each for each in entries], "model")
    assert [each["image_id"] for each in better.random] == random  # blind to the scores


def test_only_model_rows_are_shown_and_pictures_asked_for_only_where_shown(tmp_path: Path) -> None:
    data = results()
    data["rows"].insert(3, row("other model", "model", 0.5))
    asked = []

    def picture_of(each: dict[str, Any]) -> Picture:
        asked.append(each["row"])
        return grey(each)

    names = [each["name"] for each in data["rows"]]
    written(tmp_path, data, [entry(index, 0.5, row=name) for index in range(50) for name in names], picture_of)
    assert asked == ["model"] * 3 * CASES + ["other model"] * 3 * CASES


def test_boxes_lie_over_the_picture_at_its_scale() -> None:
    svg = case_svg(entry(1, 0.5), np.zeros((96, 128, 3), dtype=np.uint8), resolution=None)
    assert 'viewBox="0 0 256 192.0"' in svg
    assert svg.count('<rect x="8.0" y="16.0" width="52.0" height="64.0"/>') == 1  # 4 8 30 40, twice as large
    assert "wanted: kite" in svg and "detected: apple 0.87" in svg
    assert 'aria-label="Image 1. Wanted: kite. Detected: apple 0.87."' in svg


@pytest.mark.parametrize(("resolution", "view"), [(64, "0 0 256 256.0"), (None, "0 0 256 375.5")])
def test_a_picture_not_kept_leaves_its_boxes(tmp_path: Path, resolution: int | None, view: str) -> None:
    svg = case_svg(entry(1, 0.5), None, resolution)
    assert f'viewBox="{view}"' in svg and "picture not kept" in svg and "<image" not in svg and "kite" in svg
    empty = {**entry(1, 0.5), "wanted": [], "detected": []}
    assert "Wanted: nothing. Detected: nothing." in case_svg(empty, None, resolution)
    Page(written(tmp_path, results(), [entry(1, 0.5)], lambda _: None))


def test_small_pictures_are_embedded_exactly_and_large_ones_as_bounded_jpeg() -> None:
    small = np.arange(300 * 40 * 3, dtype=np.uint32).reshape(300, 40, 3).astype(np.uint8)
    kind, encoded = data_uri(small).split(",")
    assert kind == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))), small)
    kind, encoded = data_uri(np.zeros((301, 1400, 3), dtype=np.uint8)).split(",")
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert kind == "data:image/jpeg;base64" and image.format == "JPEG" and image.size == (640, 138)


def test_a_picture_of_another_kind_is_an_error_that_names_the_image() -> None:
    with pytest.raises(ValueError, match=r"image 7 must be uint8 \[H, W, 3\], got float64 \(4, 4, 3\)"):
        case_svg(entry(7, 0.5), np.zeros((4, 4, 3)), 64)


def test_bars_have_the_length_of_their_value() -> None:
    svg = bar_chart("AP", [Bar("a", 0.5, 1.0), Bar("b", None, 0.25), Bar("c", 0.0, math.nan)], "model", "real images")
    lengths = re.findall(r'class="bar-(\w+)" x="150" y="[\d.]+" width="([\d.]+)"', svg)
    assert lengths == [("bound", "208.0"), ("value", "104.0"), ("bound", "52.0"), ("value", "0.0")]
    alone = bar_chart("AP", [Bar("a", 0.5, None)], "real images", None)
    assert "bound" not in alone and 'width="104.0"' in alone
    Page(svg)


def test_real_images_alone_make_a_report(tmp_path: Path) -> None:
    data = results()
    data["rows"] = data["rows"][:1]
    data["rows"][0]["per_class"] = {}
    data["sampling"] = None
    page = Page(written(tmp_path, data, [entry(1, 0.5, row="real images")]))
    assert "By size: real images" in page.text and "By class" not in page.text and "Cases" not in page.text


def test_many_classes_are_cut_at_the_rarest(tmp_path: Path) -> None:
    data = results()
    data["rows"][2]["per_class"] = {
        f"class{index:03d}": {"count": index, "AP50": 0.5, "mIoU": 0.5, "SR50": 0.5} for index in range(100)
    }
    text = Page(written(tmp_path, data, [])).text
    assert "class099" in text and "class020" in text and "class019" not in text and "20 rarer classes" in text


def test_another_format_is_refused(tmp_path: Path) -> None:
    for broken in ({**results(), "format": "other-2"}, {}):
        with pytest.raises(ValueError, match="the report reads 'structmar-eval-1'"):
            format_table(broken)
    with pytest.raises(ValueError, match="'other-2'"):
        write_report({**results(), "format": "other-2"}, [], tmp_path, tmp_path / "r.html", grey)
    assert not (tmp_path / "r.html").exists()
