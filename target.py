"""A model to ask, here or at a server, behind a budget and a journal: nothing paid for is lost.

- a journal notes every call before it goes out and when it has come back: a crawl that was killed
  goes on where it was, and asks nothing again that may have been paid for
- the budget is never passed; calls, tries, failed and lost ones are counted
- no server is trusted: what it sends is bounded in time and size, read with care, and cleaned once;
  the key is struck from it

Read `Target` first, then `Local`, then `Endpoint`: its `complete` is one call with its tries.
"""

import fcntl
import json
import os
import random
import re
import sys
import threading
import time
import unicodedata
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
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
    """`text` goes on after the prefill; `finish` is stop, refusal (by the service), error, lost."""

    text: str = ""
    finish: str = "stop"
    problem: str = ""  # why there is no text
    paid: bool = True  # whether it counts against the budget
    tries: int = 1

    def visible(self):
        """The text without its thought; empty if the thought never closes."""
        text = self.text.rpartition("</think>")[2]
        return "" if "<think>" in text else text.strip()


def clean(text, secret=None):
    """A text from outside, once for all: no key, no control marks, no half emojis."""
    for _ in range(2):  # the key may be written in letters that only then become its own
        text = secret.sub("***", text) if secret else text
        text = unicodedata.normalize("NFKC", text[:10_000].replace("\r\n", "\n"))
    return data.printable(re.sub("[\u202a-\u202e\u2066-\u2069]", "", text))  # direction marks


# ----------------------------------------------------------------------------- budget and journal


class Stop(Exception):
    """The target can't or must not go on: one line for the user; what was paid for is kept."""


class Target:
    """A model behind a budget and a journal, which is all the state that a crawl has.

    Every call has a number. It is noted before it goes out (`sent`) and when it has come back
    (`call`); a resumed crawl asks the same again and is answered from the journal. A call that was
    sent and never came back (the process was killed) may have been paid for: it counts, and is not
    asked again. Its reply is "lost". What failed without a bill while an outage ended the crawl is
    asked again (`forget`). Raises ValueError for a journal that is not of this crawl.
    """

    def __init__(self, backend, path, args, prompts, resume=False):
        self.backend, self.path = backend, path
        self.budget = args.budget
        self.sent = set()  # numbers of calls that have not come back
        self.replies = {}  # number: Reply
        self.noted = 0  # calls in the journal that count against the budget
        self.calls = self.used = 0  # what the crawl has asked so far, and what of it counts
        self.purposes = Counter()
        self.full = False  # whether the budget had no room for a call
        self.lock = threading.Lock()
        self.file = open(path, "a+b", buffering=0)  # each row goes to the system at once
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path} is in use by another crawl") from None
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1 if resume else 0)  # a torn last line
        rows = data.read_rows(path)
        if not rows:
            self.write({"flags": common.shaping_flags(args), "prompts": fingerprint(prompts)})
        for number, row in enumerate(rows, 1):
            try:
                if number > 1:
                    self.apply(row)
                else:
                    common.check_flags(row["flags"], args, path)
                    if row["prompts"] != fingerprint(prompts):
                        raise ValueError(f"{path} is of a crawl with other prompts or topics")
            except (KeyError, TypeError, AttributeError):
                raise ValueError(f"{path}, line {number}: no row of a crawl's journal") from None
        for number in self.sent:
            self.replies[number] = Reply(finish="lost", problem="killed in flight")

    def write(self, row):
        """Appends a row to the journal."""
        self.file.write((json.dumps(row) + "\n").encode())

    def apply(self, row):
        """Takes a row into account, when it is written and when it is read."""
        if "forget" in row:
            for number in row["forget"]:
                del self.replies[number]
            return
        number = row["sent"] if "sent" in row else row["call"]
        values = [row[f.name] for f in fields(Reply) if "call" in row]
        if not all(map(isinstance, [number, *values], [int, *(f.type for f in fields(Reply))])):
            raise TypeError("no row of a journal")
        if number in self.sent:
            self.sent.remove(number)
            self.noted -= 1
        if "sent" in row:
            self.sent.add(number)
            self.noted += 1
        else:
            self.replies[number] = Reply(*values)
            self.noted += self.replies[number].paid

    def send(self, number):
        """To be called before a call goes out; False if the budget has no room for it."""
        with self.lock:
            room = self.noted < self.budget
            if room:
                self.write({"sent": number})
                self.apply({"sent": number})
            return room

    def receive(self, number, request, reply):
        """To be called when a call has come back, or failed. 240 characters of answers are kept."""
        if request.purpose in ("write", "answer"):
            reply.text = reply.visible()[:240]
        with self.lock:
            row = {"call": number} | asdict(reply)
            self.write(row)
            self.apply(row)

    def ask(self, requests):
        """A Reply for each request; those that the budget has no room for are errors."""
        numbers = range(self.calls, self.calls + len(requests))
        self.calls += len(requests)
        todo = [(n, r) for n, r in zip(numbers, requests) if n not in self.replies]
        if todo and not self.full:
            try:
                self.backend.answer(todo, self)
                os.fsync(self.file.fileno())
            except Stop:
                failed = [n for n in numbers if n in self.replies and not self.replies[n].paid]
                with suppress(OSError):  # if it is a full disk, they stay failed
                    self.write({"forget": failed})
                raise
        self.full = self.full or any(n not in self.replies for n in numbers)
        for number, request in zip(numbers, requests):
            if number in self.replies:
                self.used += self.replies[number].paid
                self.purposes[request.purpose] += 1
        return [self.replies.get(n, Reply(finish="error", problem="no budget")) for n in numbers]

    def spent(self):
        """Whether the budget has no room for another call."""
        return self.full or self.used >= self.budget

    def counts(self):
        """What the calls were for, in words."""
        kinds = ", ".join(f"{n} {purpose}" for purpose, n in self.purposes.items())
        tries = sum(reply.tries for reply in self.replies.values())
        ends = Counter(reply.finish for reply in self.replies.values())
        told = f"{self.used} of {self.budget} calls spent ({kinds}) in {tries} tries"
        return f"{told}; {ends['error']} failed, {ends['lost']} lost"


