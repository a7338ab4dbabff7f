"""The page of all results: one script for real, a failing one, and what stands on the page."""

import json
from html.parser import HTMLParser

import pytest

import legacy as common
import reproduce

CLAIM = {
    "id": "C1", "claim": "a < b & c", "paper": ".9", "measured": {"x<y": 0.5}, "control": {"r": 0.1},
    "criterion": "x >= .4", "holds": True, "control_fails": True,
}  # fmt: skip


def write(folder, name, **changes):
    (folder / name).mkdir()
    result = {"script": name, "paper": "2511.05743", "preset": "toy", "seeds": [0], "device": "cpu", "seconds": 1.0}
    result |= {"claims": [CLAIM | changes], "metrics": {}}
    (folder / name / "result.json").write_text(json.dumps(result))


class Checker(HTMLParser):
    """Every element that is opened is closed, in order; collects the text."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page(tmp_path):
    write(tmp_path, "train_hapax")
    write(tmp_path, "sae", holds=False, control_fails=False)
    (tmp_path / "sae" / "picture.png").write_bytes(b"not really a picture")
    (tmp_path / "patching").mkdir()
    args = common.parse(reproduce.Args, ["--out", str(tmp_path)])
    page = reproduce.report(args, {"patching": "exit code 1: <boom>"})
    checker = Checker()
    checker.feed(page)
    assert not checker.open and "1 of 2 claims" in checker.text and "a < b & c" in checker.text
    assert "does not hold; its control does not fail" in checker.text and "exit code 1: <boom>" in checker.text
    assert page.count("data:image/png;base64,") == 1 and "http" not in page.replace("https://arxiv.org/abs/", "")


def test_runs_resumes_and_goes_on_after_a_failure(tmp_path, capfd, monkeypatch):
    flags = ["--preset", "smoke", "--only", "train_hapax", "--out", str(tmp_path)]
    assert reproduce.main(flags) == {}
    first = (tmp_path / "train_hapax" / "result.json").read_bytes()
    assert reproduce.main([*flags, "--resume"]) == {}
    assert (tmp_path / "train_hapax" / "result.json").read_bytes() == first and "done before" in capfd.readouterr().out
    monkeypatch.setattr(reproduce, "PAPERS", {"pyproject": "no script at all", **reproduce.PAPERS})
    args = common.parse(reproduce.Args, flags)
    assert reproduce.run_script("pyproject", args).startswith("exit code 2: ")
    assert "no script at all" in reproduce.report(args, {"pyproject": "exit code 2"})


def test_unknown_script(capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--only", "sae", "train_nothing"])
    assert stop.value.code == 2 and "train_nothing, allowed: train_hapax" in capsys.readouterr().err
