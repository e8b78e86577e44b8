"""`SavedRun`: is a checkpoint whole, and of this run and model? On folders made by hand; runs: tests/training."""

import os
import re
import shutil

import pytest
from transformers import AutoConfig, TrainerState

from hf_dynsparse import sparse_layers
from hf_dynsparse.checkpoints.saved_run import CHECKSUM_FILE, SavedRun, find_run_to_resume
from hf_dynsparse.models.density import sizes_of
from hf_dynsparse.training.saving import write_checksums
from tests.toy import toy_config, toy_model


STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def save_state(folder, given_sizes=None):
    """The training state of a run: one that changes the sizes of its model if those of its beginning are given."""
    attributes = {} if given_sizes is None else {"final": {"sizes": given_sizes}}
    callbacks = {"Other": [{}, {}], "TopologyCallback": {"args": {}, "attributes": attributes}}
    TrainerState(global_step=4, stateful_callbacks=callbacks).save_to_json(str(folder / "trainer_state.json"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint of the toy model. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoint-4"
    toy_model().save_pretrained(folder)
    save_state(folder)
    for name in STATE[:3]:
        (folder / name).write_bytes(name.encode() * 9)
    write_checksums(folder)
    return folder


@pytest.fixture
def checkpoint(whole, tmp_path):
    """The same, to be damaged."""
    return shutil.copytree(whole, tmp_path / "checkpoint-4")


def test_what_is_read(whole):
    run = SavedRun(str(whole))
    run.check_training_state()
    run.check_weights()
    run.check_config(toy_config())
    run.check_model(toy_model(seed=1))
    assert run.state.global_step == 4
    assert run.state is run.state
    assert run.given_sizes is None
    assert run.sizes(toy_model()) == sizes_of(toy_model())


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


DAMAGES = (cut, flip_a_bit, os.remove, empty)


# Each file in two ways, each way with two files.
@pytest.mark.parametrize(("name", "damage"), [(STATE[i % 4], DAMAGES[(i + i // 4) % 4]) for i in range(8)])
def test_damaged_training_state_is_refused(checkpoint, name, damage):
    damage(checkpoint / name)
    with pytest.raises(ValueError, match=f"{re.escape(str(checkpoint))}.*{name}.*: resume from another"):
        SavedRun(checkpoint).check_training_state()


@pytest.mark.parametrize("text", ["", "[1]", "[" * 100_000, "\x00", '"a"', '{"optimizer.pt": null}', "{}"])
def test_damaged_checksums_are_refused(checkpoint, text):
    (checkpoint / CHECKSUM_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(checkpoint))}.*: resume from another"):
        SavedRun(checkpoint).check_training_state()


@pytest.mark.parametrize("name", STATE)
def test_training_state_that_is_not_there_is_missed_without_checksums(checkpoint, name, caplog):
    (checkpoint / CHECKSUM_FILE).unlink()
    SavedRun(checkpoint).check_training_state()
    assert "carries no checksums of its training state" in caplog.text
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=f"{re.escape(str(checkpoint))} without {name[:9]}.*: resume from another"):
        SavedRun(checkpoint).check_training_state()


def test_a_pickle_in_the_place_of_weights_is_refused(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must be safetensors. Got .*pytorch_model.bin, a pickle"):
        SavedRun(checkpoint).check_weights()


@pytest.mark.parametrize(
    ("changed", "said"), [({"sparsity": 0.5}, "sparsity = 0.5"), ({"intermediate_size": 32}, "intermediate_size = 32")]
)
def test_another_configuration_is_refused(whole, changed, said):
    with pytest.raises(ValueError, match=f"Got {said}, but {re.escape(str(whole))} has .*another --output_dir"):
        SavedRun(whole).check_config(toy_config(**changed))


def test_another_model_is_refused(whole):
    layer = "bert.encoder.layer.0.attention.self.query"
    for changed, tensor, theirs in (
        ({"sparsity": 0.5}, rf"`{layer}.values` of shape \(32, 4, 4\)", r"\(16, 4, 4\)"),
        ({"num_hidden_layers": 3}, r"`bert.encoder.layer.2.\S+` of shape \S.*", "none"),
    ):
        with pytest.raises(ValueError, match=f"Got {tensor}, but {re.escape(str(whole))} has {theirs}"):
            SavedRun(whole).check_model(toy_model(**changed))


def test_a_run_that_changes_sizes_must_lead_on_from_the_same_model(checkpoint):
    """The checkpoint has 16 blocks in most layers; its run was given a model with twice as many."""
    given = sizes_of(toy_model(sparsity=0.5))
    save_state(checkpoint, given)
    run = SavedRun(checkpoint)
    assert run.given_sizes == given
    halfway = toy_model(sparsity=0.5)
    run.check_model(halfway)
    run.resize_(halfway, optimizer=None)
    assert sizes_of(halfway) == run.sizes(halfway) == sizes_of(toy_model())
    run.check_model(halfway)  # has the sizes of the checkpoint
    run.check_model(toy_model(sparsity=0.9), given)  # which had others before its run
    with pytest.raises(ValueError, match="with 6 active blocks, but the run of .* was given one with 32"):
        run.check_model(toy_model(sparsity=0.9))
    with pytest.raises(ValueError, match=r"position_embeddings.weight` of shape \(16, 32\), but .* has \(32, 32\)"):
        run.check_model(toy_model(sparsity=0.5, max_position_embeddings=16))


def test_a_configuration_half_way_says_its_blocks(checkpoint):
    """And the trainer, not the configuration, knows where they lead."""
    config = AutoConfig.from_pretrained(checkpoint)
    names = [name.removeprefix("bert.encoder.") for name in sparse_layers(toy_model())]
    config.nnzb = dict.fromkeys(names, 20)
    config.save_pretrained(checkpoint)
    SavedRun(checkpoint).check_config(toy_config(sparsity=0.5))
    with pytest.raises(ValueError, match="Got hidden_size = 64"):
        SavedRun(checkpoint).check_config(toy_config(hidden_size=64))


def test_where_a_script_goes_on(checkpoint, tmp_path):
    assert find_run_to_resume(tmp_path / "new", None) is None
    assert find_run_to_resume(tmp_path / "new", "last") is None
    assert find_run_to_resume(tmp_path, "last") == find_run_to_resume("new", str(checkpoint)) == str(checkpoint)
    with pytest.raises(FileNotFoundError, match="must name a checkpoint folder or `last`. Got elsewhere"):
        find_run_to_resume(tmp_path, "elsewhere")
    with pytest.raises(ValueError, match=f"must not hold another run. Got {re.escape(str(tmp_path))}"):
        find_run_to_resume(tmp_path, None)
