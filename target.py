"""A model to ask, here or at a server, behind a budget and a journal: nothing paid for is lost.

- a journal notes every call before it goes out and when it has come back: a crawl that was killed
  goes on where it was, and asks nothing again that may have been paid for
- the budget is never passed; calls, tries, failed and lost ones are counted
- no server is trusted: what it sends is bounded in time and size, read with care, and cleaned once;
  the key is struck from it

Read `Target` first, then `Local`, then `Endpoint`: its `complete` is one call with its tries.
"""

import json
import os
import random
import re
import sys
import threading
import time
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from urllib.parse import urlsplit

import torch

import common
import data
from model import generate


@dataclass
class Request:
    """One call. `prefill` opens the assistant's turn, thought tags included."""

    purpose: str  # probe, list, write, answer
    user: str
    prefill: str = ""
    temperature: float = 0.0
    max_tokens: int = 100


@dataclass
class Reply:
    """What came back: `text` goes on after the prefill. All but "failed" counts as a paid call."""

    text: str = ""
    finish: str = "stop"  # refusal: the service's. unread: odd. lost: killed in flight. failed
    problem: str = ""  # why there is no text
    tries: int = 1

    def visible(self):
        """The text without its thought; empty if the thought never closes."""
        text = self.text.rpartition("</think>")[2]
        return "" if "<think>" in text else text.strip()


class Stop(Exception):
    """The target can't or must not go on: one line for the user; what was paid for is kept."""


def clean(text, key=""):
    """A text from outside, once for all: the key struck, then cut, without control characters."""
    text = text.replace(key, "***") if key else text
    return data.printable(text[:10_000].replace("\r\n", "\n"))


def fingerprint(what):
    """A number that differs if something does."""
    return zlib.crc32(repr(what).encode())


# ----------------------------------------------------------------------------- budget and journal


class Target:
    """A model behind a budget and a journal, which is all the state that a crawl has.

    Every call has a number. It is noted before it goes out (`sent`) and when it has come back
    (`call`); a resumed crawl asks the same again and is answered from the journal. A call that was
    sent and never came back (the process was killed) may have been paid for: it counts, and is not
    asked again. What failed without a bill while an outage ended the crawl is asked again
    (`forget`). Raises ValueError for a journal that is not of this crawl.
    """

    def __init__(self, backend, path, args, prompts, resume=False):
        self.backend, self.path, self.budget = backend, path, args.budget
        self.replies = {}  # number of a call: Reply, "lost" until it is back
        self.noted = 0  # calls in the journal that count against the budget
        self.calls = self.used = 0  # what the crawl has asked so far, and what of it counts
        self.spent = False  # whether the budget has no room for another call
        self.purposes = Counter()
        self.lock = threading.Lock()
        self.file = open(path, "a+b", buffering=0)  # each row goes to the system at once
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1 if resume else 0)  # a torn last line
        first = {"flags": common.shaping_flags(args), "prompts": fingerprint(prompts)}
        rows = data.read_rows(path)
        if not rows:
            self.file.write((json.dumps(first) + "\n").encode())
        for line, row in enumerate(rows, 1):
            try:
                if line > 1:
                    self.apply(row)
                else:
                    common.check_flags(row["flags"], args, path)
                    if row["prompts"] != first["prompts"]:
                        raise ValueError(f"{path} is of a crawl with other prompts or topics")
            except (KeyError, TypeError, AttributeError):
                raise ValueError(f"{path}, line {line}: no row of a crawl's journal") from None

    def note(self, **row):
        """Writes a row to the journal, then takes it into account."""
        with self.lock:
            self.file.write((json.dumps(row) + "\n").encode())
            self.apply(row)

    def apply(self, row):
        """Takes a row of the journal into account."""
        if "forget" in row:
            for number in row["forget"]:
                del self.replies[number]
        elif "sent" in row:
            self.replies[row["sent"]] = Reply(finish="lost", problem="killed in flight")
            self.noted += 1
        else:
            number, reply = row["call"], Reply(**row["reply"])
            self.noted += (reply.finish != "failed") - (number in self.replies)
            self.replies[number] = reply

    def receive(self, number, request, reply):
        """To be called when a call has come back, or failed. 240 characters of answers are kept."""
        if request.purpose in ("write", "answer"):
            reply.text = reply.visible()[:240]
        self.note(call=number, reply=asdict(reply))

    def ask(self, requests):
        """A Reply for each request; fewer if the budget has no room for all, then none any more."""
        calls = list(enumerate([] if self.spent else requests, self.calls))
        todo = [(number, request) for number, request in calls if number not in self.replies]
        todo = todo[: max(0, self.budget - self.noted)]
        try:
            if todo:
                self.backend.answer(todo, self)
        except Stop:
            back = [number for number, _ in todo if number in self.replies]
            failed = [number for number in back if self.replies[number].finish == "failed"]
            if failed:
                self.note(forget=failed)
            raise
        replies = []
        for number, _ in calls:
            if number not in self.replies:
                break
            replies.append(self.replies[number])
        self.calls += len(replies)
        self.used += sum(reply.finish != "failed" for reply in replies)
        self.purposes.update(request.purpose for request in requests[: len(replies)])
        self.spent = len(replies) < len(requests) or self.used >= self.budget
        return replies

    def counts(self):
        """What the calls were for, in words."""
        kinds = ", ".join(f"{n} {purpose}" for purpose, n in self.purposes.items())
        tries = sum(reply.tries for reply in self.replies.values())
        ends = Counter(reply.finish for reply in self.replies.values())
        told = f"{self.used} of {self.budget} calls spent ({kinds}) in {tries} tries"
        return f"{told}; {ends['failed']} failed, {ends['unread']} unread, {ends['lost']} lost"


