"""The answers behind the page, over HTTP."""

import http.client
import json
import math
import re
import socket
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from genrec.data.sequences import take_users
from genrec.demo_ui.question import Question
from genrec.demo_ui.server import Handler, Server
from genrec.generation import Recommender


def raw(server, *lines, body=b""):
    """The status line of an answer to words that no ordinary client would send."""
    with socket.create_connection(server.server_address, timeout=20) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        return connection.makefile("rb").readline().decode().strip()


def test_the_page_brings_everything_along(server):
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    connection.request("GET", "/")
    answer = connection.getresponse()
    page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert answer.status == 200
    assert answer.headers.get_content_type() == "text/html"
    assert "/* CSS */" not in page
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert re.search(r"script-src 'sha256-[^']+'; style-src 'sha256-[^']+';", policy)
    assert "unsafe" not in policy
    assert len(page) < 60_000


def test_the_run(call, demo):
    status, about = call("api/run")
    assert status == 200
    assert (about["name"], about["items"], about["users"]) == ("a run", demo.catalogue.size, len(demo.sequences))
    assert about["levels"] == [8, 8, 8]
    assert about["defaults"]["beams"] == 8


def test_users_are_found_page_by_page(call, demo):
    everyone = demo.sequences.user_ids.tolist()
    assert call("api/users?limit=100")[1]["total"] == len(everyone)
    pages = [call(f"api/users?offset={offset}&limit=7")[1]["users"] for offset in range(0, len(everyone), 7)]
    rows = [row for page in pages for row in page]
    assert [row["id"] for row in rows] == everyone
    assert [row["events"] for row in rows] == np.diff(demo.sequences.cu_events).tolist()
    found = [row["id"] for row in call("api/users?q=1")[1]["users"]]
    assert sorted(found) == sorted(user for user in everyone if "1" in user)
    begins = [user.startswith("1") for user in found]
    assert begins == sorted(begins, reverse=True)
    assert call("api/users?q=nobody")[1] == {"total": 0, "users": []}


def test_titles_are_found_by_their_words(call, demo, html_title):
    title = demo.catalogue.titles[5]
    words = title.split()[::-1]
    for query in (title, title.upper(), " ".join(words), title[1:-1]):
        answer = call("api/items?limit=100&q=" + "".join(f"%{byte:02x}" for byte in query.encode()))[1]
        assert title in [row["title"] for row in answer["items"]]
    row = next(row for row in answer["items"] if row["title"] == title)
    assert row["id"] == demo.catalogue.item_ids[5]
    assert row["codes"] == demo.run.model.codes[5].tolist()
    everything = call("api/items?limit=100")[1]
    assert everything["total"] == demo.catalogue.size
    counts = demo.catalogue.counts[[row["index"] for row in everything["items"]]]
    assert (np.diff(counts) <= 0).all()
    assert call("api/items?q=%3Cimg")[1]["items"][0]["title"] == html_title


def test_accents_and_case_do_not_matter(demo, monkeypatch):
    monkeypatch.setattr(demo, "_titles", ["", "leon: the professional", *demo._titles[2:]])
    assert demo.items("LÉON", 0, 5)["total"] == 1


def test_a_user_gets_what_the_recommender_says(recommend, demo):
    answer = recommend(user="3", top_k=6)
    items, scores = Recommender(demo.run.model, demo.run.settings).rank_scored(demo_user(demo, "3"), 6)
    assert [row["index"] for row in answer["results"]] == items[0].tolist()
    assert [row["score"] for row in answer["results"]] == pytest.approx(scores[0].tolist(), abs=1e-4)
    assert [row["title"] for row in answer["results"]] == demo.catalogue.titles[items[0]].tolist()
    assert answer["latency_ms"] > 0
    assert answer["held_out"] is None
    history = demo_user(demo, "3")
    assert [row["title"] for row in answer["history"]] == demo.catalogue.titles[history.item_ids].tolist()
    assert [row["rating"] for row in answer["history"]] == history.ratings.tolist()
    reads = demo.run.model.config.max_events
    assert [row["read"] for row in answer["history"]][-reads - 1 :] == [False] + reads * [True]


def demo_user(demo, user):
    return take_users(demo.sequences, np.flatnonzero(demo.sequences.user_ids == user))


