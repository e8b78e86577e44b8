"""Flags of the training scripts: those that several share, and the help in groups, sparsity first."""

import argparse
import logging
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import TrainingArguments

from ..blocks.sizes import parse_block_size
from .arguments import DynSparseTrainingArguments
from .finetuning import FinetuningArguments
from .plugins import PLUGIN_HELP, PluginParser


logger = logging.getLogger(__name__)

# These stand first in the help, before the flags of topology updates.
SPARSITY = (
    *("sparsity", "block_size", "calibration_samples", "distribution", "dense_baseline", "static"),
    *("finetune_mode", "method"),
)
HELP_ALL = ("--help_all", "--help-all")
_THEIRS = {each.name for each in fields(TrainingArguments)}


@dataclass
class HubArguments:
    """Where a model comes from, and its licence."""

    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Hub token for private models and data."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the repository."})
    license: str | None = field(
        default=None, metadata={"help": "Licence of the trained model, for its card, e.g. apache-2.0."}
    )

    @property
    def hub(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`."""
        return {"revision": self.model_revision, "token": self.token, "cache_dir": self.cache_dir}


@dataclass
class PrunedModelArguments(HubArguments):
    """Where a model comes from, and what of a dense one is kept."""

    calibration_samples: int | None = field(
        default=None,
        metadata={
            "help": "With --sparsity: pass so many training examples through the dense checkpoint, keep the blocks "
            "that matter most to its outputs, and fit these: a minute for a small encoder. 0: the blocks of largest "
            "L1 norm, at once, and far worse. Default: 512, and 0 where the model is pruned step by step."
        },
    )
    calibrates_by_default: bool = field(default=False, init=False)  # `check_calibration` chose the number

    @property
    def kept(self) -> str:
        """What a dense checkpoint keeps when it is made sparse, for the card."""
        samples = self.calibration_samples
        return (
            f"the blocks that matter most to {samples} training examples"
            if samples
            else "the blocks of largest L1 norm"
        )

    def check_calibration(self, sparsity: float | None, excluded: Mapping[str, bool]) -> None:
        """
        Refuse examples to calibrate by where nothing is made sparse, and choose their number if none is given.

        Args:
            excluded (`Mapping[str, bool]`): what leaves nothing to calibrate, and whether it was given.

        Raises:
            ValueError: naming it.
        """
        without = [what for what, given in {"no --sparsity": sparsity is None, **excluded}.items() if given]
        if self.calibration_samples is None:
            self.calibrates_by_default = not without
            self.calibration_samples = 0 if without else 512
        if self.calibration_samples < 0:
            raise ValueError(f"`--calibration_samples` must not be negative. Got {self.calibration_samples}.")
        if self.calibration_samples and without:
            raise ValueError(
                "`--calibration_samples` of the training set choose what a dense checkpoint keeps at its "
                f"--sparsity. Got {self.calibration_samples} with {without[0]}. Leave one of them out."
            )


@dataclass
class FinetunedModelArguments(PrunedModelArguments):
    """What is fine-tuned."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A sparse checkpoint, or any dense encoder: folder or Hub name. Required."}
    )
    sparsity: float | None = field(
        default=None,
        metadata={
            "help": "Make a dense checkpoint sparse: leave out this share, and keep the blocks that "
            "--calibration_samples choose. With --finetune_mode gradual step by step, while it trains."
        },
    )
    block_size: str | None = field(
        default=None, metadata={"help": "With --sparsity: side of a block, or ROWSxCOLUMNS such as 1x4. Default: 16."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration, if not the model's own."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's own."})

    @property
    def start(self) -> dict[str, Any]:
        """Arguments of [`~hf_dynsparse.models.auto.load_pretrained`]: the checkpoint, and how sparse it is made."""
        return {
            "name_or_path": self.model_name_or_path,
            "sparsity": self.sparsity,
            "block_size": None if self.block_size is None else parse_block_size(self.block_size),
            "trust_remote_code": self.trust_remote_code,
            **self.hub,
        }

    def hub_of_teacher(self, teacher: str) -> dict[str, Any]:
        """Arguments of `from_pretrained`: the revision is the model's, and another model's is `main`."""
        return self.hub if teacher == self.model_name_or_path else self.hub | {"revision": "main"}


@dataclass
class ScriptArguments:
    """What a script adds to training arguments, which its class inherits too: name this one first."""

    num_threads: int | None = field(
        default=None,
        metadata={
            "help": "CPU threads of each process. Default: OMP_NUM_THREADS, or the cores shared among the processes."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint folder; `last`: the newest of --output_dir, if there is one; or what --hub_strategy "
            "checkpoint pushed, as user/name or user/name@revision."
        },
    )

    plugin: list[str] | None = field(default=None, metadata={"help": PLUGIN_HELP})

    # Optimiser steps where neither these nor epochs are given; without it the epochs have a default.
    default_steps: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        args: Any = self
        if args.max_steps is None:
            args.max_steps = -1 if args.num_train_epochs is not None else self.default_steps
        elif args.max_steps > 0 and args.num_train_epochs is not None:
            logger.warning(
                "`max_steps` goes before `num_train_epochs`. Got %d and %g: the run has %d steps. Leave one out.",
                *(args.max_steps, args.num_train_epochs, args.max_steps),
            )
        if args.num_train_epochs is None and self.default_steps is not None:
            args.num_train_epochs = 3.0  # as in transformers
        following: Any = super()
        following.__post_init__()


@dataclass
class FinetuningRunArguments(ScriptArguments, FinetuningArguments):
    """How it is fine-tuned: all arguments of the transformers Trainer; rates and epochs follow --finetune_mode."""

    do_train: bool = field(default=True, metadata={"help": "Train; --do_train false only evaluates or predicts."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate on the validation set at the end."})
    do_predict: bool = field(default=False, metadata={"help": "Predict the answers of the test set at the end."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Examples per process and micro-batch."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "The same for evaluation."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept."})
    logging_steps: float = field(default=0.02, metadata={"help": "Steps between log entries, or a share of the run."})

    def __post_init__(self) -> None:
        # transformers turns evaluation on for any strategy but "no".
        if not (self.do_train and self.do_eval):
            self.eval_strategy = "no"
        super().__post_init__()

    @property
    def splits(self) -> list[str]:
        """The splits of the data that the run reads."""
        wanted = {"train": self.do_train, "validation": self.do_eval, "test": self.do_predict}
        return [split for split in wanted if wanted[split]]


class FlagParser(PluginParser):
    """
    An [`~transformers.HfArgumentParser`] whose help shows each flag once, in groups: sparsity, then a group a
    dataclass, then the run. Flags of the transformers Trainer to which a script adds nothing are only named;
    `--help_all` explains them.

    Args:
        description (`str`, *optional*): what the script does. Its first paragraph begins the help, the rest ends it.
    """

    shows_all = False

    def __init__(self, kinds: Any, description: str | None = None, **kwargs: Any) -> None:
        first, _, rest = (description or "").strip().partition("\n\n")
        rest = f"examples:\n{rest}" if rest.startswith(" ") else rest
        kwargs |= {"description": first, "epilog": rest, "usage": "%(prog)s [--flag value ...]"}
        super().__init__(kinds, formatter_class=_Formatter, **kwargs)
        self.add_argument(*HELP_ALL, action=_HelpAll, nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS)

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """The arguments that a command line gives: no defaults."""
        defaults = [action.default for action in self._actions]
        try:
            for action in self._actions:
                action.default = argparse.SUPPRESS
            return vars(self.parse_known_args([flag for flag in argv if flag not in ("-h", "--help", *HELP_ALL)])[0])
        finally:
            for action, default in zip(self._actions, defaults, strict=True):
                action.default = default

    def format_help(self) -> str:
        """The help of `--help`, or of `--help_all`."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        left = {action.dest: action for action in reversed(self._actions)}
        del left["help"], left[argparse.SUPPRESS]
        for title, names in self._groups():
            formatter.start_section(title)
            formatter.add_arguments([left.pop(name) for name in names if name in left])
            formatter.end_section()
        formatter.start_section(f"all flags of transformers.TrainingArguments work too; {HELP_ALL[0]} explains them")
        if self.shows_all:
            formatter.add_arguments(reversed(left.values()))
        else:
            formatter.add_text(textwrap.fill(" ".join(f"--{name}" for name in left), 115, break_on_hyphens=False))
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _groups(self) -> Iterator[tuple[str, list[str]]]:
        """Titles, and names of flags; what is in a group before is in none after it."""
        topology = [each.name for each in fields(DynSparseTrainingArguments) if each.name not in _THEIRS]
        yield "sparsity and topology", [*SPARSITY, *topology]
        for kind in self.dataclass_types:
            own = [name for cls in kind.__mro__ for name in vars(cls).get("__annotations__", {}) if cls not in _BASES]
            yield (kind.__doc__ or kind.__name__).strip().splitlines()[0].rstrip("."), own
        yield "flags of transformers.TrainingArguments that have another default here", [*self._defaults]


class _HelpAll(argparse.Action):
    """Print the help with all flags, and end."""

    def __call__(self, parser: Any, *_: Any) -> None:
        parser.shows_all = True
        parser.print_help()
        parser.exit()


_BASES = (TrainingArguments, *TrainingArguments.__mro__[1:])


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=119)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if action.nargs in (0, "?"):  # a switch
            return ", ".join([*names, f"--no_{action.dest}"] if action.default is True else names)
        kind = {int: "N", float: "X"}.get(action.type, "TEXT")  # type: ignore[call-overload]
        return f"{', '.join(names)} {'{' + ','.join(map(str, action.choices)) + '}' if action.choices else kind}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS) or "efault:" in (action.help or ""):
            return action.help
        return f"{action.help or ''} (default: %(default)s)"
