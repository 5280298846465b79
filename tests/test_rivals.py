"""RLP beside its rivals: the arms of the command, and the rows made of what they reached, by hand."""

import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import summary_of
from test_report import entry, leaf, thinking

import train
from tools import report
from tools import rivals as program_of_rivals
from views import families, rivals

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("arm", program_of_rivals.ABLATIONS)
def test_every_ablation_changes_one_setting_of_rlp(arm):
    config, default = train.parse(program_of_rivals.ABLATIONS[arm].split()).check(), train.parse([])
    assert config != default
    changed = {name for name, value in vars(config.rlp).items() if value != getattr(default.rlp, name)}
    assert len(changed) == 1
    assert f"{arm}-cpu" in rivals.ABLATIONS


def test_rows_of_ablations_are_paired_with_the_default():
    found = found_of(rlp__cpu=[thinking(0), thinking(1)], rlp__g2__cpu=[thinking(1, after=0.6)])
    assert rivals.ablation_rows(found)[1:] == [["2 thoughts a context", "1", "0.60", "0.60", "-2.00", "-0.300", "-0.300"]]


@pytest.mark.parametrize("arm", program_of_rivals.ARMS)
def test_every_arm_is_a_valid_command_and_begins_with_what_was_run_before_it(arm):
    words = program_of_rivals.ARMS[arm].split()
    if "--init" in words:
        names = list(program_of_rivals.ARMS)
        assert words[-2] == "--init"
        assert names.index(words[-1]) < names.index(arm)
        assert rivals.BEGINS[f"{arm}-cpu"] == f"{words[-1]}-cpu"
        words = words[:-2]
    else:
        assert f"{arm}-cpu" not in rivals.BEGINS
    config = train.parse([*words]).check()
    assert config.mode in train.MODES
    assert f"{arm}-cpu" in rivals.ARMS


@pytest.mark.parametrize("arm", program_of_rivals.ELASTIC)
def test_every_arm_of_elastic_is_a_valid_command_with_a_name_in_the_table(arm):
    """It changes one setting of the default or, at a third of the steps, one more; but for orders of several axes."""
    config, default = train.parse(program_of_rivals.ELASTIC[arm].split()).check(), train.parse([]).elastic
    assert config.mode == "elastic"
    short = {*families.THIRDS, *families.RANDOM, *families.WHOLE}
    assert f"{arm}-cpu" in {"elastic-cpu", *families.FAMILIES, *short, families.FIVE, families.GROWN}
    changed = {name for name, value in vars(config.elastic).items() if value != getattr(default, name)} - {"choose_seed"}
    if f"{arm}-cpu" in short:
        assert config.elastic.steps == default.steps // 3
        changed -= {"steps"}
    by_hand = {"unturned": 1, "units": 4, "order": 5, "drawn": 1, "full": 1, "five": 2, "layers": 6}
    by_hand = by_hand.get(arm.removeprefix("elastic-"), 0)
    expected = 1 + by_hand if by_hand else int(arm not in ("elastic-third", "elastic-grown"))
    assert len(changed) == expected


def test_rates_are_tried_as_often_for_each():
    assert {len(rates) for _, rates in program_of_rivals.RATES.values()} == {3}
    assert all(arm in program_of_rivals.ARMS for arm in program_of_rivals.RATES)
    for arm, (setting, rates) in program_of_rivals.RATES.items():
        config = train.parse(program_of_rivals.ARMS[arm].split())
        mode, name = setting.removeprefix("--").split(".")
        assert getattr(getattr(config, mode), name) in rates


def test_arms_are_run_once_and_go_on_from_each_other(tmp_path, cache_dir, corpus_read_once, capsys):
    """SFT, then RLVR from what it became; the second command runs nothing. Unknown arms are refused."""
    words = ["--preset", "smoke", "--seeds", "0", "--out", str(tmp_path), f"--words=--data.cache-dir {cache_dir}"]
    assert program_of_rivals.main([*words, "--arms", "rlvr", "match"]) == 0
    after = summary_of(tmp_path / "rlvr-smoke-seed0")
    assert after["base_dir"] == str(tmp_path / "sft-smoke-seed0")
    assert after["accuracy"]["greedy"]["all"].keys() == {"base", "rlvr"}
    assert after["steps_flops"] > 0
    assert after["steps_s"] > 0
    assert (tmp_path / "match-smoke-seed0" / "controls.json").exists()
    assert not (tmp_path / "sft-smoke-seed0" / "controls.json").exists()
    capsys.readouterr()
    assert program_of_rivals.main([*words, "--arms", "sft", "rlvr", "match"]) == 0
    assert capsys.readouterr().out == ""
    assert program_of_rivals.main([*words, "--arms", "nothing"]) == 2


