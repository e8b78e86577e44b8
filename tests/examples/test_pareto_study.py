"""A study of many runs: its plan, what it finds in made-up numbers, its pictures and report, and a small real one."""

import json
import math
import random
import runpy
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from scripts import EXAMPLES, run_script
from study.analysis import (
    best_configurations,
    cost_at_loss,
    cost_ratio,
    cost_ratio_interval,
    dense_family,
    learning_rate_rule,
    loss_at_cost,
    pareto_front,
    series,
    variations,
)
from study.intervals import confidence_interval
from study.pairs import find_pairs
from study.pictures import PICTURES, draw_study
from study.plan import Run
from study.report import format_table, pair_rows, ratios, results, table_rows, write_report
from study.runs import StudyRun, mean_newborn_share, read_run, read_step_seconds
from study.untrained import add_untrained_rest_
from study.words import difference, label
from toy import toy_model

from hf_dynsparse import sparse_layers
from hf_dynsparse.reports.pictures.time_axis import linear_ticks, logarithmic_ticks


STUDY = EXAMPLES / "pareto_study.py"
PLAN = """
flags: {max_steps: 6, max_seq_length: 32, per_device_train_batch_size: 4, vocab_size: 300, max_eval_samples: 16,
  report_to: none, logging_steps: 2, num_threads: 1}
sizes:
  toy: {preset: tiny, config_overrides: "hidden_size=32,intermediate_size=64"}
sweeps:
  - {size: toy, method: dense, learning_rate: 0.001}
  - {size: toy, sparsity: 0.5, block_size: 8, method: dynsparse, num_topology_updates: 2, seed: 3}
"""

SPARSE = "toy_sparsity=0.5_block_size=8_dynsparse_num_topology_updates=2_seed=3"


def made_up(
    loss: float,
    flops: float = 1e9,
    *,
    method: str = "dense",
    seconds: float | None = None,
    gain: float | None = None,
    **plan: Any,
) -> StudyRun:
    """A run that nobody ran. What a sparse run records by itself has its usual values."""
    plan = {"size": "wide", "method": method, **plan}
    settings = {"seed": 0, "learning_rate": 1e-3, **plan}
    if method == "dense":
        settings |= {"sparsity": 0.0, "block_size": None}
    else:
        settings = {"sparsity": 0.9, "block_size": "16"} | settings
    if method not in ("dense", "static"):
        usual = {"num_topology_updates": 40, "pruning_ratio": 0.5, "pruning_schedule": "cosine", "prune_score": "l1"}
        settings = {**usual, "regrow_rule": "random", **settings}
    results = {
        "eval_loss": loss,
        "context_gain": gain,
        "flops": flops,
        "dense_flops": 8e9,
        "seconds": seconds or flops / 1e6,
    }
    results |= {
        "coverage": 0.8 if method == "dynsparse" else 0.1,
        "newborn_share": 0.2 if method == "dynsparse" else None,
    }
    results |= {
        "steps": 2000,
        "data": "some",
        "hardware": "abacus",
        "versions": "python 3",
        "seconds_from": "the run itself",
    }
    return StudyRun(Path("nowhere"), plan, settings, results)


