"""A real Triton server, asked as services would ask it."""

import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import stand_in

from genrec.export.triton_server import add_version

CLIENTS = 32
LOWEST = float(np.finfo(np.float32).min)


def random_indices(count, seed=0):
    """Histories of item indices, a tenth of them of items that nobody knows."""
    rng = np.random.default_rng(seed)
    return [
        [int(item) if rng.random() > 0.1 else -1 for item in rng.integers(1, stand_in.ITEMS + 1, rng.integers(1, 40))]
        for _ in range(count)
    ]


def names(history):
    return ["never seen" if index < 0 else f"ü{index}" for index in history]


def expected(export, *histories):
    """What ONNX Runtime says itself of each: item ids, titles and scores."""
    title = json.loads((export / "items.json").read_text())["titles"]
    return [
        (
            [f"ü{item}" if item else "" for item in items],
            [title[item - 1] if item else "" for item in items],
            [score if item else LOWEST for item, score in zip(items, scores, strict=True)],
        )
        for items, scores in stand_in.answer(export, histories)
    ]


def post(server, path, body):
    """(status, body) of a POST; a str is sent as it is."""
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.ports.http}{path}", data)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def request(data, shape=None, datatype="BYTES", name="history"):
    return {"inputs": [{"name": name, "datatype": datatype, "shape": shape or [1, len(data)], "data": data}]}


def metrics(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.ports.metrics}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def in_threads(connect, protocol, ask, work):
    """ask(client, piece) for every piece of work, by CLIENTS threads with a connection each."""
    local = threading.local()

    def one(piece):
        if not hasattr(local, "client"):
            local.client = connect(protocol)
        return ask(local.client, piece)

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(one, work))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_answers_are_those_of_onnx_runtime_whoever_else_asks(connect, exports, protocol):
    histories = random_indices(320)
    requests = [histories[begin : begin + 1 + begin % 3] for begin in range(len(histories))]  # of 1 to 3 users
    answers = in_threads(connect, protocol, lambda c, rows: c.recommend([names(row) for row in rows]), requests)
    asked = [row for rows in requests for row in rows]
    truth = {version: iter(expected(export, *asked)) for version, export in exports.items()}
    for answer in answers:
        for found in zip(*answer[1:], strict=True):
            right = {version: next(rows) for version, rows in truth.items()}
            assert found == right[answer.version]


def test_requests_of_different_lengths_run_together(server, connect, exports):
    """The graph itself pads, so histories that come from everywhere share a run."""
    histories = random_indices(200, seed=1)
    client = connect("http")

    def count():
        stats = client.connection.get_inference_statistics("recommend_graph")["model_stats"]
        return np.array([[int(s["inference_count"]), int(s["execution_count"])] for s in stats]).sum(0)

    def ask(client, history):
        result = client.connection.infer("recommend_graph", [client.tensor("history", [history], "INT64")], "1")
        return result.as_numpy("item_ids")[0].tolist(), result.as_numpy("scores")[0].tolist()

    before = count()
    assert in_threads(connect, "http", ask, histories) == stand_in.answer(exports[1], histories)
    requests, runs = count() - before
    assert requests == len(histories)
    assert runs < requests


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (request([""]), 400, "history 0 is empty; expected at least one item id"),
        (request(["ü1", ""], [2, 1]), 400, "history 1 is empty"),
        (request([], [1, 0]), 400, "history has 0 events; expected 1 to 100"),
        (request(["ü1"] * 101), 400, "history has 101 events; expected 1 to 100"),
        (request([1, 2], datatype="INT64"), 400, "data-type is 'INT64', but model 'recommend' expects 'BYTES'"),
        (request(["ü1"], [1]), 400, "unexpected shape for input 'history'"),
        (request(["ü1"], [1, 1, 1]), 400, "unexpected shape for input 'history'"),
        (request(["ü1"], [1, 3]), 400, "expected 3 string elements for inference input 'history'"),
        (request(["ü1"], [-1, 1]), 500, "Unable to parse 'shape'"),
        (request(["ü1"] * 65, [65, 1]), 400, "batch-size must be <= 64"),
        (request(["ü1"], name="hist"), 400, "unexpected inference input 'hist'"),
        ({}, 500, "Unable to parse 'inputs'"),
        ("{no json", 500, "failed to parse the request JSON"),
    ],
)
def test_malformed_requests_are_refused(server, connect, body, status, words):
    found, answer = post(server, "/v2/models/recommend/infer", body)
    assert found == status
    assert words in json.loads(answer)["error"]
    assert len(answer.splitlines()) == 1
    assert len(connect("grpc").recommend([["ü1"]]).item_ids[0]) == stand_in.TOP_K  # alive, and answering


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (request([1], datatype="INT32"), "data-type is 'INT32'"),
        (request([], [1, 0], "INT64"), "history has 0 events"),
        (request([1] * 101, datatype="INT64"), "history has 101 events; expected 1 to 100"),
    ],
)
def test_the_graph_refuses_too(server, body, words):
    status, answer = post(server, "/v2/models/recommend_graph/infer", body)
    assert status == 400
    assert words in json.loads(answer)["error"]