def test_the_quick_version_of_all_tables_runs(tmp_path, cache_dir):
    """From another folder, in tiny form: one base for both processes, and what has ended is kept."""
    settings = {"PRESET": "smoke", "OUT": str(tmp_path), "WORDS": f"--data.cache-dir {cache_dir}"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run([ROOT / "runs" / "all.sh", "quick"], cwd=tmp_path, env={**os.environ, **settings, "PATH": path},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for arm in ("rlp", "cpt", "elastic"):
        assert summary_of(tmp_path / f"{arm}-smoke-seed0")["seed"] == 0
    assert summary_of(tmp_path / "elastic-smoke-seed0")["baselines"].keys() == {"separate", "minitron"}
    assert (tmp_path / "rlp-smoke-seed0" / "controls.json").exists()


def asked_of(which, tmp_path, monkeypatch):
    """What runs/all.sh asks for: a stand-in for python writes down its words, and the program's runs are checked, not
    trained. By arm the seeds, and those whose rates are tried."""
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$ASKED/words-$$"\n')
    (tmp_path / "python").chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ASKED": str(tmp_path), "OUT": str(tmp_path / "runs")}
    subprocess.run([ROOT / "runs" / "all.sh", which], env=os.environ | settings, check=True)
    seeds, tried = defaultdict(set), []

    def run(words):
        config = replace(train.parse(words), init="").check()  # what --init names is not there
        arm, seed = config.run_dir().name.rsplit("-seed", 1)
        assert config.seed == int(seed)
        seeds[arm].add(config.seed)
        return 0

    monkeypatch.setattr(train, "main", run)
    monkeypatch.setattr(program_of_rivals.controls, "write", lambda *of: None)
    monkeypatch.setattr(program_of_rivals, "try_rates", lambda run, arms, seeds, out, preset: tried.append(seeds))
    for asked in tmp_path.glob("words-*"):
        _, program, *words = asked.read_text().splitlines()
        assert program == "tools.report" or program_of_rivals.main(words) == 0
    return seeds, tried


@pytest.mark.parametrize(("which", "least"), [("all", 1), ("seeds", 3)])
def test_the_command_for_all_tables_runs_every_arm(which, least, tmp_path, monkeypatch):
    seeds, tried = asked_of(which, tmp_path, monkeypatch)
    assert tried == [(0,)]
    assert {len(seeds[arm]) for arm in ("rlp-cpu", "cpt-cpu", "rlp-computed", "elastic-cpu")} == {5}
    assert {f"{arm}-cpu" for arms in program_of_rivals.SETS.values() for arm in arms} <= seeds.keys()
    assert {len(seeds[f"{arm}-cpu"]) for arm in program_of_rivals.ABLATIONS} == {least}


def test_the_quick_version_asks_for_what_each_mode_reads(tmp_path, monkeypatch):
    seeds, tried = asked_of("quick", tmp_path, monkeypatch)
    assert seeds == {"rlp-cpu": {0}, "cpt-cpu": {0}, "elastic-cpu": {0}}
    assert not tried


def test_tried_rates_are_measured_on_validation_and_no_such_run_is_reported(
    tmp_path, cache_dir, corpus_read_once, monkeypatch, capsys
):
    """RLVR begins with SFT at its own rate, which is measured as any arm is."""
    monkeypatch.setattr(program_of_rivals, "RATES", {"rlvr": ("--rlvr.lr", (1e-4, 2e-4))})
    words = ["--preset", "smoke", "--seeds", "0", "--out", str(tmp_path), f"--words=--data.cache-dir {cache_dir}"]
    assert program_of_rivals.main([*words, "--what", "rates"]) == 0
    tries = json.loads((tmp_path / "rates-smoke.json").read_text())["tries"]
    assert [(t["arm"], t["rate"], t["seed"]) for t in tries] == [("rlvr", 1e-4, 0), ("rlvr", 2e-4, 0)]
    assert summary_of(tmp_path / "sft-smoke-seed0")["split"] == "test"
    run = tmp_path / "rates" / "rlvr-0.0001-smoke-seed0"
    assert summary_of(run)["split"] == "val"
    assert report.main([str(run)]) == 2
    assert "was measured on validation" in capsys.readouterr().err


@pytest.mark.parametrize(("arm", "muon"), [("cpt", ["0.005", "0.01", "0.02"]), ("match", [])])
def test_with_a_rate_muons_is_tried_in_proportion(arm, muon, tmp_path, monkeypatch):
    """cpt's are 7.5e-4 and .01; RLP has none."""
    tried = []

    def run(name, seed, folder, words):
        tried.append(words)
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(thinking(mode=program_of_rivals.ARMS[name].split()[1])))

    program_of_rivals.try_rates(run, (arm,), (0,), tmp_path, "cpu")
    assert [words[i + 1] for words in tried for i, word in enumerate(words) if word.endswith("muon-lr")] == muon
    assert len(json.loads((tmp_path / "rates-cpu.json").read_text())["tries"]) == len(tried) == 3


# ---------------------------------------------------------------------------------------------------- rows, by hand


def test_a_mean_over_seeds_has_students_interval():
    """1, 2, 3: mean 2, standard deviation 1, half width 4.30 / sqrt(3) = 2.48."""
    assert rivals.spread([1.0, 2.0, 3.0]) == "2.00 ±2.48"
    assert rivals.spread([0.5]) == "0.50"
    assert rivals.spread([]) == ""
    assert rivals.spread([0.1, 0.3], "+.1f") == "+0.2 ±1.3"


def found_of(**kinds):
    return defaultdict(list, {name.replace("__", "-"): runs for name, runs in kinds.items()})


def test_rows_of_arms_and_of_the_lead_pair_the_seeds():
    """CPT ran on seeds 0 and 1 of three: .9 - .6, .9 - .8."""
    ours = [thinking(seed) | {"steps_flops": 2e12, "steps_s": 30.4} for seed in (0, 1, 2)]
    cpt = [thinking(seed, "cpt", after) for seed, after in ((0, 0.6), (1, 0.8))]
    found = found_of(rlp__cpu=ours, cpt__cpu=cpt)
    head, base, rlp, rival = rivals.arm_rows(found)
    assert head[:4] == ["", "seeds", "sampled", "greedy"]
    assert base == ["base", "3", "0.50 ±0.00", "0.50 ±0.00", "", "", "", ""]
    assert rlp == ["RLP", "3", "0.90 ±0.00", "0.90 ±0.00", "-2.00 ±0.00", "+3.0% ±0.0%", "2.0", "30"]
    assert rival[:3] == ["CPT, FLOPs of RLP", "2", "0.70 ±1.27"]
    assert rivals.lead_rows(found)[1:] == [["(RLP) minus (CPT, FLOPs of RLP)", "2", "+0.200 ±1.271", "+0.200 ±1.271"]]


def test_arms_that_begin_with_others_stand_beside_the_base_of_all():
    """Text: RLP's base 3, SFT 3.1 of that, then RLVR 3.3 of 3.1: +10 %. FLOPs are those of the whole chain, on the seeds
    that the arm has: 2 + 1 + 4."""

    def run(mode, before, after, flops):
        return thinking(0, mode) | {
            "loss_nats": {"no_think_text": {"base": leaf(before), mode: leaf(after)}, "no_think_text_change": leaf(9.0)},
            "steps_flops": flops * 1e12, "steps_s": flops}  # fmt: skip

    rlp, sft, rlvr = run("rlp", 3.0, 3.0, 2), run("sft", 3.0, 3.1, 1), run("rlvr", 3.1, 3.3, 4)
    other = run("rlp", 3.0, 3.0, 50) | {"seed": 1}
    rows = rivals.arm_rows(found_of(rlp__cpu=[rlp, other], rlp__sft__cpu=[sft], rlp__rlvr__cpu=[rlvr]))
    assert [row[0] for row in rows[3:]] == ["RLP, SFT", "RLP, SFT, RLVR"]
    assert rows[4][4:] == ["", "+10.0%", "7.0", "7"]
    found = found_of(rlp__cpu=[rlp], sft__cpu=[run("sft", 3.0, 3.1, 1)], rlp__sft__cpu=[run("sft", 3.0, 3.1, 1)])
    assert [row[0] for row in rivals.lead_rows(found)[1:]] == ["(RLP) minus (SFT)", "(RLP, SFT) minus (SFT)"]


def test_a_lead_is_of_the_runs_before_where_more_seeds_have_both():
    runs = {"rlp__cpu": [thinking(0), thinking(1)], "cpt__cpu": [thinking(0, "cpt", 0.6)],
            "before__rlp__cpu": [thinking(0, after=0.8), thinking(2, after=0.8)],
            "before__cpt__cpu": [thinking(2, "cpt", 0.7)]}  # fmt: skip
    assert rivals.lead_rows(found_of(**runs))[1:] == [["(RLP) minus (CPT, FLOPs of RLP)", "1", "+0.300", "+0.300"]]
    runs["before__cpt__cpu"].append(thinking(0, "cpt", 0.7))
    assert rivals.lead_rows(found_of(**runs))[1][1:3] == ["2", "+0.100 ±0.000"]
    assert rivals.lead_rows(found_of(**runs))[1][0] == "(RLP) minus (CPT, FLOPs of RLP) (before)"
    runs["rlp__cpu"].append(thinking(2))  # three of today are enough, however many there are of before
    runs["cpt__cpu"] += [thinking(seed, "cpt", 0.6) for seed in (1, 2)]
    runs |= {f"before__{mode}__cpu": [thinking(seed, mode) for seed in range(5)] for mode in ("rlp", "cpt")}
    assert rivals.lead_rows(found_of(**runs))[1][:2] == ["(RLP) minus (CPT, FLOPs of RLP)", "3"]


def behind(seed, mode, base, after):
    """A made-up controls.json: the same accuracy everywhere."""
    both = {"base": leaf(base), mode: leaf(after)}
    return {"mode": mode, "seed": seed, "versions": {},
            "levels": {"as trained": {"all": both, "sum": both}, "1 more": {"all": both, "sum": both}},
            "pass": {"1": both, "32": both}, "thoughts": {"own": leaf(2.0), "swapped": leaf(-1.0)},
            "changed": {"text": {"changed": leaf(0.2), "rank": leaf(3.0), "right": leaf(0.3), "base_right": leaf(0.1),
                                 "median_rank_where_changed": 2.0}},
            "text": {"base": leaf(3.5), "thought": leaf(3.6)}}  # fmt: skip


@pytest.mark.parametrize(("base", "n_hard"), [(0.5, 4), (0.1, 0), (0.9, 0)])
def test_rows_of_controls(base, n_hard):
    found = found_of(
        controls__rlp__cpu=[behind(0, "rlp", base, base + 0.1), behind(1, "rlp", base, base + 0.1)],
        controls__cpt__cpu=[behind(1, "cpt", base, base + 0.05)],
    )
    levels = rivals.level_rows(found)
    assert [row[0] for row in levels[1:]] == ["as trained", "1 more"]
    assert levels[1][1:] == [f"{base:.2f} ±0.00", f"{base + 0.1:.2f} ±0.00", "", f"{base + 0.05:.2f}",
                             "+0.100 ±0.000", "+0.050"]  # fmt: skip
    assert len(rivals.hard_rows(found)) == 1 + n_hard
    assert rivals.pass_rows(found)[2][0] == "32"
    assert rivals.pass_rows(found)[2][-1] == "+0.100 ±0.000"
    assert rivals.remains_rows(found)[2] == ["swapped thought", "-1.00 ±0.00", "", "-1.00"]
    assert rivals.changed_rows(found)[2] == ["its rank in the base, where changed, text", "11.00 ±0.00", "", "11.00"]
    assert rivals.changed_rows(found)[-1][1] == "3.600 ±0.000"


@pytest.mark.parametrize("arm", program_of_rivals.CONTROLS)
def test_every_arm_whose_controls_are_taken_has_a_column(arm):
    arms = {f"{kind}-{what}" for what in rivals.UNWORKED for kind in ("rlp", "match", "cpt")}
    assert f"{arm}-cpu" in rivals.COMPARED or arm in {*arms, "cpt-worked-longer"}
    assert {*arms} < program_of_rivals.CONTROLS.keys()


def test_rows_of_unworked_problems_by_level_and_family():
    found = found_of(
        controls__rlp__longer__cpu=[behind(0, "rlp", 0.3, 0.5), behind(1, "rlp", 0.3, 0.5)],
        controls__cpt__worked__longer__cpu=[behind(0, "cpt", 0.3, 0.4)],
        controls__cpt__longer__cpu=[behind(1, "cpt", 0.3, 0.2)],
    )
    rows = rivals.unworked_rows(found, "longer")
    assert rows[0][2:5] == ["RLP (2)", "CPT of worked ones (1)", "CPT of these (1)"]
    assert rows[0][5:] == ["RLP - base", "RLP - CPT of worked ones", "RLP - CPT of these"]
    assert [row[0] for row in rows[1:]] == ["as trained", "  sum", "1 more", "  sum"]
    assert rows[4][1:] == ["0.30 ±0.00", "0.50 ±0.00", "0.40", "0.20", "+0.200 ±0.000", "+0.100", "+0.300"]
    assert len(rivals.unworked_rows(found, "distractors")) == len(rivals.unworked_rows(found_of(), "longer")) == 1
    heads, *hard = rivals.hard_rows(found)  # the base is right .3 of the time
    levels = [f"{level}, {family}" for level in ("as trained", "1 more") for family in ("all", "sum")]
    assert [row[0] for row in hard] == [f"longer ones read too: {name}" for name in levels]
    assert (heads[-1], hard[0][-2:]) == ("RLP - CPT", ["+0.200 ±0.000", "+0.300"])


def test_rows_of_random_positions_pair_the_base_and_rlp():
    """Two seeds: at computed documents .2 to .5 and .4 to .6, so +.3 and +.2; another's thought 3 nats less."""

    def run(seed, before, after):
        made = thinking(seed)
        there = {who: {"gain_nats": {"frozen_base": leaf(x), "empty_thought": leaf(x), "swapped_thought": leaf(x + 3)},
                       "gain_nats_by_kind": {"all": leaf(x), "ledger": leaf(2 * x)},
                       "share_not_empty": {"all": leaf(x / 2)}}
                 for who, x in (("base", before), ("rlp", after))}  # fmt: skip
        return made | {"positions": made["positions"] | {"computed": there}}

    rows = rivals.position_rows(found_of(rlp__computed=[run(0, 0.2, 0.5), run(1, 0.4, 0.6)]))
    by_name = {row[0]: row[1:] for row in rows[1:]}
    assert by_name["gain over the frozen base, nats"] == ["0.30 ±1.27", "0.55 ±0.64", "+0.250 ±0.636"]
    assert by_name["  ledger"][:2] == ["0.60 ±2.54", "1.10 ±1.27"]
    assert by_name["gain over another's thought, nats"][1] == "3.55 ±0.64"
    assert by_name["thoughts not empty"][1] == "0.28 ±0.32"
    assert by_name["gain at ordinary text, nats"] == ["-3.00 ±0.00", "-2.00 ±0.00", "+1.000 ±0.000"]
    assert by_name["problems right, greedy"] == ["0.50 ±0.00", "0.90 ±0.00", "+0.400 ±0.000"]
    assert len(rivals.position_rows(found_of())) == 1


def test_rows_of_the_gate():
    gate = {kind: {name: leaf(x + i) for i, name in enumerate(("thought", "no thought", "gated", "weight"))}
            for kind, x in (("text", 0.1), ("computed", 0.2))}  # fmt: skip
    found = found_of(controls__rlp__computed=[behind(0, "rlp", 0.1, 0.2) | {"gate": gate}])
    assert rivals.gate_rows(found)[1:] == [["RLP, ordinary text", "1", "0.10", "1.10", "2.10", "3.10"],
                                           ["RLP, computed documents", "1", "0.20", "1.20", "2.20", "3.20"]]  # fmt: skip
    assert len(rivals.gate_rows(found_of())) == 1


def test_rows_of_rates():
    tries = [{"arm": "cpt", "rate": 0.01, "seed": s, "sampled": 0.5, "greedy": 0.6} for s in (0, 1)]
    assert rivals.rate_rows(tries)[1:] == [["CPT, FLOPs of RLP", "0.01", "2", "0.50 ±0.00", "0.60 ±0.00"]]
    tries.append({**tries[0], "arm": "cpt-longer", "as trained": 0.6, "1 more": 0.2, "distractors": 0.4})
    assert [row[3:] for row in rivals.rate_rows(tries)] == [
        ["sampled", "greedy", "of a step more", "with lines that lead nowhere"],
        ["0.50 ±0.00", "0.60 ±0.00", "", ""], ["0.50", "0.60", "0.20", "0.40"]]  # fmt: skip


def test_rates_of_an_arm_that_reads_unworked_problems_are_tried_on_those(tmp_path, monkeypatch):
    """Its controls are measured by level, once; those of other arms are not."""
    measured = []

    def run(name, seed, folder, words):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(thinking(mode="cpt")))

    def controls_of(folders, parts):
        measured.append(parts)
        levels = {"as trained": 0.9, "1 more": 0.2, "distractors": 0.4}
        found = {"levels": {level: {"all": {"base": {"mean": 0}, "cpt": {"mean": mean}}} for level, mean in levels.items()}}
        (folders[0] / "controls.json").write_text(json.dumps(found))

    monkeypatch.setattr(program_of_rivals.controls, "write", controls_of)
    for _ in range(2):
        program_of_rivals.try_rates(run, ("cpt", "cpt-longer"), (0,), tmp_path, "cpu")
    assert measured == [("levels",)] * 3
    tries = json.loads((tmp_path / "rates-cpu.json").read_text())["tries"]
    assert [(t["1 more"], t["distractors"]) for t in tries if t["arm"] == "cpt-longer"] == [(0.2, 0.4)] * 3
    assert all("1 more" not in t for t in tries if t["arm"] == "cpt")