DENSE = [made_up(4.0, 1e9, size="s"), made_up(3.0, 4e9, size="m"), made_up(2.5, 16e9, size="l")]


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    """The names of the script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return runpy.run_path(str(STUDY))


@pytest.fixture
def run_study(monkeypatch, tmp_path):
    """Run the script with a plan."""

    def run(plan: str, flags: str) -> None:
        file = tmp_path / "plan.yaml"
        file.write_text(plan)
        monkeypatch.syspath_prepend(str(EXAMPLES))
        run_script(STUDY, f"{file} {flags}")

    return run


# The plan


def test_a_sweep_is_a_product_and_no_run_is_twice(study):
    plan = {
        "sizes": {"toy": {"preset": "tiny"}},
        "sweeps": [
            {"size": "toy", "method": ["static", "rigl"], "seed": [0, 1]},
            {"size": "toy", "method": "rigl", "seed": [1, 2]},
            {"preset": "mini", "method": "dense"},
        ],
    }
    runs = list(study["plan_runs"](plan))
    names = ["toy_static_seed=0", "toy_static_seed=1", "toy_rigl_seed=0", "toy_rigl_seed=1", "toy_rigl_seed=2"]
    assert [run.name for run in runs] == [*names, "mini_dense"]
    assert runs[0].flags(plan["sizes"]) == ["--preset=tiny", "--static", "--seed", "0"]
    assert runs[2].flags(plan["sizes"]) == ["--preset=tiny", "--method", "rigl", "--seed", "0"]
    assert runs[5].flags(plan["sizes"]) == ["--preset", "mini", "--dense_baseline"]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("sweeps: [", "must be YAML"),
        ("flags: {max_steps: 2}", "must hold a list `sweeps`"),
        ("sweep: []\nsweeps: [{preset: tiny}]", "may hold flags, sizes, sweeps. Got `sweep`"),
        ("sweeps: {preset: tiny}", "`sweeps` of the plan must be a list"),
        ("sweeps: [tiny]", "A sweep must be a table of flags"),
        ("sweeps: [{size: huge}]", "`size` must be one of none"),
        ("sweeps: [{preset: tiny, block_sise: 8}]", "tiny_block_sise=8: .*block_sise"),
        ("sweeps: [{preset: tiny, method: magic}]", "tiny_magic: .*'magic'"),
        ("sweeps: [{preset: huge}]", "huge: `--preset` must be one of tiny"),
        ("sweeps: [{preset: tiny, sparsity: 1.5}]", "tiny_sparsity=1.5: .*1.5"),
        ("sweeps: [{preset: tiny, train_file: nowhere.txt}]", "`--train_file` must be an existing file"),
        ("sweeps: [{preset: tiny, max_steps: 5, num_topology_updates: 9}]", "max_steps=5.*Got 9"),
        ("sweeps: [{preset: tiny, untrained_rest: true}]", "give --static too"),
    ],
)
def test_a_wrong_plan_is_refused_before_any_work(run_study, tmp_path, plan, message):
    with pytest.raises(SystemExit, match=message):
        run_study(plan, f"--output_dir {tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_a_plan_must_exist(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit, match="nothing.yaml"):
        run_script(STUDY, f"{tmp_path / 'nothing.yaml'} --output_dir {tmp_path / 'out'}")


def test_the_plans_that_come_with_the_package_are_right(run_study, tmp_path, capsys):
    for plan in sorted((EXAMPLES / "studies").glob("*.yaml")):
        run_study(plan.read_text(), f"--output_dir {tmp_path / 'out'} --dry_run --report_to none --bf16 false")
        commands = capsys.readouterr().out.splitlines()
        assert len(set(commands)) == len(commands) > 3


# What is found


def test_the_front_keeps_what_nothing_undercuts():
    points = [(4, 1.0), (1, 3.0), (2, 2.0), (3, 2.5), (5, 1.0), (math.nan, 0.1), (1, math.nan)]
    assert pareto_front(points) == [(1, 3.0), (2, 2.0), (4, 1.0)]


def test_interpolation_is_linear_in_the_logarithm_of_the_cost():
    family = [(1e9, 4.0), (4e9, 3.0), (16e9, 2.5)]
    assert cost_at_loss(family, 3.5) == pytest.approx(2e9)  # half way from 4.0 to 3.0: the geometric mean of 1 and 4
    assert cost_at_loss(family, 2.75) == pytest.approx(8e9)
    assert cost_at_loss(family, 3.0) == pytest.approx(4e9)
    assert loss_at_cost(family, 2e9) == pytest.approx(3.5)
    assert loss_at_cost(family, 8e9) == pytest.approx(2.75)
    # A member that another beats at a lower cost is no guide.
    assert cost_at_loss([*family, (5e9, 3.9)], 3.5) == pytest.approx(2e9)


@pytest.mark.parametrize("family", [[], [(1e9, 4.0)], [(1e9, 4.0), (4e9, 3.0)]])
def test_nothing_is_extrapolated(family):
    assert cost_at_loss(family, 2.9) is None
    assert cost_at_loss(family, 4.1) is None
    assert loss_at_cost(family, 0.9e9) is None
    assert loss_at_cost(family, 4.1e9) is None


def test_the_ratio_at_equal_loss():
    runs = [*DENSE, made_up(3.5, 1e9, method="dynsparse", seconds=6000.0)]
    *_, sparse = configurations = best_configurations(runs)
    assert cost_ratio(sparse, dense_family(configurations)) == pytest.approx(0.5)  # 1e9 for what dense has for 2e9
    assert cost_ratio(sparse, dense_family(configurations, "seconds"), "seconds") == pytest.approx(3.0)


def test_the_ratio_has_an_interval_over_seeds():
    """Each seed against the dense family of the same seed: 0.5 and 0.125, the geometric mean of which is 0.25."""
    runs = [*DENSE, made_up(4.5, 1e9, size="s", seed=1), made_up(3.5, 4e9, size="m", seed=1)]
    runs += [made_up(2.5, 16e9, size="l", seed=1), made_up(3.5, 1e9, method="static")]
    runs += [made_up(3.0, 1e9, method="static", seed=1)]  # dense: half way from 3.5 to 2.5, that is 8e9
    configurations = best_configurations(runs)
    found = cost_ratio_interval(configurations[-1], configurations)
    assert found.mean == pytest.approx(0.25)
    # Logarithms of 2 and 8 differ by log(4), their deviation is log(4) / sqrt(2): 12.706 log(4) / 2 on either side.
    assert found.high / found.mean == pytest.approx(4 ** (12.706 / 2))
    assert found.low * found.high == pytest.approx(0.25**2)

    # A dense member without seed 1: both against the means, which have 3.5 at 4^(3/4) e9, and 3 at 4^(4/3) e9.
    configurations = best_configurations([run for run in runs if run.results["eval_loss"] != 2.5 or run in DENSE])
    found = cost_ratio_interval(configurations[-1], configurations)
    assert found.mean == pytest.approx(4 ** -((3 / 4 + 4 / 3) / 2))
    *dense, sparse = best_configurations(runs[:-1])  # one seed
    assert cost_ratio_interval(sparse, dense)[1:] == (None, None, 1)
    assert cost_ratio_interval(sparse, []) is None


def test_an_interval_is_by_students_t():
    """0.1, 0.2, 0.3: deviation 0.1, and 4.303 at two degrees of freedom: 4.303 * 0.1 / sqrt(3) = 0.2484."""
    found = confidence_interval([0.1, 0.2, 0.3])
    assert found == pytest.approx((0.2, 0.2 - 0.24843, 0.2 + 0.24843, 3), abs=1e-5)
    assert found.half == pytest.approx(0.24843, abs=1e-5)
    # 0 and 1: deviation 1 / sqrt(2), 12.706 at one: half of it on either side. More than the table has: its last.
    assert confidence_interval([0.0, 1.0]).high == pytest.approx(0.5 + 12.706 / 2)
    assert confidence_interval([0.0, 1.0] * 50).half == pytest.approx(2.086 * math.sqrt(25 / 99) / 10)
    assert confidence_interval([0.3]) == (0.3, None, None, 1)
    assert math.isnan(confidence_interval([math.nan, 1.0]).half)


def paired_runs() -> list[StudyRun]:
    """Static and two dynamic methods; the third seed of the second method is missing, and one has left no plateau."""
    runs = [made_up(loss, method="static", seed=seed, gain=gain) for seed, (loss, gain) in enumerate(STATIC)]
    runs += [made_up(loss, method="dynsparse", seed=seed, gain=1.0) for seed, loss in enumerate((2.9, 3.0, 3.1))]
    runs += [made_up(loss, method="rigl", pruning_ratio=0.3, seed=seed) for seed, loss in ((1, 3.3), (3, 2.0))]
    return [
        *runs,
        made_up(3.0, method="static", seed=7, untrained_rest=True),
        made_up(2.0, method="dynsparse", size="x"),
    ]


STATIC = ((3.0, 0.9), (3.2, 0.7), (3.4, 0.05))


def test_runs_that_differ_in_the_method_are_compared_seed_by_seed():
    plain, rigl = find_pairs(best_configurations([*DENSE, *paired_runs()]))
    assert (plain.common, plain.differs, plain.seeds, plain.alone) == ("wide", "dynsparse", [0, 1, 2], ())
    assert plain.differences() == pytest.approx([0.1, 0.2, 0.3])
    assert plain.interval().half == pytest.approx(0.24843, abs=1e-5)
    assert plain.differences("context_gain") == pytest.approx([0.1, 0.3, 0.95])  # positive where dynamic is better
    assert plain.on_plateau == 1
    assert (rigl.differs, rigl.seeds, rigl.alone) == ("rigl pr=0.3", [1], (0, 2, 3))
    assert rigl.interval() == pytest.approx((-0.1, None, None, 1), nan_ok=True)
    assert rigl.of_dynamic("coverage") == 0.1


@pytest.mark.parametrize("other", [{"sparsity": 0.5}, {"block_size": "4"}, {"max_steps": 9}, {"seed": 1}], ids=str)
def test_what_differs_in_more_than_the_method_is_no_pair(other):
    assert len(find_pairs(best_configurations([made_up(3.0, method="static"), made_up(2.9, method="set")]))) == 1
    assert not find_pairs(best_configurations([made_up(3.0, method="static"), made_up(2.9, method="set", **other)]))


@pytest.mark.parametrize("result", ["steps", "data"])
def test_other_data_or_steps_are_no_pair(result):
    static, dynamic = made_up(3.0, method="static"), made_up(2.9, method="dynsparse", block_age_adam=True)
    assert len(find_pairs(best_configurations([static, dynamic]))) == 1  # ages are nothing to a static topology
    dynamic.results[result] = "other"
    assert not find_pairs(best_configurations([static, dynamic]))


def test_tables_and_numbers_hold_pairs_and_plateaus():
    configurations = best_configurations([*DENSE, *paired_runs()])
    plain, rigl = pair_rows(configurations)
    assert list(plain.values()) == [
        *("wide", "dynsparse", "0.001", "+0.2000", "-0.0484 to +0.4484", "+0.450", "-0.654 to +1.554"),
        *("0, 1, 2", "20.0%", "80.0%", "1 of 6 runs"),
    ]
    assert [rigl[key] for key in ("95 % interval", "context gain, dynamic - static", "seeds")] == [
        *("one seed", "-", "1; 0 alone; 2 alone; 3 alone")
    ]
    cells = {row["configuration"]: row["context gain"] for row in table_rows(configurations)}
    assert cells["wide static"] == "0.55 plateau: 1 of 3"
    assert "Positive: it is better" in format_table(configurations)
    numbers = json.loads(results(configurations), parse_constant=pytest.fail)  # no NaN
    assert numbers["pairs"][0]["eval_loss"]["high"] == pytest.approx(0.4484, abs=1e-4)
    assert numbers["pairs"][1]["context_gain"]["mean"] is None
    assert [ratio["flops"].get("count") for ratio in numbers["ratios_at_equal_loss"]] == [3, 3, 2, None]


def test_times_are_in_words():
    assert logarithmic_ticks(40, 400) == {60: "1 min", 120: "2 min", 300: "5 min"}
    assert list(logarithmic_ticks(1, 1e6).values()) == ["1 s", "10 s", "2 min", "30 min", "4 h", "2 d"]
    assert list(linear_ticks(0, 3000).values()) == ["0", "10 min", "20 min", "30 min", "40 min", "50 min"]
    assert list(linear_ticks(-1, 5)) == [-1, 0, 1, 2, 3, 4, 5]
    assert linear_ticks(5.2, 5.8) == {}


def test_the_best_learning_rate_has_the_lowest_mean_over_seeds():
    rates = {1e-3: (3.0, 3.2), 2e-3: (2.8, 3.6), 4e-3: (3.4,)}
    runs = [
        made_up(loss, learning_rate=rate, seed=seed)
        for rate, losses in rates.items()
        for seed, loss in enumerate(losses)
    ]
    (found,) = best_configurations(runs)
    assert found.learning_rate == 1e-3
    assert found.loss == pytest.approx(3.1)
    assert found.spread == pytest.approx(0.2 / math.sqrt(2))  # of two: their distance over the root of 2
    assert found.sweep == pytest.approx({1e-3: 3.1, 2e-3: 3.2, 4e-3: 3.4})
    assert "0.001 <" in format_table([found])


def test_a_run_that_diverged_is_never_the_best():
    (found,) = best_configurations([made_up(math.nan, learning_rate=1e-2), made_up(3.0, learning_rate=1e-3)])
    assert found.learning_rate == 1e-3
    assert found.spread is None


def test_the_same_settings_said_in_two_ways_are_one_configuration():
    plain = made_up(3.0, method="dynsparse")
    explicit = made_up(3.5, method="dynsparse", pruning_ratio=0.5, num_topology_updates=40)
    (found,) = best_configurations([plain, explicit])
    assert found.runs == (plain,)  # of the same seed the first counts


def test_variations_differ_in_one_setting():
    runs = [
        made_up(3.0 + n / 100, method="dynsparse", num_topology_updates=n, seed=seed)
        for n in (80, 20)
        for seed in (0, 1)
    ]
    runs += [
        made_up(3.2, method="dynsparse"),
        made_up(3.9, method="static"),
        made_up(3.1, method="set", pruning_ratio=0.3),
    ]
    configurations = best_configurations(runs + DENSE)
    ((name, line),) = variations(configurations, "num_topology_updates").items()
    assert name == ""
    assert [each.settings["num_topology_updates"] for each in line] == [20, 40, 80]
    assert [[each.settings["method"] for each in line] for line in variations(configurations, "method").values()] == [
        ["dynsparse", "set", "static"]
    ]
    assert variations(configurations, "block_size") == {}


def test_the_plainest_stands_for_its_variants():
    runs = [
        made_up(3.2, method="dynsparse"),
        made_up(3.0, method="dynsparse", pruning_ratio=0.3),
        made_up(2.9, 2e9, method="dynsparse", size="wider"),
        made_up(3.4, method="static"),
        made_up(3.3, method="static", untrained_rest=True),
    ]
    lines, variants = series(best_configurations(runs + DENSE))
    assert {tuple(kind): [each.loss for each in line] for kind, line in lines.items()} == {
        ("dynsparse", "16", 0.9): [3.2, 2.9],
        ("static", "16", 0.9): [3.4],
    }
    assert [(each.loss, words) for each, words in variants] == [(3.0, "pr=0.3")]
    assert difference({"readmit": True, "seed": None}, {"regrow_std": 0.1}) == "readmit no regrow_std"


def test_labels_say_the_difference():
    runs = [
        made_up(3.0, method="dynsparse"),
        made_up(3.0, method="dynsparse", block_size="1"),
        made_up(3.0, method="static"),
    ]
    assert label(best_configurations(runs)) == ["dynsparse B=16", "dynsparse B=1", "static B=16"]


def test_the_rule_starts_from_the_dense_twin():
    runs = [made_up(3.0, learning_rate=1e-3), made_up(2.9, learning_rate=2e-3), made_up(3.0, method="dynsparse")]
    dense, sparse = configurations = best_configurations(runs)
    assert learning_rate_rule(sparse, configurations) == pytest.approx(2e-3 * 6.40, rel=1e-3)
    assert learning_rate_rule(dense, configurations) is None
    assert learning_rate_rule(sparse, [sparse]) is None


def test_the_table_compares_with_the_dense_family():
    configurations = best_configurations(
        [*DENSE, made_up(3.5, 1e9, method="dynsparse"), made_up(4.5, method="static")]
    )
    rows = {row["configuration"]: row for row in table_rows(configurations)}
    assert rows["wide dynsparse"]["dense at equal FLOPs"] == "4.0000"
    assert rows["wide dynsparse"]["FLOPs ratio at equal loss"] == "0.50"
    assert rows["wide dynsparse"]["of dense"] == "12.5%"
    assert rows["wide static"]["FLOPs ratio at equal loss"] == "outside"
    assert rows["m dense"]["FLOPs ratio at equal loss"] == "-"
    assert ratios(configurations) == [
        {"FLOPs ratio at equal loss": "wide, dynsparse, s = 0.9", "B = 16": "0.50"},
        {"FLOPs ratio at equal loss": "wide, static, s = 0.9", "B = 16": "outside"},
    ]


def test_newborn_share_is_the_mean_over_updates_but_the_first():
    entries = [(1, 0.0), (2, 0.4), (2, 0.4), (3, 0.1)]
    log = [{"dynsparse/topology_updates": update, "dynsparse/newborn_share": share} for update, share in entries]
    assert mean_newborn_share([{"loss": 1.0}, *log]) == pytest.approx(0.25)
    assert mean_newborn_share(log[:1]) is None


def test_step_seconds_tell_updates_from_steps(tmp_path):
    steps, log, elapsed = 40, [], 0.0
    for step in range(1, steps + 1):
        # The first steps are slow, every fifth has an update, one is disturbed.
        elapsed += 1.0 if step <= 3 else 0.5 if step == 17 else 0.13 if step % 5 == 0 else 0.1
        entry = {"loss": 3.0, "step": step, "dynsparse/tokens_per_second": 64 * step / elapsed}
        log.append(entry | ({"dynsparse/topology_updates": step // 5} if step >= 5 else {}))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [*log, {"eval_loss": 3.0}]}))
    (tmp_path / "summary.json").write_text(json.dumps({"tokens": 64 * steps, "steps": steps}))
    found = read_step_seconds(tmp_path)
    assert found.step == pytest.approx(0.1)
    assert found.update == pytest.approx(0.03)
    assert found.of({"steps": 2000, "topology_updates": 40}) == pytest.approx(201.2)


# Pictures and report


def many_runs(folder: Path) -> list[StudyRun]:
    """Something for every picture."""
    runs = [*DENSE, made_up(3.2, 3e9), made_up(3.1, 3e9, learning_rate=2e-3)]
    for block in ("1", "4x4", "16"):
        runs += [made_up(3.5, 1e9, method=method, block_size=block) for method in ("static", "dynsparse")]
    runs += [made_up(3.4, 2e9, method="dynsparse", sparsity=0.5, seed=seed) for seed in (0, 1)]
    runs += [made_up(3.4, 1e9, method="static", sparsity=sparsity, untrained_rest=True) for sparsity in (0.5, 0.9)]
    runs += [
        made_up(3.4, 1e9, method="dynsparse", prune_score="l2", gain=0.05),
        made_up(3.4, 1e9, method="set", pruning_ratio=0.3),
    ]
    for rule in ("random", "gradient"):
        toy_model(block_size=8).save_pretrained(folder / rule)
        run = made_up(3.4, 1e9, method="dynsparse", size="toy", regrow_rule=rule)
        runs.append(StudyRun(folder / rule, run.plan, run.settings, run.results))
    return runs


class References(HTMLParser):
    """All that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_every_picture_is_drawn_and_the_report_needs_nothing_else(tmp_path):
    configurations = best_configurations(many_runs(tmp_path))
    pictures = draw_study(configurations, tmp_path)
    assert list(pictures) == list(PICTURES)
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    report = tmp_path / "report.html"
    write_report(configurations, report, pictures, plan="sweeps: <all>", commands=["python x > y"])
    page = report.read_text()
    references = References()
    references.feed(page)
    assert len(references.found) == len(pictures)
    assert all(found.startswith("data:image/png;base64,") for found in references.found)
    assert "url(" not in page
    assert "@import" not in page
    assert "sweeps: &lt;all&gt;" in page
    assert "python x &gt; y" in page
    assert "abacus" in page
    assert "wide dynsparse" in page


