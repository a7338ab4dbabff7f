"""target.py: budget and journal on a scripted model, the client on small servers that misbehave."""

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

import target as script
from crawler import Args
from target import Endpoint, Reply, Request, Stop, Target

torch.set_num_threads(1)
KEY = "sk-live-abc123DEF456"
ASKED = Request("answer", "Hi", "1.", 0.5, 10)


class Server:
    """A server on 127.0.0.1: `script(number, body)` gives (status, headers, body) or a callable."""

    def __init__(self, script):
        self.bodies, self.headers, self.paths = [], [], []
        self.inflight = self.most = 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    n = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.paths.append(self.path)
                    outer.inflight += 1
                    outer.most = max(outer.most, outer.inflight)
                answer = script(n, body)
                if callable(answer):
                    answer(self)
                else:
                    status, headers, text = answer
                    text = text if isinstance(text, bytes) else json.dumps(text).encode()
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(text)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text)
                with lock:
                    outer.inflight -= 1

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads, block_on_close, request_queue_size = True, False, 64

            def handle_error(self, *_):  # clients hang up, as they should
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def completion(text, finish="stop", **more):
    return {"choices": [{"message": {"content": text} | more, "finish_reason": finish}]}


OK = (200, {}, completion("fine"))


def endpoint(url, **flags):
    flags = {"url": url, "model": "m", "timeout": 5.0, "concurrency": 1} | flags
    backend = Endpoint(replace(Args(), **flags), 0)
    backend.pause = 1e-3
    return backend


def opened(backend, path, budget=100, resume=False, prompts=(), **flags):
    return Target(backend, path, replace(Args(), budget=budget, **flags), prompts, resume)


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("API_KEY", KEY)


def ask(tmp_path, answers, asked=ASKED, n=1, name="j", **flags):
    """What a server's answers, one a try (the last again and again), become: (replies, server)."""
    with Server(lambda i, body: answers[min(i, len(answers) - 1)]) as server:
        target = opened(endpoint(server.url, **flags), tmp_path / name)
        replies = []
        for _ in range(n):
            replies += target.ask([asked])
    return replies, server, target


# ------------------------------------------------------------------------------- what a server does


def raw(text, close=True, pause=0.0):
    """Bytes instead of a response."""

    def send(handler):
        for piece in text if isinstance(text, list) else [text]:
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(pause)
        handler.close_connection = close

    return send


def dropped(handler):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def date(seconds):
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + seconds))


@pytest.mark.parametrize(
    "bad",
    [
        [(429, {"Retry-After": "0"}, {}), (429, {"Retry-After": date(-9)}, {})],
        [(429, {}, {"error": "over your quota per minute, see https://x/billing"})],
        [(429, {"Retry-After": "0"}, {"error": {"code": "insufficient_quota"}})],
        [(529, {}, {}), (500, {}, b"oops"), (503, {"Retry-After": "soon"}, b"")],
        [(408, {"Retry-After": "-5"}, b""), (425, {}, b"\xff\x00")],
        [dropped, dropped],
        [raw(b"hello, I am no web server\r\n\r\n")],
        [raw(b"HTTP/1.1 2x0 OK\r\n\r\n")],
        [raw(b"HTTP/1.1 503 \xff\xfe\r\nX: \xff\r\nContent-Length: 0\r\n\r\n")],
    ],
    ids=["429", "429 billing", "429 quota, wait", "5xx", "odd", "dropped", "none", "2x0", "latin"],
)
def test_tries_without_an_answer_are_repeated_and_do_not_count(tmp_path, bad):
    (reply,), server, target = ask(tmp_path, [*bad, OK])
    assert (reply.text, reply.finish, reply.tries) == ("fine", "stop", len(bad) + 1)
    assert target.used == target.noted == 1 and len(server.bodies) == len(bad) + 1
    assert f"1 of 100 calls spent (1 answer) in {len(bad) + 1} tries" in target.counts()