def test_every_result_is_explained(recommend, demo):
    alpha = demo.run.settings.alpha
    for row in recommend(user="3", top_k=20)["results"]:
        assert row["codes"] == demo.run.model.codes[row["index"]].tolist()
        assert sum(map(math.log, row["steps"])) == pytest.approx(row["beam"], abs=0.01)
        counted = row["score"] - alpha * row["item_head"]
        assert (counted == pytest.approx(row["beam"], abs=1e-2)) == row["reached"]
    reached = {
        mode: {row["reached"] for row in recommend(user="3", mode=mode)["results"]} for mode in ("beam", "items")
    }
    assert reached == {"beam": {True}, "items": {None}}


def test_the_last_event_can_be_hidden(recommend, demo):
    whole = recommend(user="3")
    answer = recommend(user="3", hide_last=True, top_k=100)
    last = whole["history"][-1]
    assert answer["events"] == whole["events"] - 1
    assert [row["id"] for row in answer["history"]] == [row["id"] for row in whole["history"][:-1]]
    assert answer["held_out"]["id"] == last["id"]
    hits = [row["id"] for row in answer["results"] if row["hit"]]
    assert hits == [last["id"]]
    assert answer["results"][answer["held_out"]["place"] - 1]["id"] == last["id"]
    few = recommend(user="3", hide_last=True, top_k=1, mode="items")
    everything = recommend(user="3", hide_last=True, top_k=100, mode="items")
    assert few["held_out"]["place"] == everything["held_out"]["place"], "the place is that in the whole catalogue"


def test_a_typed_history(recommend, demo):
    ids = demo.catalogue.item_ids[[4, 9, 2]].tolist()
    answer = recommend(items=ids)
    assert answer["user"] is None
    assert [row["id"] for row in answer["history"]] == ids
    assert len(answer["results"]) == 10
    assert not set(ids) & {row["id"] for row in answer["results"]}
    assert recommend(items=ids[::-1])["results"] != answer["results"], "the order of a history matters"
    everything = recommend(items=ids, include_seen=True, top_k=100)
    assert {row["id"] for row in everything["results"]} == set(demo.catalogue.item_ids[1:])


def test_settings_are_used_and_do_not_stay(recommend):
    before = recommend(user="5")
    chosen = {"beams": 3, "alpha": 0.5, "mode": "rerank", "top_k": 3, "include_seen": True}
    answer = recommend(user="5", **chosen)
    assert answer["settings"] == chosen
    assert len(answer["results"]) == 3
    after = recommend(user="5")
    assert {**after, "latency_ms": 0} == {**before, "latency_ms": 0}


def test_many_at_once_get_their_own_answers(recommend, demo):
    users = demo.sequences.user_ids[:8].tolist()
    settings = [{"user": user, "mode": mode, "top_k": 5} for user in users for mode in ("mixed", "beam", "items")]
    expected = [recommend(**body)["results"] for body in settings]
    found = {}
    threads = [
        threading.Thread(target=lambda at=at, body=body: found.update({at: recommend(**body)["results"]}))
        for at, body in enumerate(settings)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[at] for at in range(len(settings))] == expected


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b"\xff", "the body is not JSON"),
        ([], "the body is not a JSON object"),
        ({}, "expected either user or items"),
        ({"user": "3", "items": ["1"]}, "expected either user or items"),
        ({"user": 3}, "user is 3; expected a value of type str"),
        ({"user": "nobody"}, "user 'nobody' is not in the log"),
        ({"items": []}, "items holds 0 items; expected 1 to 1000"),
        ({"items": ["1"] * 1001}, "items holds 1001 items"),
        ({"items": [1]}, "items holds 1; expected item ids, which are strings"),
        ({"items": [""]}, "'' is not an item id"),
        ({"items": ["no such"]}, "'no such' is not an item id"),
        ({"user": "3", "beams": 0}, "beams is 0; expected 1 to 500"),
        ({"user": "3", "beams": True}, "beams is True; expected a value of type int"),
        ({"user": "3", "beams": 10**30}, "expected 1 to 500"),
        ({"user": "3", "alpha": math.nan}, "alpha is nan; expected 0 to 100"),
        ({"user": "3", "alpha": "2"}, "alpha is '2'; expected a value of type float"),
        ({"user": "3", "top_k": 1000}, "top_k is 1000; expected 1 to 100"),
        ({"user": "3", "mode": "magic"}, "mode is 'magic'; expected one of mixed, rerank, beam, items"),
        ({"user": "3", "hide_last": 1}, "hide_last is 1; expected a value of type bool"),
        ({"user": "3", "colour": "red"}, "unknown key 'colour'; expected some of user, items"),
    ],
)
def test_a_bad_question_is_told_so(call, body, words):
    status, answer = call("api/recommend", body)
    assert status == 400
    assert words in answer["error"]


