"""The hybrid model by two routes: in one pass and in pieces, alone and packed or padded, forked and in full.

The fixture `model` runs a test once for each variant below. Gradients are those of one random linear function of the
hidden states, for every weight.
"""

import copy
import math
import warnings

import pytest
import torch
from torch.testing import assert_close

import kernels
from attention import append, rope
from model import Cache, HybridLM
from system.config import ModelConfig, RopeScaling
from system.costs import count_parameters

EXACT = {"rtol": 1e-9, "atol": 1e-9}
VARIANTS = {
    "M-M*-": {},
    "M": {"pattern": "M"},
    "*": {"pattern": "*"},
    "*-": {"pattern": "*-"},
    "rope": {"rope_theta": 100.0},
    "biases": {"rope_theta": 100.0, "qkv_bias": True},
    "yarn": {"rope_theta": 100.0, "rope_scaling": RopeScaling("yarn", 4.0, 40, 1.0, 32.0, 1.14)},
    "qk_norm": {"qk_norm": True},
    "swiglu": {"ffn": "swiglu", "tie_embeddings": False},
}


@pytest.fixture(params=VARIANTS)
def model(request, make_model):
    return make_model(**VARIANTS[request.param])


def random_tokens(*shape, seed=0):
    return torch.randint(12, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows_BT, n_list):
    """The rows with their first n tokens turned into padding, and the ids that say so."""
    ids_BT = torch.zeros_like(rows_BT)
    for row, n in enumerate(n_list):
        ids_BT[row, :n] = -1
    return rows_BT, ids_BT


def run_pieces(model, sizes, tokens_BT, cache=None, ids_BT=None):
    pieces, hidden = tokens_BT.split(sizes, dim=1), []
    ids = [None] * len(sizes) if ids_BT is None else ids_BT.split(sizes, dim=1)
    for piece_BT, ids_piece in zip(pieces, ids, strict=True):
        hidden_BTD, cache = model(piece_BT, cache, ids_piece)
        hidden.append(hidden_BTD)
    return torch.cat(hidden, dim=1), cache


