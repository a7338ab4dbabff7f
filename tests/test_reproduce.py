"""The page of all results: one script for real, a failing one, and what stands on the page."""

import json
from html.parser import HTMLParser

import pytest

import common
import reproduce

CLAIM = {
    "id": "C1",
    "claim": "a < b & c",
    "paper": ".9",
    "measured": {"x<y": 0.5},
    "control": {"r": 0.1},
    "criterion": "arm.x >= .4",
    "holds": True,
    "control_fails": True,
    "held": [True, False, True],
}


def write(folder, name, **changes):
    (folder / name).mkdir()
    result = {
        "script": name,
        "paper": "2511.05743",
        "preset": "toy",
        "seeds": [0],
        "device": "cpu",
        "seconds": 1.0,
    }
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
    assert "does not hold in 2 of 3 seeds" in checker.text and "exit code 1: <boom>" in checker.text
    assert page.count("data:image/png;base64,") == 1 and "http" not in page.replace(
        "https://arxiv.org/abs/", ""
    )


ODD = {
    "torn": '{"script": "sae", "claims": [{"id"',
    "empty": "",
    "list": "[1, 2]",
    "null": "null",
    "no claims": json.dumps({"script": "sae"}),
    "claims of text": json.dumps({"script": "sae", "claims": "all"}),
    "claim of text": json.dumps(
        {"script": "sae", "claims": ["one"], "seeds": [0], "preset": "toy"}
    ),
    "numbers of text": json.dumps(
        {"script": "sae", "paper": "1", "preset": "toy", "seeds": [0], "device": "cpu"}
        | {"seconds": 1, "claims": [CLAIM | {"measured": {"x": "many"}}]}
    ),
    "seconds of text": json.dumps(
        {"script": "sae", "paper": "1", "preset": "toy", "seeds": [0], "device": "cpu"}
        | {"seconds": "long", "claims": [CLAIM]}
    ),
    "a number without end": json.dumps(
        {"script": "sae", "paper": "1", "preset": "toy", "seeds": [0], "device": "cpu"}
        | {"seconds": 1, "claims": [CLAIM | {"measured": {"x": 10**400}}]}
    ),
    "nested without end": "[" * 100_000,
    "another script's": json.dumps({"script": "culture", "claims": [CLAIM]}),
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_an_odd_result_costs_its_own_section(text, tmp_path):
    write(tmp_path, "train_hapax")
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "result.json").write_text(text)
    checker = Checker()
    checker.feed(reproduce.report(common.parse(reproduce.Args, ["--out", str(tmp_path)]), {}))
    assert not checker.open and "a < b & c" in checker.text
    assert "sae.py: no result" in checker.text or "sae.py: its results are odd" in checker.text


def test_a_figure_that_can_not_be_read_costs_its_own_section(tmp_path):
    write(tmp_path, "train_hapax")
    (tmp_path / "train_hapax" / "b.png").symlink_to(tmp_path / "nowhere")
    write(tmp_path, "sae")
    page = reproduce.report(common.parse(reproduce.Args, ["--out", str(tmp_path)]), {})
    checker = Checker()
    checker.feed(page)
    assert not checker.open and "train_hapax.py: its results are odd" in checker.text
    assert checker.text.count("a < b & c") == 2


def test_results_of_another_dtype_are_not_those_asked_for(tmp_path, monkeypatch):
    flags = ["--only", "sae", "--out", str(tmp_path), "--seeds", "0", "--resume"]
    write(tmp_path, "sae")
    path, ran = tmp_path / "sae" / "result.json", []
    monkeypatch.setattr(reproduce, "run_script", lambda name, args: ran.append(args.dtype) or "")
    for saved, dtype, again in ("bf16", "bf16", 0), ("auto", "bf16", 1), (None, "auto", 1):
        result = json.loads(path.read_text())
        result["flags"] = saved and {"preset": "toy", "seeds": [0], "dtype": saved}
        path.write_text(json.dumps(result))
        reproduce.main([*flags, "--dtype", dtype])
        assert len(ran) == again
        ran.clear()


def test_all_text_is_escaped(tmp_path):
    write(tmp_path, "train_hapax")
    path = tmp_path / "train_hapax" / "result.json"
    bad = "<script>alert(1)</script>"
    result = json.loads(path.read_text()) | {
        "paper": bad,
        "preset": bad,
        "device": bad,
        "seeds": [bad],
    }
    claim = CLAIM | {"id": bad, "claim": bad, "criterion": bad, "paper": bad, "measured": {bad: 1}}
    path.write_text(json.dumps(result | {"claims": [claim]}))
    page = reproduce.report(common.parse(reproduce.Args, ["--out", str(tmp_path)]), {})
    assert "<script" not in page and page.count("&lt;script") >= 9


def test_runs_resumes_and_goes_on_after_a_failure(tmp_path, capfd, monkeypatch):
    flags = ["--preset", "smoke", "--only", "train_hapax", "--out", str(tmp_path)]
    assert reproduce.main(flags) == {}
    first = (tmp_path / "train_hapax" / "result.json").read_bytes()
    assert reproduce.main([*flags, "--resume"]) == {}
    assert (
        tmp_path / "train_hapax" / "result.json"
    ).read_bytes() == first and "done before" in capfd.readouterr().out
    monkeypatch.setattr(reproduce, "PAPERS", {"pyproject": "no script at all", **reproduce.PAPERS})
    args = common.parse(reproduce.Args, flags)
    assert reproduce.run_script("pyproject", args).startswith("exit code 2: ")
    assert "no script at all" in reproduce.report(args, {"pyproject": "exit code 2"})


def test_unknown_script(capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--only", "sae", "train_nothing"])
    assert stop.value.code == 2 and "train_nothing, allowed: train_hapax" in capsys.readouterr().err
