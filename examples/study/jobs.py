"""The runs of a study as processes: wave after wave, several at a time, and what went wrong."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, NoReturn

from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm

from hf_dynsparse.training.flags import FlagParser
from hf_dynsparse.training.threads import usable_cores


class Job(NamedTuple):
    """
    One run.

    Args:
        name (`str`): its folder inside the study; what it prints goes to a `.log` beside that.
        command (`list[str]`): program and flags.
        needs (`tuple[str, ...]`): names of the runs that it builds on. It fails at once where one is not finished.
    """

    name: str
    command: list[str]
    needs: tuple[str, ...] = ()


class StudyParser(FlagParser):
    """
    Checks the flags of a script without ending the process.

    Raises:
        ValueError: for flags that the script would refuse.
    """

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


@contextmanager
def naming(run: str) -> Iterator[None]:
    """
    What is wrong with the flags of a run, in one line that names the run.

    Raises:
        ValueError: instead of the errors of values, files and configurations.
    """
    try:
        yield
    except (ValueError, OSError, StrictDataclassError) as error:
        raise ValueError(f"{run}: {str(error).strip().splitlines()[-1].strip()}") from error


def run_jobs(
    waves: Sequence[Sequence[Job]],
    output: Path,
    is_finished: Callable[[Path], bool],
    *,
    jobs: int = 1,
    pin: bool = False,
    words: str = "runs",
) -> list[str]:
    """
    Run all jobs of a wave before the next one begins. Ctrl-C ends them all, and this process.

    Args:
        waves (`Sequence[Sequence[Job]]`): what is run.
        output (`Path`): folder of the study.
        is_finished (`Callable[[Path], bool]`): whether the folder of a job holds all that it is to write.
        jobs (`int`): how many at a time.
        pin (`bool`): each keeps to its share of the cores.
        words (`str`): beside the progress bar.

    Returns:
        `list[str]`: a line for each job that failed: its name and the last line of its log.
    """
    cores = usable_cores()
    shares: SimpleQueue[list[int]] = SimpleQueue()
    for job in range(jobs):
        shares.put(cores[job::jobs])
    running: set[subprocess.Popen[bytes]] = set()

    def execute(job: Job) -> str | None:
        if waits := [name for name in job.needs if not is_finished(output / name)]:
            return f"{job.name}: needs {', '.join(waits)}, which is not finished"
        folder, share = output / job.name, shares.get()
        folder.parent.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").unlink(missing_ok=True)  # half written
        try:
            with Path(f"{folder}.log").open("wb") as log:
                log.write(f"$ {shlex.join(job.command)}\n".encode())
                log.flush()
                process = subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT)
                running.add(process)
                if pin:
                    os.sched_setaffinity(process.pid, share)  # before it has threads, which inherit it
                process.wait()
                running.discard(process)
        finally:
            shares.put(share)
        lines = Path(f"{folder}.log").read_text(errors="replace").strip().splitlines()[1:] or ["no output"]
        return None if is_finished(folder) else f"{job.name}: {lines[-1]}"

    failed = []
    with tqdm(total=sum(map(len, waves)), desc=words, unit="run") as progress, ThreadPoolExecutor(jobs) as pool:
        try:
            for wave in waves:
                for done in as_completed([pool.submit(execute, job) for job in wave]):
                    progress.update()
                    if error := done.result():
                        failed.append(error)
                        progress.write(f"failed: {error}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            sys.exit("Interrupted. The same command goes on with what is missing.")
    return failed


def logged_command(folder: Path) -> list[str] | None:
    """The command that made this folder; `None` without a log."""
    with suppress(OSError):
        return shlex.split(Path(f"{folder}.log").read_text(errors="replace").partition("\n")[0].removeprefix("$ "))
    return None