def fingerprint(what):
    """A number that differs if something does."""
    return zlib.crc32(repr(what).encode())


# ------------------------------------------------------------------------- models in this process


class Local:
    """A checkpoint, or the toy, in this process. A call's sample depends on its number alone."""

    def __init__(self, model, tokenizer, seed, system=""):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.seed, self.stopped = seed, []
        self.system = [{"role": "system", "content": system}] if system else []

    def ids(self, request):
        """The prompt's token ids, ending in the prefill."""
        turns = [*self.system, {"role": "user", "content": request.user}]
        prefill, opened = request.prefill, self.tokenizer.chat(turns)[-4:]
        if prefill and self.tokenizer.decode(opened).rstrip().endswith("<think>"):  # R1's template
            thought = prefill.startswith("<think>")
            prefill = prefill.removeprefix("<think>") if thought else f"\n</think>\n\n{prefill}"
        return self.tokenizer.chat(turns, prefill)

    def answer(self, calls, target):
        """Answers calls, which are alike but for their text, as one batch."""
        calls = calls[: max(0, target.budget - target.noted)]
        if not calls:
            return
        first, device = calls[0][1], self.model.wte.weight.device
        stops = self.tokenizer.stops
        seeds = [fingerprint((self.seed, number)) for number, _ in calls]
        rngs = [torch.Generator(device).manual_seed(seed) for seed in seeds]

        def sample(logits, alive, out):  # the largest of logits / T + Gumbel noise is a sample
            if self.stopped:
                raise Stop("stopped")
            if not first.temperature:
                return logits
            noise = [torch.rand(logits.shape[1], generator=rngs[i], device=device) for i in alive]
            return logits / first.temperature - torch.stack(noise).log_().neg_().log_()

        prompts = [self.ids(request) for _, request in calls]
        new = generate(self.model, prompts, first.max_tokens, 0.0, stop=stops, process=sample)
        for (number, request), ids in zip(calls, new):
            text = self.tokenizer.decode(ids[: len(ids) - (ids[-1] in stops)])
            target.receive(number, request, Reply(clean(text)))


# ---------------------------------------------------------------------------------------- servers

RETRIED = {0, 200, 408, 409, 425, 429, 500, 502, 503, 504, 529}  # 0: none came
EXHAUSTED = re.compile(rb'"(code|type)"\s*:\s*"(insufficient|billing|credit)')
MODERATED = re.compile(rb"moderat|content.?polic|content.?filter", re.I)
ODD_JSON = KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError


class Endpoint:
    """A server, asked through `requests` with --concurrency calls in flight.

    A try that brings no answer is repeated, after a pause that grows; a status that trying again
    does not mend ends the crawl, as do five failed calls in a row. An answer that can't be read is
    a failed call: it was paid for. Redirects are not followed: the key would leak.
    """

    tries, pause, largest = 6, 1.0, 10**6  # tries of a call, seconds, bytes of a body

    def __init__(self, args, seed):
        import requests

        self.args, self.seed = args, seed
        self.requests = requests
        self.url = args.url.rstrip("/")
        self.url += "/v1/messages" if args.api == "anthropic" else "/chat/completions"
        self.key, self.host = os.environ.get("API_KEY", ""), urlsplit(args.url).hostname
        signs = [re.escape(c) for c in self.key if c.isalnum()]  # whatever stands between them
        self.secret = re.compile(r"[\W_]*+".join(signs), re.I) if len(signs) > 5 else None
        self.headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if args.api == "anthropic":
            self.headers |= {"x-api-key": self.key, "anthropic-version": "2023-06-01"}
        elif self.key:
            self.headers["Authorization"] = f"Bearer {self.key}"
        self.sessions = []  # open, and not in use
        self.lock = threading.Lock()
        self.stopped = []  # not empty once Ctrl-C came
        self.dead = ""  # why the crawl can't go on
        self.failed = 0  # calls in a row
        self.turn = self.resting = 0.0  # no try before these times: of --rps, of a 429

    def answer(self, calls, target):
        """Answers calls, --concurrency at a time; raises Stop if the crawl can't go on."""
        left, told = iter(calls), False
        threads = [start(self.work, left, target) for _ in calls[: self.args.concurrency]]
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(0.05)  # so that Ctrl-C is heard
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
            try:
                if request is None or not target.send(number):
                    return
                target.receive(number, request, self.complete(number, request))
            except Exception as error:  # a full disk; no thread may end without a word
                self.dead = self.told(f"{target.path}: {type(error).__name__} {error}".encode())

    def complete(self, number, request):
        """The reply to a call, after as many tries as it takes; finish "error" if all failed."""
        payload = json.dumps(self.body(number, request)).encode()
        tries = status = until = 0
        problem = "stopped"
        while status != 200 and tries < self.tries and self.wait(until):
            tries += 1
            status, headers, raw, problem = self.exchange(payload)
            if status in (400, 403) and MODERATED.search(raw):
                return Reply(finish="refusal", tries=tries)
            if status == 200 and not problem:
                with suppress(*ODD_JSON):
                    text, finish = self.read(raw)
                    self.failed = 0
                    return Reply(text.removeprefix(request.prefill), finish, tries=tries)
            problem = problem or f"status {status}: {self.told(raw)}"
            after = retry_after(headers)
            page = status == 200 and raw.lstrip()[:1] == b"<"  # not the base of an API
            empty = status == 429 and EXHAUSTED.search(raw) and "Retry-After" not in headers
            if after > 300:
                problem += f"; it asks to wait {after:.0f} s: go on later with --resume"
            if page or empty or after > 300 or status not in RETRIED:
                self.dead = f"{self.host} can't go on, {problem}"
            until = time.monotonic() + max(after, self.pause * random.uniform(0, 2**tries))
            if status == 429:
                self.resting = max(self.resting, until)  # so do all calls
        self.failed += 1
        if self.failed >= 5 and not self.dead:
            self.dead = f"{self.host} failed {self.failed} times in a row: {problem}"
        return Reply("", "error", problem, status == 200, tries)

    def wait(self, until):
        """Sleeps until then, and as --rps and a 429 of any call ask; False if the crawl ends."""
        with self.lock:
            if self.args.rps:
                self.turn = max(self.turn + 1 / self.args.rps, time.monotonic())
            until = max(until, self.turn)
        while not (self.dead or self.stopped):
            left = max(until, self.resting) - time.monotonic()
            if left <= 0:
                return True
            time.sleep(min(left, 0.1))
        return False

    def exchange(self, payload):
        """One try: (status, headers, body, problem). It ends after --timeout, come what may."""
        late = f"no whole answer within {self.args.timeout} s"
        found = {"status": 0, "headers": {}, "body": b"", "problem": late}
        start(self.post, payload, found).join(self.args.timeout)  # if it hangs, it is left behind
        return tuple(found.values())

    def post(self, payload, found):
        """Sends a request and fills in what comes back, as it comes."""
        try:
            with self.lock:
                session = self.sessions.pop() if self.sessions else self.requests.Session()
            session.auth = lambda request: request  # no .netrc signs in the key's place
            session.trust_env = self.host not in ("localhost", "127.0.0.1", "::1")  # for proxies
            options = {"headers": self.headers, "timeout": self.args.timeout, "stream": True}
            with session.post(self.url, payload, allow_redirects=False, **options) as response:
                found |= {"status": response.status_code, "headers": response.headers}
                for piece in response.iter_content(2**14):
                    found["body"] += piece
                    if len(found["body"]) > self.largest:
                        raise ValueError(f"a body of over {self.largest} bytes")
            found["problem"] = ""
            self.sessions.append(session)
        except Exception as error:  # of any kind: a server can make the libraries raise many
            found["problem"] = self.told(f"{type(error).__name__}: {error}".encode())

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
            text = json.dumps(json.loads(text), ensure_ascii=False)  # no \\u0073 for an s
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
    if reply.finish in ("error", "lost"):
        raise Stop(f"the probe had no answer: {reply.problem}")
    if not re.match(r"\W*blue\b", reply.text, re.I):
        target.path.unlink()  # it holds nothing else
        told = f"the target does not go on with a prefill, it says {reply.text[:60]!r}"
        raise Stop(f"{told}: use --place naive, or --no-probe")
