"""Bad invocations of every script: one line on stderr that names what is wrong and what is allowed, exit code 2."""

import importlib

import pytest

import bench
from reproduce import PAPERS

BAD = {  # flags -> what the line names
    "--nothing 1": "--nothing",
    "--preset huge": "smoke",
    "--device abacus": "abacus",
    "--device cuda:99": "cuda:99",
    "--dtype fp8": "bf16",
    "--seeds": "--seeds",
    "--seeds -1": "--seeds -1",
    "--steps two": "two",
    "--steps 0": "1 and more",
    "--batch-size 0": "and more",
    "--lr nan": "--lr nan",
    "--warmup -1": "0 and more",
    "--jobs 0": "1 and more",
    "--model {file}/nowhere": "model",
    "--out {file}/below": "below",
}


@pytest.mark.parametrize("script", PAPERS)
def test_one_line_and_exit_code_2(script, tmp_path, capsys):
    (tmp_path / "file").write_text("a file, not a folder")
    main = importlib.import_module(script).main
    for line, named in BAD.items():
        flags = line.format(file=tmp_path / "file").split()
        out = [] if "--out" in flags else ["--out", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as stop:
            main(["--preset", "smoke", *flags, *out])
        error = capsys.readouterr().err
        assert (stop.value.code, error.count("\n")) == (2, 1), (line, error)
        assert error.startswith("error: ") and named in error, (line, error)


def test_a_section_that_bench_does_not_have(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["mask", "nosuch"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "no section nosuch, allowed: mask" in error