def gradients(model, hidden_BTD):
    weight_BTD = torch.randn(hidden_BTD.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((hidden_BTD * weight_BTD).sum(), list(model.parameters()), materialize_grads=True)


def rms_norm(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight


# --------------------------------------------------------------------------------------- pieces, causality, padding


@pytest.mark.parametrize("sizes", [[1] * 11, [1, 10], [4, 1, 5, 1], [8, 3]], ids=str)
def test_a_sequence_in_pieces_equals_one_pass(model, sizes):
    tokens_BT = random_tokens(2, 11)
    hidden_BTD, cache = model(tokens_BT)
    in_pieces_BTD, last_cache = run_pieces(model, sizes, tokens_BT)
    assert_close(in_pieces_BTD, hidden_BTD, **EXACT)
    assert_close(last_cache.layers, cache.layers, **EXACT)
    assert last_cache.n_tokens == cache.n_tokens == 11
    assert_close(gradients(model, in_pieces_BTD), gradients(model, hidden_BTD), **EXACT)


@pytest.mark.parametrize("sizes", [[1] * 9, [1, 8], [3, 6]], ids=str)
def test_a_left_padded_sequence_in_pieces_equals_one_pass(model, sizes):
    tokens_BT, ids_BT = left_padded(random_tokens(3, 9), [0, 2, 5])
    hidden_BTD, cache = model(tokens_BT, ids_BT=ids_BT)
    in_pieces_BTD, last_cache = run_pieces(model, sizes, tokens_BT, ids_BT=ids_BT)
    assert_close(in_pieces_BTD, hidden_BTD, **EXACT)
    assert_close(vars(last_cache), vars(cache), **EXACT)


@pytest.mark.parametrize("t", range(9))
def test_a_token_changes_its_own_hidden_state_and_none_before(model, t):
    tokens_BT = random_tokens(1, 9)
    changed_BT = tokens_BT.clone()
    changed_BT[:, t] = (tokens_BT[:, t] + 1) % 12
    difference_BT = (model(changed_BT)[0] - model(tokens_BT)[0]).abs().amax(-1)
    assert (difference_BT[:, :t] < 1e-12).all()
    assert (difference_BT[:, t] > 1e-3).all()


def test_left_padding_changes_no_hidden_state(model):
    tokens_BT, ids_BT = left_padded(random_tokens(3, 9), [0, 2, 5])
    hidden_BTD, _ = model(tokens_BT, ids_BT=ids_BT)
    for row, n in enumerate([0, 2, 5]):
        alone_BTD, _ = model(tokens_BT[row : row + 1, n:])
        assert_close(hidden_BTD[row : row + 1, n:], alone_BTD, **EXACT)


@pytest.mark.parametrize("sizes", [[4], [1, 3], [1, 1, 1, 1]], ids=str)
def test_left_padding_changes_nothing_in_what_goes_on_from_its_cache(model, sizes):
    tokens_BT, ids_BT = left_padded(random_tokens(3, 9), [0, 2, 4])
    _, cache = model(tokens_BT[:, :5], ids_BT=ids_BT[:, :5])
    hidden_BTD, _ = run_pieces(model, sizes, tokens_BT[:, 5:], cache)
    for row, n in enumerate([0, 2, 4]):
        alone_BTD, _ = model(tokens_BT[row : row + 1, n:])
        assert_close(hidden_BTD[row : row + 1], alone_BTD[:, 5 - n :], **EXACT)


@pytest.mark.parametrize("sizes", [[4, 3, 4], [1, 1, 9], [5, 6]], ids=str)
def test_packed_documents_equal_each_document_alone(model, sizes):
    tokens_BT = random_tokens(2, 11)
    ids_BT = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).expand(2, -1)
    packed_BTD, _ = model(tokens_BT, ids_BT=ids_BT)
    alone_BTD = torch.cat([model(document_BT)[0] for document_BT in tokens_BT.split(sizes, dim=1)], dim=1)
    assert_close(packed_BTD, alone_BTD, **EXACT)
    assert_close(gradients(model, packed_BTD), gradients(model, alone_BTD), **EXACT)


@pytest.mark.parametrize("n_last", [1, 5])
def test_a_packed_cache_goes_on_with_its_last_document(model, n_last):
    """Its last document may be shorter than the convolution's tail."""
    tokens_BT = random_tokens(2, 11)
    _, cache = model(tokens_BT[:, :8], ids_BT=torch.tensor([[0] * (8 - n_last) + [1] * n_last] * 2))
    hidden_BTD, _ = model(tokens_BT[:, 8:], cache)
    alone_BTD, _ = model(tokens_BT[:, 8 - n_last :])
    assert_close(hidden_BTD, alone_BTD[:, n_last:], **EXACT)


# ------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("n_list", [[0, 0], [0, 2]], ids=["plain", "left padded"])
def test_continuing_a_forked_cache_equals_each_full_sequence(model, n_list):
    """In values, and in the gradients of every weight, which reach the shared prefix through the cache."""
    context_BT, ids_BT = left_padded(random_tokens(2, 6), n_list)
    rest_RT = random_tokens(6, 5, seed=1)
    _, cache = model(context_BT, ids_BT=ids_BT)
    forked_RTD, _ = model(rest_RT, cache.fork(3))
    full_RT = torch.cat([context_BT.repeat_interleave(3, dim=0), rest_RT], dim=1)
    full_RTD, _ = model(full_RT, ids_BT=torch.cat([ids_BT.repeat_interleave(3, dim=0), torch.zeros_like(rest_RT)], dim=1))
    assert_close(forked_RTD, full_RTD[:, 6:], **EXACT)
    assert_close(gradients(model, forked_RTD), gradients(model, full_RTD[:, 6:]), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("n_list", [[0, 0, 0], [0, 2, 1]], ids=["plain", "left padded"])
@pytest.mark.parametrize("T", [1, 2])
def test_forks_that_are_dropped_one_after_the_other_equal_each_full_sequence(model, n_list, T):
    """Four forks of each of three contexts go on for six tokens, one at a time or two. Rows are dropped and change
    places after two and after four: of the second context none is left, then only of the first one."""
    (context_BT, ids_BT), rest_RT = left_padded(random_tokens(3, 6), n_list), random_tokens(12, 6, seed=1)
    full_RT = torch.cat([context_BT.repeat_interleave(4, dim=0), rest_RT], dim=1)
    full_ids_RT = torch.cat([ids_BT.repeat_interleave(4, dim=0), torch.zeros_like(rest_RT)], dim=1)
    full_RTD, _ = model(full_RT, ids_BT=full_ids_RT)
    _, cache = model(context_BT, ids_BT=ids_BT)
    cache, rows = cache.fork(4), torch.arange(12)
    for t in range(0, 6, T):
        kept = {2: [11, 0, 3, 2, 8], 4: [2, 1]}.get(t)
        if kept:
            rows, cache = rows[kept], cache.select(torch.tensor(kept))
        found_RTD, cache = model(rest_RT[rows, t : t + T], cache)
        assert_close(found_RTD, full_RTD[rows, 6 + t : 6 + t + T], **EXACT)


@torch.no_grad()
def test_a_fork_that_is_selected_twice_goes_on_in_two_ways(model):
    context_BT, first_RT, rest_RT = random_tokens(1, 6), random_tokens(3, 1, seed=1), random_tokens(4, 1, seed=2)
    _, cache = model(context_BT)
    _, cache = model(first_RT, cache.fork(3))
    rows = torch.tensor([1, 1, 0, 1])
    whole_RT = torch.cat([context_BT.expand(4, -1), first_RT[rows], rest_RT], dim=1)
    assert_close(model(rest_RT, cache.select(rows))[0], model(whole_RT)[0][:, -1:], **EXACT)


@torch.no_grad()
def test_forks_share_the_keys_of_their_context(make_model):
    """They are the context's own, until a row is dropped; contexts without rows are then dropped too."""
    model = make_model(pattern="M*")
    _, cache = model(random_tokens(3, 6))
    shared = cache.layers[1].keys.data_ptr()
    _, cache = model(random_tokens(12, 1), cache.fork(4))
    assert cache.layers[1].shared.keys.data_ptr() == shared
    assert cache.layers[1].own.keys.shape[2] == 1
    assert len(cache.select(torch.tensor([1, 2, 9])).layers[1].shared.keys) == 2


def test_a_fork_of_forks_equals_a_fork_of_as_many(model):
    context_BT, rest_RT = random_tokens(2, 6), random_tokens(12, 3, seed=1)
    _, cache = model(context_BT)
    expected_RTD, _ = model(rest_RT, cache.fork(6))
    assert_close(model(rest_RT, cache.fork(2).fork(3))[0], expected_RTD, **EXACT)


def test_selected_rows_of_a_cache_go_on_in_the_order_named(model):
    tokens_BT, rows = random_tokens(3, 9), torch.tensor([2, 0, 2])
    _, cache = model(tokens_BT[:, :5])
    hidden_BTD, _ = model(tokens_BT[rows, 5:], cache.select(rows))
    assert_close(hidden_BTD, model(tokens_BT)[0][rows, 5:], **EXACT)


def test_select_takes_the_document_ids_along():
    cache = Cache([(torch.randn(2, 3),)], 2, torch.tensor([[-1, 0], [0, 0]]))
    assert cache.select(torch.tensor([1, 0])).ids_BS.tolist() == [[0, 0], [-1, 0]]


@pytest.mark.parametrize("T", [1, 3])
@torch.no_grad()
def test_a_forward_pass_leaves_the_cache_given_as_it_is(model, T):
    tokens_BT, ids_BT = left_padded(random_tokens(2, 5), [0, 2])
    _, cache = model(tokens_BT, ids_BT=ids_BT)
    before = copy.deepcopy(cache)
    model(random_tokens(2, T), cache)
    assert_close(vars(cache), vars(before), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 3])
def test_continuations_of_one_cache_do_not_disturb_each_other(model, T):
    """The first writes into the room behind the keys of the past; the others find it taken."""
    context_BT, pieces = random_tokens(2, 5), [random_tokens(2, T, seed=seed) for seed in (1, 2, 3)]
    _, cache = model(context_BT[:, :4])
    _, cache = model(context_BT[:, 4:], cache)
    caches = [model(piece_BT, cache)[1] for piece_BT in pieces]
    for piece_BT, after in zip(pieces, caches, strict=True):
        hidden_BTD, _ = model(piece_BT, after)
        whole_BTD, _ = model(torch.cat([context_BT, piece_BT, piece_BT], dim=1))
        assert_close(hidden_BTD, whole_BTD[:, 5 + T :], **EXACT)


@torch.no_grad()
def test_appending_copies_the_past_only_when_its_room_is_used_up():
    """Five positions, then 140 one by one: a new buffer has room for 64 more, so one is needed at 6, 71 and 136."""
    all_BKSP, buffers = torch.randn(2, 1, 5, 3), []
    expected_BKSP = all_BKSP
    for _ in range(140):
        new_BKTP = torch.randn(2, 1, 1, 3)
        all_BKSP, expected_BKSP = append(all_BKSP, new_BKTP), torch.cat([expected_BKSP, new_BKTP], dim=2)
        buffers.append(all_BKSP.data_ptr())
    assert torch.equal(all_BKSP, expected_BKSP)
    assert [i + 6 for i in range(140) if i == 0 or buffers[i] != buffers[i - 1]] == [6, 71, 136]


def test_appending_with_gradients_keeps_them():
    past_BKSP, new_BKTP = torch.randn(1, 1, 2, 3, requires_grad=True), torch.randn(1, 1, 1, 3, requires_grad=True)
    append(past_BKSP, new_BKTP).sum().backward()
    assert (past_BKSP.grad == 1).all()
    assert (new_BKTP.grad == 1).all()


# ------------------------------------------------------------------------------------------------- layers by formula


def test_every_layer_adds_its_mixer_of_the_normalised_stream_to_the_stream(model):
    tokens_BT = random_tokens(2, 5)
    x_BTD = model.embed.weight[tokens_BT]
    for block in model.layers:
        x_BTD = x_BTD + block.mixer(rms_norm(x_BTD, block.norm), None, None)[0]
    assert_close(model(tokens_BT)[0], rms_norm(x_BTD, model.norm), **EXACT)


def test_mamba_mixer_equals_its_formulas(make_model):
    """H = 4, P = 3, K = 2, N = 5: the projection holds a gate of 12, x of 12, B and C of 10 each, and 4 step sizes."""
    mixer = make_model(pattern="M").layers[0].mixer
    u_BTD = torch.randn(2, 6, 8, dtype=torch.float64)
    z_BTI, xbc_BTE, dt_BTH = (u_BTD @ mixer.in_proj.weight.T).split([12, 32, 4], dim=-1)
    xbc_BTE, _ = kernels.causal_conv_reference(xbc_BTE, mixer.conv_weight, mixer.conv_bias)
    x_BTI, b, c = (xbc_BTE * xbc_BTE.sigmoid()).split([12, 10, 10], dim=-1)
    x_BTHP, b_BTKN, c_BTKN = x_BTI.unflatten(-1, (4, 3)), b.unflatten(-1, (2, 5)), c.unflatten(-1, (2, 5))
    dt_BTH = (1 + (dt_BTH + mixer.dt_bias).exp()).log()
    y_BTHP, _ = kernels.ssd_reference(x_BTHP, dt_BTH, -mixer.A_log.exp(), b_BTKN, c_BTKN, mixer.D)
    y_BTI = kernels.gated_norm(y_BTHP.flatten(2), z_BTI, mixer.norm_weight, 2, 1e-5)
    assert_close(mixer(u_BTD, None, None)[0], y_BTI @ mixer.out_proj.weight.T, **EXACT)


def test_relu2_feed_forward_squares_the_positive_part(make_model):
    mixer, x_BTD = make_model(pattern="M-").layers[1].mixer, torch.randn(2, 5, 8, dtype=torch.float64)
    up_BTF = x_BTD @ mixer.up_proj.weight.T
    expected_BTD = torch.where(up_BTF > 0, up_BTF**2, 0) @ mixer.down_proj.weight.T
    assert_close(mixer(x_BTD, None, None)[0], expected_BTD, **EXACT)


def test_swiglu_feed_forward_gates_with_a_silu(make_model):
    mixer, x_BTD = make_model(pattern="M-", ffn="swiglu").layers[1].mixer, torch.randn(2, 5, 8, dtype=torch.float64)
    gate_BTF, up_BTF = x_BTD @ mixer.gate_proj.weight.T, x_BTD @ mixer.up_proj.weight.T
    expected_BTD = (gate_BTF * gate_BTF.sigmoid() * up_BTF) @ mixer.down_proj.weight.T
    assert_close(mixer(x_BTD, None, None)[0], expected_BTD, **EXACT)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_grouped_query_attention_equals_softmax_attention_with_repeated_keys_and_values(make_model, qk_norm):
    attention = make_model(pattern="*", qk_norm=qk_norm).layers[0].mixer
    x_BTD = torch.randn(2, 5, 8, dtype=torch.float64)
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    q_BHTP, k_BKTP, v_BKTP = (project(x_BTD).unflatten(-1, (-1, 4)).transpose(1, 2) for project in projections)
    if qk_norm:
        q_BHTP, k_BKTP = rms_norm(q_BHTP, attention.q_norm), rms_norm(k_BKTP, attention.k_norm)
    k_BHTP, v_BHTP = (t.repeat_interleave(2, dim=1) for t in (k_BKTP, v_BKTP))
    scores_BHTT = q_BHTP @ k_BHTP.transpose(-1, -2) / math.sqrt(4)
    future_TT = torch.ones(5, 5, dtype=torch.bool).triu(1)
    y_BHTP = scores_BHTT.masked_fill(future_TT, -torch.inf).softmax(-1) @ v_BHTP
    expected_BTD = attention.o_proj(y_BHTP.transpose(1, 2).flatten(2))
    assert_close(attention(x_BTD, None, None)[0], expected_BTD, **EXACT)


@pytest.mark.parametrize("shift", [1, 7, 100])
def test_rope_scores_depend_on_differences_of_positions_only(shift):
    q_BHTP, k_BHTP = torch.randn(2, 1, 2, 6, 8, dtype=torch.float64)

    def scores(start):
        return rope(q_BHTP, start, 1e4) @ rope(k_BHTP, start, 1e4).transpose(-1, -2)

    assert_close(scores(shift), scores(0), **EXACT)


def test_rope_turns_each_pair_at_its_own_rate():
    """P = 4 and theta = 100: channels 0 and 2 turn by 1 radian a position, 1 and 3 by 100^(-2/4) = 0.1."""
    turned_BHTP = rope(torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 5, 4), start=3, theta=100.0)
    expected = [[math.cos(t), math.cos(t / 10), math.sin(t), math.sin(t / 10)] for t in range(3, 8)]
    assert_close(turned_BHTP[0, 0], torch.tensor(expected))


