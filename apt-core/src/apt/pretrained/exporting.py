"""A run becomes a folder that transformers' `LlamaForCausalLM` and `AutoTokenizer` load, without any code of ours."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from apt.builtin.pretrained import FILE, SETTINGS, PretrainedTokenizer
from apt.builtin.tokenizer import BPETokenizer, ByteTokenizer
from apt.core.providers import TokenizerProvider
from apt.errors import FaultsError, UserError
from apt.pretrained.llama import LlamaShape, to_theirs
from apt.training.checkpoint import LoadedRun


def export_hf(run: LoadedRun, out: Path) -> list[str]:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer; returns what could not be taken along.

    Raises `UserError` with every reason where `LlamaForCausalLM` cannot be this model.
    """
    provider = run.resolved.providers["tokenizer"]
    assert isinstance(provider, TokenizerProvider)
    # What the model is made of, were it a fallback.
    config = run.config.model_copy(update={"attention_name": run.resolved.providers["attention"].get_name()})
    try:
        shape = LlamaShape.from_config(config, provider.get_stop_ids())
    except FaultsError as error:
        reasons = "\n".join(f"  {fault}" for fault in error.faults)
        raise UserError(
            f"{run.folder}: transformers has no model of this shape; loading it there would need code of ours "
            f"(trust_remote_code), which is not written:\n{reasons}"
        ) from error
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    notes = []
    if run.model.aligner is not None:
        notes.append("the aligner is left out: it takes part in training alone")
    theirs = shape.to_hf()
    (out / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
    ids = {key: theirs[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # The start of another text ends one, too.
    ids["eos_token_id"] = [*shape.eos, *sorted(run.special.stop - {*shape.eos})]
    (out / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    save_file(to_theirs(shape, run.model.state_dict()), out / "model.safetensors", metadata={"format": "pt"})
    notes += _write_tokenizer(run, provider, out)
    return notes


def _write_tokenizer(run: LoadedRun, provider: TokenizerProvider, out: Path) -> list[str]:
    tokenizer = run.tokenizer
    if isinstance(tokenizer, PretrainedTokenizer):
        tokenizer.save(out)
        settings = tokenizer.settings
    elif isinstance(tokenizer, BPETokenizer | ByteTokenizer):
        if isinstance(tokenizer, BPETokenizer):
            tokenizer.save(out)
        else:
            (out / FILE).write_text(json.dumps(_bytes_as_pairs(), ensure_ascii=False, indent=1), encoding="utf-8")
        settings = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    else:
        return [f"the tokenizer {provider.get_name()} has no form that transformers reads; it is left out"]
    if run.special.start is not None:
        _begin_with(out / FILE, run.special.start)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": run.config.max_seq_len, **settings}
    (out / SETTINGS).write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return []


def _begin_with(path: Path, start: int) -> None:
    """Let the tokenizer put the id that starts a text before it, as prompts here have it, where it does not do so itself."""
    from tokenizers import Tokenizer

    content = json.loads(path.read_text(encoding="utf-8"))
    token = {each["id"]: each["content"] for each in content["added_tokens"]}.get(start)
    if token is None or Tokenizer.from_str(json.dumps(content)).encode("").ids[:1] == [start]:
        return
    bos, first = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    rule = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [start], "tokens": [token]}},
    }
    before = content["post_processor"]
    content["post_processor"] = rule if before is None else {"type": "Sequence", "processors": [before, rule]}
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _bytes_as_pairs() -> dict[str, object]:
    """tokenizer.json of the byte tokenizer: byte-level pairs, of which none is ever joined."""
    # GPT-2's letters for bytes (Radford et al. 2019): those that print stand for themselves, the others follow after 255.
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = [chr(byte) if byte in prints else chr(next(others)) for byte in range(256)]
    special = ("<pad>", "<bos>", "<eos>")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags} for index, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate((*special, *letters))},
            "merges": [],
        },
    }