def test_results_show_the_rivals_and_judge_them(tmp_path):
    """RLP's .9 against .6 with the reward of RPT; its thoughts gain 2 nats, another's -1; no level is carried further."""
    files = {"rlp-cpu-seed0": thinking(), "match-cpu-seed0": thinking(after=0.6),
             "controls-rlp-cpu-seed0": behind(0, "rlp", 0.1, 0.1)}  # fmt: skip
    files["controls-rlp-cpu-seed0"]["levels"]["3 more"] = files["controls-rlp-cpu-seed0"]["levels"]["1 more"]
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = {row[0]: row[1] for row in report.claims(report.load(tmp_path))}
    assert found["RLP: better than the reward of RPT"] == "reproduced"
    assert found["RLP: what a thought gains hangs on its context"] == "reproduced"
    assert found["RLP: thinking carries further than what was shown: three steps more"] == "**not reproduced**"
    assert found["RLP: still ahead after SFT and RLVR, of the base with both"] == "not tested here"
    shown = report.results(tmp_path)
    assert "### By level" in shown
    assert "| (RLP) minus (the reward of RPT) | 1 | +0.300 | +0.300 |" in shown


def family(seed, losses, **more):
    """A made-up elastic run: accuracies of 1 less the loss over 10."""
    entries = [entry(f, [[4, 16], [2], [64]], loss) for f, loss in zip((1.0, 0.75, 0.5), losses, strict=True)]
    for e, loss in zip(entries, losses, strict=True):
        e["accuracy"] = {how: {"all": leaf(1 - loss / 10)} for how in ("sampled", "greedy")}
    parent = entries[0] | {
        "loss_nats": leaf(1.0),
        "accuracy": {"greedy": {"all": leaf(0.9)}, "sampled": {"all": leaf(0.9)}},
    }
    curves = {str(b): [{"until": 25, "mean": 2.0 + seed}, {"until": 50, "mean": 1.0}] for b in (1, 0.75, 0.5)}
    return {"mode": "elastic", "seed": seed, "teacher": parent, "budgets": entries, "baselines": {}, "curves": curves,
            "stage1": [], "versions": {}} | more  # fmt: skip


