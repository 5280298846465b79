"""What is behind a run's figures, against values by hand and against enumeration."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import summary_of

import evals
from system.presets import PRESETS
from text.batches import Position
from tools import controls

THINK, CLOSE, END = 9, 10, 11
TOKENIZER = SimpleNamespace(
    think=THINK, close=CLOSE, tags=(THINK, CLOSE), end=END, ends=(END,), begin=(), encode=lambda text: []
)


def positions_of(contexts, targets):
    places = [Position(c, [t]) for c, t in zip(contexts, targets, strict=True)]
    config = dataclasses.replace(PRESETS["smoke"], rlp=dataclasses.replace(PRESETS["smoke"].rlp, thought_len=3))
    return evals.Positions(places, TOKENIZER, config, ["a"] * len(places))


THOUGHTS = torch.tensor([[[1, 2, 3, CLOSE, CLOSE], [4, CLOSE, CLOSE, CLOSE, CLOSE]], [[CLOSE] * 5, [1, 2, 3, 4, 5]]])


def test_halves_by_hand():
    expected = [[[1] + [CLOSE] * 4, [CLOSE] * 5], [[CLOSE] * 5, [1, 2, CLOSE, CLOSE, CLOSE]]]
    assert controls.halved(THOUGHTS, CLOSE).tolist() == expected


def test_shuffled_thoughts_have_their_tokens_in_every_order_and_end_where_they_did():
    found = [controls.shuffled(THOUGHTS, CLOSE, seed) for seed in range(60)]
    for thoughts in found:
        assert thoughts[0, 0, 3:].tolist() == [CLOSE, CLOSE]
        assert thoughts[0, 1].tolist() == THOUGHTS[0, 1].tolist()
        assert thoughts[1, 0].tolist() == [CLOSE] * 5
        assert thoughts[1, 1].sort().values.tolist() == [1, 2, 3, 4, 5]
    assert {tuple(t[0, 0, :3].tolist()) for t in found} == set(itertools.permutations([1, 2, 3]))


def test_pass_at_k_is_the_share_of_draws_of_k_thoughts_with_a_right_one(monkeypatch):
    """Four thoughts, of which 0, 1, 2, 4 are right, and every choice of k of them."""
    n_right = [0, 1, 2, 4]
    monkeypatch.setattr(controls, "K", (1, 2, 4))
    monkeypatch.setattr(evals, "problem_positions", lambda corpus, config: None)
    share = {"correct": torch.tensor(n_right) / 4}
    monkeypatch.setattr(evals, "measure_thoughts", lambda model, positions, temperature, n: share)
    found = controls.pass_at_k(None, None, PRESETS["smoke"])
    for k in (1, 2, 4):
        draws = [[any(pick) for pick in itertools.combinations([1] * c + [0] * (4 - c), k)] for c in n_right]
        assert found[str(k)]["mean"] == pytest.approx(sum(sum(d) / len(d) for d in draws) / 4)


def test_what_is_left_of_thoughts_is_scored_after_them(make_model):
    """Each control against a plain pass over context, tags, thought and target; minus the base without a thought."""
    model, base = make_model(), make_model(norm_eps=1e-2)
    positions = positions_of([[1, 2, 3], [4, 5], [6, 7]], [2, 3, 4])
    own = evals.measure_thoughts(model, positions, positions.config.rlp.temperature, positions.config.eval.samples)
    found = controls.remains(model, base, positions)

    def logp(network, tokens, target):
        hidden, _ = network(torch.tensor([tokens]))
        logits = network.logits(hidden[0, -1]).index_fill(0, torch.tensor([THINK, CLOSE]), -torch.inf)
        return logits.log_softmax(-1)[target].item()

    thoughts = own["thought_BGL"]
    seed, close = positions.config.seed, CLOSE
    made = {"own": thoughts, "swapped": evals.swapped(thoughts, seed), "first half": controls.halved(thoughts, close),
            "shuffled": controls.shuffled(thoughts, close, seed), "empty": torch.full_like(thoughts, close)}  # fmt: skip
    for name, given in made.items():
        gains = []
        for place, group in zip(positions.places, given.tolist(), strict=True):
            plain = logp(base, place.context, place.target[0])
            for thought in group:
                inside = [*itertools.takewhile(lambda t: t != CLOSE, thought), CLOSE]
                gains.append(logp(model, [*place.context, THINK, *inside], place.target[0]) - plain)
        assert found[name]["mean"] == pytest.approx(sum(gains) / len(gains), abs=1e-6), name


def test_changed_positions_by_plain_passes(make_model):
    """The likeliest token after the likeliest thought, its rank among the base's predictions, and who is right."""
    model, base = make_model(), make_model(norm_eps=1.0)
    contexts, targets = [[1, 2, 3], [4, 5], [6, 7], [0, 8], [2, 2, 2]], [2, 3, 4, 1, 0]
    positions, rows = positions_of(contexts, targets), []
    for context, target in zip(contexts, targets, strict=True):
        tokens = [*context, THINK]
        for _ in range(3):
            logits = model.logits(model(torch.tensor([tokens]))[0][0, -1]).index_fill(0, torch.tensor([THINK]), -torch.inf)
            tokens.append(int(logits.argmax()))
            if tokens[-1] in (CLOSE, END):
                break
        tokens += [CLOSE] * (tokens[-1] != CLOSE)
        ban = torch.tensor([THINK, CLOSE])
        said = int(model.logits(model(torch.tensor([tokens]))[0][0, -1]).index_fill(0, ban, -torch.inf).argmax())
        plain = base.logits(base(torch.tensor([context]))[0][0, -1]).index_fill(0, ban, -torch.inf)
        order = plain.argsort(descending=True).tolist()
        rows.append((said != order[0], 1 + order.index(said), said == target, order[0] == target))
    found = controls.changed(model, base, positions)
    means = [sum(map(float, column)) / len(rows) for column in zip(*rows, strict=True)]
    assert [found[name]["mean"] for name in ("changed", "rank", "right", "base_right")] == pytest.approx(means)
    ranks = sorted(rank for is_changed, rank, *_ in rows if is_changed)
    assert ranks
    assert found["median_rank_where_changed"] == ranks[(len(ranks) - 1) // 2]


def test_a_gate_mixes_probabilities():
    """By hand: a quarter of .5 and three quarters of .1, for odds of 3."""
    found = controls.mixed(*(torch.tensor([x]).log() for x in (3.0, 0.5, 0.1)))
    assert found.exp().item() == pytest.approx(0.25 * 0.5 + 0.75 * 0.1)


def test_a_gate_learns_from_the_states_when_a_thought_helps():
    """Thoughts help where the first channel is 1 and hurt where it is -1; the other three are noise."""
    torch.manual_seed(0)
    state_RE = torch.randn(400, 4)
    state_RE[:, 0] = state_RE[:, 0].sign()
    plain_R = torch.full((400,), -1.0)
    thought_R = plain_R + 2 * state_RE[:, 0]
    weight_R = controls.fit_gate(state_RE, plain_R, thought_R)(state_RE)[:, 0].sigmoid()
    assert weight_R[state_RE[:, 0] > 0].min() > 0.9
    assert weight_R[state_RE[:, 0] < 0].max() < 0.1


def test_states_with_and_without_a_thought_are_those_that_predictions_are_read_from(make_model):
    """Two thoughts at each of three positions, of which one stands two tokens back."""
    model = make_model()
    positions = positions_of([[1, 2, 3, 4], [4, 5], [6, 7]], [2, 3, 4])
    positions.places[0] = positions.places[0]._replace(back=2)
    positions = positions._replace(config=dataclasses.replace(
        positions.config, eval=dataclasses.replace(positions.config.eval, samples=2)))  # fmt: skip
    state_RE, plain_R, thought_R = controls.both_ways(model, positions)
    target_R = torch.tensor([2, 3, 4]).repeat_interleave(2)
    for state_RD, logp_R in zip(state_RE.chunk(2, dim=1), (plain_R, thought_R), strict=True):
        logits_RV = model.logits(state_RD).index_fill(1, torch.tensor([THINK, CLOSE]), -torch.inf)
        expected = logits_RV.log_softmax(-1).gather(1, target_R[:, None])[:, 0]
        assert logp_R.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    own = evals.measure_thoughts(model, positions, positions.config.rlp.temperature, 2)
    assert thought_R.view(3, 2).mean(1).tolist() == pytest.approx(own["logp"].tolist(), abs=1e-5)
    assert plain_R[::2].tolist() == pytest.approx(own["logp_plain"].tolist(), abs=1e-5)


@pytest.mark.parametrize("mode", ["rlvr", "sft"])
def test_controls_of_a_whole_run_and_of_the_rivals(program, tmp_path, mode, capsys):
    """Every figure has an interval; the losses are those at the run's own text positions."""
    run = tmp_path / "run"
    assert program(run, "--mode", mode) == 0
    assert controls.main([str(run)]) == 0
    assert "wrote" in capsys.readouterr().out
    found, summary = json.loads((run / "controls.json").read_text()), summary_of(run)
    assert found["levels"].keys() == {"as trained", "1 more", "2 more", "3 more", "distractors"}
    assert found["levels"]["3 more"]["chain"].keys() == {"base", mode}
    assert found["thoughts"].keys() == {"own", "swapped", "shuffled", "first half", "empty"}
    assert found["thoughts"]["own"] == pytest.approx(summary["gain_nats"]["frozen_base"], abs=1e-5)
    gain = found["text"]["base"]["mean"] - found["text"]["thought"]["mean"]
    assert gain == pytest.approx(summary["positions"]["text"][mode]["gain_nats"]["frozen_base"]["mean"], abs=1e-5)
    for kind, gate in found["gate"].items():
        own = summary["positions"][kind][mode]["gain_nats"]["frozen_base"]["mean"]
        assert gate["thought"]["mean"] == pytest.approx(own, abs=1e-5)
        without = own - summary["positions"][kind][mode]["gain_nats"]["own_no_think"]["mean"]
        assert gate["no thought"]["mean"] == pytest.approx(without, abs=1e-5)
        assert 0 < gate["weight"]["mean"] < 1
    assert found["gate"].keys() == {"text", "computed"}
    (run / "controls.json").write_text(json.dumps({"text": found["text"]}))
    assert controls.main([str(run), "--parts", "levels"]) == 0  # what was measured before stays
    again = json.loads((run / "controls.json").read_text())
    assert again == {key: found[key] for key in ("text", "mode", "seed", "versions", "levels")}


@pytest.mark.parametrize("content", [None, '{"mode": "pretrain"}'])
def test_what_is_no_finished_run_with_thoughts_is_refused(tmp_path, content, capsys):
    if content:
        (tmp_path / "summary.json").write_text(content)
    assert controls.main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert ("give a run of rlp" if content else "holds no summary.json") in said.out + said.err


def test_controls_of_no_run_are_refused(capsys):
    assert controls.main([]) == 2
    said = capsys.readouterr()
    assert "no run is named; give the folder of one" in said.out + said.err
