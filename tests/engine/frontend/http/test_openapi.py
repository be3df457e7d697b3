"""The OpenAPI document is true: every route is in it, its schemas are valid, answers follow them,
and bodies made from them are served or refused as it says. The page needs no other address.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from hypothesis import given, settings, strategies as st
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from lockstep.engine.frontend.http import agents, app as application
from lockstep.engine.protocol.frontends import Rejected, Submit
from lockstep.engine.protocol.message import Finish
from support.engine.frontend.running_frontend import RunningFrontend
from support.engine.text.tiny_tokenizer import IM_END, write_model

KEY, ADMIN = {"Authorization": "Bearer k1"}, {"Authorization": "Bearer a1"}
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def script(submit: Submit) -> Iterator[Any]:
    """A few tokens and the end, whatever ends the request for its client."""
    yield from ([5], [6], [7], [IM_END], Finish.STOP)


Document = dict[str, Any]


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFrontend]:
    folder = write_model(tmp_path_factory.mktemp("model"))
    with RunningFrontend(folder, script, api_keys=("k1",), admin_key="a1") as running:
        running.engine.ends_timelines = True
        running.http.headers.update(KEY)
        yield running


@pytest.fixture(scope="module")
def document(frontend: RunningFrontend) -> Document:
    answer = frontend.http.get("/openapi.json", headers={"Authorization": ""})
    assert answer.status_code == 200, "a browser has no key yet"
    return answer.json()  # type: ignore[no-any-return]


def found(document: Document, part: Document) -> Document:
    """The part itself, or that to which it refers."""
    while "$ref" in part:
        start, *names = part["$ref"].split("/")
        assert start == "#"
        part = document
        for name in names:
            part = part[name]
    return part


def operations(document: Document) -> Iterator[tuple[str, str, Document]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def validator(document: Document, schema: Document) -> Draft202012Validator:
    resource = Resource.from_contents(document, default_specification=DRAFT202012)
    registry = Registry().with_resource("urn:api", resource)
    moved = json.loads(json.dumps(schema).replace('"#/', '"urn:api#/'))
    return Draft202012Validator(moved, registry=registry)


def check(document: Document, path: str, answer: httpx.Response) -> None:
    """Holds an answer against the document: status, headers, content type, body."""
    operation = document["paths"][path][answer.request.method.lower()]
    status = str(answer.status_code)
    told = found(document, operation["responses"].get(status) or operation["responses"]["default"])
    media = answer.headers["content-type"].partition(";")[0]
    assert media in told["content"], (path, status, media)
    for name in told.get("headers", {}):
        assert name in answer.headers, (path, status, name)
    if media == "application/json":
        errors = list(validator(document, told["content"][media]["schema"]).iter_errors(answer.json()))
        assert not errors, (path, status, errors[0].message, answer.text[:300])


# --------------------------------------------------------------------------- the document itself


def test_it_has_every_route(
    document: Document, frontend: RunningFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    routers = []

    class Kept(APIRouter):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            routers.append(self)

    for module in (application, agents):
        monkeypatch.setattr(module, "APIRouter", Kept)
    service: Any = SimpleNamespace(spec=frontend.spec, model=SimpleNamespace(codec=None), metrics=None)
    application.build_app(service)
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    there = {(path, method.upper()) for path, method, _ in operations(document)}
    assert there == {
        (route.path.replace(":path}", "}"), method) for route in routes for method in route.methods
    }
    assert (CHAT, "POST") in there and ("/metrics", "GET") in there


def test_it_follows_openapi(document: Document) -> None:
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["title"] and document["info"]["version"]
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(names) == len(set(names))
    for path, _, operation in operations(document):
        parameters = [found(document, item) for item in operation["parameters"]]
        in_path = {item["name"] for item in parameters if item["in"] == "path"}
        assert in_path == set(re.findall(r"{(\w+)}", path))
        for status, answer in operation["responses"].items():
            assert re.fullmatch(r"[1-5]\d\d|default", status)
            assert found(document, answer)["description"]
        for need in operation["security"]:
            assert set(need) <= set(document["components"]["securitySchemes"])


def test_every_reference_leads_somewhere_and_nothing_is_left_over(document: Document) -> None:
    text = json.dumps(document)
    for reference in set(re.findall(r'"\$ref": "([^"]+)"', text)):
        assert found(document, {"$ref": reference})
    for kind in ("schemas", "responses", "headers", "parameters"):
        for name in document["components"][kind]:
            assert f'"#/components/{kind}/{name}"' in text, f"{kind}/{name} is used nowhere"
    assert "HTTPValidationError" not in text and "422" not in text, "FastAPI's own errors are not ours"


def test_every_schema_is_valid(document: Document) -> None:
    for name, schema in document["components"]["schemas"].items():
        Draft202012Validator.check_schema(schema)
        assert schema["type"] == "object", name


def test_every_operation_tells_its_errors_its_key_and_its_types(document: Document) -> None:
    for path, method, operation in operations(document):
        answers = operation["responses"]
        assert "default" in answers
        for status, answer in answers.items():
            if status == "default" or int(status) >= 400:
                schema = found(document, answer)["content"]["application/json"]["schema"]
                shape = "MessagesErrorAnswer" if path.startswith("/v1/messages") else "ErrorAnswer"
                assert schema == {"$ref": f"#/components/schemas/{shape}"}
        assert ("401" in answers) == bool(operation["security"])
        assert ("requestBody" in operation) == (method == "post")
    paths = document["paths"]
    for path in (CHAT, "/v1/completions", "/invocations"):
        post = paths[path]["post"]
        assert {"400", "401", "404", "413", "415", "500", "503"} < set(post["responses"])
        assert set(post["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        assert post["security"] == [{"ApiKey": []}]
    assert "Retry-After" in found(document, paths[CHAT]["post"]["responses"]["503"])["headers"]
    assert "WWW-Authenticate" in found(document, paths[CHAT]["post"]["responses"]["401"])["headers"]
    assert paths["/admin/drain"]["post"]["security"] == [{"AdminKey": []}]
    assert paths["/health"]["get"]["security"] == []
    assert list(paths["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    schemes = document["components"]["securitySchemes"]
    assert {(scheme["type"], scheme["scheme"]) for scheme in schemes.values()} == {("http", "bearer")}


def test_roles_are_listed(document: Document) -> None:
    role = document["components"]["schemas"]["ChatMessage"]["properties"]["role"]
    assert role["enum"] == ["system", "developer", "user", "assistant", "tool"]


def test_without_keys_none_is_asked_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    with RunningFrontend(write_model(tmp_path_factory.mktemp("model")), script) as frontend:
        document = frontend.http.get("/openapi.json").json()
    for path, _, operation in operations(document):
        assert operation["security"] == ([{"AdminKey": []}] if path.startswith("/admin") else [])
        assert ("401" in operation["responses"]) == path.startswith("/admin")


# --------------------------------------------------------------------------- answers


def test_examples_are_served_and_answers_follow_their_schemas(
    document: Document, frontend: RunningFrontend
) -> None:
    frontend.http.post(CHAT, json=HELLO, headers={"X-Request-Id": "known"})
    for path, method, operation in operations(document):
        headers = ADMIN if path.startswith("/admin") else KEY
        if method == "get":
            path_of = path.replace("{model}", "tiny").replace("{id}", "known")
            answer = frontend.http.get(path_of, headers=headers)
        else:
            example = operation["requestBody"]["content"]["application/json"]["example"]
            answer = frontend.http.post(path, headers=headers, json=example)
        assert str(answer.status_code) == next(iter(operation["responses"])), answer.text
        check(document, path, answer)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, HELLO | {"stream": True}),
        (CHAT, HELLO | {"logprobs": True, "top_logprobs": 2, "n": 2, "return_token_ids": True}),
        (CHAT, HELLO | {"stop_token_ids": [6]}),
        ("/v1/completions", {"prompt": ["a", "b"], "stream": True}),
        ("/v1/completions", {"prompt": "a", "logprobs": 1, "echo": True}),
        ("/v1/completions", {"prompt": [[5, 6, 7], [8, 9]], "prompt_logprobs": 1, "return_token_ids": True}),
        (CHAT, HELLO | {"prompt_logprobs": 2}),
        ("/invocations", {"prompt": "a"}),
        ("/v1/responses", {"input": "a", "stream": True}),
        ("/v1/messages", HELLO | {"max_tokens": 1}),
        ("/v1/messages", HELLO | {"stream": True}),
        ("/tokenize", HELLO),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}),
    ],
)
def test_other_answers_follow_them_too(
    document: Document, frontend: RunningFrontend, path: str, body: Document
) -> None:
    answer = frontend.http.post(path, json=body)
    assert answer.status_code == 200
    check(document, path, answer)


def test_errors_follow_theirs(document: Document, frontend: RunningFrontend) -> None:
    frontend.engine.script = lambda submit: [Rejected(submit.handle, 503, "full", 3.0)]
    answers = [(CHAT, frontend.http.post(CHAT, json=HELLO))]
    frontend.engine.script = script
    answers += [
        (CHAT, frontend.http.post(CHAT, content=b"{")),
        (CHAT, frontend.http.post(CHAT, json=HELLO, headers={"Authorization": ""})),
        (CHAT, frontend.http.post(CHAT, json=HELLO | {"model": "other"})),
        ("/v1/models/{model}", frontend.http.get("/v1/models/other")),
        ("/detokenize", frontend.http.post("/detokenize", json={"tokens": [10**9]})),
        ("/admin/cluster", frontend.http.get("/admin/cluster")),
        ("/admin/drain", frontend.http.post("/admin/drain", headers=ADMIN, json={"deadline": -1})),
    ]
    answers.append((CHAT, frontend.http.post(CHAT, content=b"x", headers={"Content-Encoding": "gzip"})))
    assert [answer.status_code for _, answer in answers] == [503, 400, 401, 404, 404, 400, 401, 400, 415]
    for path, answer in answers:
        check(document, path, answer)


# --------------------------------------------------------------------------- bodies by schemas


def values(document: Document, schema: Document, depth: int = 0) -> st.SearchStrategy[Any]:
    """Small values that a schema of the document allows."""
    schema = found(document, schema)
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return st.one_of([values(document, choice, depth) for choice in choices])
    match schema.get("type"):
        case "object":
            return objects(document, schema, depth)
        case "array":
            least = schema.get("minItems", 0)
            most = min(schema.get("maxItems", 3), max(least, 3 - depth))
            return st.lists(
                values(document, schema.get("items", {}), depth + 1), min_size=least, max_size=most
            )
        case "string":
            return st.text(st.characters(codec="utf-8"), min_size=schema.get("minLength", 0), max_size=8)
        case "integer":
            low, high = (
                schema.get("minimum", 0),
                schema.get("maximum", schema.get("exclusiveMaximum", 40) - 1),
            )
            return st.integers(low, max(low, high))
        case "number":
            low, high = schema.get("minimum", schema.get("exclusiveMinimum", 0)), schema.get("maximum", 2)
            return st.floats(low, high, exclude_min="exclusiveMinimum" in schema, allow_subnormal=False)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
    return st.none() | st.booleans() | st.text(max_size=3)


def objects(document: Document, schema: Document, depth: int) -> st.SearchStrategy[Any]:
    properties = schema.get("properties")
    if properties is None:
        extra = schema.get("additionalProperties")
        inner = values(document, extra, depth + 1) if isinstance(extra, dict) else st.integers(0, 9)
        return st.dictionaries(st.text(st.characters(codec="ascii"), max_size=4), inner, max_size=2)
    required = set(schema.get("required", ()))
    fields = {name: values(document, part, depth + 1) for name, part in properties.items()}
    must = {name: fields[name] for name in required}
    may = {name: fields[name] for name in fields if name not in required}

    def some(names: list[str]) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries(must | {name: may[name] for name in names})

    return st.lists(st.sampled_from(sorted(may)), max_size=3, unique=True).flatmap(some) if may else some([])


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/invocations", "/tokenize", "/detokenize"])
def test_any_body_of_the_schema_is_answered_as_the_document_says(
    document: Document, frontend: RunningFrontend, path: str
) -> None:
    media = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]

    @given(values(document, media["schema"]))
    @settings(max_examples=80)
    def run(body: Document) -> None:
        answer = frontend.http.post(path, content=json.dumps(body).encode())
        assert answer.status_code in (200, 400, 404), answer.text
        check(document, path, answer)

    run()


@pytest.mark.parametrize("name", ["ChatRequest", "CompletionRequest", "TokenizeText", "DetokenizeRequest"])
def test_a_body_that_breaks_the_schema_is_refused(
    document: Document, frontend: RunningFrontend, name: str
) -> None:
    paths = {"ChatRequest": CHAT, "CompletionRequest": "/v1/completions", "TokenizeText": "/tokenize"}
    schema = document["components"]["schemas"][name]
    judge = validator(document, schema)
    good = {"messages": HELLO["messages"], "prompt": "a", "tokens": [5]}
    start = {key: good[key] for key in schema["required"]}

    @given(
        st.sampled_from(sorted(schema["properties"])),
        st.none()
        | st.booleans()
        | st.integers(-3, 3)
        | st.floats(-9, 9)
        | st.text(max_size=2)
        | st.lists(st.integers(-1, 1), max_size=2)
        | st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
    )
    @settings(max_examples=150)
    def run(field: str, value: object) -> None:
        body = start | {field: value}
        if field != "role" and not judge.is_valid(body):
            answer = frontend.http.post(paths.get(name, "/detokenize"), json=body)
            assert answer.status_code == 400, (body, answer.text)

    run()


# --------------------------------------------------------------------------- the page


def test_the_page_needs_no_other_address(frontend: RunningFrontend) -> None:
    answer = frontend.http.get("/docs", headers={"Authorization": ""})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert not re.findall(r"""(?:https?:)?//[\w.-]+\.\w+|\bsrc=|@import|url\(""", answer.text)
    assert set(re.findall(r'href="([^"]*)"', answer.text)) == {"openapi.json"}
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", policy)


def test_the_page_never_reads_text_as_markup(frontend: RunningFrontend) -> None:
    page = frontend.http.get("/docs").text
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\son\w+=", page)
