"""/admin: the live page, its headers and its key, and the page itself in a real browser."""

from __future__ import annotations

import json
import re
import time
from array import array
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lockstep.engine.frontend.http.page import load_page
from lockstep.engine.protocol.cluster_state import ClusterState, OverlapChoice, RankState
from support.engine.frontend.browser import CHROMIUM, Browser
from support.engine.frontend.running_frontend import RunningFrontend, wait_until
from support.engine.frontend.scripted_controller import STATE, say
from support.engine.text.tiny_tokenizer import IM_END, write_model

ADMIN = {"Authorization": "Bearer a1"}
SCRIPT = say([5, IM_END])
# First and last layer, rank, first and last expert.
HELD = ((0, 0, 0, 0, 1), (0, 0, 1, 0, 0), (0, 0, 1, 2, 3), (1, 1, 0, 0, 1), (1, 1, 1, 2, 3))
REASON = "rank 1 is lost: killed by SIGKILL"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian's package)")


def rank(number: int, state: str = "serving") -> RankState:
    return RankState(number, "node-a", 100 + number, state, 2, 6, 3, 16, 0.004, 0.001 * number, "reconnect")


def working() -> ClusterState:
    """Two ranks with 2 MoE layers of 4 experts; expert 0 of layer 0 has a replica."""
    return msgspec.structs.replace(
        STATE,
        ranks=(rank(0), rank(1)),
        num_running=4,
        expert_layers=2,
        expert_i64=array("q", [80, 10, 5, 5, 7, 7, 7, 7]).tobytes(),
        placement_i32=array("i", chain.from_iterable(HELD)).tobytes(),
        overlap="auto",
        overlap_choices=(OverlapChoice(64, 2, 0.25, None),),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def frontend(model: Path) -> Iterator[RunningFrontend]:
    with RunningFrontend(model, SCRIPT, api_keys=("k1",), admin_key="a1") as running:
        yield running


def told(frontend: RunningFrontend) -> dict[str, Any]:
    document: dict[str, Any] = frontend.http.get("/admin/cluster", headers=ADMIN).json()
    return document


# --------------------------------------------------------------------------- the answers


@pytest.mark.parametrize("path", ["/admin", "/admin/"])
def test_the_page_is_open_and_loads_nothing_else(frontend: RunningFrontend, path: str) -> None:
    answer = frontend.http.get(path)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert not re.findall(r"""(?:src|href)=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)""", answer.text)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[kind]), kind
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_never_reads_text_as_markup_and_keeps_the_key_in_its_tab() -> None:
    page = bytes(load_page("admin.html")().body).decode()
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\son\w+=", page)
    assert "localStorage" not in page and "document.cookie" not in page and "style=" not in page


def test_answers_share_no_headers() -> None:
    make = load_page("admin.html")
    make().headers["vary"] = "Origin"
    assert "vary" not in make().headers