def test_rows_of_families_pair_their_losses_by_seed():
    """By hand: 1.3 - 1.2 and 1.5 - 1.3 in seed 1 alone; sizes alone in seed 0."""
    alone = family(0, (1.0, 1.1, 1.4))["budgets"]
    found = found_of(
        elastic__cpu=[family(0, (1.1, 1.2, 1.3), baselines={"separate": alone}), family(1, (1.1, 1.2, 1.3))],
        elastic__drawn__cpu=[family(1, (1.1, 1.3, 1.5))],
        elastic__third__cpu=[family(0, (1.1, 1.2, 1.4))],
        elastic__hand__cpu=[family(0, (1.1, 1.3, 1.4))],
    )
    head, parent, ours, separate, drawn = families.family_rows(found)
    assert head[2:] == [f"{what}, {b} %" for what in ("greedy", "loss") for b in (100, 75, 50)]
    assert parent == ["parent", "2", *["0.90 ±0.00"] * 3, *["1.000 ±0.000"] * 3]
    losses = ["1.100 ±0.000", "1.200 ±0.000", "1.300 ±0.000"]
    assert ours == ["elastic, one run", "2", "0.89 ±0.00", "0.88 ±0.00", "0.87 ±0.00", *losses]
    assert separate == ["alone, equal FLOPs in all", "1", "0.90", "0.89", "0.86", "-0.100", "-0.100", "+0.100"]
    assert drawn == ["a budget a sequence, equal FLOPs", "1", "0.89", "0.87", "0.85", "+0.000", "+0.100", "+0.200"]
    rows = families.third_rows(found)
    assert [row[0] for row in rows[1:]] == ["parent", "the router", "widths by hand"]
    assert rows[3][-3:] == ["+0.000", "+0.100", "+0.000"]
    assert families.family_rows(found_of()) == families.third_rows(found_of()) == families.five_rows(found_of()) == [[]]
    five = found_of(elastic__five__cpu=[family(0, (1.1, 1.2, 1.3), baselines={"separate": alone})])
    assert [row[0] for row in families.five_rows(five)[1:]] == ["parent", "elastic, one run", "alone, equal FLOPs in all"]
    assert families.five_rows(five)[3] == separate


