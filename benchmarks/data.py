"""The memory and the time that a text takes: the same small model on 2 MB and on 2 GB of it, each in a process of its own.

``python benchmarks/data.py [--megabytes 2000] [--steps 60] [--place DIR]``; DIR needs thrice the text's size. The text is
made: the standard library's sources again and again, each time with other numbers in them. The tokens are written in the first
run of each size and found in the second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

PROFILE = """\
name: memory
model:
  {{d_model: 64, num_heads: 2, num_layers: 2, d_ff: 128, max_seq_len: 256, dropout: 0.0, attention: sdpa, ffn: default}}
training: {{max_steps: {steps}, batch_size: 32, warmup_steps: 2, learning_rate: 1e-3}}
data: {{source: files, path: "{text}", cache: "{cache}"}}
evaluation: {{max_batches: 8, sample_tokens: 0}}
monitoring: {{plot: false}}
"""


def make_text(path: Path, megabytes: int) -> None:
    """Write it in pieces."""
    from apt.builtin.data import StandardLibrary

    def sources() -> Iterator[str]:
        for number in range(10**9):
            for document in StandardLibrary().read():
                yield f"# copy {number} of {document.name}\n{document.text}"

    left = megabytes * 10**6
    with path.open("wb") as file:
        for text in sources():
            content = text.encode()[:left]
            # The last one may be cut inside a character.
            file.write(content.decode(errors="ignore").encode())
            left -= len(content)
            if left <= 0:
                return


def train(profile: Path, out: Path) -> dict[str, float]:
    """In this process: peak memory by the second, beyond what was there before the run."""
    import psutil
    import torch
    from rich.console import Console

    from apt.core.profile import load_profile
    from apt.training.trainer import Trainer

    torch.set_num_threads(1)
    process, peak, done = psutil.Process(), {"rss": 0, "uss": 0}, threading.Event()
    loaded = load_profile(profile)

    def watch() -> None:
        while not done.wait(0.05):
            memory = process.memory_full_info()
            for name in peak:
                peak[name] = max(peak[name], getattr(memory, name))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    Trainer(loaded.config, out, resolved=loaded.resolved, console=Console(file=sys.stderr)).fit()
    done.set()
    watcher.join()
    return {**{name: value / 1e6 for name, value in peak.items()}, "cpu_s": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--place", type=Path)
    parser.add_argument("--run", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(train(*arguments.run)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.place) as folder:
        place = Path(folder)
        print(f"{'text':>8} {'run':>7} {'peak RSS':>10} {'peak USS':>10} {'CPU':>8}")
        found: dict[tuple[int, str], dict[str, float]] = {}
        for megabytes in (2, arguments.megabytes):
            text, profile = place / f"{megabytes}.txt", place / f"{megabytes}.yaml"
            make_text(text, megabytes)
            profile.write_text(PROFILE.format(steps=arguments.steps, text=text, cache=place / "cache"))
            for run in ("first", "second"):
                command = [sys.executable, __file__, "--run", str(profile), str(place / f"{megabytes}-{run}")]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                now = found[megabytes, run] = json.loads(done.stdout)
                print(
                    f"{megabytes:>5} MB {run:>7} {now['rss']:>7.0f} MB {now['uss']:>7.0f} MB {now['cpu_s']:>6.1f} s",
                    flush=True,
                )
        for run in ("first", "second"):
            more = found[arguments.megabytes, run]["rss"] - found[2, run]["rss"]
            print(f"{run} run: {arguments.megabytes} MB of text take {more:+.0f} MB more than 2 MB (goal: under 300)")


if __name__ == "__main__":
    main()