def test_one_bad_request_costs_the_others_nothing(connect):
    histories = [["ü1"] if number % 4 else [""] for number in range(200)]

    def ask(client, history):
        try:
            return client.recommend([history]).item_ids[0][0]
        except client.library.InferenceServerException as error:
            return str(error)

    answers = in_threads(connect, "grpc", ask, histories)
    assert all("is empty" in answer for answer in answers[::4])
    assert len({answer for number, answer in enumerate(answers) if number % 4}) == 1


def test_unknown_items_are_events_all_the_same(server, connect, exports):
    before = metrics(server)
    answer = connect("http").recommend([["ü3", "never seen", "ü4"]])
    after = metrics(server)
    right, without = expected(exports[answer.version], [3, -1, 4], [3, 4])
    assert (answer.item_ids[0], answer.titles[0], answer.scores[0]) == right != without
    assert after["genrec_unknown_events"] - before["genrec_unknown_events"] == 1
    assert after["genrec_history_events"] - before["genrec_history_events"] == 3


def test_places_without_an_item_are_valid_json(server, exports):
    """JSON has no infinity."""
    rare = next(i for i in range(1, 31) if all("" in expected(export, [i])[0][0] for export in exports.values()))

    def refuse(word):
        raise AssertionError(word)

    status, answer = post(server, "/v2/models/recommend/infer", request([f"ü{rare}"]))
    outputs = {output["name"]: output["data"] for output in json.loads(answer, parse_constant=refuse)["outputs"]}
    assert status == 200
    assert (outputs["item_ids"][-1], outputs["titles"][-1]) == ("", "")
    assert np.float32(outputs["scores"][-1]) == np.float32(LOWEST)


def test_metrics_count(server, connect):
    def answered():
        return sum(
            v for k, v in metrics(server).items() if k.startswith('nv_inference_request_success{model="recommend"')
        )

    before = answered()
    client = connect("http")
    for _ in range(5):
        client.recommend([["ü1"]])
    assert answered() - before == 5


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_loadtest(server, main, capsys, protocol, tmp_path):
    users = tmp_path / "users.jsonl"
    users.write_text('["ü1", "ü2"]\n["nobody knows"]\n')
    url = f"127.0.0.1:{getattr(server.ports, protocol)}"
    argv = ["loadtest", "--url", url, "--protocol", protocol, "--users", str(users), "--seconds", "1", "--clients", "8"]
    assert main([*argv, "--json", "true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["errors"] == 0
    assert found["requests"] > 20
    assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"]
    assert found["throughput"] == pytest.approx(found["requests"] / found["seconds"], rel=0.01)
    assert main(argv) == 0
    assert "answers a second" in capsys.readouterr().out


def test_loadtest_counts_errors(server, main, capsys, tmp_path):
    users = tmp_path / "users.jsonl"
    users.write_text('["ü1"]\n[""]\n')
    url = f"http://127.0.0.1:{server.ports.http}/"
    argv = ["loadtest", "--url", url, "--users", str(users), "--seconds", "1", "--clients", "4"]
    assert main([*argv, "--json", "true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["errors"] < found["requests"]
    assert "is empty" in found["first_error"]
    assert main([*argv, "--model", "recommend_graph"]) == 2
    assert "reads INT64 histories" in capsys.readouterr().err
    assert main([*argv, "--model", "nothing"]) == 2
    assert "has no model 'nothing'" in capsys.readouterr().err


def test_a_new_version_takes_over_without_a_dropped_request(server, repository, connect, exports):
    """Catalogue and graph change hands together: every answer is wholly of one version."""
    stop, histories = threading.Event(), random_indices(40, seed=2)
    truth = {version: expected(export, *histories) for version, export in exports.items()}
    versions = [[] for _ in range(8)]

    def ask_on(number):
        client, seen = connect("http" if number % 2 else "grpc"), versions[number]
        while not stop.is_set():
            place = (number + len(seen)) % len(histories)
            answer = client.recommend([names(histories[place])])
            assert (answer.item_ids[0], answer.titles[0], answer.scores[0]) == truth[answer.version][place]
            seen.append(answer.version)

    def everybody_sees(version):
        while not all(version in seen for seen in versions):
            for client in clients:
                assert not client.done(), client.exception()
            time.sleep(0.02)

    with ThreadPoolExecutor(len(versions)) as pool:
        clients = [pool.submit(ask_on, number) for number in range(len(versions))]
        try:
            everybody_sees(1)
            assert add_version(exports[2], repository.directory) == 2
            for model in ("recommend_graph", "recommend"):
                status, answer = post(server, f"/v2/repository/models/{model}/load", {})
                assert status == 200, answer
            everybody_sees(2)
        finally:
            stop.set()
        for client in clients:
            client.result()  # an error of any request is raised here
    for seen in versions:
        assert seen == sorted(seen)
        assert {1, 2} == set(seen)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_client_of_the_documentation(server, protocol, capsys):
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 12
    code = code.replace("tritonclient.http", f"tritonclient.{protocol}")
    exec(code.replace("127.0.0.1:8000", f"127.0.0.1:{getattr(server.ports, protocol)}"), {})
    assert len(capsys.readouterr().out.splitlines()) == stand_in.TOP_K
