"""Commands for models of other programs, and for talking with them. PyTorch is imported when one of them runs."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from apt.cli.running import (
    add_compile,
    add_place,
    add_run,
    add_sampling,
    add_weights,
    hooks_of,
    load_in_place,
    load_weights,
)
from apt.cli.show import written
from apt.errors import UserError

if TYPE_CHECKING:
    from apt.inference.chat import Chat

Commands = argparse._SubParsersAction  # the only name that argparse has for it


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the commands of this module."""
    importing = commands.add_parser("import", help="make a run of a pretrained Llama-family model")
    importing.add_argument("format", choices=("hf", "gguf"), help="hf: a folder with safetensors; gguf: a file")
    importing.add_argument("path", type=Path, metavar="PATH", help="the folder or file")
    importing.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder, which must be new")
    importing.add_argument(
        "--set",
        dest="sets",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="a value of the profile, such as model.max_seq_len=1024 or data.source=files; may be repeated",
    )
    importing.set_defaults(run=_import)

    exporting = commands.add_parser("export", help="write a run in the form of another program")
    exporting.add_argument("format", choices=("hf",), help="hf: a folder that transformers' LlamaForCausalLM loads")
    add_run(exporting)
    add_weights(exporting)
    exporting.add_argument("out", type=Path, metavar="DIR", help="the folder to write, which must be new")
    exporting.set_defaults(run=_export)

    chat = commands.add_parser("chat", help="talk with a model that was trained on conversations")
    add_run(chat)
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the first turn")
    chat.add_argument(
        "--template", type=Path, metavar="FILE", help="a chat template (Jinja) in place of the model's own"
    )
    add_sampling(chat, max_new_tokens=512)
    add_place(chat)
    add_weights(chat)
    add_compile(chat)
    chat.set_defaults(run=_chat)


def _import(arguments: argparse.Namespace) -> int:
    from apt.pretrained.importing import import_model

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    folder = import_model(arguments.format, arguments.path, arguments.out, sets=arguments.sets, tell=tell)
    print(f"run: {folder.parent}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    run = load_weights(arguments)
    from apt.pretrained.exporting import export_hf

    for note in export_hf(run, arguments.out):
        print(f"note: {note}", file=sys.stderr)
    print(arguments.out)
    return 0


HELP = "/clear forgets the conversation, /exit ends it (so does Ctrl-D); Ctrl-C ends a reply"


def _chat(arguments: argparse.Namespace) -> int:
    from apt.builtin.pretrained import read_text

    template = None if arguments.template is None else read_text(arguments.template)
    run = load_in_place(arguments, prepared=True, compiled=arguments.compile)
    from apt.inference.chat import Chat
    from apt.inference.sampling import Sampling

    chat = Chat(
        run.model,
        run.tokenizer,
        system=arguments.system,
        template=template,
        max_new_tokens=arguments.max_new_tokens,
        sampling=Sampling(arguments.temperature, arguments.top_k, arguments.top_p),
        seed=arguments.seed,
        special=run.special,
        hooks=hooks_of(run),
        state=run.state,
    )
    _talk(chat)
    return 0


def _talk(chat: Chat) -> None:
    """Answer what is said, line by line, until the input ends."""
    person = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no UTF-8 are an error of their turn; a strict reader would lose the lines after them too.
        sys.stdin.reconfigure(errors="surrogateescape")
    if person:
        print(HELP, file=sys.stderr)
    while (text := _ask(person)) is not None:
        if text == "/clear":
            chat.clear()
        elif text == "/exit":
            break
        elif text.startswith("/"):
            print(f"{text.split()[0]}: no such command; {HELP}", file=sys.stderr)
        elif text:
            _reply(chat, text)


def _ask(person: bool) -> str | None:
    """What is said next; None at the end of the input."""
    while True:
        try:
            return input("> " if person else "").strip()
        except EOFError:
            if person:
                print()
            return None
        except KeyboardInterrupt:
            if not person:
                raise
            print("\n(/exit ends the conversation)", file=sys.stderr)


def _reply(chat: Chat, text: str) -> None:
    """Print the reply as it comes; Ctrl-C ends it and not the program."""
    before = chat.left_out
    reply = chat.say(text)
    try:
        for piece in reply:
            print(written(piece), end="", flush=True)
    except KeyboardInterrupt:
        reply.close()
        print(" ...", end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return
    print(flush=True)
    if chat.left_out > before:
        print(f"(the context is full: the oldest {chat.left_out} turns are left out)", file=sys.stderr)