def test_a_picture_needs_runs_to_compare(tmp_path):
    assert draw_study(best_configurations(DENSE[:1]), tmp_path) == {}
    assert list(draw_study(best_configurations(DENSE), tmp_path)) == ["pareto.png"]
    assert [file.name for file in tmp_path.iterdir()] == ["pareto.png"]


# The probe


def test_the_untrained_rest_fills_the_inactive_positions(tmp_path):
    model = toy_model(block_size=8)
    name, layer = next(iter(sparse_layers(model).items()))
    rows = torch.eye(layer.in_features)
    bias, sparse = layer.bias.detach(), layer.to_dense().detach()
    add_untrained_rest_(model, std=0.02)
    weight = (layer(rows) - bias).T.detach()
    active = sparse != 0
    assert torch.allclose(weight[active], sparse[active])
    assert 0.01 < weight[~active].std() < 0.02
    assert weight[~active].abs().max() <= 0.04 + 1e-6
    assert not [tensor for tensor in model.state_dict() if "untrained" in tensor]
    assert not layer.untrained_rest.requires_grad


# A real one


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghij") for _ in range(draw.randint(2, 7))) for _ in range(120)]
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text("\n".join(" ".join(draw.choice(words) for _ in range(draw.randint(4, 30))) for _ in range(300)))
    return file


