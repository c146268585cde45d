"""Conversations: the template's prompt, the cache that goes on from turn to turn, the command line's manners."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from apt.builtin.tokenizer import ByteTokenizer
from apt.cli import main
from apt.core.profile import load_profile
from apt.core.providers import Plugin
from apt.core.registry import registry
from apt.errors import UserError
from apt.hookspecs import NextToken, hookimpl
from apt.inference.chat import Chat, render
from apt.inference.sampling import Sampling
from apt.modeling.compose import ModelBuilder
from apt.modeling.model import Decoder

pytest.importorskip("jinja2")

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
PAIRS = """\
model:
  {architecture: encoder_decoder, num_encoder_layers: 1, num_decoder_layers: 1, d_model: 16, num_heads: 2, d_ff: 16,
   max_seq_len: 16, attention: sdpa}
training: {max_steps: 1, warmup_steps: 0}
data: {source: pairs, path: pairs.jsonl}
"""
GREEDY = Sampling(temperature=0)


class Talker(ByteTokenizer):
    """Bytes, with a template."""

    chat_template = TEMPLATE
    settings = {"bos_token": {"content": "<bos>"}, "chat_template": TEMPLATE}  # noqa: RUF012

    def encode_marked(self, text: str) -> Sequence[int]:
        return self.encode(text)


class Letters(Talker):
    """Printable ASCII alone: what the model wrote reads back as the same ids."""

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(chr(each - 3) if 35 <= each < 130 else "" for each in ids)


@pytest.fixture
def model(profile_file: Path) -> Decoder:
    profile = load_profile(profile_file, sets=["model.max_seq_len=128"])
    torch.manual_seed(0)
    model = ModelBuilder(profile.config, resolved=profile.resolved).build_model()
    unreadable = torch.tensor([each for each in range(259) if not 35 <= each < 130])
    model.head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, unreadable, -torch.inf))
    return model


def test_a_template_is_run_with_the_special_tokens_and_without_reach() -> None:
    talker = Talker()
    assert render(talker, [{"role": "user", "content": "hi"}]) == "u:hi\na:"
    assert render(talker, [], "{{ bos_token }}{{ [1, '<é>'] | tojson }}") == '<bos>[1, "<é>"]'
    with pytest.raises(UserError, match="refuses this conversation: no tools"):
        render(talker, [], "{{ raise_exception('no tools') }}")
    with pytest.raises(UserError, match=r"refuses this conversation: .*unsafe"):
        render(talker, [], "{{ messages.__class__.__mro__ }}")
    with pytest.raises(UserError, match="has no chat template; give one with --template FILE"):
        render(ByteTokenizer(), [])


def test_a_template_may_mark_the_assistants_words_and_say_how_json_is_written() -> None:
    marked = "{% for m in messages %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endfor %}"
    assert render(Talker(), [{"role": "assistant", "content": "hi"}], marked) == "<hi>"
    written = "{{ {'b': 'é', 'a': 1} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}"
    assert render(Talker(), [], written) == '{"a":1,"b":"\\u00e9"}'


@pytest.mark.parametrize(
    "template",
    ["{{ 1 + 'a' }}", "{{ 1 // 0 }}", "{{ messages[9].x }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"],
)
def test_what_goes_wrong_in_a_template_is_told_as_its_fault(template: str) -> None:
    with pytest.raises(UserError, match="the chat template refuses this conversation: "):
        render(Talker(), [], template)


@pytest.mark.parametrize("asked", [{"max_new_tokens": -1}, {"seed": -1}, {"seed": 2**64}])
def test_numbers_out_of_range_are_refused_as_generate_refuses_them(model: Decoder, asked: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"(max_new_tokens|seed): -?\d+ is not allowed"):
        Chat(model, Talker(), sampling=GREEDY, **asked)  # type: ignore[arg-type]


def test_what_was_read_in_one_turn_is_not_read_again_in_the_next(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    talker, read = Letters(), []
    forward = Decoder.forward

    def counted(self: Decoder, tokens: torch.Tensor, **more: object) -> object:
        read.append(tokens.shape[1])
        return forward(self, tokens, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "forward", counted)
    chat = Chat(model, talker, max_new_tokens=5, sampling=GREEDY)
    first = "".join(chat.say("abc"))
    assert read == [len("u:abc\na:"), 1, 1, 1, 1]
    read.clear()
    second = "".join(chat.say("de"))
    # The fifth token of the first reply was drawn and not read yet.
    assert read == [len("x\nu:de\na:"), 1, 1, 1, 1]
    assert [each["content"] for each in chat.messages] == ["abc", first, "de", second]
    fresh = Chat(model, talker, max_new_tokens=5, sampling=GREEDY)
    fresh.messages = chat.messages[:2]
    assert "".join(fresh.say("de")) == second


def test_a_reply_that_is_broken_off_stays_in_the_conversation(model: Decoder) -> None:
    chat = Chat(model, Letters(), max_new_tokens=50, sampling=GREEDY)
    reply = chat.say("abc")
    start = next(reply) + next(reply)
    reply.close()
    assert chat.messages[-1] == {"role": "assistant", "content": start}
    chat.clear()
    assert chat.messages == []


def test_after_ctrl_c_within_the_model_the_conversation_goes_on_as_if_it_were_read_anew(model: Decoder) -> None:
    calls: list[None] = []

    def interrupt(module: object, inputs: object) -> None:
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt  # the first block has read the token, the second has not

    chat = Chat(model, Letters(), max_new_tokens=12, sampling=GREEDY)
    handle = model.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(chat.say("abc"))
    handle.remove()
    assert [each["role"] for each in chat.messages] == ["user", "assistant"]
    fresh = Chat(model, Letters(), max_new_tokens=12, sampling=GREEDY)
    fresh.messages = [*chat.messages]
    assert "".join(chat.say("de")) == "".join(fresh.say("de"))
    held, right = (each._context for each in (chat, fresh))
    assert held is not None
    assert right is not None
    assert held.texts == right.texts
    for context in (held, right):
        context.add([40])
    assert torch.equal(held.logits(), right.logits())


def test_a_message_that_cannot_be_read_leaves_the_conversation_as_it_was(model: Decoder) -> None:
    chat = Chat(model, Letters(), max_new_tokens=4, sampling=GREEDY)
    list(chat.say("abc"))
    before = [*chat.messages]
    with pytest.raises(UserError, match=r"holds '\\udcff', half of a character; write it in UTF-8"):
        list(chat.say("a\udcff"))
    assert chat.messages == before
    with pytest.raises(UserError, match=r"holds '\\udcff', half of a character"):
        Chat(model, Letters(), system="\udcff", sampling=GREEDY)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_utf_8_are_an_error_of_their_turn_and_the_next_is_answered(
    model: Decoder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, errors: str
) -> None:
    import apt.cli.pretrained as commands

    chat = Chat(model, Letters(), max_new_tokens=4, sampling=GREEDY)
    piped = io.TextIOWrapper(io.BytesIO(b"a\xff\nhello\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", piped)
    commands._talk(chat)
    captured = capsys.readouterr()
    assert captured.err.startswith(r"error: the prompt holds '\udcff', half of a character")
    assert chat.messages[0]["content"] == "hello"
    assert captured.out == chat.messages[1]["content"] + "\n"


def test_the_oldest_turns_leave_where_the_context_is_full(model: Decoder) -> None:
    chat = Chat(model, Letters(), system="Be brief.", max_new_tokens=20, sampling=GREEDY)
    for _ in range(6):
        list(chat.say("x" * 20))
    assert chat.left_out > 0
    assert chat.messages[0] == {"role": "system", "content": "Be brief."}
    assert chat.messages[1]["role"] == "user"
    with pytest.raises(UserError, match=r"this message has .* tokens; the model's context has room for 128"):
        list(chat.say("x" * 300))
    assert chat.messages[-1]["role"] == "assistant"


def test_what_no_turn_would_have_room_beside_is_refused_before_the_first(model: Decoder) -> None:
    system = "x" * (128 - len("s:\nu:\na:"))
    assert list(Chat(model, Letters(), system=system, max_new_tokens=4, sampling=GREEDY).say(""))
    with pytest.raises(
        UserError, match="the system's prompt alone takes 129 tokens; the model's context has room for 128"
    ):
        Chat(model, Letters(), system=f"{system}x", sampling=GREEDY)
    with pytest.raises(UserError, match="the chat template alone takes 200 tokens"):
        Chat(model, Letters(), template="x" * 200, sampling=GREEDY)


def test_piped_lines_are_turns_and_the_template_may_be_a_file(
    profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert main(["train", "-p", str(profile_file), "--out", str(run), "--set", "model.max_seq_len=64"]) == 0
    assert main(["chat", str(run)]) == 2
    assert "no chat template" in capsys.readouterr().err
    template = tmp_path / "template.jinja"
    template.write_bytes(b"\xff")
    assert main(["chat", str(run), "--template", str(template)]) == 2
    assert "template.jinja: is not UTF-8" in capsys.readouterr().err
    template.write_text(TEMPLATE)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/huh\n/clear\nagain\n/exit\nnever\n"))
    assert main(["chat", str(run), "--template", str(template), "--max-new-tokens", "5"]) == 0
    captured = capsys.readouterr()
    assert "/huh: no such command" in captured.err
    assert not re.search("^> ", captured.out, flags=re.MULTILINE)


def test_an_encoder_decoder_is_refused_before_the_first_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    profile, run, template = tmp_path / "pairs.yaml", tmp_path / "run", tmp_path / "template.jinja"
    (tmp_path / "pairs.jsonl").write_text('{"source": "abc", "target": "d"}\n' * 40)
    profile.write_text(PAIRS)
    template.write_text(TEMPLATE)
    assert main(["train", "-p", str(profile), "--out", str(run)]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main(["chat", str(run), "--template", str(template)]) == 2
    assert "chat is for decoders" in capsys.readouterr().err


class Insistent(Plugin):
    """Writes one letter."""

    api_level: ClassVar[int] = 1

    @hookimpl
    def apt_logits_ready(self, next_token: NextToken) -> None:
        next_token.logits = torch.full_like(next_token.logits, -torch.inf).index_fill(
            -1, torch.tensor(3 + ord("z")), 0.0
        )


def test_the_run_s_plugins_have_their_say_in_a_conversation(
    profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register("plugin", "insistent", Insistent)
    run, template = tmp_path / "run", tmp_path / "template.jinja"
    words = ["--plugins", "insistent", "--set", "model.max_seq_len=64"]
    assert main(["train", "-p", str(profile_file), "--out", str(run), *words]) == 0
    template.write_text(TEMPLATE)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    capsys.readouterr()
    assert main(["chat", str(run), "--template", str(template), "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == "zzzzz\n"


def test_ctrl_c_ends_a_reply_and_not_the_program(
    model: Decoder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from apt.cli.pretrained import _reply

    chat = Chat(model, Letters(), max_new_tokens=20, sampling=GREEDY)
    add = torch.Tensor.tolist
    calls = []

    def interrupted(self: torch.Tensor) -> object:
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return add(self)

    monkeypatch.setattr(torch.Tensor, "tolist", interrupted)
    _reply(chat, "abc")
    assert capsys.readouterr().out.endswith(" ...\n")
    assert len(chat.messages[-1]["content"]) == 3
