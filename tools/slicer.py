"""Cut a size out of an elastic run's weights; needs torch and safetensors alone, not this project.

    python slicer.py RUN/checkpoint/step_002100/model.safetensors RUN/family.json 0.5 OUT_FILE

family.json says of every budget which rows and columns of which weight it keeps.
"""

import json
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def cut(weights_file: str, family_file: str, budget: str, out_file: str) -> int:
    """Write the weights of a budget. Returns their number. Raises SystemExit for an unknown one."""
    with open(family_file, encoding="utf-8") as file:
        family = json.load(file)
    if budget not in family:
        raise SystemExit(f"budget ({budget}) is not in {family_file}; it has {', '.join(family)}")
    kept = {}
    with safe_open(weights_file, "pt") as weights:
        for name, picked in family[budget]["cuts"].items():
            t = weights.get_tensor(picked["of"])
            for dim, runs in picked["keep"].items():
                t = torch.cat([t.narrow(int(dim), a, b - a) for a, b in runs], dim=int(dim))
            kept[name] = t.contiguous()
    save_file(kept, out_file)
    return sum(t.numel() for t in kept.values())


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    print(f"{sys.argv[4]}: {cut(*sys.argv[1:]):,} parameters")