def test_only_the_page_itself_is_open(frontend: RunningFrontend) -> None:
    for path in ("/admin/cluster", "/admin/x", "/admin/requests/a", "/adminx"):
        assert frontend.http.get(path).status_code == 401, path
    assert frontend.http.post("/admin").status_code == 405
    wrong = frontend.http.get("/admin/cluster", headers={"Authorization": "Bearer k1"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (401, None)


def test_without_an_admin_key_the_error_names_it(model: Path) -> None:
    with RunningFrontend(model, SCRIPT) as running:
        assert running.http.get("/admin").status_code == 200
        answer = running.http.get("/admin/cluster", headers=ADMIN)
        assert (answer.status_code, answer.json()["error"]["param"]) == (401, "frontend.admin_key")


def test_the_state_tells_since_when_and_that_the_controller_is_silent(model: Path) -> None:
    began = time.time()
    with RunningFrontend(model, SCRIPT, admin_key="a1") as running:
        running.engine.set_state(ranks=(rank(0), rank(1)))
        running.engine.set_state(ranks=(rank(0), rank(1, "lost")), phase="recovering", reason=REASON)
        wait_until(lambda: told(running)["phase"] == "recovering", "the loss")
        state = told(running)
        assert began <= state["rank_since"][0] <= state["rank_since"][1] <= state["time"]
        assert began <= state["since"] <= state["heard"] <= state["time"]
        assert [event["text"] for event in state["events"]][-2:] == [
            f"recovering: {REASON}",
            "rank 1 on node-a: lost",
        ]
        assert state["trouble"] == f"The engine is recovering: {REASON}"


def test_a_page_on_a_large_cluster_costs_about_what_its_document_does(model: Path) -> None:
    """72 ranks and 58 layers of 256 experts, asked for once a second: 1.8 ms on an EPYC Genoa, a
    fifth of one per cent of a core. Here it is held beside plain JSON of the same document,
    whatever the CPU. The time is that of this process, so that of the client and the double of the
    controller counts too.
    """
    ranks, layers, experts = 72, 58, 256
    held = [
        (layer, layer, rank, 4 * rank % experts, 4 * rank % experts + 3)
        for layer in range(layers)
        for rank in range(ranks)
    ]
    with RunningFrontend(model, SCRIPT, admin_key="a1") as running:
        running.engine.set_state(
            ranks=tuple(rank(number) for number in range(ranks)),
            expert_layers=layers,
            expert_i64=array("q", range(layers * experts)).tobytes(),
            placement_i32=array("i", chain.from_iterable(held)).tobytes(),
        )
        wait_until(lambda: len(told(running)["ranks"]) == ranks, "the large state")
        spent, plain = [], []
        for _ in range(10):
            began = time.process_time()
            answer = running.http.get("/admin/cluster", headers=ADMIN)
            spent.append(time.process_time() - began)
            assert answer.status_code == 200
            document = answer.json()
            began = time.process_time()
            json.loads(json.dumps(document))
            plain.append(time.process_time() - began)
    assert sorted(spent)[5] < 1.5 * sorted(plain)[5], f"{sorted(spent)} s; as plain JSON {sorted(plain)} s"


# --------------------------------------------------------------------------- in a browser


def headline(text: str) -> str:
    return f"document.getElementById('headline').textContent.includes({text!r})"


def sign_in(browser: Browser, key: str = "a1") -> None:
    browser.wait_for("!document.getElementById('keyform').hidden")
    browser.evaluate(f"document.getElementById('key').value = {key!r}")
    browser.evaluate("document.querySelector('#keyform button').click()")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as running:
        yield running


@needs_browser
def test_a_person_sees_whether_all_is_well_and_if_not_which_rank_and_why(
    frontend: RunningFrontend, browser: Browser
) -> None:
    frontend.engine.state = working()
    browser.open(f"{frontend.url}/admin/")
    browser.wait_for(headline("The admin key is needed"))
    sign_in(browser, "no")
    browser.wait_for(headline("This admin key is wrong"))
    assert browser.evaluate("sessionStorage.getItem('adminKey')") is None
    sign_in(browser)
    browser.wait_for("document.querySelector('#why').textContent.includes('All 2 ranks serve')")
    assert browser.text("#since").startswith("since ")
    browser.wait_for(headline("All is well"))
    assert browser.evaluate("document.querySelectorAll('#ranks tbody tr').length") == 2
    assert browser.evaluate("!document.getElementById('heat').hidden")
    assert "1 experts with replicas" in browser.text("#loadtext")
    first = browser.text("#layers tbody tr").split()
    assert first == ["0", "0", "80", "25.0", "3.20", "0,", "1"]
    browser.evaluate("document.querySelector('#heat').onpointermove({clientX: 0, clientY: 0})")
    assert "not measured" in browser.text("#choices")

    frontend.engine.set_state(ranks=(rank(0), rank(1, "lost")), phase="recovering", reason=REASON, epoch=2)
    browser.wait_for(headline("Recovering: rank 1 is lost"))
    assert REASON in browser.text("#why") and "ago" in browser.text("#since")
    assert browser.evaluate("document.querySelector('#ranks tbody tr').dataset.bad === ''")
    assert browser.text("#ranks tbody th") == "1"
    assert "epoch 2 begins" in browser.text("#events")

    frontend.engine.set_state(ranks=(rank(0), rank(1)), phase="serving", reason="", num_waiting=40)
    browser.wait_for(headline("Serving; look closer"))
    assert "40 requests wait" in browser.text("#why")
    refused = [problem for problem in browser.problems if "401" not in problem]
    assert not refused


def placed(*held: tuple[int, int, int, int, int]) -> bytes:
    return array("i", chain.from_iterable(held)).tobytes()


def corner(x: int, y: int) -> str:
    """The opacity of a cell's lower right corner, where moves are marked."""
    side = "(canvas.width / 4)"
    at = f"{side} * {x + 1} - 1, {side} * {y + 1} - 1, 1, 1"
    color = "getComputedStyle(document.documentElement).getPropertyValue('--moved')"
    return (
        f"(() => {{ const canvas = document.getElementById('heat'), pen = canvas.getContext('2d');"
        f"const found = [...pen.getImageData({at}).data].slice(0, 3);"
        f"const wanted = {color}.trim().match(/[0-9a-f]{{2}}/g).map((one) => parseInt(one, 16));"
        "return found.every((one, at) => one === wanted[at]); })()"
    )


@needs_browser
def test_a_person_sees_experts_move(frontend: RunningFrontend, browser: Browser) -> None:
    state = frontend.engine.state = working()
    browser.open(f"{frontend.url}/admin/")
    sign_in(browser)
    browser.wait_for("document.querySelector('#why').textContent.includes('All 2 ranks serve')")
    assert browser.evaluate("document.getElementById('moved').hidden")
    assert "moved" not in browser.text("#loadtext")

    frontend.engine.set_state(moves_open=3)
    browser.wait_for("document.getElementById('loadtext').textContent.includes('3 experts are on their way')")
    swapped = ((0, 0, 0, 0, 1), (0, 0, 1, 0, 0), (0, 0, 1, 2, 3), (1, 1, 0, 0, 0), (1, 1, 0, 2, 2))
    totals = msgspec.structs.replace(state.totals, moved_bytes=44_000_000)
    frontend.engine.set_state(
        moves_open=0,
        placement_version=1,
        placement_i32=placed(*swapped, (1, 1, 1, 1, 1), (1, 1, 1, 3, 3)),
        totals=totals,
    )
    browser.wait_for("!document.getElementById('moved').hidden")
    rows = browser.evaluate(
        "[...document.querySelectorAll('#moved tbody tr')]"
        ".map((row) => [...row.cells].slice(1).map((one) => one.textContent))"
    )
    assert sorted(rows) == [["1", "1", "0", "1"], ["1", "2", "1", "0"]]
    assert "44.0 MB in all; 2 experts of the last minute" in browser.text("#loadtext")
    assert browser.evaluate(corner(1, 1)) and browser.evaluate(corner(2, 1))
    assert not browser.evaluate(corner(0, 1)) and not browser.evaluate(corner(1, 0))
    assert not [problem for problem in browser.problems if "401" not in problem]


# Notes the texts of written cells, but for "Since", which grows, and how often the map is drawn.
WATCH = """
window.written = []; window.drawn = 0;
const watch = new MutationObserver((found) => written.push(...found.map((one) => one.target)
  .filter((one) => one.cellIndex !== 2).map((one) => one.textContent)));
const kinds = { subtree: true, childList: true, attributes: true, characterData: true };
for (const id of ["ranks", "events", "layers", "moved", "choices"]) {
  watch.observe(document.getElementById(id), kinds);
}
const put = CanvasRenderingContext2D.prototype.putImageData;
CanvasRenderingContext2D.prototype.putImageData = function (...given) {
  window.drawn++;
  put.apply(this, given);
};
"""
POLLS = "performance.getEntriesByType('resource').length"


@needs_browser
def test_only_cells_that_changed_are_written(frontend: RunningFrontend, browser: Browser) -> None:
    frontend.engine.state = working()
    frontend.engine.set_state(epoch=7)
    wait_until(lambda: told(frontend)["epoch"] == 7, "this state, not that of another test")
    browser.open(f"{frontend.url}/admin/")
    sign_in(browser)
    browser.wait_for("document.querySelector('#why').textContent.includes('All 2 ranks serve')")
    browser.evaluate(WATCH)
    frontend.engine.set_state(ranks=(rank(0), msgspec.structs.replace(rank(1), num_running=77)))
    browser.wait_for("written.length > 0")
    polls = browser.evaluate(POLLS)
    browser.wait_for(f"{POLLS} >= {polls} + 2")
    assert browser.evaluate("[written, drawn]") == [["77"], 0]
    frontend.engine.set_state(expert_i64=array("q", [80, 10, 5, 5, 7, 7, 7, 8]).tobytes())
    browser.wait_for("drawn === 1")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen(frontend: RunningFrontend, browser: Browser, scheme: str) -> None:
    frontend.engine.state = working()
    for width in (390, 1440):
        browser.open(f"{frontend.url}/admin/", width, scheme=scheme)
        browser.evaluate("sessionStorage.setItem('adminKey', 'a1')")
        browser.open(f"{frontend.url}/admin/", width, scheme=scheme)
        browser.wait_for("document.querySelectorAll('#ranks tbody tr').length === 2")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("[...document.querySelectorAll('input')].every((one) => one.labels.length)")
    assert browser.evaluate("document.getElementById('verdict').getAttribute('aria-live')") == "polite"


@needs_browser
def test_a_hidden_page_asks_nothing(frontend: RunningFrontend, browser: Browser) -> None:
    frontend.engine.state = working()
    browser.open(f"{frontend.url}/admin/")
    sign_in(browser)
    browser.wait_for(headline("All is well"))
    browser.evaluate(
        "Object.defineProperty(document, 'hidden', {get: () => window.away ?? true, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    assert browser.evaluate("seen.turn > 0")
    turn = browser.evaluate("seen.turn")
    frontend.engine.set_state(epoch=9)
    wait_until(lambda: told(frontend)["epoch"] == 9, "epoch 9")
    assert browser.evaluate("new Promise((done) => setTimeout(() => done(seen.turn), 1500))") == turn
    assert browser.evaluate("seen.state.epoch") != 9
    browser.evaluate("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
    browser.wait_for("seen.state.epoch === 9")


@needs_browser
def test_a_server_that_is_gone_and_one_without_a_key_are_told_apart(model: Path, browser: Browser) -> None:
    with RunningFrontend(model, SCRIPT) as running:
        browser.open(f"{running.url}/admin/")
        browser.wait_for(headline("No admin key is configured"))
        assert "frontend.admin_key" in browser.text("#why")
    with RunningFrontend(model, SCRIPT, admin_key="a1") as running:
        running.engine.state = working()
        browser.open(f"{running.url}/admin/")
        sign_in(browser)
        browser.wait_for(headline("All is well"))
    browser.wait_for(headline("The server does not answer"))
    assert "Shown is its state of" in browser.text("#why")