def test_what_rivals_took_stands_beside_the_family_of_the_same_run():
    """By hand: 30 of 20 TFLOP are 1.5 times; a run without rivals, or of before FLOPs were kept, has no row."""
    took = {"steps_flops": 20e12, "train_s": {"elastic": 100.0, "scratch": 90.0}}
    runs = [
        family(0, (1.1, 1.2, 1.3), **took, baselines_flops={"scratch": 30e12}),
        family(1, (1.1, 1.2, 1.3), **took, baselines_flops={}),
        family(2, (1.1, 1.2, 1.3)),
    ]
    head, ours, scratch = families.cost_rows(found_of(elastic__cpu=runs))
    assert head == ["", "seeds", "TFLOP", "of the family's", "seconds"]
    assert ours == ["elastic, one run", "1", "20.0", "1.00", "100"]
    assert scratch == ["from scratch, as the parent", "1", "30.0", "1.50", "90"]
    assert families.cost_rows(found_of(elastic__cpu=runs[1:])) == [head]


def test_the_router_is_ranked_among_all_random_widths_of_its_seed():
    """At 75 % three of eight lose less, at 50 % none; seed 1 lacks one and is left out."""
    found = {kind.replace("-", "__"): [family(0, (1.0, 1.1 if i < 3 else 1.3, 1.4)), family(1, (1.0, 1.0, 1.0))]
             for i, kind in enumerate(families.RANDOM)}  # fmt: skip
    found["elastic__random7__cpu"].pop()
    found = found_of(elastic__third__cpu=[family(0, (1.0, 1.2, 1.3)), family(1, (1.0, 1.2, 1.3))], **found)
    head, rank, lead = families.router_rows(found)
    assert head == ["the router, of 9", "seeds", "75 %", "50 %"]
    assert rank == ["rank by loss", "1", "4.0", "1.0"]
    assert lead[2:] == ["+0.025", "+0.100"]
    assert families.router_rows(found_of()) == [[]]


