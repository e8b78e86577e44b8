"""To the Hub: repositories that may be written to, and commits of what has been checked."""

import logging
import os
import shutil
from concurrent.futures import Future
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperation,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    run_as_future,
)

from ..models.readme import SHORT, is_ours
from ..reports.facts import read_facts
from ..reports.model_card import card_of_folder
from .errors import HubError, ask
from .files import LAST_CHECKPOINT, PENDING, Files, check_model, checkpoint_files, model_files


logger = logging.getLogger(__name__)

_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "pytorch_model*")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    with_code: bool = False,
    tag: str | None = None,
) -> CommitInfo:
    """
    Push a saved sparse model, its tokenizer, its card (one is made if there is none) and what else is in `folder`, as
    one commit.

    The folder is checked first: its model must load whole, from safetensors. Pickles are not pushed: what a run left
    in the folder (optimiser, random state, arguments, checkpoints) stays behind, any other is refused. Weights that an
    earlier push brought under other names (shards) go. If anything fails, call it again.

    Args:
        folder (`str` or `Path`): what `save_pretrained` or a finished run wrote.
        repo_id (`str`): such as `"user/name"`; `"name"` is one of yours. Created if it does not exist.
        private (`bool`, *optional*): whether to create it private. `True` refuses a public one that exists.
        revision (`str`, *optional*): the branch, created if it does not exist; by default `"main"`.
        commit_message (`str`, *optional*): by default `"Upload a sparse model"`.
        token (`str`, *optional*): by default the one that `hf auth login` stored.
        with_code (`bool`): add the modelling code, as [`save_with_code`] does; `folder` is not changed.
        tag (`str`, *optional*): a new tag for the commit.

    Returns:
        `CommitInfo`: its `oid` is a `revision` for `from_pretrained`.

    Raises:
        ValueError: if the folder does not hold a whole sparse model, or holds a pickle.
        HubError: for a token without the right to write there, a tag that exists, an interrupted upload and the like.

    Example:
        ```python
        >>> commit = push_folder("runs/medium-s90-b16", "me/dynsparse-bert-medium-s90-b16", private=True, tag="v1")
        ```
    """
    folder = Path(folder)
    if folder.is_dir():
        model_files(folder)  # before anything is loaded: opening a pipe would wait for ever
    model = check_model(folder)
    files = model_files(folder, with_code)
    if "README.md" not in files or is_ours(folder, SHORT):
        files["README.md"] = str(card_of_folder(folder, model, read_facts(folder))).encode()
    repo_id = open_repository(repo_id, private=private, revision=revision, token=token)
    api = HfApi(token=token)
    if tag is not None:
        tags = ask(f"Pushing to {repo_id}", lambda: api.list_repo_refs(repo_id).tags)
        taken = {ref.name: ref.target_commit for ref in tags}
        if tag in taken:
            raise HubError(f"`tag` must be new. Got {tag!r}, which {repo_id} has at {taken[tag]}. Choose another.")
    message = commit_message or "Upload a sparse model"
    commit = commit_files(repo_id, files, message=message, revision=revision, token=token)
    if tag is not None:
        name = tag
        ask(f"Tagging {repo_id}", lambda: api.create_tag(repo_id, tag=name, revision=commit.oid))
    return commit


def open_repository(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> str:
    """
    The full name of a repository that may be written to, made together with its branch if it does not exist.

    Raises:
        HubError: if that may not be, or it is public and must be private.
    """
    api = HfApi(token=token)

    def opened() -> str:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(name, write=True)
        if private and not api.model_info(name).private:
            raise HubError(
                f"`private=True` needs a private repository. Got {name}, which is public. Change that in its "
                "settings, or choose another name."
            )
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        return name

    return ask(f"Pushing to {repo_id}", opened)


def commit_files(
    repo_id: str, files: Files, *, message: str, revision: str | None = None, token: str | None = None
) -> CommitInfo:
    """
    Push `files`, by their paths in the repository, as one commit: it comes whole or not at all. Without a change there
    is none, and the last one is returned.

    Raises:
        HubError: if that failed.
    """
    api = HfApi(token=token)

    def committed() -> CommitInfo:
        present = api.list_repo_files(repo_id, revision=revision)
        # Not `upload_folder`: it may split a large folder into several commits, and takes files on the disk only.
        replaced = [path for path in present if _is_replaced(path, files)]
        changes: list[CommitOperation] = [CommitOperationDelete(path) for path in replaced]
        changes += [CommitOperationAdd(path, source) for path, source in files.items()]
        return api.create_commit(repo_id, changes, commit_message=message, revision=revision)

    return ask(f"Pushing to {repo_id}", committed)


def push_checkpoint(
    checkpoint: str | Path,
    repo_id: str,
    *,
    subfolder: str | None,
    message: str,
    revision: str | None,
    token: str | None,
) -> Future[None]:
    """
    Push a checkpoint of a run in the background: its model and, if there is a `subfolder`, all that a resumed run
    needs into that, in one commit. The checkpoint may be removed meanwhile. A failure is logged, and ends nothing.
    """
    checkpoint = Path(checkpoint)
    frozen = checkpoint.with_name(PENDING + checkpoint.name)
    shutil.rmtree(frozen, ignore_errors=True)
    shutil.copytree(checkpoint, frozen, copy_function=_link, symlinks=True)  # links are looked at, not followed

    def push() -> None:
        try:
            files = checkpoint_files(frozen, subfolder) if subfolder else model_files(frozen)
            commit_files(repo_id, files, message=message, revision=revision, token=token)
        except (HubError, ValueError) as error:
            logger.error("%s was not pushed, and training goes on; the next save pushes again. %s", checkpoint, error)
        finally:
            shutil.rmtree(frozen)

    return run_as_future(push)


def _is_replaced(path: str, files: Files) -> bool:
    """Whether a file of the repository belongs to weights or a checkpoint whose place `files` take."""
    folders = {new.partition("/")[0] for new in files if new.startswith((f"{LAST_CHECKPOINT}/", "checkpoint-"))}
    if "/" in path:
        return path not in files and path.partition("/")[0] in folders
    return path not in files and any(fnmatchcase(path, pattern) for pattern in _WEIGHTS)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
