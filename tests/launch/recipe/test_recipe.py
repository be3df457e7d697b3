"""The recipe: accepted values, overrides, and errors that name key, value and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given, strategies as st

from lockstep.engine.frontend.formats.choice import REASONING_TAGS, TOOL_FORMATS
from lockstep.engine.protocol.specs import KVEventsSpec
from lockstep.launch.recipe.file import find_recipe, load_recipe, parse_recipe
from lockstep.launch.recipe.keys import key_paths, key_type
from lockstep.launch.recipe.model_folder import model_directory
from lockstep.launch.recipe.recipe import (
    FrontendSection,
    Recipe,
    RecipeError,
)
from lockstep.launch.recipe.resolve import for_gpus, kv_events_spec

MODEL = "model: {path: x}\n"


def refusal(text: str | bytes, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, overrides, "r.yaml")
    return str(caught.value)


def test_defaults_are_those_of_the_design() -> None:
    recipe = parse_recipe(MODEL)
    assert (recipe.cluster.backend, recipe.overlap, recipe.experts.dispatch) == ("ray", "auto", "auto")
    assert (recipe.kv_cache.page_size, recipe.kv_cache.memory, recipe.kv_cache.prefix_caching) == (
        64,
        None,
        True,
    )
    assert (recipe.scheduler.max_batch_tokens, recipe.scheduler.max_running, recipe.scheduler.max_queue) == (
        8192,
        128,
        1024,
    )
    assert (recipe.frontend.host, recipe.frontend.port, recipe.frontend.api_keys) == ("127.0.0.1", 8000, ())
    assert recipe.model.max_len is None


@pytest.mark.parametrize(
    ("name", "short"),
    [("float32", "fp32"), ("fp32", "fp32"), ("bfloat16", "bf16"), ("bf16", "bf16"), ("auto", "auto")],
)
def test_dtypes_have_long_and_short_names(name: str, short: str) -> None:
    recipe = parse_recipe(f"model: {{path: x, dtype: {name}}}", [f"kv_cache.dtype={name}"])
    assert (recipe.model.dtype, recipe.kv_cache.dtype) == (short, short)


@pytest.mark.parametrize("address", ["tcp://*:5557", "tcp://10.0.0.5:1", "tcp://[fd00::1]:65535", "off"])
def test_addresses_of_events(address: str) -> None:
    for recipe in (
        parse_recipe(MODEL + f"kv_cache: {{events: '{address}'}}"),
        parse_recipe(MODEL, [f"kv_cache.events={address}"]),
    ):
        spec = kv_events_spec(recipe)
        assert (spec is None) == (address == "off") and (spec is None or spec.address == address)


@pytest.mark.parametrize(
    "address",
    [
        "on",
        "5557",
        "tcp://host:5557",
        "tcp://10.0.0.5",
        "tcp://10.0.0.5:0",
        "tcp://1.2.3.4:65536",
        "tcp://1.2.3:5",
    ]
    + ["udp://10.0.0.5:5557", "ipc:///tmp/x", "tcp://*:5557/", "tcp://[::x]:5", "tcp://:5557", ""],
)
def test_other_addresses_of_events_are_refused(address: str) -> None:
    for key in ("kv_cache.events", "kv_cache.events_replay"):
        text = refusal(MODEL, f"{key}='{address}'")
        assert key in text and "tcp://" in text


def test_events_need_a_cache_and_replays_need_events() -> None:
    one = "kv_cache.events=tcp://*:5557"
    assert "kv_cache.prefix_caching" in refusal(MODEL, one, "kv_cache.prefix_caching=false")
    assert "another address" in refusal(MODEL, "kv_cache.events_replay=tcp://*:5557")
    assert "another address" in refusal(MODEL, one, "kv_cache.events_replay=tcp://*:5557")
    recipe = parse_recipe(MODEL, [one, "kv_cache.events_replay=tcp://*:5558", "kv_cache.events_topic=kv@a@b"])
    assert kv_events_spec(recipe) == KVEventsSpec(
        address="tcp://*:5557", replay_address="tcp://*:5558", topic="kv@a@b"
    )


def test_fp8_pages_have_two_names() -> None:
    for name in ("fp8", "fp8_e4m3"):
        assert parse_recipe(MODEL, [f"kv_cache.dtype={name}"]).kv_cache.dtype == "fp8"
        assert "model.dtype" in refusal(MODEL, f"model.dtype={name}")


@pytest.mark.parametrize("name", ["float16", "fp16", "half", "float64", "int8", "BF16", "torch.bfloat16"])
def test_other_dtypes_are_refused_by_name(name: str) -> None:
    for key in ("model.dtype", "kv_cache.dtype"):
        text = refusal(MODEL, f"{key}={name}")
        assert f'{key} = "{name}"' in text
        assert "'auto', 'bf16'" in text and "'fp32'" in text
        assert ("nothing computes in float16" in text) == (name in ("float16", "fp16", "half"))


@pytest.mark.parametrize(
    "origins",
    [
        [],
        ["*"],
        ["null"],
        ["localhost", "https://chat.example.com"],
        ["http://192.168.0.7:3000", "http://[fd00::1]:8080", "chrome-extension://abcdef"],
        ["http://a.example:443", "https://a.example:80"],
    ],
)
def test_origins_of_pages(origins: list[str]) -> None:
    written = yaml.safe_dump(origins, default_flow_style=True).strip()
    for recipe in (
        parse_recipe(MODEL + f"frontend: {{cors_origins: {written}}}"),
        parse_recipe(MODEL, [f"frontend.cors_origins={written}"]),
    ):
        assert recipe.frontend.cors_origins == tuple(origins)


@pytest.mark.parametrize(
    "origins",
    [
        "https://chat.example.com/",
        "https://chat.example.com/path",
        "chat.example.com",
        "https://*.example.com",
        "HTTPS://chat.example.com",
        "https://user@chat.example.com",
        "https://chat.example.com:443",
        "http://chat.example.com:80",
        "http://localhost:port",
        "'https://a.example,https://b.example'",
        "''",
        "'*', localhost",
    ],
)
def test_what_no_browser_sends_as_an_origin_is_refused(origins: str) -> None:
    text = refusal(MODEL, f"frontend.cors_origins=[{origins}]")
    assert "frontend.cors_origins = " in text
    assert "should be an origin" in text or "must be the only entry" in text


def test_pages_of_this_machine_are_allowed_and_requests_are_logged_by_default() -> None:
    frontend = parse_recipe(MODEL).frontend
    assert (frontend.cors_origins, frontend.access_log) == (("localhost",), "on")
    assert parse_recipe(MODEL + "frontend: {access_log: off}").frontend.access_log == "off"
    assert "frontend.access_log" in refusal(MODEL, "frontend.access_log=loud")


@pytest.mark.parametrize("written", ["http://collector:4318", "https://[::1]:4318/otlp", "on", "off"])
def test_tracing_is_a_collector_or_a_switch(written: str) -> None:
    assert parse_recipe(MODEL).frontend.tracing == "off"
    assert parse_recipe(MODEL + f"frontend: {{tracing: {written!r}}}").frontend.tracing == written


@pytest.mark.parametrize("written", ["collector:4318", "grpc://collector", "http://user:key@host", "''"])
def test_tracing_to_no_collector_is_refused(written: str) -> None:
    text = refusal(MODEL, f"frontend.tracing={written}")
    assert "frontend.tracing = " in text and "http://collector:4318" in text


def test_a_recipe_cannot_be_changed() -> None:
    recipe = parse_recipe(MODEL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.cluster.nodes = 3  # type: ignore[misc]


def test_auto_and_sizes_and_switches() -> None:
    recipe = parse_recipe(
        "model: {path: x, max_len: auto}\nkv_cache: {memory: 1.5GiB}\noverlap: off\n"
        "experts: {balance: off}\ncluster: {threads: 3}"
    )
    assert recipe.model.max_len is None
    assert recipe.kv_cache.memory == 3 * 2**29
    assert recipe.overlap == "off"
    assert recipe.experts.balance == "off"
    assert recipe.cluster.threads == 3


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("'4096'", 4096),
        ("64MiB", 2**26),
        ("2GB", 2 * 10**9),
        ("1.1TB", 1.1e12),
        ("1 kib", 1024),
        ("7B", 7),
        ("512M", 512 * 10**6),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_recipe(MODEL + f"kv_cache: {{memory: {text}}}").kv_cache.memory == size


def test_world_is_nodes_times_ranks() -> None:
    recipe = parse_recipe(MODEL + "cluster: {nodes: 18, ranks_per_node: 4}")
    assert (recipe.world, recipe.data) == (72, 72)


# --------------------------------------------------------------------------- overrides


def test_overrides_set_nested_keys_of_every_type() -> None:
    recipe = parse_recipe(
        MODEL + "frontend: {port: 1}",
        [
            "frontend.port=9000",
            "kv_cache.prefix_caching=false",
            "cluster.start_deadline=5",
            "overlap=off",
            "kv_cache.memory=1MiB",
        ],
    )
    assert recipe.frontend.port == 9000
    assert recipe.kv_cache.prefix_caching is False
    assert recipe.cluster.start_deadline == 5
    assert recipe.overlap == "off"
    assert recipe.kv_cache.memory == 2**20


def test_overrides_of_text_keys_stay_text() -> None:
    recipe = parse_recipe(
        MODEL,
        ["model.served_name=123", "frontend.admin_key=true", "model.path=a=b: c", "frontend.api_keys=[a, b]"],
    )
    assert recipe.model.served_name == "123"
    assert recipe.frontend.admin_key == "true"
    assert recipe.model.path == "a=b: c"
    assert recipe.frontend.api_keys == ("a", "b")


def test_an_optional_text_key_can_be_unset() -> None:
    assert (
        parse_recipe("model: {path: x, served_name: y}", ["model.served_name=null"]).model.served_name is None
    )


def test_the_last_override_wins_and_sections_appear_as_needed() -> None:
    recipe = parse_recipe("model:\n  path: x\nfrontend:\n", ["frontend.port=1", "frontend.port=2"])
    assert recipe.frontend.port == 2


def test_an_empty_file_can_be_filled_by_overrides() -> None:
    assert parse_recipe("", ["model.path=x"]).model.path == "x"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("frontend.port", ["key=value", "frontend.port=9000"]),
        ("=3", ["key=value"]),
        ("frontend.prot=3", ["frontend.prot", "unknown key", "did you mean frontend.port?"]),
        ("port=3", ["unknown key", "did you mean frontend.port?"]),
        ("model.path.x=3", ["unknown key"]),
        ("frontend.port=[1", ["'[1'", "not valid YAML"]),
        ("frontend.port=nine", ["frontend.port", '"nine"', "integer"]),
        ("frontend=3", ["frontend = 3", "section with keys"]),
        ("scheduler.max_running=0", ["scheduler.max_running = 0", "greater than or equal to 1"]),
        ("model.max_len=null", ["model.max_len", "auto or a whole number"]),
    ],
)
def test_bad_overrides(override: str, words: list[str]) -> None:
    message = refusal(MODEL, override)
    assert all(word in message for word in words), message


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["model: missing"]),
        ("model: {}", ["model.path: missing"]),
        ("model: {path: ''}", ["model.path", "at least 1 character"]),
        ("model: {path: null}", ["model.path = null", "string"]),
        ("model: {path: 3}", ["model.path = 3", "string"]),
        ("model:", ["model = null", "section with keys (path,"]),
        ("- a\n- b", ["sections with keys", "got a list"]),
        ("just text", ["sections with keys", "got a str"]),
        ("a: [", ["line 1", "not valid YAML"]),
        ("\tmodel: 3", ["line 1", "not valid YAML"]),
        (MODEL + MODEL, ["line 2", "'model' is given twice"]),
        ("model: {path: x, path: y}", ["'path' is given twice"]),
        ("model: !!python/object:os.system {}", ["not valid YAML"]),
        (MODEL + "kv_cahce: {}", ["kv_cahce", "unknown key", "did you mean kv_cache?"]),
        (
            MODEL + "scheduler: {max_runing: 3}",
            ["scheduler.max_runing = 3", "did you mean scheduler.max_running?"],
        ),
        (MODEL + "page_size: 3", ["did you mean kv_cache.page_size?"]),
        (MODEL + "zebra: 3", ["zebra = 3: unknown key"]),
        (MODEL + "1: 2", ["keys should be strings"]),
        (MODEL + "kv_cache: {dtype: fp9}", ['kv_cache.dtype = "fp9"', "'auto', 'bf16', 'fp32' or 'fp8'"]),
        (MODEL + "kv_cache: {memory: lots}", ['kv_cache.memory = "lots"', "512MiB"]),
        (MODEL + "kv_cache: {memory: -1}", ["kv_cache.memory = -1", "greater than or equal to 1"]),
        (MODEL + "kv_cache: {memory: 5lots}", ['kv_cache.memory = "5lots"', "auto, a number of bytes"]),
        (MODEL + "kv_cache: {memory: '1,5GB'}", ['kv_cache.memory = "1,5GB"', "512MiB"]),
        (MODEL + "kv_cache: {host_memory: 1.2.3GB}", ['= "1.2.3GB": should be a number of bytes', "512MiB"]),
        (MODEL + "kv_cache: {memory: 9PiB}", ["kv_cache.memory", "less than or equal to"]),
        (MODEL + f"kv_cache: {{memory: {'9' * 400}TiB}}", ["kv_cache.memory", "should be auto"]),
        (MODEL + "kv_cache: {memory: .inf}", ["kv_cache.memory = inf", "integer"]),
        (MODEL + "kv_cache: {page_size: 48}", ["kv_cache.page_size = 48", "power of two"]),
        (MODEL + "frontend: {max_body: 1GiB}", ["frontend.max_body = 1073741824", "body_memory"]),
        (MODEL + "kv_cache: {prefix_caching: 1}", ["kv_cache.prefix_caching = 1", "boolean"]),
        (MODEL + "kv_cache: {page_size: '64'}", ['kv_cache.page_size = "64"', "integer"]),
        (MODEL + "scheduler: {max_running: 1.5}", ["scheduler.max_running = 1.5", "integer"]),
        (MODEL + "scheduler: {max_running: true}", ["scheduler.max_running = true", "integer"]),
        (MODEL + "scheduler: {inter_token_target: .nan}", ["scheduler.inter_token_target = nan", "finite"]),
        (MODEL + "frontend: {port: 70000}", ["frontend.port = 70000", "less than or equal to 65535"]),
        (MODEL + "frontend: {api_keys: one}", ['frontend.api_keys = "one"', "list"]),
        (MODEL + "frontend: {api_keys: [a, 3]}", ["frontend.api_keys.1 = 3", "string"]),
        (MODEL + "overlap: maybe", ['overlap = "maybe"', "'auto', 'off' or 'on'"]),
        (MODEL + "cluster: {backend: slurm}", ['cluster.backend = "slurm"', "'ray' or 'local'"]),
        (MODEL + "cluster: {nodes: 0}", ["cluster.nodes = 0", "greater than or equal to 1"]),
        (MODEL + "model2: {path: y}", ["model2", "did you mean model?"]),
    ],
)
def test_errors_name_path_value_and_what_is_allowed(text: str, words: list[str]) -> None:
    message = refusal(text)
    assert message.startswith("r.yaml: ")
    assert all(word in message for word in words), message


def test_all_errors_are_reported_at_once() -> None:
    message = refusal(MODEL + "scheduler: {max_running: 0, max_queue: x}\nnodes: 2\n")
    assert message.startswith("r.yaml: 3 problems\n")
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", b"model: \xc3\x28", b"\x00"])
def test_bytes_that_are_not_text(text: bytes) -> None:
    assert "not valid YAML" in refusal(text)


def test_deep_nesting_is_refused() -> None:
    assert "r.yaml" in refusal("a: " + "[" * 5000)


# --------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cluster: {backend: local, nodes: 2}", ["cluster.nodes = 2", "cluster.backend = local"]),
        ("cluster: {backend: local, address: 'h:1'}", ["cluster.address = h:1", "cluster.backend = local"]),
        ("scheduler: {max_batch_tokens: 64, max_running: 65}", ["max_batch_tokens = 64", "max_running (65)"]),
        (
            "parallel: {tensor: 2}\ncluster: {ranks_per_node: 3}",
            ["parallel.tensor x parallel.pipeline = 2", "3 ranks"],
        ),
        (
            "parallel: {dense: 2}\ncluster: {ranks_per_node: 3}",
            ["parallel.dense = 2", "3 ranks of a pipeline stage"],
        ),
        (
            "parallel: {dense: 3, tensor: 2}\ncluster: {ranks_per_node: 6}",
            ["parallel.dense = 3", "parallel.tensor (2)"],
        ),
        (
            "experts: {dispatch: local}\ncluster: {ranks_per_node: 2}",
            ["experts.dispatch = local", "ranks_per_node 2"],
        ),
        ("overlap: on\ncluster: {ranks_per_node: 1}", ["overlap = on", "one rank"]),
        ("overlap: on\ncluster: {ranks_per_node: 2}\nparallel: {pipeline: 2}", ["overlap = on", "one rank"]),
        ("frontend: {api_keys: [k], admin_key: k}", ["frontend.admin_key", "frontend.api_keys"]),
    ],
)
def test_contradictions_show_both_values(text: str, words: list[str]) -> None:
    message = refusal(MODEL + text)
    assert all(word in message for word in words), message


def test_memory_below_the_context_is_refused() -> None:
    message = refusal("model: {path: x, max_len: 4096}\nkv_cache: {memory: 1KiB}")
    assert "kv_cache.memory = 1024" in message
    assert "model.max_len (4096)" in message


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("kv_cache: {host_memory: 1GiB}", f"kv_cache.host_memory = {2**30}"),
        ("deterministic: true", "deterministic = true"),
    ],
)
def test_what_does_not_work_yet_is_refused_saying_so(text: str, what: str) -> None:
    message = refusal(MODEL + text)
    assert f"{what}: does not work yet" in message


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["demo", "demo.yaml"])
def test_a_packaged_recipe_is_found_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, path = load_recipe(name)
    assert path.name == "demo.yaml"
    assert (model_directory(recipe, path.parent) / "config.json").is_file()


def test_a_path_wins_over_a_packaged_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo.yaml").write_text("model: {path: mine}")
    monkeypatch.chdir(tmp_path)
    recipe, path = load_recipe("demo.yaml")
    assert model_directory(recipe, path.parent) == tmp_path / "mine"


def test_a_model_path_on_the_command_line_starts_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, path = load_recipe("demo", ["model.path=here"])
    assert model_directory(recipe, path.parent) == tmp_path / "here"


def test_a_missing_recipe_names_the_packaged_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such file.*did you mean demo\.yaml\?.*packaged: .*demo\.yaml"):
        find_recipe("demo.yml")
    with pytest.raises(RecipeError, match="is a directory"):
        find_recipe(str(tmp_path))


def test_every_key_is_described_once() -> None:
    for path in key_paths():
        kind = key_type(tuple(path.split(".")))
        assert kind is not None, path
    described = [
        field.description
        for part in [Recipe, *(f.annotation for f in Recipe.model_fields.values())]
        if isinstance(part, type) and hasattr(part, "model_fields")
        for field in part.model_fields.values()
        if not hasattr(field.annotation, "model_fields")
    ]
    assert all(described)
    assert len(set(described)) == len(described)


# --------------------------------------------------------------------------- anything at all

_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_keys = st.text(max_size=8)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3),
    max_leaves=8,
)


@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    try:
        parse_recipe(text)
    except RecipeError as error:
        assert str(error).startswith("recipe: ")


@given(st.sampled_from(key_paths()), st.text(max_size=40))
def test_any_override_is_taken_or_refused(key: str, value: str) -> None:
    try:
        parse_recipe(MODEL, [f"{key}={value}"])
    except RecipeError as error:
        assert key in str(error)


@given(st.dictionaries(st.sampled_from([*Recipe.model_fields, "x"]), _values, max_size=4))
def test_any_structure_is_a_recipe_or_a_recipe_error(data: dict[str, object]) -> None:
    try:
        parse_recipe(yaml.safe_dump(data))
    except RecipeError as error:
        assert str(error).startswith("recipe: ")


def test_the_parsers_of_replies_are_those_there_are() -> None:
    for key, known in (("tool_parser", TOOL_FORMATS), ("reasoning_parser", REASONING_TAGS)):
        field = FrontendSection.model_fields[key]
        assert set(get_args(field.annotation)) == {"auto", "off", *known}, key


def test_settings_that_only_gpus_can_follow_are_found_by_name() -> None:
    assert for_gpus(parse_recipe(MODEL)) == []
    kernels = "kernels: {linear_fp8: deep_gemm, attention: flashinfer, prompt_attention: flash_attn_4}\n"
    every = kernels + "cluster: {ranks_per_node: 2}\n"
    lines = for_gpus(parse_recipe(MODEL + every + "experts: {wire: fp8, dispatch: flashinfer}"))
    assert [line.partition(":")[0] for line in lines] == [
        "kernels.linear_fp8 = deep_gemm",
        "kernels.attention = flashinfer",
        "kernels.prompt_attention = flash_attn_4",
        "experts.wire = fp8",
        "experts.dispatch = flashinfer",
    ]
    for library in ("deepep", "nccl_ep"):
        experts = f"cluster: {{ranks_per_node: 2}}\nexperts: {{dispatch: {library}}}"
        [line] = for_gpus(parse_recipe(MODEL + experts))
        assert line.startswith(f"experts.dispatch = {library}: is for ranks on GPUs")
