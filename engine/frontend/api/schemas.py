"""The bodies that clients may send. Types and ranges are checked here; ``requests/prepare.py``
checks what depends on the model.

Unknown fields are accepted, because clients rely on it. A field that would change the output but is
not supported is refused, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

MAX_CHOICES = 128
MAX_SEQUENCES = 1024
MAX_LOGPROBS = 20
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 128
MAX_BIASES = 1024
MAX_TOOLS = 512
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
    "thinking_token_budget": (),
}
REMOVED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


class Strict(BaseModel):
    """A request body without coercion between JSON types, NaN or infinity. Unknown fields are kept
    for inspection.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


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
Name = Annotated[str, Field(min_length=1, max_length=256)]
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
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None
    ) = None
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
    structured_outputs: StructuredOutputs | None = None
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
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported by this server unless it equals n")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

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


class ContentPart(Strict):
    type: str
    text: str | None = None


class CalledFunction(Strict):
    """``arguments`` is JSON as text, as the client got it. An object is accepted too, and null for
    no arguments.
    """

    name: Name
    arguments: str | dict[str, Any] | None = None


class ToolCall(Strict):
    """A call of an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Strict):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class Function(Strict):
    """``parameters`` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class Conversation(Strict):
    """The fields from which a chat template makes a prompt."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None

    @model_validator(mode="after")
    def _one_ending(self) -> Conversation:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self

    @property
    def opens_turn(self) -> bool:
        """Whether the prompt ends with the opening of the reply."""
        return self.add_generation_prompt is not False and not self.continue_final_message


class ChatRequest(Generate, Conversation):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    echo: Literal[False] | None = None

    @model_validator(mode="after")
    def _tools(self) -> ChatRequest:
        if self.forced_tool and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in self.tool_names:
            raise ValueError(
                f"tool_choice.function.name {self.tool_choice.function.name[:80]!r} is not one of tools"
            )
        if self.forced_tool:
            self.refuse_endless("tool_choice")
            if self.is_structured:
                raise ValueError(
                    "tool_choice that forces a call cannot be combined with response_format or"
                    " structured_outputs"
                )
        if len(set(self.tool_names)) != len(self.tool_names):
            raise ValueError("tools has two functions of the same name")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def tool_names(self) -> list[str]:
        return [tool.function.name for tool in self.tools or ()]

    @property
    def forced_tool(self) -> bool:
        """Whether a tool must be called."""
        return self.tool_choice is not None and self.tool_choice not in ("none", "auto")

    @property
    def offers_tools(self) -> bool:
        """Whether the reply may call a tool."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def num_logprobs(self) -> int:
        """As in ``Sampling``: -1 for none, 0 for the chosen token alone."""
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
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1 unless echo is true")
        if self.scores_prompt and self.max_tokens == 0 and (self.n or 1) > 1:
            raise ValueError(
                "n must be 1 when only the prompt's logprobs are asked for (max_tokens 0): all choices"
                " would be equal"
            )
        return self

    @property
    def scores_prompt(self) -> bool:
        return bool(self.echo) and self.logprobs is not None

    @property
    def num_logprobs(self) -> int:
        return -1 if self.logprobs is None else self.logprobs

    @property
    def output_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list. A list whose first element is a token id is one prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast(list[list[int]], self.prompt)


GenerationRequest = ChatRequest | CompletionRequest


class TokenizeText(Strict):
    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChat(Conversation):
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


def _tokenize_kind(body: Any) -> str:
    return "TokenizeChat" if isinstance(body, dict) and body.get("messages") is not None else "TokenizeText"


TokenizeRequest = Annotated[
    Annotated[TokenizeText, Tag("TokenizeText")] | Annotated[TokenizeChat, Tag("TokenizeChat")],
    Discriminator(_tokenize_kind),
]


class DetokenizeRequest(Strict):
    tokens: list[TokenId]
    model: str | None = None
