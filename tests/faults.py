"""Deliberate faults, one at a time, in a copy of the repo: the tests named must notice each of them.

    python tests/faults.py              all of them, in about half an hour on one core
    python tests/faults.py gain_sign    those that are named

Prints a line a fault; the exit code is 1 if one passed unnoticed. pytest does not run this file: test_faults.py only
looks whether every fault can still be put in.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Fault(NamedTuple):
    """One text of a file, which occurs there once, replaced by another."""

    name: str
    file: str
    text: str
    wrong: str
    tests: str  # files of tests/ without `test_` and `.py`, one of which must fail


FAULTS = [
    # the objective
    Fault("information_gain_sign", "rlp.py", "(logp_pred_BG - logp_ema_B[:, None])",
          "(logp_ema_B[:, None] - logp_pred_BG)", "rlp"),
    Fault("reward_without_floor", "rlp.py", "return gain_BG.clamp(min=floor)", "return gain_BG", "rlp"),
    Fault("advantage_factor", "rlp.py", "G / (G - 1) * (reward_BG", "(reward_BG", "rlp"),
    Fault("advantage_over_batch", "rlp.py", "reward_BG.mean(dim=1, keepdim=True)", "reward_BG.mean().view(1, 1)", "rlp"),
    Fault("clip_maximum", "rlp.py", "torch.minimum(", "torch.maximum(", "rlp"),
    Fault("clip_bounds_swapped", "rlp.py", "clamp(1 - eps_low, 1 + eps_high)", "clamp(1 - eps_high, 1 + eps_low)", "rlp"),
    Fault("mean_over_padding", "rlp.py", "sum(dim=1) / length_R", "sum(dim=1) / value_RL.shape[1]", "rlp"),
    Fault("teacher_too_fast", "rlp.py", "theta, 1 - tau)", "theta, tau)", "rlp"),
    Fault("thought_fed_ahead", "rlp.py", "token_rl[:, :-1]], dim=1)", "token_rl[:, 1:]], dim=1)", "rlp"),
    Fault("policy_may_open_thoughts", "rlp.py", "(think,), temperature)", "(), temperature)", "rlp"),
    Fault("kl_of_the_other_side", "rlp.py", "half_R = d_RL.sum(dim=1).square() / 2",
          "half_R = (torch.exp(-d_RL) - 1 + d_RL).sum(dim=1)", "rlp"),
    Fault("ratio_to_the_samplers", "rlp.py", 'batch.setdefault("old_logp_RL", logp_RL.detach())',
          "thoughts.logp_RL", "rlp"),
    Fault("predictor_sign", "rlp.py", "loss - c.predictor * c.group_size", "loss + c.predictor * c.group_size", "rlp"),
    Fault("predictor_of_one_thought_alone", "rlp.py", "c.predictor * c.group_size", "c.predictor", "rlp"),
    Fault("predictor_after_the_second_thought", "rlp.py", "thoughts.tokens_RL[:: c", "thoughts.tokens_RL[1 :: c", "rlp"),
    Fault("all_answers_count", "rlp.py", '(batch["is_right_BG"], kind_B == 0)', 'batch["is_right_BG"]', "rlp"),
    Fault("any_answer_matches", "rlp.py", "target_BX[:, None]).all(-1).float()", "target_BX[:, None]).any(-1).float()",
          "rlp"),
    Fault("rivals_reward_for_all", "rlp.py", 'is_right_BG if c.reward == "match"', 'is_right_BG if c.reward', "rlp"),
    Fault("sure_positions_count", "rlp.py", "reward_BG.where(entropy_B[:, None] >= c.min_entropy, 0)",
          "reward_BG.where(entropy_B[:, None] < c.min_entropy, 0)", "rlp"),
    Fault("fine_tuned_on_questions", "text/batches.py", "problem.thought, foretell=False)", "problem.thought)", "data"),
    # what is read
    Fault("masked_thoughts_trained", "text/batches.py", "[(inside, back == 0) for", "[(inside, True) for", "data"),
    Fault("opening_tag_trained", "text/batches.py", "[(tokenizer.think, False)]", "[(tokenizer.think, True)]", "data"),
    Fault("thought_of_another_token", "text/batches.py", "thoughts.get(i + back)", "thoughts.get(i - back)", "data"),
    Fault("thoughts_never_back", "text/batches.py", "rng.choice((0, config.rlp.back))", "0", "data"),
    Fault("all_results_have_thoughts", "text/batches.py", "if rng.random() < often:", "if True:", "data"),
    Fault("quotes_look_ahead", "text/batches.py", "min(i + ahead, t)", "i + ahead", "data"),
    Fault("thoughts_of_results_all_worked", "text/batches.py", "some_of(thought, rng, fit.worked)", "thought", "data"),
    Fault("questions_foretold", "text/batches.py", "tokenizer, problem, thought, foretell=False)",
          "tokenizer, problem, thought)", "data"),
    Fault("target_of_the_next_document", "text/batches.py", "(ids_BT[:, 1:] != ids_BT[:, :-1]) | ~wanted",
          "~wanted", "data"),
    Fault("kinds_in_turn", "text/batches.py", "shares[k] * n_next - n_tokens[k]", "-n_tokens[k]", "data"),
    Fault("all_families_at_once", "text/batches.py", "families[0] if intro else rng", "rng", "data"),
    Fault("text_from_the_start", "text/batches.py", "} if intro else", "} if False else", "data"),
    Fault("back_at_answers", "text/batches.py", "return Position(prompt, answer[: fit.horizon])",
          "return Position(prompt, answer[: fit.horizon], back=fit.back)", "data"),
    Fault("back_beyond_the_beginning", "text/batches.py", "back=fit.back * (t >= fit.back)", "back=fit.back", "data"),
    Fault("random_positions_from_one", "text/batches.py", "max(1, fit.back) if fit.back <= last else 1", "1", "data"),
    Fault("mixture_begins_again", "text/batches.py", "config.warmup.steps + step, fit.batch", "step, fit.batch", "data"),
    Fault("wrong_results_in_ledgers", "text/computed.py", "balance = int(thought[-1])",
          "balance = (int(thought[-1]) + 1) % 10", "computed"),
    Fault("wrong_thoughts_in_traces", "text/computed.py", "value = after", "value = n", "computed"),
    # the loop and its phases
    Fault("enough_ignored", "system/loop.py", "ended = bool(enough) or step", "ended = step", "train"),
    Fault("enough_is_not_saved", "system/loop.py", "settings.checkpoint_every == 0 or ended:",
          "settings.checkpoint_every == 0:", "train"),
    Fault("best_family_is_enough", "train.py", "if min(found.values()) >=", "if max(found.values()) >=", "train"),
    Fault("no_warm_up", "train.py", "config.warmup.steps > 0 and not", "config.warmup.steps < 0 and not", "train"),
    Fault("warmed_up_again", "train.py", "and not rundir.was_warmed(", "and rundir.was_warmed != (", "train"),
    Fault("warm_up_of_any_settings", "train.py", 'kept("warmed", "warmup")', 'kept("warmed")', "train"),
    # thoughts
    Fault("score_with_tags", "thoughts.py", "mask_banned(model.logits(hidden_BXD), tags)",
          "model.logits(hidden_BXD)", "generate"),
    Fault("thought_outlives_end", "thoughts.py", "torch.isin(token, ends) | ", "", "generate"),
    Fault("target_of_another", "thoughts.py", "target_BX.repeat_interleave(G, dim=0), ASK",
          "target_BX.repeat(G, 1), ASK", "generate"),
    Fault("length_of_all_rows", "thoughts.py", "length_R[rows] += thinking", "length_R[rows] += 1", "generate"),
    Fault("noise_of_who_is_left", "thoughts.py", "uniform_R1[rows])", "uniform_R1[: len(rows)])", "generate"),
    Fault("a_card_asked_at_every_token", "thoughts.py", "if (step + 1) % every == 0:", "if True:", "generate"),
    Fault("cut_without_its_last_token", "thoughts.py", "torch.where(cut, CUT, THINKING)", "torch.where(cut, 0, THINKING)",
          "generate"),
    Fault("given_thought_unclosed", "thoughts.py", "after_rY.shape[1]), value=close)",
          "after_rY.shape[1]), value=tokenizer.end)", "generate"),
    Fault("given_target_shifted", "thoughts.py", "target_rX[:, :-1].clamp", "target_rX[:, 1:].clamp", "generate"),
    Fault("thought_right_before_its_target", "thoughts.py", "begin = (early if back else cache)",
          "begin = cache", "generate"),
    Fault("text_behind_a_thought_unread", "thoughts.py", "fed_rT.scatter_(1, at_rZ[:, 1:], after_rY)",
          "fed_rT.scatter_(1, at_rZ[:, back + 1 :], after_rY[:, back:])", "generate"),
    Fault("places_of_dropped_forks", "attention.py", "of_R * self.n + place_R % self.n", "place_R", "model"),
    Fault("forks_in_the_order_of_places", "attention.py", "found.index_select(0, place_R) if", "found[: len(place_R)] if",
          "model"),
    Fault("repeated_forks", "attention.py", "if len(rows.unique()) < len(rows):", "if False:", "model"),
    Fault("gate_turned_round", "tools/controls.py", "F.logsigmoid(-logit_R) + plain_R", "F.logsigmoid(logit_R) + plain_R",
          "controls"),
    Fault("states_handed_to_other_heads", "nested.py", "index_copy(dim, of_old, t)", "index_copy(dim, of_old, t.flip(dim))",
          "elastic"),
    Fault("cut_one_token_late", "thoughts.py", "cut = context_BT.shape[1] - int",
          "cut = context_BT.shape[1] + 1 - int", "generate"),
    Fault("sampled_thoughts_stay_at_the_end", "thoughts.py",
          "n_read = 0 if batch[\"back_B\"].any() else X", "n_read = X", "generate"),
    Fault("rows_in_the_order_of_back", "thoughts.py", "hidden[rows.argsort()]", "hidden", "generate"),
    Fault("share_of_one", "thoughts.py", "share_R1 * sum_RV[:, -1:]", "share_R1", "generate"),
    Fault("share_may_be_zero", "thoughts.py", "share_R1 = 1 - uniform_R1", "share_R1 = uniform_R1", "generate"),
    # the program that talks
    Fault("talk_temperature", "generate.py", "c.temperature if temperature is None else temperature",
          "c.temperature", "generate"),
    Fault("talk_without_budget", "generate.py", "submodel(family, sizes[b])", "family", "generate"),
    Fault("talk_seed", "generate.py", "prompt, c, seed, back, reads)", "prompt, c, 0, back, reads)", "generate"),
    # held-out figures
    Fault("gain_sign", "evals.py", 'sampled["logp"] - logp for', 'logp - sampled["logp"] for', "evals"),
    Fault("half_a_sigma", "evals.py", "half = 1.96 * float", "half = 0.5 * float", "evals"),
    Fault("base_reads_backwards", "evals.py", '"frozen_base": plain_logp(here, p)',
          '"frozen_base": plain_logp(here, p._replace(places=[q._replace(context=q.context[::-1]) for q in p.places]))',
          "evals"),
    Fault("empty_thought_reopened", "evals.py", "full_like(thought_BGL[:, :1, :1], close)",
          "full_like(thought_BGL[:, :1, :1], positions.tokenizer.think)", "evals"),
    Fault("five_forced_tokens", "evals.py", "encode(p.thought or \"\")[:2]", "encode(p.thought or \"\")[:5]", "evals"),
    Fault("sampled_at_five", "evals.py", "positions, c.rlp.temperature, n)", "positions, 5.0, n)", "evals"),
    Fault("forced_at_five", "evals.py", "measure_thoughts(model, positions, t, 1, forced_Bl)",
          "measure_thoughts(model, positions, 5.0 * t, 1, forced_Bl)", "evals"),
    Fault("samples_count_as_problems", "evals.py", "m = min(n * samples, ", "m = n * samples + 0 * min(n, ", "evals"),
    Fault("bootstrap_over_positions", "evals.py", "of_value = _numbered(documents)\n        total",
          "of_value = np.arange(len(values)) % N\n        total", "evals"),
    Fault("bootstrap_of_all", "evals.py", "multinomial(N - 1, ", "multinomial(N, ", "evals"),
    Fault("thoughts_stay", "evals.py", "thought_BGL[ring.roll(1)]", "thought_BGL[ring]", "evals"),
    Fault("swapped_thoughts_are_own", "evals.py", "logp_after(model, positions, swapped(thought_BGL, c.seed))",
          "logp_after(model, positions, thought_BGL)", "evals"),
    Fault("computed_positions_of_training", "evals.py", 'draw_computed(rng, split, ',
          'draw_computed(rng, "train", ', "evals"),
    Fault("validated_on_the_test", "evals.py", 'problems_per_family=n, split="val"', "problems_per_family=n",
          "evals"),
    Fault("no_vote_for_the_full_widths", "routers.py", "full * FULL_VOTE", "0 * FULL_VOTE", "elastic"),
    Fault("one_sided_mcnemar", "evals.py", "min(1.0, 2 * tail", "min(1.0, tail", "evals"),
    Fault("cuts_without_their_end", "nested.py", "int(index[b - 1]) + 1]", "int(index[b - 1])]", "elastic_runs"),
    Fault("the_slower_numbers", "system/machine.py", '"bf16" if low < plain', '"bf16" if low > plain', "machine"),
    Fault("errors_below_no_bound", "tools/gpu_check.py", '"ok": error <= bound', '"ok": True', "gpu_check"),
    Fault("pass_at_k_of_wrong_ones", "tools/controls.py", "math.comb(n - c, k)", "math.comb(c, k)", "controls"),
    Fault("halves_of_the_width", "tools/controls.py", "place >= n_BG1 // 2", "place >= n_BG1.amax() // 2",
          "controls"),
    Fault("shuffled_tags", "tools/controls.py", "key_BGL + 2 * behind_BGL", "key_BGL", "controls"),
    Fault("rank_from_below", "tools/controls.py", "logits_BV > logits_BV.gather", "logits_BV < logits_BV.gather",
          "controls"),
    Fault("gain_over_the_model_itself", "tools/controls.py", "plain, thought_BGL = evals.plain_logp(base, positions)",
          "plain, thought_BGL = evals.plain_logp(model, positions)", "controls"),
    Fault("all_repeats", "evals.py", "pairwise(context[:-1])", "pairwise(context)", "evals"),
    Fault("repeats_of_one_token", "evals.py", "tuple(context[-2:]) in earlier", "context[-1] in context[:-1]", "evals"),
    Fault("windows_overlap", "evals.py", "len(document) - length), length)",
          "len(document) - length), length // 2)", "evals"),
    Fault("any_token_right", "evals.py", "same_RX.all(-1)", "same_RX.any(-1)", "evals"),
    Fault("change_of_other_sign", "evals.py", "(loss_after - loss_before)", "(loss_before - loss_after)", "evals"),
    Fault("text_weighs_as_problems", "evals.py", "w * i[\"mean\"] for", "0.5 * i[\"mean\"] for", "evals"),
    Fault("kl_the_other_way", "evals.py", "F.kl_div(logp_BTV, wanted_BTV", "F.kl_div(wanted_BTV, logp_BTV", "evals"),
    Fault("reference_is_parent", "evals.py", 'found[reference]["loss_nats"]', "parent", "evals"),
    Fault("long_text_from_its_start", "evals.py", "[:, c.seq_len - 1 :]", "[:, : 1 - c.seq_len]", "evals"),
    Fault("fastest_of_five", "evals.py", "sorted(times)[2]", "sorted(times)[0]", "evals"),
    Fault("family_without_router", "evals.py", "storage_bytes(model, router, s)", "storage_bytes(model, s)", "evals"),
    # elastic
    Fault("teachers_count_alike", "elastic.py", "p_tV.mul_(w) if", "p_tV if", "elastic"),
    Fault("full_ce_for_all", "elastic.py", "c.ce + is_full * c.full_ce", "c.ce + c.full_ce", "elastic"),
    Fault("full_teaches_itself", "elastic.py", "elif c.self_kl and not is_full:", "elif c.self_kl:", "elastic"),
    Fault("together_all_alike", "elastic.py", "weights[n] / sum(weights)", "1 / len(weights)", "elastic"),
    Fault("seldom_drawn_weighs_less", "elastic.py", ".double().mean()) / drawn[n]", ".double().mean())", "elastic"),
    Fault("ends_are_drawn_too", "system/config.py", "inner = range(1, len(weights) - 1)",
          "inner = range(len(weights))", "elastic"),
    Fault("widths_below_both_neighbours", "routers.py", "BELOW * below.clamp(0)", "0 * below.clamp(0)", "elastic"),
    Fault("rivals_cost_of_all_steps", "train.py", 'steps=ended.meta["step"]', "steps=9", "elastic_runs"),
    Fault("search_takes_the_worst", "elastic.py", "min(candidates, key=loss)", "max(candidates, key=loss)", "elastic"),
    Fault("votes_of_another_budget", "routers.py", "votes[j, k, n] = vote", "votes[j, k, 0] = vote", "elastic"),
    Fault("random_widths_all_alike", "routers.py", "torch.Generator().manual_seed(seed)",
          "torch.Generator().manual_seed(0)", "elastic"),
    Fault("alone_for_all_of_the_flops", "train.py", "c.steps * family / n_alone / size", "c.steps * family / size",
          "elastic_runs"),
    Fault("scratch_without_warm_up", "train.py", 'for mode in ("pretrain", "warmup"):', 'for mode in ("pretrain",):',
          "elastic_runs"),
    Fault("stream_in_bf16", "views/estimate.py", "stream = STATE_BYTES *", "stream = 2 *", "estimate"),
    Fault("stage_1_kept_late", "elastic.py", "self.step + 1 == self.c.stage_1_steps()",
          "self.step == self.c.stage_1_steps()", "elastic"),
    Fault("temperature_stays_high", "elastic.py", "0.05**at", "0.5**at", "elastic"),
    Fault("router_loss_uncounted", "elastic.py", "off.sum() * count", "off.sum()", "elastic"),
    Fault("padding_is_learned", "elastic.py", "inside = target != -100", "inside = target >= -100", "elastic"),
    # routers
    Fault("no_dead_zone", "routers.py", ".abs() - DEAD_ZONE)", ".abs())", "elastic"),
    Fault("noise_alone_is_cooled", "routers.py", "(scale * v + noise[a]) / tau", "scale * v + noise[a] / tau", "elastic"),
    Fault("one_layer_less", "routers.py", "depth_order.index(i) >= n - d", "depth_order.index(i) > n - d", "elastic"),
    Fault("wider_may_cost_less", "routers.py", "table.flip(axis).cummax(axis).values.flip(axis)", "table", "elastic"),
    Fault("router_without_slope", "routers.py", "nn.LeakyReLU(0.1)", "nn.ReLU()", "elastic"),
    Fault("straight_through_soft", "routers.py", "likeliest[a] + v - v.detach()", "likeliest[a] + v", "elastic"),
    Fault("neighbours_swapped", "routers.py", "(b - trained[below]) / (", "(trained[above] - b) / (", "elastic"),
    # models inside a model
    Fault("gamma_ignored", "nested.py", "m = m * gamma.to(t) if", "m = m if", "elastic"),
    Fault("norms_without_root", "nested.py", "share(masks[NORMS[rest]]).sqrt()",
          "share(masks[NORMS[rest]])", "elastic"),
    Fault("epsilon_as_it_was", "nested.py", "norm.eps = eps * float(share(masks.d_model).detach())",
          "norm.eps = eps", "elastic"),
    Fault("heads_across_groups", "nested.py", "view(n_groups, -1)[:, : n // n_groups].flatten()",
          "flatten()[:n]", "elastic"),
    Fault("turned_the_other_way", "nested.py", "t = Q_DD.T @ t", "t = Q_DD @ t", "elastic"),
    Fault("budget_of_weight_0_is_drawn", "system/config.py", "for n in inner if weights[n]}", "for n in inner}", "elastic"),
    Fault("all_groups_cost_flops", "views/estimate.py", "(1.0 if c.kl > 0 else signal) * thoughts", "thoughts", "estimate"),
    Fault("routers_gradient_unseen", "system/loop.py", "grad_norm = np.nan", "pass", "train"),
    Fault("enough_by_the_lengths_of_rlp", "train.py", "worked_lengths(config, corpus)", "config", "train"),
    Fault("equal_names_in_two_folders", "text/sources.py", "file.relative_to(root) if root else file.name", "file.name",
          "sources"),
    Fault("warmth_forgotten", "system/rundir.py", "return was_warmed(saved.init) if began is None else began",
          "return False", "train"),
    Fault("stuck_widths", "routers.py", "if best[1] > MET * target:", "if best[1] < 0:", "elastic"),
    Fault("stage_1_kept_without_stage_2", "elastic.py", "self.c.has_stage_2() and ", "", "elastic_runs"),
    Fault("flops_of_widths_by_hand", "views/estimate.py", "sizes, found = sizes or family(full, c), []",
          "sizes, found = family(full, c), []", "elastic_runs"),
    Fault("space_before_every_part", "text/tokenizer.py", "self.going_on if text[:1].isspace() else self.file", "self.file",
          "init"),
    Fault("cpt_of_other_problems", "system/rundir.py", "getattr(config.rlp, name) or None", "None", "config"),
    Fault("contexts_at_full_length", "views/estimate.py", '"context_len": context_tokens}', '"context_len": None}',
          "estimate"),
    Fault("curves_beyond_the_run", "system/rundir.py", 'min(high, lines[-1]["step"])', "high", "elastic_runs"),
    Fault("chains_beside_their_last_base", "views/rivals.py", 'begun, gain = means(chain[-1], TEXT_LOSS, "base"), {}',
          'begun, gain = means(chain[0], TEXT_LOSS, "base"), {}', "rivals"),
    Fault("muon_at_one_rate", "tools/rivals.py", "own.muon_lr * rate / own.lr", "own.muon_lr", "rivals"),
    Fault("cut_frames", "text/sources.py", "require(self.frame is None,", "require(True,", "sources"),
    Fault("a_lost_tokenizer", "system/rundir.py", 'require(saved.data.tokenizer != "corpus",', "require(True,", "train"),
    Fault("files_of_others", "system/rundir.py", 'if (folder / "config.json").exists() else', "if True else", "train"),
    Fault("sft_reads_no_problems", "text/lengths.py", 'if reads_problems or name == "sft"', "if reads_problems",
          "problem_sources"),
    Fault("horizon_of_the_figures", "text/lengths.py", "if known > fit.horizon and", "if False and", "problem_sources"),
    Fault("widened_norm", "nested.py", '(narrow[name].axes["I"] / axes["I"]) ** 0.5',
          '(narrow[name].axes["I"] / axes["I"]) ** 1.0', "widen"),
    # what a reader found untested
    Fault("masks_of_depth_twice", "nested.py", "m = m * gamma.to(t) if rest", "m = m * gamma.to(t).square() if rest",
          "elastic"),
    Fault("ffn_masked_before_its_square", "nested.py", '"mixer.down_proj.weight": "DF",',
          '"mixer.down_proj.weight": "D", "mixer.up_proj.weight": "F",', "elastic"),
    Fault("convolutions_bias_unmasked", "nested.py", '"mixer.in_proj.weight": "O", "mixer.conv_bias": "E",',
          '"mixer.in_proj.weight": "O",', "elastic"),
    Fault("queries_unmasked", "nested.py", '"mixer.q_proj.weight": "I", "mixer.q_proj.bias": "I", ', "", "elastic"),
    Fault("norms_unmasked", "nested.py", '"norm.weight": "D", "mixer.down', '"mixer.down', "elastic"),
    Fault("time_steps_unmasked", "nested.py", 'own = {"z": i, "x": i, "dt": m["H"]}', 'own = {"z": i, "x": i}',
          "elastic"),
    Fault("noise_of_the_other_sign", "elastic.py", "return -uniform.exponential_", "return uniform.exponential_",
          "elastic"),
    Fault("masks_of_one_mode", "elastic.py", "mask_weighting(p, self.c.mask)", 'mask_weighting(p, "soft")', "elastic"),
    Fault("routers_decay", "elastic.py", "lr=self.c.router_lr, weight_decay=0.0", "lr=self.c.router_lr", "elastic"),
    Fault("dearest_by_the_largest", "routers.py", "-float(self.table(i).min())", "-float(self.table(i).max())",
          "elastic"),
    Fault("latency_of_the_quickest", "routers.py", "sorted(times[1:])[3]", "sorted(times[1:])[0]", "elastic"),
    Fault("teacher_follows_once_a_batch", "system/loop.py", "                objective.after_step(model)",
          "            objective.after_step(model)", "train"),
    Fault("texts_thoughts_seldom_empty", "text/batches.py", "[] if rng.random() < 0.85 else",
          "[] if rng.random() < 0.15 else", "data"),
    Fault("entropy_at_the_thoughts_temperature", "rlp.py", "(logits_BV.softmax(-1)).sum(-1)",
          "((logits_BV / c.temperature).softmax(-1)).sum(-1)", "rlp"),
    Fault("signal_of_rewards_alone", "rlp.py", '"signal_B": advantage_BG.abs().amax(dim=1) > 1e-5',
          '"signal_B": reward_BG.amax(dim=1) - reward_BG.amin(dim=1) > 1e-5', "rlp"),
    Fault("entropy_over_padding", "rlp.py", '"entropy_nats": -thought_mean(t.logp_RL, t.length_R)',
          '"entropy_nats": -t.logp_RL.mean(1)', "rlp"),
    Fault("closed_turned_round", "rlp.py", '"closed": t.closed_R,', '"closed": ~t.closed_R,', "rlp"),
    Fault("clipped_over_padding", "rlp.py", '"clipped": thought_mean(cut_RL, length_R)',
          '"clipped": cut_RL.double().mean(1)', "rlp"),
    Fault("clipped_by_the_other_bound", "rlp.py", "(rho_RL < 1 - c.eps_low) & (A_R1 < 0)",
          "(rho_RL < 1 - c.eps_high) & (A_R1 < 0)", "rlp"),
    Fault("handed_over_sign", "evals.py", "less = torch.cat(logp[b, b]) - torch.cat(logp[a, b])",
          "less = torch.cat(logp[a, b]) - torch.cat(logp[b, b])", "elastic_runs"),
    Fault("handed_over_pair", "evals.py", "for reader in (b, a))", "for reader in (a, b))", "elastic_runs"),
    Fault("beginnings_of_the_first_batch", "evals.py", "forced_Bl[i * n : (i + 1) * n]", "forced_Bl[: n]", "evals"),
    Fault("scorers_of_the_first_batch", "evals.py", '"correct": positions.right(t.answer_RX, target_BX, i * n)',
          '"correct": positions.right(t.answer_RX, target_BX, 0)', "evals"),
    Fault("most_important_layer_lost", "importance.py", "layers[ranking.depth[0]] = ()",
          "layers[ranking.depth[-1]] = ()", "elastic_runs"),
    Fault("one_random_order_for_three", "importance.py", 'half(axis, "random", seed) for seed',
          'half(axis, "random", 0) for seed', "elastic_runs"),
    Fault("shown_text_read_twice", "thoughts.py", "model(after, prefix.early)", "model(after, prefix.cache)",
          "generate"),
    Fault("shown_text_all_again", "thoughts.py", "ids[len(ids) - back :]", "ids[-back:]", "generate"),
    Fault("shown_thought_left_open", "thoughts.py", "    if not t.closed_R[0]:\n        shown.append(tokenizer.close)",
          "    if False:\n        shown.append(tokenizer.close)", "generate"),
    Fault("shown_tags", "thoughts.py", "int(mask_banned(model.logits(hidden_BTD[:, -1]), tokenizer.tags).argmax())",
          "int(model.logits(hidden_BTD[:, -1]).argmax())", "generate"),
    Fault("first_decides_not", "system/loop.py", "enough = said[0][1]", "enough = said[parallel.team.rank][1]",
          "parallel"),
    Fault("alone_but_saves", "system/loop.py", "saved = save() if parallel.team.world == 1 else",
          "saved = save() if parallel.team.world else", "parallel"),
    Fault("texts_not_compared", "train.py", "len(set(parallel.everyone(corpus.key))) == 1",
          "len(set(parallel.everyone(corpus.key))) > 0", "parallel"),
]  # fmt: skip


def spoiled(fault: Fault, root: Path = ROOT) -> str:
    """The file's text with the fault in it. Raises ValueError unless its text occurs exactly once."""
    before = (root / fault.file).read_text()
    if (n := before.count(fault.text)) != 1:
        raise ValueError(f"{fault.name}: {fault.file} has {fault.text!r} {n} times; it must be there once")
    return before.replace(fault.text, fault.wrong)


