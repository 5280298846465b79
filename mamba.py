"""The Mamba-2 mixer (arXiv 2405.21060), laid out as in NVIDIA's Nemotron-H.

    z, xBC, dt = x W_in              gate, inputs of the scan, step sizes
    xBC        = silu(conv(xBC))     depthwise, causal, W taps
    y          = SSD(x, softplus(dt + dt_bias), -exp(A_log), B, C) + D x
    out        = norm(y silu(z)) W_out

Training runs the chunked scan over whole sequences; decoding runs the same mixer on one token at a
time, from what it leaves behind: the last W - 1 inputs of the convolution, and the state. Both
carry gradients, so a prefix can be computed once and continued in many ways. Unlike in some public
code, step sizes are not clamped (nor are they in Megatron's scan).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from system.config import ModelConfig
from system.costs import in_proj_rows


class Mamba2(nn.Module):
    """One mixer: H heads of P channels, K groups of B and C maps, state size N."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads, self.head_dim = config.mamba_heads, config.mamba_head_dim
        self.n_groups, self.d_state, self.chunk = config.mamba_groups, config.d_state, config.chunk
        self.norm_eps = config.norm_eps
        rows = in_proj_rows(config)
        self.conv_rows = [rows[part] for part in "xBC"]
        d_inner, d_conv = rows["z"], sum(self.conv_rows)
        self.rows = [d_inner, d_conv, rows["dt"]]
        self.in_proj = nn.Linear(config.d_model, sum(self.rows), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(d_conv, config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(d_conv))
        self.A_log, self.D, self.dt_bias = (
            nn.Parameter(torch.empty(self.n_heads)) for _ in range(3))
        self.norm_weight = nn.Parameter(torch.empty(d_inner))
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A = -(1..H), D = 1, softplus(dt_bias) log-uniform in [0.001, 0.1]: up to 1,000 tokens."""
        bound = self.conv_weight.shape[1] ** -0.5
        self.conv_weight.uniform_(-bound, bound)
        self.conv_bias.zero_()
        self.A_log.copy_(torch.arange(1, self.n_heads + 1).log())
        self.D.fill_(1.0)
        dt_H = torch.exp(torch.rand(self.n_heads) * math.log(100) + math.log(0.001))
        self.dt_bias.copy_(dt_H + torch.log(-torch.expm1(-dt_H)))  # the inverse of softplus
        self.norm_weight.fill_(1.0)

    def forward(self, u_BTD: Tensor, cached: tuple[Tensor, Tensor] | None, ids_BT: Tensor | None
                ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """cached: (convolution tail [B, W-1, E], state [B, H, P, N]) of the tokens before, or None.
        Returns: y_BTD, and the tail and the state after these tokens. Padding belongs on the left
        of whatever is continued from: the tail is the last W - 1 positions, padded or not."""
        # 1. Project, and convolve what the scan reads.
        tail_BYE, state_BHPN = (None, None) if cached is None else cached
        z_BTI, xbc_BTE, dt_BTH = self.in_proj(u_BTD).split(self.rows, dim=-1)
        xbc_BTE, tail_BYE = kernels.causal_conv(
            xbc_BTE, self.conv_weight, self.conv_bias, tail_BYE, ids_BT)
        x_BTI, b, c = F.silu(xbc_BTE).split(self.conv_rows, dim=-1)
        x_BTHP = x_BTI.unflatten(-1, (self.n_heads, self.head_dim))
        b_BTKN, c_BTKN = (t.unflatten(-1, (self.n_groups, self.d_state)) for t in (b, c))
        dt_BTH, a_H = F.softplus(dt_BTH + self.dt_bias), -torch.exp(self.A_log)
        # 2. One step of the recurrence where one token goes on from a state, else the scan.
        if u_BTD.shape[1] == 1 and state_BHPN is not None and ids_BT is None:
            y_BHP, state_BHPN = kernels.ssd_step(
                x_BTHP[:, 0], dt_BTH[:, 0], a_H, b_BTKN[:, 0], c_BTKN[:, 0], self.D, state_BHPN)
            y_BTHP = y_BHP[:, None]
        else:
            y_BTHP, state_BHPN = kernels.ssd(
                x_BTHP, dt_BTH, a_H, b_BTKN, c_BTKN, self.D, state_BHPN, ids_BT, self.chunk)
        # 3. Gate, norm, and back to the model's width.
        y_BTI = kernels.gated_norm(
            y_BTHP.flatten(2), z_BTI, self.norm_weight, self.n_groups, self.norm_eps)
        return self.out_proj(y_BTI), (tail_BYE, state_BHPN)