def test_retry_after_is_obeyed(tmp_path):
    for wait in "1", "":
        began = time.monotonic()
        wait = wait or date(2.1)
        (reply,), _, target = ask(tmp_path, [(429, {"Retry-After": wait}, {}), OK])
        assert reply.text == "fine" and time.monotonic() - began > 0.9
        target.file.close()


CUT = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
CUT_CHUNK = raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{")
ENDLESS = raw([b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 2**16] * 40])
SLOW = raw([b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", *[b"x"] * 60], pause=0.05)
SLOW_HEAD = raw([b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 20], pause=0.05)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[" * 200_000,
        b"1" * 10_000,
        b"null",
        b"\xff\xfe{}",
        {"odd": 1},
        {"choices": []},
        {"choices": 7},
        {"choices": {"0": 1}},
        {"choices": [7]},
        {"choices": [{"message": "fine"}]},
        {"choices": [{"message": {"content": 7}}]},
        {"choices": [{"message": {"content": {"text": "x"}}}]},
        {"choices": [{"message": {"content": [7]}}]},
        {"choices": [{"message": {"content": [{"type": "text", "text": 7}]}}]},
        {"choices": [{"message": {"content": "x", "reasoning": 7}}]},
        {"choices": [{"message": {"content": None, "refusal": {"a": 1}}}]},
        {"error": {"code": 429}},
    ],
)
def test_an_answer_that_can_not_be_read_is_a_failed_call_that_counts(tmp_path, body):
    (reply, after), server, target = ask(tmp_path, [(200, {}, body), OK], n=2)
    assert (reply.finish, reply.text, reply.tries) == ("unread", "", 1) and after.text == "fine"
    assert target.used == 2 == len(server.bodies)


@pytest.mark.parametrize(
    "bad", [CUT, CUT_CHUNK, ENDLESS, SLOW], ids="cut chunk endless slow".split()
)
def test_bodies_that_do_not_end_well(tmp_path, bad):
    (reply, after), _, target = ask(tmp_path, [bad, OK], n=2, timeout=1.0)
    assert reply.finish == "unread" and after.text == "fine" and target.used == 2


def test_a_server_that_hangs_or_drips_its_headers(tmp_path):
    (reply,), server, target = ask(
        tmp_path, [lambda h: time.sleep(0.5), SLOW_HEAD, OK], timeout=0.2
    )
    assert reply.text == "fine" and reply.tries == 3 and target.used == 1


@pytest.mark.parametrize(
    "message, text, finish",
    [
        ({"content": [{"type": "text", "text": "a"}, {"text": "b"}, {"type": "x"}]}, "ab", "stop"),
        ({"content": None, "refusal": "I can't."}, "I can't.", "refusal"),
        ({"content": "", "refusal": "No."}, "No.", "refusal"),
        ({"content": "b", "reasoning_content": "a"}, "b", "stop"),
        ({"content": "1. echoed"}, "echoed", "stop"),
        ({"content": "half \ud83d emoji"}, "half \ufffd emoji", "stop"),
        ({"content": "\x1b]0;evil\x07\x1b[2Jred"}, "\ufffd]0;evil\ufffd\ufffd[2Jred", "stop"),
        ({"content": None}, "", "stop"),
    ],
)
def test_odd_replies(tmp_path, message, text, finish):
    answer = {"choices": [{"message": message, "finish_reason": ["odd"]}], "usage": ["odd"]}
    (reply,), _, target = ask(tmp_path, [(200, {}, answer)])
    assert (reply.text, reply.finish) == (text, finish)
    again = opened(None, copied(target.path), resume=True).ask([ASKED])
    assert again == [reply]  # journal and memory agree


def copied(path):
    """A journal's twin: the first is locked by its crawl."""
    twin = path.with_name("twin")
    twin.write_bytes(path.read_bytes())
    return twin


@pytest.mark.parametrize(
    "answer, told",
    [
        ((401, {}, {"error": f"bad key {KEY}"}), r"status 401: .*bad key \*\*\*"),
        ((401, {}, b'{"e":"' + b"".join(b"\\u%04x" % ord(c) for c in KEY) + b'"}'), r"\*\*\*"),
        ((400, {}, {"error": "no support for assistant message prefill"}), "prefill"),
        ((429, {}, {"error": {"code": "insufficient_quota"}}), "insufficient_quota"),
        ((429, {}, b'{"error": {"type" : "billing_hard_limit_reached"}}'), "billing_hard"),
        ((503, {"Retry-After": "4000"}, b""), "asks to wait 4000 s"),
        ((302, {"Location": "http://elsewhere.example/"}, b""), "status 302"),
        ((404, {}, b"\x1b[2J" + b"x" * 900_000), "status 404"),
    ],
)
def test_what_ends_the_crawl(tmp_path, answer, told, key):
    with Server(lambda *_: answer) as server:
        target = opened(endpoint(server.url), tmp_path / "j")
        with pytest.raises(Stop, match=told) as stop:
            target.ask([ASKED] * 9)
    text = str(stop.value) + target.path.read_text()
    assert len(server.bodies) == 1 and KEY not in text and "\x1b" not in text
    assert len(str(stop.value)) < 400 and "\n" not in str(stop.value)


def test_moderation_is_a_refusal(tmp_path):
    for answer in (403, {}, {"error": "blocked by moderation"}), (400, {}, {"e": "content policy"}):
        (reply,), _, target = ask(tmp_path, [answer])
        assert reply.finish == "refusal" and target.used == 1
        target.file.close()


def test_five_failures_in_a_row_end_the_crawl_and_are_asked_again(tmp_path):
    with Server(lambda i, body: (500, {}, b"") if i < 30 else OK) as server:
        target = opened(endpoint(server.url), tmp_path / "j")
        with pytest.raises(Stop, match="5 times in a row: status 500"):
            target.ask([ASKED] * 9)
        assert len(server.bodies) == 30 and target.noted == 0  # six tries each, nothing to pay
        target.file.close()
        again = opened(endpoint(server.url), tmp_path / "j", resume=True)
        assert [reply.text for reply in again.ask([ASKED] * 9)] == ["fine"] * 9


def test_a_server_that_is_down(tmp_path):
    with Server(lambda *_: OK) as server:
        pass
    with pytest.raises(Stop, match="5 times in a row: ConnectionError"):
        opened(endpoint(server.url, concurrency=4), tmp_path / "j").ask([ASKED] * 9)


# ----------------------------------------------------------------------------------------- requests


def headers(backend):
    return backend.sign(SimpleNamespace(headers={})).headers


def test_request_bodies(key):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "1."}]
    shared = {"model": "m", "max_tokens": 10, "temperature": 0.5}
    chat = endpoint("http://127.0.0.1:1/v1/", system="Be brief.")
    body = chat.body(3, ASKED)
    assert 0 <= body.pop("seed") < 2**31
    system = {"role": "system", "content": "Be brief."}
    vllm = {"continue_final_message": True, "add_generation_prompt": False}
    assert body == shared | vllm | {"messages": [system, *turns]}
    assert chat.url == "http://127.0.0.1:1/v1/chat/completions"
    assert headers(chat)["Authorization"] == f"Bearer {KEY}"
    claude = endpoint("https://127.0.0.1", api="anthropic", system="Be brief.")
    assert claude.body(3, ASKED) == shared | {"system": "Be brief.", "messages": turns}
    assert headers(claude)["x-api-key"] == KEY and "Authorization" not in headers(claude)
    assert claude.url == "https://127.0.0.1/v1/messages"
    plain = endpoint("http://127.0.0.1:1").body(0, replace(ASKED, prefill=""))
    assert plain["messages"] == turns[:1] and "continue_final_message" not in plain