def tests_pass(root: Path, names: str) -> bool:
    """Whether these test files pass in a copy. Raises RuntimeError where pytest could not run them."""
    files = [f"tests/test_{name}.py" for name in names.split()]
    words = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        words, cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}, check=False
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == 0


def main(names: list[str]) -> int:
    """Returns 0 if all faults were noticed, 1 if one was not, 2 for a name that no fault has."""
    chosen = [fault for fault in FAULTS if not names or fault.name in names]
    if unknown := set(names) - {fault.name for fault in chosen}:
        print(f"no fault is called {', '.join(sorted(unknown))}; known are {', '.join(f.name for f in FAULTS)}")
        return 2
    unnoticed = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "repo"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".*", "__pycache__", "cache"))
        # 1. Without a fault all of them pass: else a failure would say nothing.
        for files in sorted({name for fault in chosen for name in fault.tests.split()}):
            if not tests_pass(root, files):
                raise RuntimeError(f"tests/test_{files}.py fails without a fault")
        # 2. With each.
        for fault in chosen:
            right, wrong = (root / fault.file).read_text(), spoiled(fault, root)
            (root / fault.file).write_text(wrong)
            passed = tests_pass(root, fault.tests)
            (root / fault.file).write_text(right)
            unnoticed += [fault.name] * passed
            print(f"{'UNNOTICED' if passed else 'noticed':9}  {fault.file:12} {fault.name}", flush=True)
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} faults were noticed")
    return int(bool(unnoticed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
