"""Every file of `examples/accelerate` starts the processes that it says."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from launch import ACCELERATE_FILES
from scripts import clean_environment


# `accelerate launch` is imported once, which takes longer than all the rest. Machines start at the same time.
LAUNCH_ALL = """
import json, multiprocessing, sys
from accelerate.commands.launch import launch_command, launch_command_parser

def launch(arguments):
    launch_command(launch_command_parser().parse_args(arguments))

for machines in json.loads(sys.argv[1]):
    processes = [multiprocessing.get_context("fork").Process(target=launch, args=(machine,)) for machine in machines]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(1)
"""
WRITE_ENVIRONMENT = """
import json, os, pathlib, sys

pathlib.Path(f"{sys.argv[1]}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(dict(os.environ)))
"""
# For a machine with two processes to spare, whatever it has.
TWO = ["--num_processes", "2", "--main_process_port", "0"]
FLAGS = {"one_gpu": [[]], "cpu": [["--main_process_port", "0"]], "multi_gpu": [TWO], "fsdp2": [TWO], "two_nodes": []}
PROCESSES = {"one_gpu": 1, "cpu": 2, "multi_gpu": 2, "fsdp2": 2, "two_nodes": 2}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """Environments of the processes that each file starts."""
    folder = tmp_path_factory.mktemp("accelerate")
    script = folder / "write_environment.py"
    script.write_text(WRITE_ENVIRONMENT)
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free.getsockname()[1])]
    nodes = [["--num_processes", "2", *meeting, "--machine_rank", rank] for rank in "01"]
    launches = [
        [
            ["--config_file", str(ACCELERATE_FILES / f"{name}.yaml"), *flags, str(script), str(folder / name)]
            for flags in machines
        ]
        for name, machines in {**FLAGS, "two_nodes": nodes}.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH_ALL, json.dumps(launches)],
        env=clean_environment(folder),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: [json.loads(file.read_text()) for file in sorted(folder.glob(f"{name}-*.json"))] for name in FLAGS}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_processes_are_started(started: dict[str, list[dict[str, str]]], name: str) -> None:
    processes = started[name]
    assert len(processes) == PROCESSES[name]
    if len(processes) > 1:
        assert [process["RANK"] for process in processes] == ["0", "1"]
        assert {process["WORLD_SIZE"] for process in processes} == {"2"}
    assert {process.get("GROUP_WORLD_SIZE", "1") for process in processes} == {"2" if name == "two_nodes" else "1"}
    sharding = {process.get("FSDP_VERSION") for process in processes}
    assert sharding == ({"2"} if name == "fsdp2" else {None})


@pytest.mark.parametrize("file", sorted(ACCELERATE_FILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_files_say_how_many(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert file.stem in FLAGS
    assert config.num_processes == {"one_gpu": 1, "cpu": 2, "multi_gpu": 8, "fsdp2": 8, "two_nodes": 16}[file.stem]
    assert config.num_machines == (2 if file.stem == "two_nodes" else 1)
