"""Command line > YAML > parser default, and every way a config file can be wrong."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from util.config import ConfigError, PresetAction, dump_yaml, load_yaml, parse_args, resolved_dict, told_as_flags
from util.ranges import positive_float


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--blr", type=float, default=1e-4)
    parser.add_argument("--coco_root", required=True)
    parser.add_argument("--resume", default=None)
    parser.add_argument("--rope_mode", choices=("gated", "full", "off"), default="gated")
    parser.add_argument("--online_eval", action="store_true")
    parser.add_argument("--no_learned_pos", dest="learned_pos", action="store_false")
    parser.add_argument("--pin_mem", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ids", type=int, nargs="+", default=[1])
    parser.add_argument("--pair", type=float, nargs=2, default=[0.0, 1.0])
    parser.add_argument("--tag", action="append")
    return parser


def write(folder: Path, text: str) -> str:
    (folder / "x.yaml").write_text(text)
    return str(folder / "x.yaml")


def test_precedence(tmp_path: Path) -> None:
    path = write(tmp_path, "coco_root: data/coco\nbatch_size: 8\nblr: 2e-4\n")
    args = parse_args(make_parser(), ["--batch_size", "2", "--config", path])
    assert (args.batch_size, args.blr, args.rope_mode) == (2, 2e-4, "gated")  # command line, file, parser
    assert args.coco_root == "data/coco"  # a file satisfies what is required
    assert args.config == path


def test_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_args(make_parser(), ["--coco_root", "x"]).batch_size == 64
    with pytest.raises(SystemExit):
        parse_args(make_parser(), [])
    assert "--coco_root" in capsys.readouterr().err


def test_every_kind_of_value(tmp_path: Path) -> None:
    text = (
        "coco_root: a\nblr: 1\nresume: null\nrope_mode: full\nonline_eval: true\nlearned_pos: false\npin_mem: false\n"
        "ids: [3, 4]\npair: [1, 2.5]\n"
    )
    args = parse_args(make_parser(), ["--config", write(tmp_path, text)])
    assert args.blr == 1.0 and isinstance(args.blr, float)
    assert (args.resume, args.rope_mode) == (None, "full")
    assert (args.online_eval, args.learned_pos, args.pin_mem) == (True, False, False)
    assert args.ids == [3, 4] and args.pair == [1.0, 2.5]
    override = parse_args(make_parser(), ["--config", str(tmp_path / "x.yaml"), "--pin_mem", "--ids", "9"])
    assert override.pin_mem is True and override.ids == [9]


def test_an_empty_text_is_none_where_that_is_the_default_whatever_a_file_says(tmp_path: Path) -> None:
    path = write(tmp_path, "resume: a.pth\ncoco_root: data\n")
    assert parse_args(make_parser(), ["--config", path, "--resume", ""]).resume == ""
    with pytest.raises(SystemExit, match="--coco_root must not be empty, got ''"):
        parse_args(make_parser(), ["--config", path, "--coco_root", ""])


def test_the_parser_is_left_as_it_was(tmp_path: Path) -> None:
    parser = make_parser()
    parse_args(parser, ["--config", write(tmp_path, "coco_root: a\nbatch_size: 8")])
    assert parse_args(parser, ["--coco_root", "b"]).batch_size == 64
    with pytest.raises(SystemExit):
        parse_args(parser, [])


def test_config_flag_is_added_where_it_is_missing(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    assert parse_args(parser, [f"--config={write(tmp_path, 'seed: 3')}"]).seed == 3


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("batch_sise: 8", ["unknown key batch_sise", "8", "did you mean batch_size?"]),
        ("help: true", ["unknown key help"]),
        ("config: other.yaml", ["do not include one another", "other.yaml"]),
        ("batch_size: 8.0", ["batch_size: 8.0", "expected an int, got float"]),
        ("batch_size: eight", ["batch_size: 'eight'", "expected an int, got str"]),
        ("batch_size: true", ["batch_size: True", "expected a int, got bool"]),
        ("batch_size: null", ["batch_size: None", "NoneType"]),
        ("batch_size: [8]", ["batch_size: [8]", "got list"]),
        ("blr: fast", ["blr: 'fast'", "could not convert"]),
        ("coco_root: 2017", ["coco_root: 2017", "expected a string, got int (quote it)"]),
        ("rope_mode: fulll", ["rope_mode: 'fulll'", "choose from gated, full, off"]),
        ("online_eval: 1", ["online_eval: 1", "expected true or false"]),
        ("ids: 3", ["ids: 3", "expected a list"]),
        ("ids: []", ["ids: []", "expected at least one"]),
        ("pair: [1]", ["pair: [1]", "expected 2 values, got 1"]),
        ("tag: a", ["tag: 'a'", "only be given on the command line"]),
        ("- a\n- b", ["must be a mapping", "list"]),
        ("a: [", ["is not YAML"]),
        ("batch_size: 1\nbatch_size: 2", ["is not YAML", "key batch_size is there twice", "line 2"]),
    ],
)
def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, parts: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SystemExit) as caught:
        parse_args(make_parser(), ["--config", path, "--coco_root", "x"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2
    assert all(part in message for part in [path, *parts]), message


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(make_parser(), ["--config", str(tmp_path / "no.yaml")])
    assert "no.yaml does not exist" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="does not exist"):
        load_yaml(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path, "# nothing yet\n")) == {}


def test_a_dumped_run_can_be_given_back(tmp_path: Path) -> None:
    argv = ["--coco_root", "é", "--blr", "1e-5", "--ids", "5", "6", "--no-pin_mem", "--no_learned_pos"]
    values = resolved_dict(parse_args(make_parser(), [*argv, "--config", write(tmp_path, "batch_size: 3")]))
    dump_yaml(values, tmp_path / "run" / "args.yaml")
    again = resolved_dict(parse_args(make_parser(), ["--config", str(tmp_path / "run" / "args.yaml")]))
    assert again == values and values["batch_size"] == 3 and "config" not in values


def test_only_plain_values_resolve() -> None:
    with pytest.raises(ValueError, match="root is not a plain value"):
        resolved_dict(argparse.Namespace(root=Path("x")))


PRESETS = {"slow": {}, "quick": {"batch_size": 9, "blr": 1.0}}


def preset_parser() -> argparse.ArgumentParser:
    parser = make_parser()
    parser.add_argument(
        "--preset", action=PresetAction, expand=lambda name, _: PRESETS[name], default="slow", choices=list(PRESETS)
    )
    return parser


@pytest.mark.parametrize(
    ("in_file", "on_command_line", "expected"),
    [
        ("", [], (64, 1e-4)),
        ("", ["--preset", "quick"], (9, 1.0)),
        ("", ["--preset=quick"], (9, 1.0)),
        ("", ["--batch_size", "3", "--preset", "quick"], (3, 1.0)),
        ("batch_size: 8\n", ["--preset", "quick"], (9, 1.0)),  # stronger than a file
        ("batch_size: 8\npreset: quick\n", [], (8, 1.0)),  # the file's other keys are beside it
        ("batch_size: 8\npreset: quick\n", ["--blr", "2"], (8, 2.0)),
        ("batch_size: 8\npreset: quick\n", ["--preset", "slow"], (8, 1e-4)),
    ],
)
def test_a_preset_stands_under_what_is_said_beside_it(
    tmp_path: Path, in_file: str, on_command_line: list[str], expected: tuple[int, float]
) -> None:
    path = write(tmp_path, f"coco_root: data/coco\n{in_file}")
    args = parse_args(preset_parser(), ["--config", path, *on_command_line])
    assert (args.batch_size, args.blr) == expected


def test_an_unknown_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(preset_parser(), ["--coco_root", "x", "--preset", "quickest"])
    assert "quickest" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_args(preset_parser(), ["--config", write(tmp_path, "coco_root: x\npreset: quickest\n")])
    assert "preset: 'quickest'" in capsys.readouterr().err


def test_a_number_out_of_range_in_a_file_is_told_with_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=positive_float, default=1.0)
    path = write(tmp_path, "lr: .nan\n")
    with pytest.raises(SystemExit):
        parse_args(parser, ["--config", path])
    assert f"config file {path}: --lr must be positive, got nan" in capsys.readouterr().err


def test_fields_are_told_as_the_flags_they_came_from():
    for said, told in (
        ("img_size 65 is not a multiple of 8", "--img_size 65 is not a multiple of 8"),
        ("--img_size 65, my_img_size 3 and img_sizes", "--img_size 65, my_img_size 3 and img_sizes"),
        ("a head has num_iter", "a head has --num_iter"),
    ):
        with pytest.raises(ValueError) as caught, told_as_flags(("img_size", "num_iter", "head")):
            raise ValueError(said)
        assert str(caught.value) == told