def test_narrower_layers_stand_beside_fewer():
    """Paired by seed: what fewer lose more; seed 1 has no such run."""
    narrow = [family(seed, (1.0, 1.1, 1.2)) for seed in (0, 1)]
    found = found_of(elastic__widths__cpu=narrow, elastic__layers__cpu=[family(0, (1.0, 1.3, 1.6))])
    rows = families.layer_rows(found)
    assert [row[:2] for row in rows[2:]] == [["widths alone", "2"], ["whole layers alone", "1"]]
    assert rows[3][-2:] == ["+0.200", "+0.400"]
    assert families.layer_rows(found_of()) == [[]]


def test_rows_of_curves_have_a_stretch_a_column():
    found = found_of(elastic__hand__cpu=[family(0, (1.0, 1.1, 1.2)), family(1, (1.0, 1.1, 1.2))])
    head, first, second = families.curve_rows(found)
    assert head == ["training loss, up to step", "seeds", "25", "50"]
    assert first == ["widths by hand, 75 %", "2", "2.500 ±6.355", "1.000 ±0.000"]
    assert second[0] == "widths by hand, 50 %"


def test_single_settings_stand_beside_the_router_of_their_seeds():
    """Seed 2, which no other arm has, is left out of its mean; without others all are there."""
    third = [family(seed, (1.0, 1.1, loss)) for seed, loss in ((0, 1.2), (1, 1.4), (2, 9.0))]
    hand = [family(seed, (1.0, 1.1, 1.5)) for seed in (0, 1)]
    rows = families.third_rows(found_of(elastic__third__cpu=third, elastic__hand__cpu=hand))
    assert [(row[0], row[1]) for row in rows[2:]] == [("the router", "2"), ("widths by hand", "2")]
    assert rows[2][-1].startswith("1.300")
    assert families.third_rows(found_of(elastic__third__cpu=third))[2][1] == "3"