@pytest.mark.slow
def test_a_study_runs_what_is_missing_and_reports(run_study, tmp_path, text, capsys):
    out = tmp_path / "out"
    run_study(PLAN, f"--output_dir {out} --train_file {text} --dry_run")
    for command in capsys.readouterr().out.splitlines():  # in this process, to save the imports of others
        script, flags = command.split(" ", 2)[1:]
        run_script(Path(script), flags)
    capsys.readouterr()
    run_study(PLAN, f"--output_dir {out} --train_file {text}")
    dense, sparse = (
        out / "toy_dense_learning_rate=0.001",
        out / SPARSE,
    )
    table = pandas.read_parquet(out / "results.parquet")
    assert list(table["name"]) == [dense.name, sparse.name]
    assert list(table["topology_updates"]) == [0, 2]
    assert list(table["seed"]) == [42, 3]
    assert list(table["flops"]) == [
        json.loads((folder / "summary.json").read_text())["flops"] for folder in (dense, sparse)
    ]
    assert not (sparse / "tokenizer").exists()  # the first run's vocabulary served
    assert (out / "table.md").read_text() in capsys.readouterr().out
    assert (out / "report.html").exists()

    # Again: nothing runs. A run without numbers is missing, whatever else it left.
    written = {file: file.stat().st_mtime_ns for file in out.glob("*/summary.json")}
    run_study(PLAN, f"--output_dir {out} --train_file {text}")
    assert written == {file: file.stat().st_mtime_ns for file in out.glob("*/summary.json")}
    (dense / "summary.json").write_text("{")
    capsys.readouterr()
    run_study(PLAN, f"--output_dir {out} --train_file {text} --dry_run --timing_steps 20")
    *missing, dense_timing, sparse_timing = capsys.readouterr().out.splitlines()
    assert len(missing) == 1
    assert f"--output_dir={dense}" in missing[0]

    # Timing is a run of the same configuration that updates often; the report prefers it.
    script, flags = sparse_timing.split(" ", 2)[1:]
    run_script(Path(script), flags)
    capsys.readouterr()
    run_study(PLAN, f"--output_dir {out} --report_only")
    (row,) = pandas.read_parquet(out / "results.parquet").to_dict("records")
    timed = read_step_seconds(out / "timing" / "toy_sparsity=0.5_block_size=8_dynsparse_num_topology_updates=2")
    assert row["seconds_from"] == "timed alone"
    assert row["seconds"] == pytest.approx(6 * timed.step + 2 * timed.update)
    assert timed.update > 0


