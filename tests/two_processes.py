"""What the tests of several processes run, in one process or in two: small models in fp64 on batches made up here.

As a program it is one of two processes, which find each other through the environment that torchrun would set.
"""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import elastic  # noqa: E402
import routers  # noqa: E402
import train  # noqa: E402
from rlp import RLP  # noqa: E402
from system import checkpoint, loop, lora, parallel, rundir  # noqa: E402
from system.config import LoRAConfig, ParallelConfig  # noqa: E402
from system.presets import PRESETS  # noqa: E402

CPU, STEPS = torch.device("cpu"), 4
TOKENIZER = SimpleNamespace(think=29, close=30, end=31, ends=(31,), tags=(29, 30))
MODES = ("pretrain", "rlp", "elastic", "muon", "bf16")
OF_RLP = ("rlp", "lora")  # lora: RLP of adapters, which are not sharded
SHAPES = {"pretrain": (4, 17), "muon": (4, 17), "bf16": (4, 17)}


def make_batch(mode, step):
    """Rows of random tokens; every mode's batch has rows that differ in what they hold, so that parts weigh unequally."""
    generator = torch.Generator().manual_seed(step)
    rows, length = (2, 33) if mode == "elastic" and step == STEPS - 1 else SHAPES.get(mode, (4, 17))
    tokens_BT = torch.randint(0, 28, (rows, length), generator=generator)
    ids_BT = torch.zeros(rows, length - 1, dtype=torch.long)
    if mode in OF_RLP:
        ids_BT[1, :5] = -1
        kind_B = torch.arange(rows) % 3
        facts = {"target_BX": tokens_BT[:, -1:].repeat(1, 2), "kind_B": kind_B, "back_B": 3 * (kind_B > 0)}
        return {"context_BT": tokens_BT[:, :-1], "ids_BT": ids_BT, **facts}
    targets_BT = tokens_BT[:, 1:].clone()
    targets_BT[0, :7] = -100
    budgets = {"budget_B": torch.arange(rows) * (step + 1) % 2}
    return {"tokens_BT": tokens_BT[:, :-1], "targets_BT": targets_BT, "ids_BT": ids_BT, **budgets}


def settings_of(mode, accumulate):
    """Four steps, a checkpoint every two; elastic: three on masks, then slices in long sequences."""
    preset = PRESETS["smoke"]
    changes = {"steps": STEPS, "checkpoint_every": 2, "accumulate": accumulate, "lr": 1e-2, "warmup": 0, "muon_lr": 0.0}
    if mode in OF_RLP:
        return dataclasses.replace(preset.rlp, **changes, kl=0.1, inner_epochs=2, tau=0.9, reward_floor=-9.0, horizon=2)
    if mode == "elastic":
        shares = {
            "search_share": 0.75,
            "long_share": 0.25,
            "budgets": (1.0, 0.6),
            "long_weights": (0.5, 0.5),
            "self_kl": 0.5,
        }
        return dataclasses.replace(preset.elastic, **changes, **shares, ce=1.0, seq_len=16, long_len=32)
    return dataclasses.replace(preset.pretrain, **changes | ({"muon_lr": 0.02} if mode == "muon" else {}))


def run(mode, run_dir, accumulate=1, start=None, before_step=None, objective=None):
    """Train with what `parallel.start` has set up."""
    model = rundir.build_model(PRESETS["smoke"], 33, CPU, seed=0)  # 33 rows cannot be halved
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    settings = settings_of(mode, accumulate)
    if parallel.team.settings.dtype == "fp32":
        model = model.double()
    if mode == "lora":
        lora.adapt(model, LoRAConfig(rank=3))
    if mode in OF_RLP:
        objective = RLP(settings, TOKENIZER)
    elif mode == "elastic":
        router = routers.build_router(model.config, settings, [2, 0, 1], CPU)
        if parallel.team.settings.dtype == "fp32":
            router = router.double()
        objective = elastic.Elastic(settings, router, parallel.frozen_twin(model))
    run_dir.mkdir(parents=True, exist_ok=True)

    def batch_of(step):
        if before_step is not None:
            before_step(step)
        return make_batch(mode, step)

    loop.fit(model, objective or train.NextToken(), batch_of, settings, run_dir, 0, {}, mode, start)
    return model, objective


def options(mode, sharing="data", **changes):
    """Of `parallel.start`."""
    return ParallelConfig(mode=sharing, dtype="bf16" if mode == "bf16" else "fp32", timeout_s=60, **changes)


def launch(*words, port):
    """Start both processes of `python two_processes.py WORDS`; returns them."""
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, words)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def everything(folder):
    """Every mode with the data and with the weights shared out, and the runs of one process gone on with on two."""
    os.devnull = str(folder / "null")
    for mode in (*MODES, "lora"):
        for sharing in ("data", "fsdp")[: 1 + (mode in MODES)]:
            parallel.start(options(mode, sharing), CPU)
            model, _ = run(mode, folder / f"{mode}-{sharing}")
            if parallel.is_first():
                torch.save(model.state_dict(), folder / f"{mode}-{sharing}" / "left.pt")
    for mode in ("rlp", "elastic"):
        parallel.start(options(mode, "fsdp"), CPU)
        run(mode, folder / f"{mode}-resumed", start=checkpoint.newest(folder / f"{mode}-resumed"))
    parallel.stop()
    return 0


def lose_one(folder):
    """The second process is killed in the third step."""

    def whole_run(config):
        parallel.start(options("pretrain"), CPU)
        rank = parallel.team.rank
        run("pretrain", folder, before_step=lambda step: step == 2 and rank == 1 and os.kill(os.getpid(), signal.SIGKILL))

    train.run = whole_run
    return train.main(["--preset", "smoke", "--mode", "pretrain", "--out", str(folder)])


def apart(folder):
    """What the processes find differs: the first has enough after two steps, the second after three. Then the second's
    third batch cannot be made."""

    class Differing(train.NextToken):
        def enough(self, model, step):
            return f"process {parallel.team.rank}" if step == 2 + parallel.team.rank else ""

    def whole_run(config):
        parallel.start(options("pretrain"), CPU)
        run("pretrain", folder / "enough", objective=Differing())

        def before_step(step):
            if step == 2 and parallel.team.rank == 1:
                raise ValueError("mine.py, line 3: no answer; mend it")

        run("pretrain", folder / "broken", before_step=before_step)

    train.run = whole_run
    return train.main(["--preset", "smoke", "--mode", "pretrain", "--out", str(folder / "broken")])


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(parallel.leave(globals()[sys.argv[1]](Path(sys.argv[2]))))
