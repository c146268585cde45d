from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.cli import main
from apt.core.providers import Document
from apt.errors import DataError, UserError
from apt.hookspecs import Prompt
from apt_rag.plugin import SHORTEST, RAGPlugin, fit

PASSAGES = st.lists(
    st.builds(Document, st.sampled_from(["a:1", "b.txt:20"]), st.text("word ", min_size=1, max_size=90)), max_size=5
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "copy.txt").write_text("shutil has copyfile, which copies the contents of a file")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "stat.txt").write_text("\nthe median is the middle number of a sorted list")
    (tmp_path / "picture.bin").write_bytes(b"\x00\xff\xfe")
    (tmp_path / ".hidden").write_text("copyfile copyfile copyfile")
    return tmp_path


def test_passages_stand_before_the_prompt_with_their_source_the_best_one_last(folder: Path) -> None:
    prompt = Prompt("how does copyfile copy? is there a median?")
    RAGPlugin(folder=folder).apt_prompt_prepare(prompt)
    assert prompt.text == (
        "[sub/stat.txt:2]\nthe median is the middle number of a sorted list\n\n"
        "[copy.txt:1]\nshutil has copyfile, which copies the contents of a file\n\n"
        "how does copyfile copy? is there a median?"
    )
    assert prompt.sources == ["copy.txt:1", "sub/stat.txt:2"]


def test_a_prompt_that_nothing_bears_on_stays_as_it_is(folder: Path) -> None:
    prompt = Prompt("zzz")
    RAGPlugin(folder=folder).apt_prompt_prepare(prompt)
    assert prompt == Prompt("zzz")


def test_top_k_limits_the_passages(folder: Path) -> None:
    prompt = Prompt("how does copyfile copy? is there a median?")
    RAGPlugin(folder=folder, top_k=1).apt_prompt_prepare(prompt)
    assert prompt.sources == ["copy.txt:1"]


def test_the_retriever_is_an_option(folder: Path) -> None:
    plugin = RAGPlugin.model_validate(
        {"folder": folder, "retriever": {"provider": "cosine", "chunk_chars": 20, "overlap": 0}}
    )
    prompt = Prompt("copyfile")
    plugin.apt_prompt_prepare(prompt)
    assert prompt.sources == ["copy.txt:1"] * 3
    assert all(len(line) <= 20 for line in prompt.text.splitlines())


def test_the_folder_is_read_once(folder: Path) -> None:
    plugin = RAGPlugin(folder=folder)
    first, second = Prompt("copyfile"), Prompt("copyfile")
    plugin.apt_prompt_prepare(first)
    (folder / "copy.txt").unlink()
    plugin.apt_prompt_prepare(second)
    assert first == second


@given(PASSAGES, st.integers(1, 200))
def test_passages_are_cut_to_the_room_there_is(passages: list[Document], max_chars: int) -> None:
    fitting = fit(passages, max_chars)
    assert sum(len(f"[{document.name}]\n{document.text}\n\n") for document in fitting) <= max_chars
    assert fitting[:-1] == passages[: len(fitting)][:-1]
    assert all(whole.text.startswith(part.text) for whole, part in zip(passages, fitting, strict=False))
    assert all(len(part.text) >= SHORTEST // 2 or part == whole for whole, part in zip(passages, fitting, strict=False))


def test_a_folder_that_is_missing_empty_or_unreadable_is_said_by_name(tmp_path: Path) -> None:
    prompt = Prompt("copy")
    with pytest.raises(UserError, match="no folder to retrieve from; --rag FOLDER"):
        RAGPlugin().apt_prompt_prepare(prompt)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        RAGPlugin(folder=tmp_path / "nowhere").apt_prompt_prepare(prompt)
    with pytest.raises(DataError, match="no readable text: no files"):
        RAGPlugin(folder=tmp_path).apt_prompt_prepare(prompt)
    (tmp_path / "binary").write_bytes(b"\x00\x01")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(DataError, match="2 files, none of them UTF-8 text"):
        RAGPlugin(folder=tmp_path).apt_prompt_prepare(prompt)
    with pytest.raises(DataError, match="a file, not a folder"):
        RAGPlugin(folder=tmp_path / "binary").apt_prompt_prepare(prompt)


def test_a_run_whose_folder_is_given_later_trains_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("".join(f"the {number}th line\n" for number in range(200)))
    profile = tmp_path / "profile.yaml"
    profile.write_text(
        "plugins: [{rag: {top_k: 2}}]\n"
        "model: {d_model: 8, num_heads: 1, num_layers: 1, d_ff: 8, max_seq_len: 16, attention: sdpa, ffn: default}\n"
        "training: {max_steps: 2, batch_size: 2, warmup_steps: 0}\n"
        f"data: {{source: files, path: '{tmp_path / 'text.txt'}'}}\n"
        "monitoring: {plot: false}\n"
    )
    assert main(["train", "-p", str(profile), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "no sample is drawn: plugin.rag: no folder to retrieve from" in said
    assert "\nrun: " in said