# ---------------------------------------------------------------------------------------------------- shapes, config


@pytest.mark.parametrize(("tied", "head"), [(True, 0), (False, 12 * 8)])
@pytest.mark.parametrize(("ffn", "n_matrices"), [("relu2", 2), ("swiglu", 3)])
def test_count_parameters_equals_the_count_by_hand(make_model, tied, head, ffn, n_matrices):
    """The tiny model: D = 8, V = 12, F = 12; Mamba H = 4, P = 3, K = 2, N = 5, W = 4, so E = 4 * 3 + 2 * 2 * 5 = 32."""
    embed = 12 * 8
    mamba = 8 * (12 + 32 + 4) + 32 * (4 + 1) + 3 * 4 + 12 + 12 * 8  # in, convolution, A D dt, norm, out
    attention = 8 * 16 + 2 * 8 * 8 + 16 * 8
    norms = 4 * 8  # before each layer, and the last
    model = make_model(pattern="M*-", ffn=ffn, tie_embeddings=tied)
    assert count_parameters(model) == embed + mamba + attention + n_matrices * 8 * 12 + norms + head


def test_tied_embeddings_have_no_head_and_give_the_logits(make_model):
    model, hidden_BTD = make_model(), torch.randn(2, 3, 8, dtype=torch.float64)
    assert not any("head" in name for name in model.state_dict())
    assert_close(model.logits(hidden_BTD), hidden_BTD @ model.embed.weight.T, **EXACT)