# ------------------------------------------------------------------------- models in this process


class Local:
    """A checkpoint, or the toy, in this process. A call's sample depends on its number alone."""

    def __init__(self, model, tokenizer, seed, system=""):
        self.model, self.tokenizer, self.seed = model.eval(), tokenizer, seed
        self.system = [{"role": "system", "content": system}] if system else []
        self.stopped = []  # not empty once Ctrl-C came

    def answer(self, calls, target):
        """Answers calls, which are alike but for their text, as one batch."""
        first, stops = calls[0][1], self.tokenizer.stops
        device = self.model.wte.weight.device
        seeds = [fingerprint((self.seed, number)) for number, _ in calls]
        rngs = [torch.Generator(device).manual_seed(seed) for seed in seeds]

        def sample(logits, alive, out):  # the largest of logits / T + Gumbel noise is a sample
            if self.stopped:
                raise Stop("stopped")
            if first.temperature == 0:
                return logits
            noise = [torch.rand(logits.shape[1], generator=rngs[i], device=device) for i in alive]
            return logits / first.temperature - torch.stack(noise).log_().neg_().log_()

        prompts = []
        for _, request in calls:
            turns = [*self.system, {"role": "user", "content": request.user}]
            prompts.append(self.tokenizer.chat(turns, request.prefill))
        new = generate(self.model, prompts, first.max_tokens, 0.0, stop=stops, process=sample)
        for (number, request), ids in zip(calls, new):
            text = self.tokenizer.decode(ids[: len(ids) - (ids[-1] in stops)])
            target.receive(number, request, Reply(clean(text)))


# ---------------------------------------------------------------------------------------- servers

