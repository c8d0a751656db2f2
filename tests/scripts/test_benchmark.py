"""The benchmark counts, compares and reports rightly. Nothing here asserts a time.

With a checkout of LTH14/mar at hand: MAR_CHECKOUT=../mar python -m pytest tests/scripts/test_benchmark.py
"""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from models.flops import meta_model, sampling_flops
from models.heads.packed import PackedLinear, can_pack
from models.masking import cosine_masked_counts
from models.policy.elbo import ElboEstimator
from models.structmar import StructMAR
from scripts.benchmark import cli, curves, operations, plot, run, table, timing
from scripts.benchmark.baseline import load_baseline, on_this_device, sample_baseline
from scripts.benchmark.counting import count
from scripts.benchmark.curves import Curve
from scripts.benchmark.policy_update import UpdateCase
from scripts.benchmark.sampling import (
    CODES,
    FULL,
    GUIDED,
    OWN,
    PUBLIC_TOO,
    SLICE,
    Entry,
    SamplingCase,
    sampling_options,
)
from scripts.benchmark.table import OURS, PLAIN, PUBLIC, Row, measure
from scripts.benchmark.timing import Ceilings, Times, interleave
from scripts.benchmark.training import PUBLIC_FIRST, STAGES, TrainingCase
from scripts.benchmark.world import NUM_TEXT, available_models, build_world
from tests.helpers import reference
from tests.helpers.family import family_model
from tests.helpers.structured import structured_model

CEILINGS = Ceilings({"fp32": 1e11, "bf16": 3e11}, 1e10)
QUICK = replace(GUIDED, num_iter=4, num_sampling_steps=5)


def rows_of(case: table.Case, model: StructMAR, public: object = None) -> list[Row]:
    world = build_world(model, case.images, case.group_size)
    return measure(case.name, case.images, case.contenders(world, public), 1, CEILINGS)  # type: ignore[arg-type]


# --- counting ------------------------------------------------------------------------------------------------------


