"""Random walks through grammars of replies, token by token: a rank's matcher accepts every token
that its mask allows, to the end, and the parser reads back what the grammar promised; for every
format, and for every way in which a tokenizer may hold the tags.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from lockstep.engine.frontend.api.schemas import ChatRequest
from lockstep.engine.frontend.formats.choice import REASONING_TAGS, TOOL_FORMATS, Formats, Manner
from lockstep.engine.frontend.formats.dsml import SIGN
from lockstep.engine.frontend.requests.structure import begins_with, grammar_of
from lockstep.engine.text.tokenizer import Codec
from lockstep.engine.text.vocabulary import load_vocabulary
from support.engine.text.tagged_tokenizer import END, HIDDEN, STORAGES, write_tagged

PARAMETERS = {
    "type": "object",
    "properties": {
        "unit": {"type": "string", "enum": ["C", "<think>", "</tool_call>"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "note": {"type": "string"},
    },
    "required": ["unit", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS: dict[str, Any] = {"get_weather": PARAMETERS, "now": {"maxProperties": 0}}
MOST = 3000  # tokens of a walk


@dataclass(frozen=True)
class World:
    """A tokenizer with the tags of ``formats``, as a frontend and as a rank see it."""

    formats: Formats
    codec: Codec
    vocabulary: LLTokenizer
    end: int

    def manner(self, ask: ChatRequest, **fields: Any) -> Manner:
        formats, tools = self.formats, None
        tags = formats.reasoning
        if tags is not None and not fields.get("thinking") and begins_with(ask, tags.open):
            formats = Formats(None, formats.tools)
            fields["answering"] = True
        if ask.offers_tools:
            tools = {tool.function.name: tool.function.parameters or {} for tool in ask.tools or ()}
        named = not isinstance(ask.tool_choice, str | None)
        one_call = ask.parallel_tool_calls is False
        return Manner(formats, tools=tools, named=named, one_call=one_call, **fields)

    def walk(self, ask: ChatRequest, manner: Manner, seed: int) -> list[int]:
        """Random tokens of the grammar of ``ask``. Now and then the walk tries to write a tag, by
        its token or by its pieces, or it would never leave free text.
        """
        grammar = grammar_of(ask, manner, self.codec.added_id)[-1].grammar
        matcher = LLMatcher(self.vocabulary, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        chance, tokens = random.Random(seed), list[int]()
        wish: list[int] = []
        while len(tokens) < MOST:
            late = len(tokens) > 200
            allowed = self._allowed(matcher)
            assert allowed, f"nothing follows {self.text(tokens)!r}"
            for token in chance.sample(allowed, min(4, len(allowed))):
                assert matcher.deep_copy().consume_token(token), (token, self.text(tokens))
            if self.end in allowed and (late or chance.random() < 0.5 or allowed == [self.end]):
                return tokens
            if not wish and chance.random() < (0.9 if late else 0.2):
                wish = self._spelling(chance.choice(self._wishes(late)), chance)
            token = wish.pop(0) if wish else chance.choice([id for id in allowed if id != self.end])
            if token not in allowed:
                wish, token = [], chance.choice([id for id in allowed if id != self.end])
            assert matcher.consume_token(token), matcher.get_error()
            tokens.append(token)
        raise AssertionError(f"no end after {MOST} tokens: {self.text(tokens)!r}")

    def text(self, tokens: list[int], shown: bool = True) -> str:
        markers = self.codec.ids_of(self.formats.markers) if shown else frozenset()
        detokenizer = self.codec.detokenizer(True, [], markers)
        return "".join([detokenizer.push(token) for token in tokens]) + detokenizer.finish()

    def _allowed(self, matcher: LLMatcher) -> list[int]:
        mask = matcher.compute_bitmask()
        return [id for id in range(self.vocabulary.vocab_size) if mask[id // 8] >> id % 8 & 1]

    def _wishes(self, late: bool) -> list[str]:
        """All tags, most often what ends something; late in a walk that alone."""
        ends = [tag for tag in self.formats.markers if "/" in tag or "end" in tag]
        ends += ['"', *(f"\n{tag}" for tag in ends if tag == "</parameter>")]
        return ends if late else [*self.formats.markers, *ends * 4]

    def _spelling(self, text: str, chance: random.Random) -> list[int]:
        id = self.codec.added_id(text)
        sign = self.codec.added_id(SIGN)
        if id is None and sign is not None and SIGN in text:
            before, _, after = text.partition(SIGN)
            return [*self.vocabulary.tokenize_str(before), sign, *self.vocabulary.tokenize_str(after)]
        if chance.random() < 0.7:
            return [id] if id is not None else self.vocabulary.tokenize_str(text)
        return [id for char in text for id in self.vocabulary.tokenize_str(char)]


@cache
def world(format: str, storage: str, tags: tuple[str, ...] = ()) -> World:
    """``tags`` are those that the tokenizer holds, by default all of the format."""
    reasoning = REASONING_TAGS[format if format in REASONING_TAGS else "think"]
    formats = Formats(reasoning, TOOL_FORMATS[format])
    with TemporaryDirectory() as folder:
        final = END if END not in formats.markers else "<|endoftext|>"
        size, end = write_tagged(Path(folder), tags or list(dict.fromkeys(formats.markers)), storage, final)
        vocabulary = load_vocabulary(Path(folder), size + 6, (end,))  # logits are often wider
        assert vocabulary is not None
        return World(formats, Codec(Path(folder)), vocabulary, end)


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})


BEGINNINGS: tuple[dict[str, bool], ...] = ({}, {"thinking": True}, {"answering": True})


@pytest.mark.parametrize(
    ("format", "storage"),
    [
        (format, storage)
        for format in TOOL_FORMATS
        for storage in STORAGES
        # SentencePiece writes a space for the sign that DeepSeek's tags hold.
        if not (format.startswith("deepseek") and storage.startswith("sentencepiece"))
    ],
)
def test_forced_calls_are_accepted_to_the_end_and_read_back(format: str, storage: str) -> None:
    check_forced_calls(world(format, storage))


@pytest.mark.parametrize("storage", ["special", "added", "tiktoken special"])
def test_a_tag_of_which_a_part_is_one_token_is_written_with_it(storage: str) -> None:
    """As the tokenizer of DeepSeek-V3.2, which holds the sign between the words of a tag."""
    place = world("deepseek_v32", storage, ("<think>", "</think>", SIGN))
    ask = chat(tools=TOOLS, tool_choice="required")
    manner = place.manner(ask, answering=True)
    matcher = LLMatcher(place.vocabulary, grammar_of(ask, manner, place.codec.added_id)[-1].grammar)
    matcher.consume_tokens(place.vocabulary.tokenize_str("<"))
    assert place._allowed(matcher) == [place.codec.added_id(SIGN)]
    check_forced_calls(place)


@pytest.mark.parametrize("storage", ["special", "added"])
def test_behind_the_token_of_an_ending_tag_comes_the_rest_of_the_tag(storage: str) -> None:
    place = world("deepseek_v32", storage, ("<think>", "</think>", SIGN))
    function = {"name": "f", "parameters": only("x", {"type": "string"})}
    ask = chat(tools=[{"type": "function", "function": function}], tool_choice="required")
    grammar = grammar_of(ask, place.manner(ask, answering=True), place.codec.added_id)[-1].grammar
    begun = (
        f'<{SIGN}function_calls>\n<{SIGN}invoke name="f">\n<{SIGN}parameter name="x" string="true">a</b></'
    )
    matcher = LLMatcher(place.vocabulary, grammar, log_level=0)
    sign = place.codec.added_id(SIGN)
    assert sign is not None
    for piece in begun.split(SIGN):
        assert matcher.consume_tokens(place.vocabulary.tokenize_str(piece)), piece
        assert sign in place._allowed(matcher)
        assert matcher.consume_token(sign)
    followers = [place.codec.piece(token) for token in place._allowed(matcher)]
    assert followers and all(b"parameter>\n".startswith(piece) for piece in followers), followers


def check_forced_calls(place: World) -> None:
    for seed in range(6):
        ask = chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=bool(seed % 2))
        manner = place.manner(ask, **BEGINNINGS[seed % 3])
        said = place.text(place.walk(ask, manner, seed))
        parser = manner.parser()
        assert parser is not None
        parser.push(said)
        parser.finish()
        delta = parser.take()
        assert delta.content == "", said
        assert delta.calls, said
        for call in delta.calls:
            name = call["function"]["name"]
            jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[name])
        assert parser.reason("stop") == "tool_calls", said


def only(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object with one member."""
    return {
        "type": "object",
        "properties": {name: schema},
        "required": [name],
        "additionalProperties": False,
    }


