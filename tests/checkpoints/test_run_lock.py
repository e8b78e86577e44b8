"""A folder has one run at a time, and no dead one."""

import errno
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from hf_dynsparse.checkpoints import run_lock as module
from hf_dynsparse.checkpoints.run_lock import LOCK_FILE, lock_holder, run_lock
from hf_dynsparse.training.scripts import find_checkpoint, holds_output_dir
from tests.toy import toy_arguments, toy_model, toy_trainer


# In a process of its own, which needs no torch: holds the lock until it is killed, with a worker as a data loader has.
HOLDER = """
import os, runpy, sys, time
with runpy.run_path(sys.argv[1])["run_lock"](sys.argv[2]):
    reader, writer = os.pipe()
    worker = os.fork()
    if worker:
        os.read(reader, 1)  # it has begun, and let go of what it inherited
        print(worker, flush=True)
    else:
        os.write(writer, b".")
    time.sleep(60)
"""


@contextmanager
def another_process(folder):
    """Its own id, and that of its worker."""
    command = [sys.executable, "-c", HOLDER, module.__file__, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        try:
            yield process, worker
        finally:
            process.kill()
            os.kill(worker, signal.SIGKILL)


@contextmanager
def another_thread(folder):
    """It holds the lock."""
    with ThreadPoolExecutor(1) as pool:
        held = run_lock(folder)
        pool.submit(held.__enter__).result()
        try:
            yield
        finally:
            pool.submit(held.__exit__, None, None, None).result()


def refused_to_another_thread(folder):
    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(lambda: run_lock(folder).__enter__()).exception()
    return isinstance(error, BlockingIOError)


def test_one_at_a_time(tmp_path):
    with run_lock(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / LOCK_FILE).read_text()
        with run_lock(f"{tmp_path}/../{tmp_path.name}"):  # a script trains
            assert refused_to_another_thread(tmp_path)
        assert refused_to_another_thread(tmp_path)
        assert f"process {os.getpid()} on " in (tmp_path / LOCK_FILE).read_text()
    assert not any(tmp_path.iterdir())
    with another_thread(tmp_path), pytest.raises(BlockingIOError, match=f"process {os.getpid()} on "):
        run_lock(tmp_path).__enter__()


def test_an_error_gives_it_back(tmp_path):
    with pytest.raises(KeyboardInterrupt), run_lock(tmp_path):
        raise KeyboardInterrupt
    assert not refused_to_another_thread(tmp_path)


def test_another_process_has_it_until_it_dies(tmp_path):
    with another_process(tmp_path) as (process, worker):
        with pytest.raises(BlockingIOError) as refusal:
            run_lock(tmp_path).__enter__()
        for word in (str(tmp_path), f"process {process.pid} on {os.uname().nodename} since", "another `output_dir`"):
            assert word in str(refusal.value)
        process.kill()
        process.wait()
        os.kill(worker, 0)  # lives, and has inherited no lock
        assert f"process {process.pid} " in (tmp_path / LOCK_FILE).read_text()
        with run_lock(tmp_path):
            assert f"process {os.getpid()} " in (tmp_path / LOCK_FILE).read_text()
    assert not (tmp_path / LOCK_FILE).exists()


def test_who_has_it(tmp_path):
    assert lock_holder(tmp_path) is None
    with run_lock(tmp_path):
        assert lock_holder(tmp_path).startswith(f"process {os.getpid()} on ")
    for host, is_told in ((socket.gethostname(), False), ("another", True)):  # here it has ended
        (tmp_path / LOCK_FILE).write_text(f"process {2**30} on {host} since today")
        assert bool(lock_holder(tmp_path)) is is_told


def test_a_folder_made_for_nothing_goes(tmp_path):
    folder = tmp_path / "runs" / "new"
    with run_lock(folder):
        assert folder.is_dir()
    assert not (tmp_path / "runs").exists()
    with run_lock(folder):
        (folder / "model").touch()
    assert [path.name for path in folder.iterdir()] == ["model"]


def test_a_place_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"needs a folder to save to. Got {tmp_path}/file.*Choose another"):
        run_lock(tmp_path / "file").__enter__()


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.FileLock, "acquire", refuse)
    with run_lock(tmp_path):
        assert f"The file system of {tmp_path} has no locks" in caplog.text


def test_a_second_trainer_is_refused_before_any_work(tmp_path):
    trainer = toy_trainer(tmp_path, toy_model(), save_strategy="steps")
    with another_thread(tmp_path):
        for write in (trainer.train, trainer.save_model):
            with pytest.raises(OSError, match=f"to itself. Got {tmp_path}, held by process {os.getpid()} on .* since"):
                write()
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    assert trainer.state.global_step == 0


def test_a_script_has_its_folder_to_its_end(tmp_path):
    arguments = toy_arguments(tmp_path / "run")

    @holds_output_dir
    def main():
        assert find_checkpoint(FindArguments(arguments), token=None) is None
        assert refused_to_another_thread(tmp_path / "run")
        raise SystemExit("some other error")

    with pytest.raises(SystemExit, match="some other error"):
        main()
    assert not (tmp_path / "run").exists()
    with another_thread(tmp_path / "run"), pytest.raises(OSError, match="A run must have its folder to itself"):
        main()


class FindArguments:
    """Training arguments, as a script has them."""

    resume_from_checkpoint = None

    def __init__(self, arguments):
        self._arguments = arguments

    def __getattr__(self, name):
        return getattr(self._arguments, name)


@pytest.fixture
def pushing_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dynsparse.hub.trainer.open_hub_repository", lambda *args: "me/toy")
    (tmp_path / "pending-upload-of-checkpoint-2").mkdir()
    settings = {"save_strategy": "steps", "push_to_hub": True, "hub_strategy": "every_save"}
    return toy_trainer(tmp_path, toy_model(), **settings)


def test_the_upload_of_another_run_is_left_alone(tmp_path, pushing_trainer):
    with another_thread(tmp_path), pytest.raises(OSError, match="to itself"):
        pushing_trainer.train()
    assert (tmp_path / "pending-upload-of-checkpoint-2").exists()
    with pushing_trainer._own_output_dir(None):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_an_upload_that_finds_no_room_ends_no_run(tmp_path, pushing_trainer, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hf_dynsparse.hub.trainer.push_checkpoint", full)
    pushing_trainer._push_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert f"{tmp_path / 'checkpoint-2'} is saved, but not pushed: [Errno 28]" in caplog.text
