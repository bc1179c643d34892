"""The benchmark of a refresh runs every kind of step on a small stack."""

import json

import pytest
import refresh
from sections import refresh as section


def test_every_kind_of_step_is_timed_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(section, "STACKS", ((2, 8),))
    monkeypatch.setattr(section, "DTYPES", ("float32",))
    monkeypatch.setenv("COLUMNS", "80")
    refresh.main(["--repeats", "2", "--output", str(tmp_path / "refresh.json")])
    [record] = json.loads((tmp_path / "refresh.json").read_text())["records"]
    assert (record["blocks"], record["dim"], record["dtype"]) == (2, 8, "float32")
    assert record["ratio"] == pytest.approx(record["exact_seconds"] / record["published_seconds"], rel=1e-4)
    assert all(record[f"{name}_mean_seconds"] > 0 for name in section.INTERVALS)
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