def test_anthropic_replies(tmp_path, key):
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "two"}]
    for stop, finish in ("end_turn", "stop"), ("refusal", "refusal"):
        body = {"content": parts, "stop_reason": stop, "usage": 3}
        (reply,), server, target = ask(tmp_path, [(200, {}, body)], api="anthropic")
        assert (reply.text, reply.finish) == ("two", finish)
        assert server.headers[0]["x-api-key"] == KEY and server.paths == ["/v1/v1/messages"]
        target.file.close()


def test_netrc_stays_out(tmp_path, monkeypatch, key):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other-secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (reply,), server, _ = ask(tmp_path, [OK])
    assert reply.text == "fine" and server.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("concurrency", [1, 4])
def test_replies_stand_in_the_order_of_the_requests(tmp_path, concurrency):
    def answer(i, body):
        time.sleep(0.01 * (i % 3))
        return 200, {}, completion(body["messages"][0]["content"])

    with Server(answer) as server:
        target = opened(endpoint(server.url, concurrency=concurrency), tmp_path / "j")
        replies = target.ask([replace(ASKED, user=str(i)) for i in range(12)])
        assert server.most <= concurrency
    assert [reply.text for reply in replies] == [str(i) for i in range(12)]


def test_rps(tmp_path):
    with Server(lambda *_: OK) as server:
        began = time.monotonic()
        opened(endpoint(server.url, rps=50.0, concurrency=8), tmp_path / "j").ask([ASKED] * 11)
        assert time.monotonic() - began >= 10 / 50


