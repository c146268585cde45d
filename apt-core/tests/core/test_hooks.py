"""Hooks: order, refusal of what is misspelt, errors that say where they come from, silence while a plugin is off."""

from __future__ import annotations

import logging

import pytest

from apt.core.hooks import HookRunner
from apt.core.providers import Plugin
from apt.errors import PluginError, UserError
from apt.hookspecs import RunState, hookimpl

STATE = RunState(7, 1, 10, 2, plugins_on=("one", "two", "three"))
seen: list[str] = []


class Says(Plugin):
    word: str = ""

    @hookimpl
    def apt_step_start(self, state):
        seen.append(self.word)


class First(Plugin):
    @hookimpl(tryfirst=True)
    def apt_step_start(self):
        seen.append("first")


class Last(Plugin):
    @hookimpl(trylast=True)
    def apt_step_start(self):
        seen.append("last")


class Around(Plugin):
    @hookimpl(wrapper=True)
    def apt_step_start(self, state):
        seen.append("before")
        result = yield
        seen.append("after")
        return result


class Fails(Plugin):
    """Fails as it is told to."""

    how: str = "bug"

    @hookimpl
    def apt_step_start(self):
        if self.how == "bug":
            raise KeyError("x")
        if self.how == "user":
            raise UserError("give another text")
        raise KeyboardInterrupt


class Fussy(Plugin):
    @hookimpl(wrapper=True)
    def apt_step_start(self):
        yield
        raise RuntimeError("after")


class Remembers(Plugin):
    @hookimpl
    def apt_checkpoint_save(self, state):
        return {"step": state.step}

    @hookimpl
    def apt_checkpoint_load(self, saved):
        seen.append(f"step {saved['step']}")

    @hookimpl
    def apt_phase_changed(self, plugin):
        seen.append(f"phase {plugin}")


@pytest.fixture(autouse=True)
def forget():
    seen.clear()


def call(**plugins: Plugin) -> list[str]:
    state = RunState(7, 1, 10, 2, plugins_on=tuple(plugins))
    HookRunner(plugins).hook.apt_step_start(state=state)
    return seen


def test_hooks_run_in_the_order_of_the_profile() -> None:
    assert call(one=Says(word="a"), two=Says(word="b"), three=Says(word="c")) == ["a", "b", "c"]


def test_plugins_can_ask_to_be_first_last_or_around() -> None:
    plugins = {"one": Says(word="a"), "last": Last(), "around": Around(), "first": First(), "two": Says(word="b")}
    assert call(**plugins) == ["before", "first", "a", "b", "last", "after"]


def test_a_plugin_that_is_off_is_passed_by() -> None:
    runner = HookRunner({"one": Says(word="a"), "off": Says(word="b"), "around": Around()})
    runner.hook.apt_step_start(state=STATE)
    assert seen == ["a"]


@pytest.mark.parametrize("around", [False, True])
def test_a_failure_names_plugin_distribution_version_hook_and_step(around: bool) -> None:
    plugins: dict[str, Plugin] = {"bad": Fails()}
    if around:
        plugins["around"] = Around()
    with pytest.raises(PluginError, match=r"plugin 'bad' \(.* 0\) failed in apt_step_start at step 7: KeyError: 'x'"):
        call(**plugins)


def test_a_failure_of_a_wrapper_is_its_own() -> None:
    with pytest.raises(PluginError, match=r"plugin 'fussy' .* failed in apt_step_start at step 7: RuntimeError: after"):
        call(fussy=Fussy())


def test_a_users_mistake_and_an_interruption_pass_through() -> None:
    with pytest.raises(UserError, match=r"^give another text"):
        call(bad=Fails(how="user"))
    with pytest.raises(KeyboardInterrupt):
        call(bad=Fails(how="stop"))


def test_a_hook_that_does_not_exist_is_refused_with_the_nearest() -> None:
    class Typo(Plugin):
        @hookimpl
        def apt_step_begin(self):
            """Never called."""

    with pytest.raises(PluginError, match=r"there is no hook 'apt_step_begin'; did you mean 'apt_step_end'\?"):
        HookRunner({"typo": Typo()})


def test_an_argument_that_does_not_exist_is_refused_with_those_that_do() -> None:
    class Typo(Plugin):
        @hookimpl
        def apt_step_end(self, metrcs):
            """Never called."""

    with pytest.raises(PluginError, match=r"has no argument 'metrcs'; did you mean 'metrics'\?; it has: state, model"):
        HookRunner({"typo": Typo()})


def test_a_hook_that_is_not_marked_is_refused() -> None:
    class Unmarked(Plugin):
        def apt_step_end(self):
            """Never called."""

    with pytest.raises(PluginError, match="apt_step_end is not marked; put @hookimpl above it"):
        HookRunner({"unmarked": Unmarked()})


def test_state_is_saved_and_given_back_to_each_plugin_alone() -> None:
    runner = HookRunner({"one": Remembers(), "two": Says(word="a")})
    saved = runner.save_state(STATE)
    assert saved == {"one": {"step": 7}}
    runner.load_state(STATE, {**saved, "gone": {"step": 3}})
    assert seen == ["step 7"]


