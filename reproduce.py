"""Runs the scripts one after another and writes all they claim, measured beside its controls, on one page.

    python reproduce.py --seeds 0 1 2            # every script's toy, three seeds; then open out/report.html
    python reproduce.py --only sae patching      # some of them; the page keeps what the others left in --out
    python reproduce.py --resume                 # go on: what is finished stays, what was cut off continues

--preset, --device, --dtype, and --jobs and --threads where given, go to the scripts. A script that fails is named on
the page, and the next one runs.
"""

import base64
import html
import json
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

import legacy as common

ROOT = Path(__file__).parent
PAPERS = {  # script -> what its page section is called; the order is that of a course
    "train_hapax": "In-context learning without copying",
    "formal_tokenization": "Tokenization as an inverse homomorphism",
    "train_zip2zip": "zip2zip: a vocabulary that grows with the text",
    "patching": "Separating tongue from thought",
    "culture": "Localized cultural knowledge",
    "sae": "Shared grammatical concepts",
    "crosscoder": "What happens before wait",
    "countdown_rl": "Geometry of self-verification",
    "crawler": "Discovering forbidden topics",
    "latent_clip": "Latent-CLIP",
}


@dataclass
class Args(common.Flags):
    """What to run"""

    presets: ClassVar[dict] = {"smoke": {}, "toy": {}, "paper": {}}
    only: list[str] = field(default_factory=lambda: [name for name in PAPERS if (ROOT / f"{name}.py").exists()])
    """the scripts to run"""


def is_done(folder, args):
    """Whether the result in a folder is that of these seeds and this preset."""
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    return (result.get("preset"), result.get("seeds")) == (args.preset, args.seeds)


def run_script(name, args):
    """Runs one script with its own progress bars; returns the end of what it printed on failure, "" on success."""
    folder = Path(args.out) / name
    flags = ["--preset", args.preset, "--device", args.device, "--dtype", args.dtype, "--out", str(folder)]
    flags += ["--seeds", *map(str, args.seeds)]
    for flag in "jobs", "threads":  # else each script's own
        flags += [f"--{flag}", str(getattr(args, flag))] if getattr(args, flag) != getattr(Args, flag) else []
    if args.resume and folder.exists():
        flags.append("--resume")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # of an earlier run: not to be shown as this one's
    command = [sys.executable, str(ROOT / f"{name}.py"), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        tail = ""
        try:
            while part := process.stderr.read1(4096).decode(errors="replace"):  # progress bars, as they are drawn
                print(part, end="", file=sys.stderr, flush=True)
                tail = (tail + part)[-2000:]
        except KeyboardInterrupt:  # Ctrl-C, which the script has had too, or SIGTERM: it saves its state
            process.terminate()
            process.wait()
            raise SystemExit("stopped; --resume goes on from there") from None
    if not process.returncode:
        return ""
    return f"exit code {process.returncode}: {tail.strip().splitlines()[-1] if tail.strip() else 'no message'}"


# ------------------------------------------------------------------------------------------------------------ the page

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid var(--line); }
td small { display: block; opacity: .75; } .yes { color: var(--good); } .no { color: var(--bad); font-weight: bold; }
figure { margin: 1rem 0; overflow-x: auto; } img { max-width: 100%; background: white; border-radius: 4px; }
@media (max-width: 40rem) {
  thead { display: none; } tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--line); }
  td { display: block; border: 0; padding: .1rem 0; }
  td[data-name]::before { content: attr(data-name) ": "; opacity: .6; }
}
"""


def element(tag, body, **attributes):
    """An HTML element around `body`, which is HTML already."""
    names = "".join(f' {k.rstrip("_").replace("_", "-")}="{html.escape(str(v))}"' for k, v in attributes.items())
    return f"<{tag}{names}>{body}</{tag}>"


def verdict(claim):
    """A claim's last cell: whether it holds, and whether its control fails as it must."""
    good = claim["holds"] and claim["control_fails"]
    words = "holds" if claim["holds"] else "does not hold"
    words += "" if claim["control_fails"] else "; its control does not fail as it must"
    return element("span", words, class_="yes" if good else "no")