# -------------------------------------------------------------------------------------------- the key


@pytest.mark.parametrize(
    "echo",
    [
        KEY,
        "x" * 9_990 + KEY,  # across the end of what is kept
        "a" * 230 + KEY,
    ],
)
def test_an_echoed_key_is_struck_before_anything_is_cut(tmp_path, echo, key):
    bad = raw(b"HTTP/1.1 599 " + KEY.encode() + b"\r\nContent-Length: 0\r\n\r\n")
    with Server(lambda i, body: (200, {}, completion("1. " + echo)) if i else bad) as server:
        target = opened(endpoint(server.url), tmp_path / "j")
        try:
            target.ask([replace(ASKED, purpose="list")])
        except Stop as stop:
            assert not leaks(str(stop))
        backend = endpoint(server.url)
        backend.dead = ""
        target.backend = backend
        target.ask([replace(ASKED, purpose="list")])
    assert not leaks(target.path.read_text())


def leaks(text):
    return any(KEY[i : i + 9] in text for i in range(len(KEY) - 8))


def test_short_keys_are_placeholders(tmp_path, monkeypatch):
    monkeypatch.setenv("API_KEY", "none")
    (reply,), server, _ = ask(tmp_path, [(200, {}, completion("nonetheless"))])
    assert reply.text == "nonetheless" and server.headers[0]["Authorization"] == "Bearer none"


# ---------------------------------------------------------------------------------- budget, journal


class Scripted:
    """A model in this process that echoes; counts what it is asked."""

    def __init__(self):
        self.served = 0

    def answer(self, calls, target):
        for number, request in calls:
            self.served += 1
            target.note(sent=number)
            target.receive(number, request, Reply(f"echo {request.user}"))


def rounds(target, n=6, size=3):
    """Some rounds of requests; all texts."""
    texts = []
    for i in range(n):
        replies = target.ask([replace(ASKED, user=f"{i}.{k}") for k in range(size)])
        texts += [reply.text for reply in replies] + [""] * (size - len(replies))
    return texts


