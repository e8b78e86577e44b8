"""To the Hub and back: commits of what has been checked, and runs that go on from there."""

from .errors import HubError
from .fetch import fetch_checkpoint
from .push import commit_files, open_repository, push_checkpoint, push_folder


__all__ = ["HubError", "commit_files", "fetch_checkpoint", "open_repository", "push_checkpoint", "push_folder"]