LITERALS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"regex": "<tool_call>[0-9]{2}</tool_call>"}, "<tool_call>[0-9]{2}</tool_call>"),
    ({"regex": r"(a|<think>)[0-9]?(b|<\|end\|>|<\|user\|>)"}, r"(a|<think>)[0-9]?(b|<\|end\|>|<\|user\|>)"),
    ({"regex": "[^\n]{0,9}x"}, "(?s).{0,9}x"),
    ({"choice": ["</think> ok", "[/THINK] ok"]}, r"(</think>|\[/THINK\]) ok"),
    ({"choice": [f"<think> {END}", HIDDEN, "<th"]}, r"<think> <\|end\|>|<\|user\|>|<th"),
    (
        {"json": only("<think>", {"const": f"a <think> {END}[TOOL_CALLS]"})},
        r'\{\s*"<think>"\s*:\s*"a <think> <\|end\|>\[TOOL_CALLS\]"\s*\}',
    ),
    (
        {"json": only("t", {"type": "string", "pattern": "^<tool_call>[a-z]{2}</think>$"})},
        r'\{\s*"t"\s*:\s*"<tool_call>[a-z]{2}</think>"\s*\}',
    ),
)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("format", ["hermes", "mistral", "kimi_k2"])
def test_literals_that_read_like_tags_end_as_text_that_the_grammar_matches(format: str, storage: str) -> None:
    place = world(format, storage)
    for number, (wanted, pattern) in enumerate(LITERALS):
        for seed in range(3):
            ask = chat(structured_outputs=wanted)
            manner = place.manner(ask, **BEGINNINGS[seed])
            said = place.text(place.walk(ask, manner, 10 * number + seed), shown=manner.parser() is not None)
            parser = manner.parser()
            content = said
            if parser is not None:
                parser.push(said)
                parser.finish()
                content = parser.take().content
            assert re.fullmatch(pattern, content), (wanted, said)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_schema_is_followed_in_the_final_channel_of_harmony(storage: str) -> None:
    place, schema = world("harmony", storage), only("a", {"enum": ["x", "<|en", 3]})
    for seed in range(6):
        ask = chat(structured_outputs={"json": schema})
        manner = place.manner(ask, **BEGINNINGS[seed % 3])
        parser = manner.parser()
        assert parser is not None
        parser.push(said := place.text(place.walk(ask, manner, seed)))
        parser.finish()
        assert "<|channel|>final<|message|>" in said
        jsonschema.validate(json.loads(parser.take().content), schema)


@pytest.mark.parametrize("storage", ["special", "added", "sentencepiece added", "tiktoken special"])
def test_a_tag_that_is_one_token_is_written_with_it_alone(storage: str) -> None:
    place = world("hermes", storage)
    for fields in BEGINNINGS:
        ask = chat(tools=TOOLS, tool_choice="required")
        manner = place.manner(ask, **fields)
        grammar = grammar_of(ask, manner, place.codec.added_id)[-1].grammar
        matcher = LLMatcher(place.vocabulary, grammar, log_level=0)
        think, close, call = (place.codec.added_id(tag) for tag in ("<think>", "</think>", "<tool_call>"))
        assert None not in (think, close, call)
        allowed = place._allowed(matcher)
        if fields == {}:
            assert allowed == sorted([think, call])  # type: ignore[type-var]
            assert matcher.consume_token(think)  # type: ignore[arg-type]
        if "answering" not in fields:
            assert close in place._allowed(matcher)
            assert call not in place._allowed(matcher), "a call would be read within the reasoning"
            assert matcher.consume_token(close)  # type: ignore[arg-type]
        assert call in place._allowed(matcher)