@pytest.mark.parametrize("budget", [1, 3, 7, 17, 18, 40])
def test_the_budget_is_reached_and_never_passed(tmp_path, budget):
    backend = Scripted()
    target = opened(backend, tmp_path / "j", budget)
    texts = rounds(target)
    assert backend.served == target.used == target.noted == min(18, budget)
    assert target.spent == (budget <= 18) and sum(map(bool, texts)) == min(18, budget)
    target.file.close()
    more = opened(Scripted(), tmp_path / "j", budget + 2, resume=True)
    assert rounds(more)[: budget + 2] == rounds(opened(Scripted(), tmp_path / "k"))[: budget + 2]
    assert more.backend.served == min(18, budget + 2) - min(18, budget)


def test_a_budget_that_is_spent_is_replayed_to_its_end(tmp_path):
    target = opened(Scripted(), tmp_path / "j", 18)
    texts = rounds(target)
    target.file.close()
    again = opened(None, tmp_path / "j", 18, resume=True)
    seen = []
    while not again.spent:
        seen += [r.text for r in again.ask([replace(ASKED, user="?")] * 3)]
    assert seen == texts and again.counts() == target.counts()


def test_cut_at_every_byte(tmp_path):
    whole = opened(Scripted(), tmp_path / "j", 18)
    texts = rounds(whole)
    journal = whole.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(journal) if byte == 10]
    for cut in ends[::3] + random.Random(0).sample(range(len(journal)), 25):
        (tmp_path / "k").write_bytes(journal[:cut])
        target = opened(Scripted(), tmp_path / "k", 18, resume=True)
        rows = [
            json.loads(line) for line in journal[: journal.rfind(b"\n", 0, cut) + 1].splitlines()
        ]
        sent, back = (sum(name in row for row in rows) for name in ("sent", "call"))
        resumed = rounds(target)
        assert target.backend.served == 18 - sent and target.used == 18
        assert f"{sent - back} lost" in target.counts()
        kept = [text for text, was in zip(resumed, texts) if text]
        assert kept == [was for text, was in zip(resumed, texts) if text]
        target.file.close()