def test_how_much_longer_other_orders_train():
    """By hand: 4 nats after 25 steps and 1 after 50 come by 2 at 35.4 steps, where the other order was after 25."""

    def curves(*means):
        return {b: [{"until": 25 * 2**i, "mean": mean} for i, mean in enumerate(means)] for b in ("1.0", "0.75", "0.5")}

    hand, units = ({"seed": 0, "curves": curves(*means)} for means in ((2.0, 1.0, 0.5), (4.0, 1.0, 0.6)))
    head, first, second = families.steps_rows(found_of(elastic__hand__cpu=[hand], elastic__units__cpu=[units]))
    assert head == ["times the steps of units in order, to their loss up to step", "seeds", "25", "50", "100"]
    assert first == ["by hand, units in random order, 75 %", "1", "1.41", "1.00", "not reached"]
    assert second[0] == "by hand, units in random order, 50 %"
    assert families.steps_rows(found_of(elastic__hand__cpu=[hand])) == [[]]


def test_rows_of_hand_overs():
    pairs = [{"read": 1.0, "goes_on": 0.5, "own": leaf(0.75), "handed": leaf(0.5), "more_nats": leaf(1.0)}]
    found = found_of(elastic__cpu=[family(seed, (1.0, 1.1, 1.2), hand_over=pairs) for seed in (0, 1)])
    _, row = families.hand_over_rows(found)
    assert row == ["100 % → 50 %", "2", "0.75 ±0.00", "0.50 ±0.00", "+1.000 ±0.000"]
    assert families.hand_over_rows(found_of(elastic__cpu=[family(0, (1.0, 1.1, 1.2))])) == [[]]


