"""What a model writes after the profile's prompt, to be looked at."""

from __future__ import annotations

from apt.core.config import APTConfig
from apt.core.hooks import HookRunner
from apt.core.providers import Tokenizer
from apt.core.resolve import Resolved
from apt.core.special import SpecialIds
from apt.hookspecs import RunState
from apt.inference.generate import generate
from apt.modeling.model import Decoder


def draw_sample(config: APTConfig, resolved: Resolved, model: Decoder, tokenizer: Tokenizer, state: RunState) -> str:
    """The prompt and what follows it, the same each time; what an encoder-decoder writes is a text of its own, a line below.

    Plugins that are on take part, as they do when a checkpoint writes.
    """
    prompt = config.evaluation.sample_prompt
    written = generate(
        model,
        tokenizer,
        prompt,
        max_new_tokens=config.evaluation.sample_tokens,
        temperature=0.8,
        special=SpecialIds.of(config, resolved),
        hooks=HookRunner(resolved.plugins_of(state.plugins_on)),
        state=state,
    )
    return f"{prompt}\n{written.text}" if config.architecture == "encoder_decoder" else prompt + written.text