def test_untied_logits_come_from_the_head(make_model):
    model, hidden_BTD = make_model(tie_embeddings=False), torch.randn(2, 3, 8, dtype=torch.float64)
    assert_close(model.logits(hidden_BTD), hidden_BTD @ model.head.weight.T, **EXACT)


SIZES = ["d_model", "d_ff", "n_heads", "n_kv_heads", "attn_head_dim", "mamba_heads", "mamba_head_dim", "mamba_groups",
         "d_state", "conv_width", "chunk"]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "field", "value", "remedy"),
    [
        ({"pattern": "M-X*"}, "model.pattern", "'M-X*'", "such as M (Mamba-2), * (attention) or - (feed-forward)"),
        ({"pattern": ""}, "model.pattern", "empty", "at least one layer, such as 'M-M*-'"),
        ({"pattern": "--"}, "model.pattern", "'--'", "add M or *"),
        ({"n_heads": 6, "n_kv_heads": 4}, "model.n_heads", "6", "must be a multiple of model.n_kv_heads (4); nearest is 8"),
        (
            {"mamba_heads": 9, "mamba_groups": 4},
            "model.mamba_heads",
            "9",
            "must be a multiple of model.mamba_groups (4); nearest is 8",
        ),
        ({"rope_theta": 1e4, "attn_head_dim": 7}, "model.attn_head_dim", "7", "must be a multiple of"),
        ({"vocab_size": -1}, "model.vocab_size", "-1", "must be 0 or more; 0 takes the tokenizer's"),
        *[({name: n}, f"model.{name}", str(n), "must be at least 1") for name in SIZES for n in (0, -3)],
    ],
    ids=str,
)
def test_a_shape_that_cannot_be_built_is_refused_with_field_value_and_remedy(changes, field, value, remedy):
    with pytest.raises(ValueError, match="model") as error:
        HybridLM(ModelConfig(**changes))
    assert all(part in str(error.value) for part in (field, value, remedy))


def test_keys_stay_in_the_dtype_of_the_products_under_autocast(make_model):
    """bf16 keys beside bf16 values in the cache, although the norm of the heads works in fp32; and no warning."""
    model = make_model(pattern="*", qk_norm=True, rope_theta=100.0).float()
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        _, cache = model(torch.tensor([[1, 2, 3]]))
    assert [t.dtype for t in cache.layers[0]] == [torch.bfloat16, torch.bfloat16]


def test_gradients_of_swiglu_equal_those_of_its_formula(make_model):
    """down(silu(gate(x)) up(x)), whose wide tensors backward makes again."""
    mixer = make_model(pattern="*-", ffn="swiglu").layers[1].mixer
    x_BTD = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    gate, up, down = mixer.gate_proj.weight, mixer.up_proj.weight, mixer.down_proj.weight
    plain = (torch.nn.functional.silu(x_BTD @ gate.T) * (x_BTD @ up.T)) @ down.T
    leaves, weight = (x_BTD, gate, up, down), torch.randn(2, 3, 8, dtype=torch.float64)
    found, expected = (torch.autograd.grad((weight * y).sum(), leaves) for y in (mixer(x_BTD, None, None)[0], plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
