"""Runs the scripts one after another and writes what they claim and measured on one page.

    python reproduce.py --seeds 0 1 2         # every script's toy, three seeds: out/report.html
    python reproduce.py --only sae patching   # some; the page keeps what others left in --out
    python reproduce.py --resume              # go on: what is finished stays

A script that fails is named on the page, and the next one runs.
"""

import base64
import json
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import ClassVar

import torch

import common

ROOT = Path(__file__).parent
PAPERS = {  # script: what its section is called; the order is that of a course
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
SAME = "preset", "seeds", "dtype"  # flags by which a result is known again


@dataclass
class Args(common.Flags):
    """what to run"""

    presets: ClassVar[dict] = {"smoke": {}, "toy": {}, "paper": {}}
    out: str = "out"  # folder for the page, and a folder for each script
    only: list[str] = common.default_list(*PAPERS)  # the scripts


def check(args, env):
    """What may be wrong: (whether it is, message)."""
    unknown = [name for name in args.only if name not in PAPERS]
    return [(unknown, f"--only {' '.join(unknown)}, allowed: {', '.join(PAPERS)}")]


def read_result(folder):
    """What a script left in its folder, or {}: no result, a damaged one, or another script's."""
    try:
        result = json.loads((folder / "result.json").read_text("utf-8"))
        # of each claim, whether it holds beside a control that fails
        result["good"] = [bool(c["holds"] and c["control_fails"]) for c in result["claims"]]
        return result if result["script"] == folder.name else {}
    except Exception:  # a file may hold anything
        return {}


def run_script(name, args):
    """Runs a script with its own progress bars; returns how it failed, "" if it didn't."""
    folder = Path(args.out) / name
    command = [sys.executable, str(ROOT / f"{name}.py"), "--out", str(folder)]
    command += ["--preset", args.preset, "--device", args.device, "--dtype", args.dtype]
    command += ["--jobs", str(args.jobs), "--seeds", *map(str, args.seeds)]
    command.append("--resume" if args.resume else "--no-resume")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # of an earlier run
    tail = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            while part := process.stderr.read1(4096).decode(errors="replace"):
                print(part, end="", file=sys.stderr, flush=True)  # progress bars, as they are drawn
                tail = (tail + part)[-2000:]
        except KeyboardInterrupt:  # Ctrl-C reaches the script, too; SIGTERM has to be passed on
            process.terminate()
            raise SystemExit("stopped; --resume goes on from there") from None
    if process.returncode == 0:
        return ""
    lines = tail.strip().splitlines() or ["no message"]
    return f"exit code {process.returncode}: {lines[-1]}"


# ------------------- the page

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem; }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem; }
tr { border-bottom: 1px solid var(--line); } td small { display: block; opacity: .75; }
.yes { color: var(--good); } .no { color: var(--bad); font-weight: bold; }
img { max-width: 100%; background: white; }
"""
HEAD = "<th>claim</th><th>paper</th><th>measured</th><th>control</th><th>verdict</th>"


def claim_row(claim):
    """A claim as a row of the table."""
    good = claim["holds"] and claim["control_fails"]
    verdict = "holds" if claim["holds"] else "does not hold"
    verdict += f" in {sum(claim['held'])} of {len(claim['held'])} seeds"
    if claim["holds"] and not good:
        verdict += "; its control holds, too"
    says = f"<b>{escape(claim['id'])}</b> {escape(claim['claim'])}"
    says += f"<small>{escape(claim['criterion'])}</small>"
    cells = [says, escape(claim["paper"])]
    for side in "measured", "control":
        lines = []
        for name, value in claim[side].items():
            lines.append(f"{escape(name)} <b>{common.number(value)}</b>")
        cells.append("<br>".join(lines))
    cells.append(f'<span class="{"yes" if good else "no"}">{verdict}</span>')
    return f"<tr><td>{'</td><td>'.join(cells)}</td></tr>"


def section(folder, failure):
    """A script's part of the page: its claims in a table, then its figures."""
    name, result = folder.name, read_result(folder)
    out = f'<h2 id="{name}">{escape(PAPERS[name])}</h2>'
    if failure or not result:
        return out + f'<p class="no">{name}.py: {escape(failure or "no result")}</p>'
    try:
        seeds = " ".join(map(str, result["seeds"]))
        command = f"python {name}.py --preset {result['preset']} --seeds {seeds}"
        where = f"{result['device']} · {result['seconds']:.0f} s"
        paper = escape(result["paper"])
        out += f'<p><a href="https://arxiv.org/abs/{paper}">arXiv {paper}</a>'
        out += f" · <code>{escape(command)}</code> · {escape(where)}</p>"
        rows = "".join(map(claim_row, result["claims"]))
        out += f"<table><tr>{HEAD}</tr>{rows}</table>"
        for image in sorted(folder.glob("*.png")):
            data = base64.b64encode(image.read_bytes()).decode()
            out += f'<figure><img alt="{escape(image.stem)}" '
            out += f'src="data:image/png;base64,{data}"></figure>'
    except Exception as error:
        out += f'<p class="no">{name}.py: its results are odd ({escape(repr(error))})</p>'
    return out


def report(args, failures):
    """The whole page, self-contained: what was run, on what, and what came out."""
    folders = [Path(args.out) / name for name in PAPERS if (Path(args.out) / name).exists()]
    good = sum((read_result(folder).get("good", []) for folder in folders), [])
    command = "git describe --always --dirty"
    git = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    machine = f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
    machine += f"commit {git.stdout.strip() or 'unknown'}, {time.strftime('%Y-%m-%d')}"
    sections = "".join(section(folder, failures.get(folder.name)) for folder in folders)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Claims</title><style>{STYLE}</style></head><body><h1>What the scripts measured</h1>
<p><b>{sum(good)} of {len(good)} claims</b> hold beside a control that fails. {escape(machine)}.</p>
{sections}</body></html>
"""


def main(argv=None):
    """Runs what is asked for; returns {script: how it failed}, empty if all is well."""
    args = common.Run(Args, argv, "", check).args
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failures, good = {}, []
    page = Path(args.out) / "report.html"
    for i, name in enumerate(args.only, 1):
        print(f"[{i}/{len(args.only)}] {name}", flush=True)
        folder = Path(args.out) / name
        before = (read_result(folder) if args.resume else {}).get("flags")
        if isinstance(before, dict) and all(before.get(k) == vars(args)[k] for k in SAME):
            print("  done before")
        elif failure := run_script(name, args):
            failures[name] = failure
        good += read_result(folder).get("good", [False])
        common.write_text(page, report(args, failures))
    print(f"{page}; scripts that failed: {', '.join(failures) or 'none'}")
    if args.strict and (failures or not all(good)):
        raise SystemExit(1)
    return failures


if __name__ == "__main__":
    common.cli(main)