RETRIED = {0, 408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses; 0: none came
EXHAUSTED = re.compile(rb'"(code|type)"\s*:\s*"(insufficient|billing|credit)')
MODERATED = re.compile(rb"moderat|content.?polic|content.?filter", re.I)
ODD_JSON = KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError


class Endpoint:
    """A server, asked through `requests` with --concurrency calls in flight.

    A try that brings no answer is repeated, after a pause that grows; a status that trying again
    does not mend ends the crawl, as do five failed calls in a row. An answer that can't be read is
    paid for, and not asked again. Redirects are not followed: the key would leak.
    """

    tries, pause, largest = 6, 1.0, 10**6  # tries of a call, seconds, bytes of a body

    def __init__(self, args, seed):
        import requests

        self.args, self.seed = args, seed
        self.url = args.url.rstrip("/")
        self.url += "/v1/messages" if args.api == "anthropic" else "/chat/completions"
        self.host = urlsplit(args.url).hostname
        self.key = os.environ.get("API_KEY", "")
        self.secret = self.key if len(self.key) > 5 else ""  # shorter ones: "none", "EMPTY"
        self.session = requests.Session()
        self.session.mount(self.url, requests.adapters.HTTPAdapter(pool_maxsize=args.concurrency))
        self.session.auth = self.sign
        self.lock = threading.Lock()
        self.stopped = []  # not empty once Ctrl-C came
        self.dead = ""  # why the crawl can't go on
        self.failed = 0  # calls in a row
        self.turn = 0.0  # no try before this time, for --rps

    def sign(self, request):
        """Adds the key to a request, and keeps `requests` from one that it finds in .netrc."""
        request.headers["Content-Type"] = "application/json"
        if self.args.api == "anthropic":
            request.headers.update({"x-api-key": self.key, "anthropic-version": "2023-06-01"})
        elif self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def answer(self, calls, target):
        """Answers calls, --concurrency at a time; raises Stop if the crawl can't go on."""
        left, told = iter(calls), False
        threads = [start(self.work, left, target) for _ in calls[: self.args.concurrency]]
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.002)  # not a long wait on a thread: Ctrl-C is to be heard
            if self.stopped and not told:
                told = True
                print("stopping after the calls in flight; Ctrl-C ends at once", file=sys.stderr)
        if self.dead or self.stopped:
            raise Stop(self.dead or "stopped")

    def work(self, left, target):
        """What a thread does: takes the next call, until none is left."""
        while not (self.dead or self.stopped):
            with self.lock:
                number, request = next(left, (None, None))
            if request is None:
                return
            try:
                target.note(sent=number)
                target.receive(number, request, self.complete(number, request))
            except Exception as error:  # a full disk; no thread may end without a word
                self.dead = self.told(f"{target.path}: {error}".encode())

    def complete(self, number, request):
        """The reply to a call, after as many tries as it takes; "failed" if none brought one."""
        payload = json.dumps(self.body(number, request)).encode()
        reply = Reply(finish="failed", problem="stopped", tries=0)
        until = 0.0
        while reply.tries < self.tries and self.wait(until):
            reply.tries += 1
            got = self.exchange(payload)
            reply.problem = got.problem or f"status {got.status}: {self.told(got.body)}"
            if got.status in (400, 403) and MODERATED.search(got.body):
                reply.finish = "refusal"
                return reply
            if got.status == 200:
                reply.finish = "unread"
                if not got.problem:
                    with suppress(*ODD_JSON):
                        reply.text, reply.finish = self.read(got.body)
                        reply.text, reply.problem = reply.text.removeprefix(request.prefill), ""
                        self.failed = 0
                        return reply
                break
            after = retry_after(got.headers)
            empty = EXHAUSTED.search(got.body) and "Retry-After" not in got.headers
            if after:
                reply.problem += f", asks to wait {after:.0f} s"
            if got.status not in RETRIED or empty or after > 300:
                self.dead = f"{self.host} can't go on, {reply.problem}"
            until = time.monotonic() + max(after, self.pause * random.uniform(0, 2**reply.tries))
        self.failed += 1
        if self.failed >= 5 and not self.dead:
            self.dead = f"{self.host} failed {self.failed} times in a row: {reply.problem}"
        return reply

    def wait(self, until):
        """Sleeps until then, or longer if --rps asks for it; False if the crawl ends."""
        with self.lock:
            if self.args.rps:
                self.turn = max(self.turn + 1 / self.args.rps, time.monotonic())
            until = max(until, self.turn)
        while not (self.dead or self.stopped):
            left = until - time.monotonic()
            if left <= 0:
                return True
            time.sleep(min(left, 0.1))
        return False

    def exchange(self, payload):
        """One try; it ends after --timeout, come what may: a thread that hangs is left behind."""
        late = f"no whole answer within {self.args.timeout} s"
        got = SimpleNamespace(status=0, headers={}, body=b"", problem=late)
        start(self.post, payload, got).join(self.args.timeout)
        return SimpleNamespace(**vars(got))  # a late thread may still write to the other

    def post(self, payload, got):
        """Sends a request and fills in what comes back, as it comes."""
        options = {"timeout": self.args.timeout, "stream": True, "allow_redirects": False}
        try:
            with self.session.post(self.url, payload, **options) as response:
                got.status, got.headers = response.status_code, response.headers
                for piece in response.iter_content(2**14):
                    got.body += piece
                    if len(got.body) > self.largest:
                        raise ValueError(f"a body of over {self.largest} bytes")
            got.problem = ""
        except Exception as error:  # of any kind: a server can make the libraries raise many
            got.problem = self.told(f"{type(error).__name__}: {error}".encode())

    def body(self, number, request):
        """The JSON of a request. Prefills end without white space: Anthropic refuses it."""
        args, turns = self.args, [{"role": "user", "content": request.user}]
        if request.prefill:
            turns.append({"role": "assistant", "content": request.prefill})
        body = {"model": args.model, "max_tokens": request.max_tokens, "messages": turns}
        body["temperature"] = request.temperature
        if args.api == "anthropic":
            return body | ({"system": args.system} if args.system else {})
        if args.system:
            turns.insert(0, {"role": "system", "content": args.system})
        if request.prefill:  # how vLLM and SGLang are told to go on with it
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return body | {"seed": fingerprint((self.seed, number)) >> 1}

    def read(self, raw):
        """(text, finish) of the reply in a body; one of ODD_JSON if there is none."""
        found = json.loads(raw)
        if self.args.api == "anthropic":
            text, finish = text_of(found["content"]), found.get("stop_reason")
        else:
            choice = found["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            text = text_of(message.get("content"))
            thought = text_of(message.get("reasoning_content") or message.get("reasoning"))
            text = f"{thought}</think>{text}" if thought else text
            if message.get("refusal") and not text:
                text, finish = text_of(message["refusal"]), "refusal"
        finish = "refusal" if finish in ("refusal", "content_filter") else "stop"
        return clean(text, self.secret), finish

    def told(self, raw):
        """What a server says, in one line: without the key, then cut."""
        text = raw.decode(errors="replace")
        with suppress(*ODD_JSON):
            text = json.dumps(json.loads(text), ensure_ascii=False)  # no \\u002b for a +
        return " ".join(clean(text, self.secret).split())[:200]


def start(function, *args):
    """A thread that calls a function, and does not keep the program from ending."""
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


def text_of(content):
    """The text of a message: a string, a list of parts, or none. TypeError, AttributeError."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type", "text") == "text")
    if not isinstance(content, str | None):
        raise TypeError("no text")
    return content or ""


def retry_after(headers):
    """The seconds that a Retry-After header asks for, as a number or as a date."""
    from urllib3 import Retry

    try:
        return Retry().parse_retry_after(headers["Retry-After"])
    except Exception:  # there is none, or it says nothing; an odd date raises anything
        return 0.0


def probe(target):
    """Does the target go on with a prefill? Raises Stop with what to do if not."""
    opening = "The three primary colours are red, yellow and"
    (reply,) = target.ask([Request("probe", "Name the three primary colours.", opening, 0.0, 8)])
    if reply.problem:
        raise Stop(f"the probe had no answer: {reply.problem}")
    if not re.match(r"\W*blue\b", reply.text, re.I):
        target.path.unlink()  # it holds nothing else
        told = f"the target does not go on with a prefill, it says {reply.text[:60]!r}"
        raise Stop(f"{told}: use --place naive, or --no-probe")