def test_turns_are_interleaved() -> None:
    calls: list[str] = []
    times = interleave({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert {name: len(found.runs) for name, found in times.items()} == {"a": 3, "b": 3}
    assert Times((3.0, 1.0, 2.0)).median == 2.0 and Times((3.0, 1.0, 2.0)).fastest == 1.0


def test_flops_and_bytes_of_products() -> None:
    left, right, bias = torch.ones(3, 5), torch.ones(7, 5), torch.ones(7)
    result, counts = count(lambda: F.linear(left, right, bias).relu())
    assert result.shape == (3, 7)
    assert counts.flops == 2 * 3 * 5 * 7
    assert counts.product_bytes == 4 * (15 + 35 + 7 + 21)
    assert counts.kernels == 2 and counts.syncs == 0  # the transposition is a view


def test_host_syncs() -> None:
    x = torch.ones(3)
    for sync in (x.sum().item, x.nonzero, lambda: torch.tensor([1.0]), lambda: torch.from_numpy(x.numpy())):
        assert count(sync)[1].syncs == 1
    assert count(lambda: x.new_zeros(3).add_(x)[1:])[1].syncs == 0


# --- cases ---------------------------------------------------------------------------------------------------------


def test_every_case_names_a_model_that_there_is() -> None:
    names = set(available_models(Path("a"), Path("b"), "mar_mini"))
    cases = [case for part in run.CASES.values() for case in part]
    assert {case.model for case in cases} <= names
    assert len({(case.name, case.images) for case in cases}) == len(cases)
    assert set(available_models(None, None, "mar_mini")) < names


@pytest.mark.parametrize("iterations", [None, (0, 2)])
def test_sampling(iterations: tuple[int, ...] | None) -> None:
    model = structured_model()
    plain, ours, bf16 = rows_of(SamplingCase("", "", 4, QUICK, OWN, iterations, group_size=2), model)
    assert (plain.relative_mse, plain.ratios["plain path fp32"]) == (0.0, 1.0)
    assert ours.relative_mse < 1e-8 < bf16.relative_mse < 1e-2
    if iterations is None:
        expected = 4 * sampling_flops(meta_model(model.config), QUICK, NUM_TEXT)
        assert ours.counts.flops == pytest.approx(expected, rel=0.02)  # some work is done once per batch
    assert ours.counts.flops < plain.counts.flops and bf16.counts.product_bytes < ours.counts.product_bytes


def test_a_preset_is_a_contender_of_its_own() -> None:
    sampling, preset = replace(QUICK, num_sampling_steps=20), Entry("ours, --speed fast", speed="fast")
    _, ours, fast = rows_of(SamplingCase("", "", 1, sampling, (Entry(PLAIN), Entry(OURS), preset)), structured_model())
    assert fast.counts.flops < ours.counts.flops and fast.relative_mse > ours.relative_mse


def test_a_slice_stands_for_its_schedule() -> None:
    """As many tokens and as many runs of every branch as four of 64 iterations have on average."""
    counts, whole = cosine_masked_counts(256, FULL.num_iter), FULL.num_iter / len(SLICE)
    assert sum(counts[at] - counts[at + 1] for at in SLICE) * whole == pytest.approx(256, rel=0.1)
    uses = replace(FULL, **sampling_options("fast", FULL)).branch_uses(2)
    runs = [at for at in SLICE if uses[at] == "run"]
    assert runs[0] == SLICE[0] and uses[SLICE[0] + 1] == "reuse"  # what the later ones of the slice reuse
    assert len(runs) * whole == pytest.approx(uses.count("run"), rel=0.2)


def test_stages() -> None:
    second, first, *_ = rows_of(TrainingCase("", "", 2, 2, STAGES[:2]), structured_model())
    assert first.counts.flops < second.counts.flops  # frozen weights need no gradients
    assert first.relative_mse < 1e-9


def test_a_model_of_codes() -> None:
    model = family_model(num_categories=5, text_dim=12, patch_size=2)
    sampling = replace(CODES, num_iter=4)
    fp32, _ = rows_of(SamplingCase("", "", 2, sampling, OWN[1:]), model)
    expected = 2 * sampling_flops(meta_model(model.config), sampling, NUM_TEXT)
    assert fp32.counts.flops == pytest.approx(expected, rel=0.02)
    second, first, *_ = rows_of(TrainingCase("", "", 2, 1, STAGES[:2]), model)
    assert first.counts.flops < second.counts.flops and first.relative_mse < 1e-9


def test_update() -> None:
    fp32, bf16 = rows_of(UpdateCase("", "", 2, 2, ElboEstimator(4, 2, 2)), structured_model())
    assert fp32.relative_mse == 0 < bf16.relative_mse < 1e-2


def test_operations() -> None:
    plain, ours = operations.count_operations("tiny", build_world(structured_model(), 1), None)
    assert (plain.who, ours.who) == (PLAIN, OURS)
    assert 0 < ours.kernels_per_head_step < plain.kernels_per_head_step
    assert ours.syncs_per_head_step == ours.syncs_per_iteration == 0
    assert operations.head_shapes(256, 64) == 7 and operations.head_shapes(256, 256) == 1


def test_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "small_model", lambda slots: structured_model())
    monkeypatch.setattr(curves, "SAMPLING", replace(QUICK, num_iter=2))
    settings = {1: curves.Setting(boxes=1, iterations=2), 2: curves.Setting(boxes=2, iterations=2)}
    monkeypatch.setitem(curves.CURVES, "boxes", settings)
    assert list(curves.measure_curve("boxes").seconds) == [1, 2]


# --- the public code -----------------------------------------------------------------------------------------------

FAKE = """
import torch
from models.parts import SCALE
from tqdm import tqdm

def mask_by_order(number, order):
    return torch.zeros(order.shape).scatter(1, order[:, :number], 1.0).bool()

class Sampler:
    def sample_tokens(self, bsz, num_iter, progress, **_):
        mask = torch.ones(bsz, 8).cuda()
        orders = self.sample_orders(bsz)
        seen = []
        for step in (tqdm(range(num_iter)) if progress else range(num_iter)):
            x = torch.randn(1, 1).cuda()
            seen.append((step, mask.bool().clone(), x, torch.randn_like(torch.cat([x, x]))))
            mask = mask_by_order(7 - step, orders)
        return seen

    def sample_orders(self, bsz):
        raise RuntimeError("orders are given")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mar.py").write_text(FAKE)
    (tmp_path / "models" / "parts.py").write_text("SCALE = 3\n")
    return tmp_path


def test_it_is_imported_past_our_own_package(checkout: Path) -> None:
    module = load_baseline(checkout)
    assert module.SCALE == 3 and Path(module.__file__ or "").parent == checkout / "models"
    assert importlib.import_module("models") is models
    assert importlib.import_module("models.structmar").StructMAR is StructMAR
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("models.parts")
    with pytest.raises(FileNotFoundError, match="no checkout"):
        load_baseline(checkout / "models")


def test_a_slice_gets_its_masks_and_the_noise(checkout: Path) -> None:
    module = load_baseline(checkout)
    orders, counts = torch.randperm(8, generator=torch.Generator().manual_seed(1))[None], list(range(8, -1, -1))

    def noise_of(iteration: int) -> Tensor:
        return torch.arange(2.0)[:, None, None] + iteration

    sampling = replace(GUIDED, num_iter=8)
    for iterations in (range(8), (2, 3, 6)):
        seen = sample_baseline(module, module.Sampler(), orders, orders, noise_of, sampling, counts, iterations)
        assert [step for step, *_ in seen] == list(iterations)
        for step, mask, start, noise in seen:
            assert sorted(mask.nonzero()[:, 1].tolist()) == sorted(orders[0, : counts[step]].tolist())
            assert start.tolist() == [[step]] and noise.tolist() == [[step + 1], [step + 1]]


def test_cuda_is_put_back() -> None:
    original, x = torch.Tensor.cuda, torch.ones(1)
    with on_this_device():
        assert x.cuda() is x
    assert torch.Tensor.cuda is original


@pytest.mark.skipif("MAR_CHECKOUT" not in os.environ, reason="needs a checkout of LTH14/mar (MAR_CHECKOUT)")
def test_the_public_code_says_the_same() -> None:
    public, model = load_baseline(Path(os.environ["MAR_CHECKOUT"])), reference.tiny_model()
    for iterations in (None, (1, 3)):
        rows = rows_of(SamplingCase("", "", 2, QUICK, PUBLIC_TOO, iterations), model, public)
        assert rows[0].who == PUBLIC and rows[2].relative_mse < 1e-8 and rows[3].relative_mse < 1e-6
    rows = rows_of(TrainingCase("", "", 2, 2, PUBLIC_FIRST), model, public)
    assert rows[2].relative_mse < 1e-9 and rows[3].relative_mse < 1e-3


# --- report --------------------------------------------------------------------------------------------------------


def test_the_whole_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(run, "measure_ceilings", lambda: CEILINGS)
    monkeypatch.setattr(run, "available_models", lambda *_: {"tiny": structured_model})
    cases = (SamplingCase("a case", "tiny", 1, QUICK, OWN), SamplingCase("no weights", "absent", 1, QUICK, OWN))
    monkeypatch.setattr(run, "CASES", {"sampling": cases})
    threads = torch.get_num_threads()
    cli.main(
        ["--parts", "sampling", "--repeats", "1", "--threads", str(threads), "--output_dir", str(tmp_path / "out")]
    )
    printed = capsys.readouterr().out
    assert "the rows of the public code are left out" in printed and "left out: no weights of absent" in printed
    content = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [row["who"] for row in content["rows"]] == [PLAIN, OURS, OURS]
    assert (tmp_path / "out" / "benchmark.md").read_text() in printed
    assert (tmp_path / "out" / "benchmark.png").is_file()


def test_mistakes_are_one_line_before_anything_is_timed(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "measure_ceilings", lambda: pytest.fail("it began"))
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    broken = tmp_path / "broken"
    (broken / "models").mkdir(parents=True)
    (broken / "models" / "mar.py").write_text("import no_such_package")
    mistakes = (
        (["--only", "case"], "no case begins with --only 'case', there are: MAR mar_mini, batch 1; "),
        (["--baseline", str(tmp_path / "bad.pth")], f"--baseline {tmp_path / 'bad.pth'} is no checkout"),
        (
            ["--baseline", str(broken)],
            f"--baseline {broken}: models/mar.py cannot be imported (ModuleNotFoundError: No mo",
        ),
        (["--weights", str(tmp_path / "absent.pth")], f"--weights {tmp_path / 'absent.pth'} does not exist"),
        (["--weights", str(tmp_path / "bad.pth")], f"{tmp_path / 'bad.pth'} is "),
        (["--mar_weights", str(tmp_path / "bad.pth")], f"{tmp_path / 'bad.pth'} is "),
        (["--output_dir", str(tmp_path / "bad.pth")], f"--output_dir {tmp_path / 'bad.pth'} is a file"),
    )
    for arguments, message in mistakes:
        with pytest.raises(SystemExit) as end:
            cli.main(["--threads", str(torch.get_num_threads()), *arguments])
        assert str(end.value).startswith(f"error: {message}") and "\n" not in str(end.value)


def test_ceilings_are_of_what_the_code_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of plain and packed products; measured again, they can only rise."""
    monkeypatch.setattr(timing, "CEILING_SECONDS", 0.0)
    monkeypatch.setattr(timing, "COPY_BYTES", 4096)
    monkeypatch.setattr(timing, "MATMUL_SHAPES", ((4, 512),))
    used: list[tuple[str, torch.dtype]] = []
    for kind in (nn.Linear, PackedLinear):
        forward = kind.forward

        def noting(self: nn.Module, x: Tensor, forward: Any = forward) -> Tensor:
            used.append((type(self).__name__, x.dtype))
            return forward(self, x)

        monkeypatch.setattr(kind, "forward", noting)
    found = timing.measure_ceilings()
    dtypes = [each for each in (torch.float32, torch.bfloat16) if can_pack(512, each, torch.device("cpu"))]
    assert set(used) >= {("Linear", torch.float32), *(("PackedLinear", dtype) for dtype in dtypes)}
    assert min(*found.matmul.values(), found.copy) > 0
    better = Ceilings({"fp32": 3.0, "bf16": 1.0}, 2.0).best_of(Ceilings({"fp32": 1.0, "bf16": 4.0}, 1.0))
    assert better == Ceilings({"fp32": 3.0, "bf16": 4.0}, 2.0)


def test_a_run_that_dies_leaves_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_model() -> StructMAR:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure_ceilings", lambda: CEILINGS)
    monkeypatch.setattr(run, "available_models", lambda *_: {"tiny": structured_model, "huge": no_model})
    cases = (SamplingCase("first", "tiny", 1, QUICK, OWN[:1]), SamplingCase("second", "huge", 1, QUICK, OWN))
    monkeypatch.setattr(run, "CASES", {"sampling": cases})
    threads = str(torch.get_num_threads())
    with pytest.raises(SystemExit, match="130"):
        cli.main(["--parts", "sampling", "--repeats", "1", "--threads", threads, "--output_dir", str(tmp_path)])
    assert [row["case"] for row in json.loads((tmp_path / "benchmark.json").read_text())["rows"]] == ["first"]


def test_a_plot_of_rows_and_curves() -> None:
    rows = rows_of(SamplingCase("", "", 1, replace(QUICK, num_iter=1), OWN), structured_model())
    picture = plot.plot(rows, [Curve("images", {1: 0.5, 2: 0.8, 16: 5.0})] * 3)
    assert picture.shape == (60 + 18 * 3 + 2 * 300, 1040, 3)
    assert len(table.cells(rows[0])) == len(table.HEADER)
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.plot([], [])


def test_schedules_agree_with_the_noise() -> None:
    """Whoever asks for as many tokens of an iteration gets the same noise."""
    world = build_world(reference.tiny_model(), 2)
    counts = cosine_masked_counts(64, 4)
    first = world.noise(1, 6, counts[1] - counts[2])
    assert torch.equal(first, world.noise(1, 6, counts[1] - counts[2]))
    assert not torch.equal(first, world.noise(2, 6, counts[1] - counts[2]))
