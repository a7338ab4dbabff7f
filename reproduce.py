"""Runs the scripts one after another and writes what they claim and measured on one page.

    python reproduce.py --seeds 0 1 2         # every script's toy, three seeds: out/report.html
    python reproduce.py --only sae patching   # some; the page keeps what others left in --out
    python reproduce.py --resume              # go on: what is finished stays

--preset, --device, --dtype and --jobs go to the scripts. A script that fails is named on the page,
and the next one runs.
"""

import base64
import json
import platform
import shutil
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


@dataclass
class Args(common.Flags):
    """what to run"""

    presets: ClassVar[dict] = {"smoke": {}, "toy": {}, "paper": {}}

    out: str = "out"  # folder for the page, and a folder for each script
    only: list[str] = common.default_list(*PAPERS)  # the scripts


def check(args, env):
    """What is wrong with the flags: (whether it is, what to say)."""
    unknown = [name for name in args.only if name not in PAPERS]
    return [(unknown, f"--only {' '.join(unknown)}, allowed: {', '.join(PAPERS)}")]


def read_result(folder, name):
    """What a script left in its folder, or {}: no result, a damaged one, or another script's.

    "good" says of each claim whether it holds beside a control that fails.
    """
    try:
        result = json.loads((folder / "result.json").read_text("utf-8"))
        result["good"] = [bool(c["holds"] and c["control_fails"]) for c in result["claims"]]
        return result if result["script"] == name else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def run_script(name, args):
    """Runs a script with its own progress bars; returns how it failed, "" if it didn't."""
    folder = Path(args.out) / name
    flags = ["--preset", args.preset, "--device", args.device, "--dtype", args.dtype]
    flags += ["--jobs", str(args.jobs), "--out", str(folder), "--seeds", *map(str, args.seeds)]
    if args.resume and folder.exists():
        flags.append("--resume")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # of an earlier run: not to be shown as this
    command = [sys.executable, str(ROOT / f"{name}.py"), *flags]
    tail = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            while part := process.stderr.read1(4096).decode(errors="replace"):
                print(part, end="", file=sys.stderr, flush=True)  # progress bars, as they are drawn
                tail = (tail + part)[-2000:]
        except KeyboardInterrupt:  # Ctrl-C reaches the script, too; SIGTERM has to be passed on
            process.terminate()
            process.wait()
            raise SystemExit("stopped; --resume goes on from there") from None
    if process.returncode == 0:
        return ""
    lines = tail.strip().splitlines() or ["no message"]
    return f"exit code {process.returncode}: {lines[-1]}"


# ---------------------------------------------------------------------------------------- the page

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem; }
tr { border-bottom: 1px solid var(--line); } td small { display: block; opacity: .75; }
.yes { color: var(--good); } .no { color: var(--bad); font-weight: bold; }
figure { margin: 1rem 0; overflow-x: auto; }
img { max-width: 100%; background: white; border-radius: 4px; }
@media (max-width: 40rem) {  /* a phone: a cell a line, its name in front */
  thead { display: none; } tr, td { display: block; padding: .1rem 0; } tr { padding: .6rem 0; }
  td[data-name]::before { content: attr(data-name) ": "; opacity: .6; }
}
"""
CELLS = "paper", "measured", "control", "verdict"


def claim_row(claim):
    """A claim as a row of the table."""
    good = claim["holds"] and claim["control_fails"]
    verdict = "holds" if claim["holds"] else "does not hold"
    verdict += f" in {sum(claim['held'])} of {len(claim['held'])} seeds"
    if claim["holds"] and not claim["control_fails"]:
        verdict += "; its control holds, too"
    numbers = []
    for side in "measured", "control":
        lines = [f"{escape(k)} <b>{common.number(v)}</b>" for k, v in claim[side].items()]
        numbers.append("<br>".join(lines))
    colour = f'<span class="{"yes" if good else "no"}">{verdict}</span>'
    row = f"<td><b>{escape(claim['id'])}</b> {escape(claim['claim'])}"
    row += f"<small>{escape(claim['criterion'])}</small></td>"
    for name, cell in zip(CELLS, (escape(claim["paper"]), *numbers, colour)):
        row += f'<td data-name="{name}">{cell}</td>'
    return f"<tr>{row}</tr>"


def section(name, folder, failure):
    """A script's part of the page: its claims in a table, then its figures."""
    out = f'<h2 id="{name}">{escape(PAPERS[name])}</h2>'
    result = read_result(folder, name)
    if failure or not result:
        return out + f'<p class="no">{name}.py: {escape(failure or "no result")}</p>'
    try:
        seeds = " ".join(map(str, result["seeds"]))
        command = escape(f"python {name}.py --preset {result['preset']} --seeds {seeds}")
        paper = escape(result["paper"])
        link = f'<a href="https://arxiv.org/abs/{paper}">arXiv {paper}</a>'
        where = f"{escape(result['device'])} · {result['seconds']:.0f} s"
        head = "".join(f"<th>{cell}</th>" for cell in ("claim", *CELLS))
        rows = "".join(map(claim_row, result["claims"]))
        out += f"<p>{link} · <code>{command}</code> · {where}</p>"
        out += f"<table><thead><tr>{head}</tr></thead>{rows}</table>"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return out + f'<p class="no">{name}.py: its result.json is odd ({escape(repr(error))})</p>'
    for image in sorted(folder.glob("*.png")):
        picture = base64.b64encode(image.read_bytes()).decode()
        out += f'<figure><img alt="{escape(image.stem)}" src="data:image/png;base64,{picture}">'
        out += "</figure>"
    return out


def good_claims(out, names):
    """Whether each claim of some scripts holds beside a control that fails."""
    return sum((read_result(Path(out) / name, name).get("good", []) for name in names), [])


def report(args, failures):
    """The whole page, self-contained: what was run, on what, and what came out."""
    folders = {name: Path(args.out) / name for name in PAPERS if (Path(args.out) / name).exists()}
    good = good_claims(args.out, folders)
    commit = ""
    if shutil.which("git"):
        git = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
    machine += f"{platform.machine()}, {torch.get_num_threads()} threads, "
    machine += f"commit {commit or 'unknown'}, {time.strftime('%Y-%m-%d')}"
    links = " · ".join(f'<a href="#{name}">{escape(PAPERS[name])}</a>' for name in folders)
    sections = [section(name, folder, failures.get(name)) for name, folder in folders.items()]
    title = "What the scripts measured"
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>
<p><b>{sum(good)} of {len(good)} claims</b> hold beside a control that fails. {escape(machine)}.</p>
<p>{links}</p>{"".join(sections)}</body></html>
"""


def main(argv=None):
    """Runs what is asked for; returns {script: how it failed}, empty if all is well."""
    run = common.Run(Args, argv, "", check)
    args = run.args
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failures = {}
    page = Path(args.out) / "report.html"
    for i, name in enumerate(args.only, 1):
        before = read_result(Path(args.out) / name, name)
        if args.resume and (before.get("preset"), before.get("seeds")) == (args.preset, args.seeds):
            print(f"[{i}/{len(args.only)}] {name}: done before")
        else:
            print(f"[{i}/{len(args.only)}] {name}", flush=True)
            failure = run_script(name, args)
            if failure:
                failures[name] = failure
        common.write_text(page, report(args, failures))
    print(f"{page}: {len(args.only) - len(failures)} of {len(args.only)} scripts ran")
    for name, failure in failures.items():
        print(f"  {name}: {failure}")
    if args.strict and (failures or not all(good_claims(args.out, args.only))):
        raise SystemExit(1)
    return failures


if __name__ == "__main__":
    common.cli(main)
