"""The fields that chat and text completions share: types, ranges, and what excludes what.

A field that would change the output but is not supported is refused, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .strict import Strict, at_most

MAX_CHOICES = 128
MAX_SEQUENCES = 1024
MAX_LOGPROBS = 20
MAX_STOPS = 1024
MAX_STOP_CHARS = 1024  # per string
MAX_ALL_STOP_CHARS = 16384
MAX_STOP_IDS = 128
MAX_BIASES = 1024
MAX_BAD_WORDS = 512
MAX_BAD_WORD_CHARS = 256
MAX_ALLOWED_IDS = 2**18
MAX_PATTERN_CHARS = 16384
MAX_STRINGS = 4096
INT64 = 2**63

# Fields of other servers that would change the output, with their values that change nothing.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "structural_tag": (),
    "regex": (),
    "ebnf": (),
    "json_schema": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "logits_processors": ([],),
    "truncation_side": ("left",),
    "prompt_embeds": (),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
    "return_tokens_as_token_ids": (False,),
    "thinking_token_budget": (),
}
REMOVED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


class StreamOptions(Strict):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class SchemaOfFormat(Strict):
    """``strict`` is accepted but changes nothing: replies always follow the schema."""

    name: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaOfFormat | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("response_format.json_schema is missing")
        return self


class StructuredOutputs(Strict):
    """Exactly one of the three fields. ``json`` is a JSON schema, as an object or as text."""

    json_: dict[str, Any] | bool | str | None = Field(default=None, alias="json")
    regex: Annotated[str, Field(max_length=MAX_PATTERN_CHARS)] | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_STRINGS)] | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        for name, value in (self.model_extra or {}).items():
            if value not in (None, False):
                raise ValueError(
                    f"structured_outputs.{name[:80]} is not supported by this server;"
                    " use json, regex or choice"
                )
        if sum(value is not None for value in (self.json_, self.regex, self.choice)) != 1:
            raise ValueError("structured_outputs takes exactly one of json, regex and choice")
        return self


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
TokenId = Annotated[int, Field(ge=0)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Int64 = Annotated[int, Field(ge=-INT64, lt=INT64)]


class Generate(Strict):
    """The fields that chat and text completions share."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], at_most(MAX_BIASES)] | None = (
        None
    )
    seed: Int64 | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED_IDS)] | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[int, Field(ge=1, le=1024)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    # Requests with the same key gather on one rank; the cache is shared by all.
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    user: Any = None

    @model_validator(mode="after")
    def _served(self) -> Generate:
        sent = self.model_extra or {}
        for name in REMOVED:
            if sent.get(name) is not None:
                raise ValueError(f"{name} is not supported: use structured_outputs or response_format")
        for name, neutral in NOT_SERVED.items():
            value = sent.get(name)
            if value is not None and value not in neutral:
                raise ValueError(f"{name} is not supported by this server")
        formatted = self.response_format is not None and self.response_format.type != "text"
        if formatted and self.structured_outputs is not None:
            raise ValueError("structured_outputs and response_format exclude each other")
        if formatted:
            self.refuse_endless("response_format")
        if self.structured_outputs is not None:
            self.refuse_endless("structured_outputs")
        self._check_limits()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported by this server unless it equals n")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

    def _check_limits(self) -> None:
        """Refuses values that no single type or range rules out."""
        if sum(map(len, self.stops)) > MAX_ALL_STOP_CHARS:
            raise ValueError(f"stop has more than {MAX_ALL_STOP_CHARS} characters in all")
        if self.truncate_prompt_tokens == 0:
            raise ValueError(
                "truncate_prompt_tokens must be at least 1, or -1 for as many tokens as fit (got 0)"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs is not available with stream: true")

    @property
    def is_structured(self) -> bool:
        """Whether the text must follow a grammar."""
        return self.structured_outputs is not None or (
            self.response_format is not None and self.response_format.type != "text"
        )

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's own tokens are asked for."""
        return False

    def refuse_endless(self, field: str) -> None:
        """Refuses to go on after the end of a grammar, which ``field`` asks for."""
        if self.ignore_eos:
            raise ValueError(f"{field} cannot be combined with ignore_eos")
        if self.min_tokens:
            raise ValueError(f"{field} cannot be combined with min_tokens")

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []
