"""What a client may send. Types and ranges are checked here; what depends on the model is checked in ``prepare.py``.

Unknown fields are accepted, because clients rely on it, but a field that would change the output and is not served is
refused, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_CHOICES = 128
MAX_SEQUENCES = 1024
MAX_LOGPROBS = 20
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 128
MAX_BIASES = 1024
INT64 = 2**63

# Fields that would change the output if they were served, and the values of them that ask for nothing.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "structured_outputs": (),
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
    "bad_words": ([],),
    "allowed_token_ids": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
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
    "include_reasoning": (True,),
    "thinking_token_budget": (),
}
REMOVED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


class Strict(BaseModel):
    """A request body: no coercion between JSON types, no NaN or infinity, unknown fields kept for inspection."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class ResponseFormat(Strict):
    type: str


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
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
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None = None
    seed: Int64 | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[int, Field(ge=1, le=1024)] | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    user: Any = None

    @model_validator(mode="after")
    def _served(self) -> Generate:
        sent = self.model_extra or {}
        for name in REMOVED:
            if sent.get(name) is not None:
                raise ValueError(f"{name} is not supported: use response_format or structured_outputs where they are served")
        for name, neutral in NOT_SERVED.items():
            value = sent.get(name)
            if value is not None and value not in neutral:
                raise ValueError(f"{name} is not supported by this server")
        if self.response_format is not None and self.response_format.type != "text":
            raise ValueError(f"response_format.type {self.response_format.type!r} is not supported by this server: only 'text' is")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported by this server unless it equals n")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Part(Strict):
    type: str
    text: str | None = None


class Message(Strict):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[Part] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class Conversation(Strict):
    """The fields from which a chat template makes a prompt."""

    messages: Annotated[list[Message], Field(min_length=1)]
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    reasoning_effort: str | None = None

    @model_validator(mode="after")
    def _one_ending(self) -> Conversation:
        if self.continue_final_message and self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self


class ChatRequest(Generate, Conversation):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    echo: Literal[False] | None = None

    @model_validator(mode="after")
    def _tools(self) -> ChatRequest:
        if self.tools and self.tool_choice != "none":
            raise ValueError("tools is not supported by this server unless tool_choice is 'none'")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice is not supported by this server unless it is 'none' or 'auto'")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def num_logprobs(self) -> int:
        """In the terms of ``Sampling``: -1 none, 0 the chosen token alone."""
        return (self.top_logprobs or 0) if self.logprobs else -1

    @property
    def output_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


Prompt = str | list[str] | list[int] | list[list[int]]


class CompletionRequest(Generate):
    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _echo(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs together with echo is not supported by this server")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1 unless echo is true")
        return self

    @property
    def num_logprobs(self) -> int:
        return -1 if self.logprobs is None else self.logprobs

    @property
    def output_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list; one of token ids is told from several by its first element."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast(list[list[int]], self.prompt)


class TokenizeText(Strict):
    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeChat(Conversation):
    model: str | None = None
    add_special_tokens: bool = False
    return_token_strs: bool | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeRequest(Strict):
    tokens: list[TokenId]
    model: str | None = None