def test_results_show_and_judge_families(tmp_path):
    """In order .1 better in both seeds, at both budgets; the stream's order adds .2 and nothing. Long texts help by .1."""
    made = {"hand": (1.0, 1.1, 1.2), "units": (1.0, 1.2, 1.3), "order": (1.0, 1.4, 1.3),
            "alike": (1.0, 1.1, 1.2), "short": (1.1, 1.2, 1.3), "large": (0.9, 1.0, 1.1),
            "third": (0.9, 1.0, 1.1), "full": (0.9, 1.2, 1.1)}  # fmt: skip
    for seed, (kind, losses) in itertools.product((0, 1), made.items()):
        made_up = family(seed, losses)
        for size, loss in zip(made_up["budgets"], losses, strict=True):
            size["long_loss_nats"] = leaf(loss + 1)
        (tmp_path / f"elastic-{kind}-cpu-seed{seed}.json").write_text(json.dumps(made_up))
    found = {row[0]: row[1:3] for row in report.claims(report.load(tmp_path))}
    verdict, figure = found["Elastic: the order of importance matters"]
    assert verdict == "reproduced"
    assert figure == "by hand, units in random order, minus that: +0.100 ±0.000, +0.100 ±0.000 nats"
    verdict, figure = found["Elastic: so does that of the stream, here turned"]
    assert verdict == "in part"
    assert figure == "by hand, units and stream in random order, minus that: +0.200 ±0.000, +0.000 ±0.000 nats"
    verdict, figure = found["Elastic: the second stage, of long texts, helps on them"]
    assert verdict == "reproduced"
    assert figure == "there, short texts alone minus that: +0.100 ±0.000, +0.100 ±0.000, +0.100 ±0.000 nats"
    assert found["Elastic: the router beats widths by sensitivity"][0] == "not tested here"
    verdict, figure = found["Elastic: the larger budgets more often in stage 2"]  # of the largest too, whose budget it is
    assert (verdict, figure.count("±")) == ("reproduced", 3)
    for begun, right in (("full widths, as the paper's", "in part"), ("widths by sensitivity", "reproduced")):
        assert found[f"Elastic: the router, begun at {begun}, beats widths by hand"][0] == right
    assert "### The order of units, while budgets train" in report.results(tmp_path)