def test_failed_runs_are_listed_and_others_reported(run_study, tmp_path, text, capfd, monkeypatch):
    """Processes that die at once, beside a run that is finished."""
    sparse = tmp_path / "out" / SPARSE
    sparse.mkdir(parents=True)
    write_run(sparse)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(SystemExit, match="1 of 2 runs failed(?s:.*)toy_dense_learning_rate=0.001: no output"):
        run_study(PLAN, f"--output_dir {tmp_path / 'out'} --train_file {text}")
    captured = capfd.readouterr()
    assert "failed: toy_dense" in captured.out + captured.err
    assert "toy s=0.5 B=8 dynsparse n=2" in captured.out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds processes to cores")
def test_pinning_needs_a_core_for_each_job(run_study, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_study(PLAN, f"--output_dir {tmp_path / 'out'} --pin --jobs 4096")
    assert "--pin needs a core for each of --jobs 4096" in capsys.readouterr().err


def write_run(folder: Path) -> None:
    """The files of a finished run."""
    summary = {"seed": 1, "learning_rate": 2e-3, "topology_updates": 40, "sparsity": 0.9004, "seconds": 5.0}
    summary |= {"eval_loss": 3.0, "flops": 1e9, "dense_flops": 8e9, "coverage": 0.8, "versions": {"torch": "2"}}
    recorded = {
        "num_topology_updates": None,
        "topology_update_every": None,
        "pruning_ratio": 0.5,
        "pruning_schedule": "cosine",
        "readmit": False,
    }
    state = {"log_history": [], "stateful_callbacks": {"TopologyCallback": {"args": recorded}}}
    files = {"summary": summary, "config": {"sparsity": 0.9, "block_size": 16}, "trainer_state": state}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_recorded_default_is_a_setting(tmp_path):
    """What a run writes about itself completes what the plan says."""
    write_run(tmp_path)
    run = read_run(tmp_path, {"size": "wide"})
    assert {key: value for key, value in run.settings.items() if value is not None} == {
        **{
            "size": "wide",
            "method": "dynsparse",
            "seed": 1,
            "learning_rate": 2e-3,
            "sparsity": 0.9,
            "block_size": "16",
        },
        **{"num_topology_updates": 40, "pruning_ratio": 0.5, "pruning_schedule": "cosine"},
    }
    assert run.results["seconds"] == 5.0
    assert run.results["seconds_from"] == "the run itself"


def test_other_architectures_record_their_blocks_in_the_summary(tmp_path):
    write_run(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text()) | {"block_size": 8, "learning_rate": 4e-3 + 3e-18}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.json").write_text("{}")
    settings = read_run(tmp_path, {}).settings
    assert (settings["sparsity"], settings["block_size"], settings["learning_rate"]) == (0.9004, "8", 0.004)


def test_a_folder_has_no_wildcards_in_its_name():
    run = Run(
        (("size", "wide"), ("block_size", "*attention*=4,*=16"), ("method", "static"), ("learning_rate", "8e-05"))
    )
    assert run.name == "wide_block_size=attention=4,=16_static_learning_rate=8e-05"