def section(name, folder, failure):
    """A script's part of the page: its claims in a table, then its figures."""
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.exists() else None
    out = element("h2", html.escape(PAPERS[name]), id=name)
    if failure or not result:
        return out + element("p", f"<code>{name}.py</code>: {html.escape(failure or 'no result')}", class_="no")
    paper = element("a", f"arXiv {result['paper']}", href=f"https://arxiv.org/abs/{result['paper']}")
    command = f"python {name}.py --preset {result['preset']} --seeds {' '.join(map(str, result['seeds']))}"
    out += element("p", f"{paper} · <code>{command}</code> · {result['device']} · {result['seconds']:.0f} s")
    numbers = lambda d: "<br>".join(f"{html.escape(k)} <b>{common.number(v)}</b>" for k, v in d.items())
    heads = ["claim", "paper", "measured", "control", "verdict"]
    rows = element("thead", element("tr", "".join(element("th", h) for h in heads)))
    for c in result["claims"]:
        claim = f"<b>{html.escape(c['id'])}</b> {html.escape(c['claim'])}<small>{html.escape(c['criterion'])}</small>"
        cells = [html.escape(c["paper"]), numbers(c["measured"]), numbers(c["control"]), verdict(c)]
        rows += element("tr", element("td", claim) + "".join(
            element("td", cell, data_name=head) for head, cell in zip(heads[1:], cells)))  # fmt: skip
    out += element("table", rows)
    for image in sorted(folder.glob("*.png")):
        data = base64.b64encode(image.read_bytes()).decode()
        out += element("figure", f'<img alt="{html.escape(image.stem)}" src="data:image/png;base64,{data}">')
    return out


def report(args, failures):
    """The whole page, self-contained: what was run, on what, and what came out."""
    folders = {name: Path(args.out) / name for name in PAPERS if (Path(args.out) / name).exists()}
    results = [json.loads(p.read_text()) for f in folders.values() if (p := f / "result.json").exists()]
    claims = [c for result in results for c in result["claims"]]
    good = sum(c["holds"] and c["control_fails"] for c in claims)
    describe = ["git", "describe", "--always", "--dirty"]
    git = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout if shutil.which("git") else ""
    machine = f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.machine()}, "
    machine += f"{torch.get_num_threads()} threads, commit {git.strip() or 'unknown'}, {time.strftime('%Y-%m-%d')}"
    body = element("h1", "What the scripts measured")
    body += element(
        "p", f"<b>{good} of {len(claims)} claims</b> hold beside a control that fails. {html.escape(machine)}."
    )
    body += element("p", " · ".join(element("a", html.escape(PAPERS[n]), href=f"#{n}") for n in folders))
    body += "".join(section(name, folder, failures.get(name)) for name, folder in folders.items())
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"{meta}<title>What the scripts measured</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def main(argv=None):
    """Runs what is asked for; returns {script: how it failed}, empty if all is well."""
    args = common.parse(Args, argv)
    args.out = "out" if args.out == "out/reproduce" else args.out
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with common.bad_input():
        if unknown := [name for name in args.only if not (name in PAPERS and (ROOT / f"{name}.py").exists())]:
            known = ", ".join(name for name in PAPERS if (ROOT / f"{name}.py").exists())
            raise ValueError(f"--only {' '.join(unknown)}, allowed: {known}")
        common.setup(args)
        Path(args.out).mkdir(parents=True, exist_ok=True)
    page, failures = Path(args.out) / "report.html", {}
    for i, name in enumerate(args.only, 1):
        if args.resume and is_done(Path(args.out) / name, args):
            print(f"[{i}/{len(args.only)}] {name}: done before")
        else:
            print(f"[{i}/{len(args.only)}] {name}", flush=True)
            if failure := run_script(name, args):
                failures[name] = failure
        common.write_text(page, report(args, failures))
    print(f"{page}: {len(args.only) - len(failures)} of {len(args.only)} scripts ran", *failures, sep="\n  ")
    if args.strict:
        results = [Path(args.out) / name / "result.json" for name in args.only if name not in failures]
        claims = [claim for path in results for claim in json.loads(path.read_text())["claims"]]
        if failures or not all(c["holds"] and c["control_fails"] for c in claims):
            raise SystemExit(1)
    return failures


if __name__ == "__main__":
    main()