@pytest.mark.parametrize(
    "row",
    [
        "7",
        "[]",
        "{}",
        '{"call": 1}',
        '{"call": 1, "reply": {"odd": 5}}',
        "{",
        "[" * 100_000,
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)
def test_garbage_journals(tmp_path, row):
    target = opened(Scripted(), tmp_path / "j")
    rounds(target)
    lines = target.path.read_text().split("\n")
    (tmp_path / "k").write_text("\n".join([*lines[:3], row, *lines[3:]]))
    with pytest.raises(ValueError, match="k, line 4"):
        opened(None, tmp_path / "k", resume=True)
    (tmp_path / "l").write_text(row + "\n")
    with pytest.raises(ValueError, match="l, line 1"):
        opened(None, tmp_path / "l", resume=True)


def test_journals_of_other_crawls(tmp_path):
    target = opened(Scripted(), tmp_path / "j", prompts=["a"])
    target.file.close()
    with pytest.raises(ValueError, match="other prompts"):
        opened(Scripted(), tmp_path / "j", resume=True, prompts=["b"])
    with pytest.raises(ValueError, match="--temperature is 0.6 there, 0.7 here"):
        opened(Scripted(), tmp_path / "j", resume=True, prompts=["a"], temperature=0.7)


def test_a_full_disk_ends_the_crawl(tmp_path):
    with Server(lambda *_: OK) as server:
        target = opened(endpoint(server.url), tmp_path / "j")
        target.file.close()
        target.file = open("/dev/full", "wb", buffering=0)
        with pytest.raises(Stop, match="No space left"):
            target.ask([ASKED] * 3)
    assert not server.bodies  # nothing goes out that could not be noted


def crawl_until_killed(path, url, budget):
    rounds(opened(endpoint(url, concurrency=4), path, budget, resume=True), 10, 12)


def test_nothing_is_asked_again_after_ten_kills(tmp_path):
    rng, budget = random.Random(0), 100

    def answer(i, body):
        time.sleep(0.01 * (i % 4))
        return 200, {}, completion("reply to " + body["messages"][0]["content"])

    with Server(answer) as server:
        for _ in range(10):
            args = tmp_path / "j", server.url, budget
            child = multiprocessing.get_context("fork").Process(
                target=crawl_until_killed, args=args
            )
            child.start()
            goal, end = len(server.bodies) + rng.randint(2, 9), time.monotonic() + 5
            while len(server.bodies) < goal and time.monotonic() < end:
                time.sleep(0.001)
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        time.sleep(0.05)
        target = opened(endpoint(server.url, concurrency=4), tmp_path / "j", budget, resume=True)
        texts = rounds(target, 10, 12)
    asked = [body["messages"][0]["content"] for body in server.bodies]
    assert len(asked) == len(set(asked)) <= budget == target.used  # not one of them twice
    assert all(text in ("", f"reply to {i // 12}.{i % 12}") for i, text in enumerate(texts))
    lost = sum(reply.finish == "lost" for reply in target.replies.values())
    assert lost <= 40 and sum(map(bool, texts)) == budget - lost


def crawl_until_interrupted(folder, url):
    """What the script does about Ctrl-C, in a process of its own; says how it ended in a file."""
    sys.stderr = open(folder / "stderr", "w", buffering=1)
    target = opened(endpoint(url, timeout=60.0, concurrency=4), folder / "j")
    try:
        with script.common.interruptible() as target.backend.stopped:
            target.ask([ASKED] * 9)
    except Stop as stop:
        sys.stderr.write(str(stop))
    except KeyboardInterrupt:
        sys.stderr.write("at once")


def interrupted(tmp_path, server, signals):
    """(seconds from the first signal to the end, what was said) of a crawl."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=crawl_until_interrupted, args=(tmp_path, server.url))
    child.start()
    while len(server.bodies) < 4:
        time.sleep(0.01)
    began = time.monotonic()
    for _ in range(signals):
        time.sleep(0.4)
        os.kill(child.pid, signal.SIGINT)
    child.join(50)
    return time.monotonic() - began, (tmp_path / "stderr").read_text()


def test_ctrl_c_is_heard_while_waiting_for_retry_after(tmp_path):
    with Server(lambda *_: (429, {"Retry-After": "60"}, {})) as server:
        seconds, said = interrupted(tmp_path, server, 1)
    assert seconds < 10 and said.endswith("stopped")
    again = opened(None, tmp_path / "j", resume=True)
    assert not again.replies and again.noted == 0  # nothing was paid for: all is asked again


def test_the_first_ctrl_c_waits_for_what_is_paid_and_a_second_ends_at_once(tmp_path):
    with Server(lambda *_: (time.sleep(1.5), OK)[1]) as server:
        _, said = interrupted(tmp_path, server, 1)
        rows = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
        assert said == "stopping after the calls in flight; Ctrl-C ends at once\nstopped"
        assert sum("call" in row for row in rows) == len(server.bodies) == 4
    (tmp_path / "j").unlink()
    with Server(lambda *_: (time.sleep(30), OK)[1]) as server:
        seconds, said = interrupted(tmp_path, server, 2)
        assert seconds < 10 and said.endswith("at once\nat once")


def test_probe(tmp_path):
    for answer, told in (
        ((200, {}, completion(" blue.")), ""),
        ((200, {}, completion("Sure! Red.")), "says 'Sure! Red.': use --place naive"),
        ((529, {}, {"error": "overloaded"}), "the probe had no answer: status 529"),
    ):
        with Server(lambda i, body, answer=answer: answer) as server:
            target = opened(endpoint(server.url), tmp_path / "j")
            if told:
                with pytest.raises(Stop, match=told):
                    script.probe(target)
            else:
                script.probe(target)
            assert server.bodies[0]["messages"][1]["content"].endswith("yellow and")
        target.file.close()
        (tmp_path / "j").unlink(missing_ok=True)
