"""One export at a time writes to a destination, whatever became of the ones before."""

import errno
import fcntl
import os
import signal
import socket
import threading

import pytest
import tiny_models

from daq_lightning import CheckpointError, ScaleSearch, export_checkpoint
from daq_lightning.checkpoint.reservation import reserved
from daq_lightning.cli import main


def holding(out):
    """The pid of a new process that holds a destination."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with reserved(out):
            os.write(write, b"x")
            signal.pause()
        os._exit(0)
    assert os.read(read, 1) == b"x"
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.fixture
def held(tmp_path):
    """The pid of another process that holds `tmp_path/out`."""
    child = holding(tmp_path / "out")
    yield child
    kill(child)


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path, held):
    with (
        pytest.raises(CheckpointError, match=rf"out is being .* \(process {held} on {socket.gethostname()}"),
        reserved(tmp_path / "out"),
    ):
        raise AssertionError("unreachable")
    with reserved(tmp_path / "other"):
        pass


def test_the_command_is_refused_before_it_reads_a_weight(tmp_path, held, capsys, monkeypatch):
    base, post = tiny_models.make_pair(tmp_path / "pair", lambda: tiny_models.llama(num_hidden_layers=1))
    monkeypatch.setattr("daq_lightning.export.stream.stream", None)
    arguments = ["quantize", str(post), "--base", str(base), "--out", str(tmp_path / "out"), "--quiet"]
    for more in ([], ["--resume"], ["--budget", "9 bits"]):
        assert main([*arguments, *more]) == 1
        assert f"process {held} on " in capsys.readouterr().err
    assert main([*arguments, "--dry-run"]) == 0  # which writes nothing


def test_the_lock_of_a_killed_process_does_not_block(tmp_path):
    kill(holding(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [tmp_path / ".out.writing"]
    with reserved(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_many_threads_one_at_a_time_gets_it(tmp_path):
    inside, most, refused = 0, 0, 0
    gate = threading.Barrier(8)

    def take():
        nonlocal inside, most, refused
        gate.wait()
        for _ in range(50):
            try:
                with reserved(tmp_path / "out"):
                    inside += 1
                    most = max(most, inside)
                    inside -= 1
            except CheckpointError:
                refused += 1

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert refused < 8 * 50


def test_nothing_is_left_and_nothing_of_others_is_removed(tmp_path):
    (tmp_path / "there").mkdir()
    with reserved(tmp_path / "there" / "a" / "b" / "out"):
        pass
    assert list((tmp_path / "there").iterdir()) == []
    with reserved(tmp_path / "there" / "a" / "out"):
        (tmp_path / "there" / "a" / "other").touch()
    assert [path.name for path in (tmp_path / "there" / "a").iterdir()] == ["other"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    def failing(*_):
        raise OSError(number, os.strerror(number))

    base, post = tiny_models.make_pair(tmp_path / "pair", lambda: tiny_models.llama(num_hidden_layers=1))
    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(CheckpointError, match=r"has no file locks.*NFS"):
        export_checkpoint(post, base, tmp_path / "out", search=ScaleSearch.absmax())
