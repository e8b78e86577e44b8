"""Progress bars: those of the Hub where somebody watches, and none that is over before it can be read."""

import sys

import transformers
from huggingface_hub.utils.tqdm import enable_progress_bars


def hide_bars() -> None:
    """No bar for each load and save of a model; those of downloads and uploads on a terminal only."""
    transformers.logging.disable_progress_bar()  # those of the Hub too
    if sys.stderr.isatty():
        enable_progress_bars()
