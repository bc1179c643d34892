"""Training that is killed goes on exactly as if it had not been; what is damaged is an error, or has no influence."""

import multiprocessing
import os
import pathlib
import random
import sys
import time

import fault_worker
import pytest

KILLS, LONGEST = 20, 500


@pytest.fixture(scope="module")
def expected() -> list[str]:
    return fault_worker.uninterrupted(LONGEST)


@pytest.mark.processes
@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_a_killed_run_goes_on_bit_for_bit(
    asynchronous: bool, expected: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at random moments: within steps, saves, and the removal of old checkpoints."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["fault_worker"])  # imports alone: each process has its own backend
    rng, resumed = random.Random(asynchronous), []
    for kill in range(KILLS + 1):
        mine, theirs = processes.Pipe(duplex=False)
        steps = LONGEST if kill < KILLS else 10
        arguments = (tmp_path, steps, expected)
        process = processes.Process(
            target=fault_worker.train, args=arguments, kwargs={"asynchronous": asynchronous, "link": theirs}
        )
        process.start()
        theirs.close()
        first, is_exact = mine.recv()
        assert is_exact, f"the state of step {first}, from which training went on, is another one"
        resumed.append(first)
        if kill < KILLS:
            begun = time.monotonic()
            enough = rng.randint(2, 7)
            for _ in range(enough):
                mine.recv()
            time.sleep(rng.uniform(0, 2 * (time.monotonic() - begun) / enough))  # up to two steps, a save among them
            process.kill()
        process.join()
        reports = []
        try:
            while True:
                reports.append(mine.recv())
        except EOFError:
            pass
        assert all(is_exact for _, is_exact in reports)
        assert process.exitcode == (-9 if kill < KILLS else 0)
    assert len(reports) == 10
    assert resumed == sorted(resumed)
    assert len(set(resumed)) > KILLS // 2  # it came forward between the kills


@pytest.mark.processes
def test_a_damaged_checkpoint_is_an_error_or_has_no_influence(
    expected: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truncated, emptied and with one bit flipped, each file in turn: never another state without an error."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    folder = tmp_path / "whole"
    mine, theirs = multiprocessing.Pipe(duplex=False)
    fault_worker.train(folder, 2, expected, asynchronous=False, link=theirs)
    mine.close()
    # In a process of its own: Orbax leaves coroutines behind where it raises, and their warnings come at any time.
    processes = multiprocessing.get_context("spawn")
    mine, theirs = processes.Pipe()
    process = processes.Process(target=fault_worker.answer_restores, args=(folder, 2, theirs))
    process.start()
    theirs.close()
    mine.send(True)
    assert mine.recv() == expected[2]  # undamaged
    rng, errors, cases = random.Random(0), 0, 0
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        flips = [rng.randrange(8 * len(content)) for _ in range(20 if len(content) > 8000 else 2)]
        damaged = [content[: len(content) // 2], b"", *(_flip(content, bit) for bit in flips)]
        for data in damaged:
            file.write_bytes(data)
            mine.send(True)
            answer = mine.recv()
            assert answer in (None, expected[2]), f"{file} was damaged without an error"
            errors += answer is None
            cases += 1
        file.write_bytes(content)
    assert errors > cases // 3
    mine.send(False)
    process.join()
    assert process.exitcode == 0


def _flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