def test_a_change_of_phase_is_told_to_that_plugin_alone() -> None:
    runner = HookRunner({"one": Remembers(), "two": Remembers()})
    runner.phase_changed("two", STATE, None, None)  # type: ignore[arg-type]
    assert seen == ["phase two"]


def test_traced_calls_are_logged_with_their_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("APT_TRACE", "1")
    with caplog.at_level(logging.WARNING):
        call(one=Says(word="a"))
    assert "plugin 'one'" in caplog.text
    assert "apt_step_start took" in caplog.text


def test_a_traced_wrapper_is_logged_before_and_after(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("APT_TRACE", "1")
    with caplog.at_level(logging.WARNING):
        call(one=Around())
    assert [" ".join(record.getMessage().split()[4:-3]) for record in caplog.records] == [
        "apt_step_start before the others",
        "apt_step_start after the others",
    ]


class Mends(Plugin):
    """Turns the errors of others into its own."""

    how: str = "bug"

    @hookimpl(wrapper=True)
    def apt_step_start(self):
        try:
            yield
        except PluginError:
            if self.how == "bug":
                raise RuntimeError("worse") from None


def test_a_wrapper_may_swallow_an_error_and_is_named_when_it_raises_another() -> None:
    call(mends=Mends(how="well"), bad=Fails())
    with pytest.raises(PluginError, match=r"plugin 'mends' .* failed in apt_step_start at step 7: RuntimeError: worse"):
        call(mends=Mends(), bad=Fails())


def test_a_plugin_that_ends_the_interpreter_is_named() -> None:
    class Exits(Plugin):
        @hookimpl
        def apt_step_start(self):
            raise SystemExit(3)

    with pytest.raises(PluginError, match=r"plugin 'exits' .* SystemExit: 3"):
        call(exits=Exits())


def test_a_users_error_says_which_plugin_said_it() -> None:
    with pytest.raises(UserError) as caught:
        call(bad=Fails(how="user"))
    assert caught.value.__notes__ == ["said by plugin 'bad' ((registered) 0) in apt_step_start"]


def test_a_wrapper_yields_and_nothing_else_does() -> None:
    class Flat(Plugin):
        @hookimpl(wrapper=True)
        def apt_step_start(self):
            """Does not yield."""

    class Unmarked(Plugin):
        @hookimpl
        def apt_step_start(self):
            yield

    class Old(Plugin):
        @hookimpl(hookwrapper=True)
        def apt_step_start(self):
            yield

    for plugin, message in (
        (Flat(), "is marked as a wrapper, but does not yield"),
        (Unmarked(), "yields, but is no wrapper"),
        (Old(), "a wrapper of pluggy's old kind"),
    ):
        with pytest.raises(PluginError, match=message):
            HookRunner({"it": plugin})


def test_a_hook_of_another_version_may_be_optional_and_a_static_method_is_a_hook() -> None:
    class Both(Plugin):
        @hookimpl(optionalhook=True)
        def apt_of_tomorrow(self, moon):
            """Not called today."""

        @hookimpl
        @staticmethod
        def apt_step_start(state):
            seen.append(f"static {state.step}")

    assert call(both=Both()) == ["static 7"]


def test_a_class_or_static_method_may_be_marked_inside_or_outside() -> None:
    class Inside(Plugin):
        @classmethod
        @hookimpl
        def apt_step_start(cls, state):
            seen.append(f"{cls.__name__} {state.step}")

    class Outside(Plugin):
        @hookimpl
        @classmethod
        def apt_step_start(cls, state):
            seen.append(f"{cls.__name__} {state.step}")

    class Unmarked(Plugin):
        @classmethod
        def apt_step_start(cls, state):
            """Would be passed by."""

    assert call(one=Inside(), two=Outside()) == ["Inside 7", "Outside 7"]
    with pytest.raises(PluginError, match="apt_step_start is not marked"):
        call(it=Unmarked())


def test_an_inherited_hook_is_a_hook_and_the_nearest_class_counts() -> None:
    class Quieter(Says):
        @hookimpl
        def apt_step_start(self, state):
            seen.append(self.word.lower())

    class Same(Says):
        """Says the same."""

    assert call(one=Quieter(word="A"), two=Same(word="B")) == ["a", "B"]


def test_a_hook_that_could_not_be_called_is_refused() -> None:
    class Asynchronous(Plugin):
        @hookimpl
        async def apt_step_start(self, state):
            """Nobody would wait."""

    class KeywordOnly(Plugin):
        @hookimpl
        def apt_step_start(self, *, state):
            """Arguments come in their order."""

    for plugin, message in ((Asynchronous(), "nobody would wait for it"), (KeywordOnly(), "is not a plain argument")):
        with pytest.raises(PluginError, match=message):
            HookRunner({"it": plugin})


def test_state_that_is_no_mapping_is_refused_by_name() -> None:
    class Odd(Plugin):
        @hookimpl
        def apt_checkpoint_save(self):
            return 3

    with pytest.raises(PluginError, match=r"plugin 'odd' .* returned a int, not a mapping"):
        HookRunner({"odd": Odd()}).save_state(STATE)
