"""The memory of a training step: what `HardwareProfile.is_compatible_with` reckons with, beside what a process really takes.

``python benchmarks/memory.py`` trains two steps of each profile in a process of its own and prints the ratio; it exits
with 1 where the two differ by more than 25 %. Plugins are on from the start, since the peak is what counts.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CASES = (
    ("core", []),
    ("tiny_debug", []),
    ("quickstart", []),
    ("gpt5_moe_reasoning_small", []),
    ("core", ["model.d_model=256", "model.num_layers=6", "training.batch_size=32"]),
    ("quickstart", ["model.d_model=256", "model.d_ff=1024", "training.batch_size=32"]),
)
LIMIT = 0.25


def main() -> int:
    """Measure every case."""
    worst = 0.0
    for name, sets in CASES:
        # Freed blocks go back to the system at once, so that the peak is what was in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, name, *sets]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        said, measured = json.loads(done.stdout)
        worst = max(worst, abs(said / measured - 1))
        print(
            f"{name} {' '.join(sets)}".ljust(80),
            f"{said:7.0f} MB reckoned, {measured:7.0f} MB taken, {said / measured:.2f}",
        )
    return int(worst > LIMIT)


def measure(name: str, sets: list[str]) -> tuple[float, float]:
    """What is reckoned and what this process takes, in MB."""
    import torch
    from torch import nn

    from apt.core.hardware import required_memory
    from apt.core.hooks import HookRunner
    from apt.core.profile import load_profile
    from apt.hookspecs import Batch, RunState
    from apt.modeling.compose import ModelBuilder
    from apt.training.optim import make_optimizer

    profile = load_profile(ROOT / "profiles" / f"{name}.yaml", sets=sets)
    assert profile.resolved is not None
    config = profile.config
    model = ModelBuilder(config, resolved=profile.resolved).build_model().train()
    optimizer = make_optimizer(model, config)
    hooks = HookRunner(profile.resolved.plugins).hook
    state = RunState(0, 0, 2, 1, config.plugins)
    hooks.apt_training_start(state=state, model=model, optimizer=optimizer)
    for _ in range(2):
        tokens = torch.randint(3, 259, (config.training.batch_size, config.max_seq_len))
        output = model(tokens)
        losses = [nn.functional.cross_entropy(output.logits.flatten(0, 1), tokens.flatten()), *output.losses.values()]
        for more in hooks.apt_loss_extra(state=state, model=model, batch=Batch(tokens, tokens), output=output):
            losses += more.values()
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return required_memory(config), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], sys.argv[2:])))
    else:
        sys.exit(main())