@pytest.mark.parametrize(
    "path", ["api/users?limit=0", "api/users?limit=101", "api/items?offset=-1", "api/items?limit=x"]
)
def test_a_bad_number_is_told_so(call, path):
    status, answer = call(path)
    assert status == 400
    assert re.fullmatch("(limit|offset) is '.*'; expected a number from .*", answer["error"])


def test_what_is_not_there(call):
    assert call("nothing") == (404, {"error": "'/nothing' is not here"})
    assert call("api/run", {})[0] == 404
    assert call("../../etc/passwd")[0] == 404


def test_a_name_of_elsewhere_is_refused(call, server):
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        status, answer = call("api/users", Host=host)
        assert status == 400
        assert "expected localhost or 127.0.0.1" in answer["error"]
        assert call("api/recommend", {"user": "3"}, Host=host)[0] == 400
    port = server.server_address[1]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "localhost", f"[::1]:{port}"):
        assert call("api/users", Host=host)[0] == 200
    assert raw(server, "GET /api/run HTTP/1.0").split()[1] == "400"
    assert raw(server, "GET /api/run HTTP/1.0", "Host: [").split()[1] == "400"


def test_a_form_of_another_site_is_refused(call):
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        status, answer = call("api/recommend", {"user": "3"}, Content_Type=kind)
        assert status == 400
        assert answer["error"] == f"the body is {kind}; expected application/json"


def test_a_body_of_no_or_too_great_length_is_refused(server):
    post = ("POST /api/recommend HTTP/1.0", "Host: localhost", "Content-Type: application/json")
    for length in ("", "Content-Length: -1", "Content-Length: x", "Content-Length: 99999999"):
        assert raw(server, *post, *filter(None, [length])).split()[1] == "400"
    assert raw(server, *post, "Content-Length: 2", body=b"{}").split()[1] == "400"
    assert raw(server, "DELETE / HTTP/1.0").split()[1] == "501"


def test_what_goes_wrong_inside_is_a_sentence_too(call, demo, monkeypatch, capsys):
    def broken():
        raise RuntimeError("out of luck")

    monkeypatch.setattr(demo, "about", broken)
    assert call("api/run") == (500, {"error": "unexpected RuntimeError: out of luck"})
    assert "out of luck" in capsys.readouterr().err


def test_an_item_that_the_vocabulary_lost(demo, monkeypatch):
    row = int(np.flatnonzero(demo.sequences.user_ids == "3")[0])
    items = demo.sequences.item_ids.copy()
    items[demo.sequences.cu_events[row + 1] - 1] = 0
    monkeypatch.setattr(demo, "sequences", replace(demo.sequences, item_ids=items))
    answer = demo.recommend(Question("3", (), True, demo.run.settings))
    assert answer["held_out"] == {
        "index": 0,
        "id": "",
        "title": "(not in the vocabulary)",
        "codes": None,
        "place": None,
    }
    whole = demo.recommend(Question("3", (), False, demo.run.settings))
    assert whole["history"][-1]["codes"] is None
    json.dumps(whole, allow_nan=False)


@pytest.mark.parametrize(("host", "url"), [("0.0.0.0", "http://localhost:"), ("127.0.0.1", "http://127.0.0.1:")])
def test_the_address_to_type(host, url):
    with Server(host, 0, SimpleNamespace()) as server:
        assert server.url == f"{url}{server.server_address[1]}/"


def test_close_hangs_up_and_leaves_no_thread(serve, demo, monkeypatch):
    monkeypatch.setattr(Handler, "timeout", None)  # else the silent one would be dropped after half a minute
    before = set(threading.enumerate())
    with serve(demo) as server:
        silent = socket.create_connection(server.server_address, timeout=20)
        assert "200 OK" in raw(
            server, "GET / HTTP/1.0", "Host: localhost"
        )  # the silent one, who was first, has a thread
    with silent:
        assert silent.recv(1) == b""
    assert set(threading.enumerate()) <= before
