#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_dynsparse[glue,plots]"]
#
# [tool.uv.sources]
# hf_dynsparse = { path = ".." }
# ///
r"""
Train a BERT with only the heads and neurons that are worth it, found early in a run (EarlyBERT, arXiv:2101.00063).

    # a GLUE task, or sentences of your own: data and model flags of run_glue_dynsparse.py
    accelerate launch examples/run_earlybert.py \
        --model_name_or_path bert-base-uncased --task_name sst2 --glue_dir glue_data --output_dir runs/sst2-early
    accelerate launch examples/run_earlybert.py ... --ticket random:0   # as many units, chosen at random
    accelerate launch examples/run_earlybert.py ... --ticket none      # the dense model, by the full recipe
    accelerate launch examples/run_earlybert.py ... --sparsity 0.5 --block_size 4 --multiple_of 4  # sparse afterwards
    # masked language modelling from scratch: flags of run_mlm_dynsparse.py
    accelerate launch examples/run_earlybert.py --mlm --train_file train.txt --preset mini --output_dir runs/mini-early
    accelerate launch examples/run_earlybert.py ... --resume_from_checkpoint last  # go on after an interruption

Three stages: gates on heads and neurons train with the model until the ticket drawn from them has settled (search/);
the ticket is written (ticket.json); the model is slimmed to it, with the weights from before the search, and trained
by a shorter recipe. Writes into the output folder what the other scripts do, and ticket.json and ticket.png;
summary.json tells the seconds of search and training apart.
"""

import argparse
import copy
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

import run_glue_dynsparse as glue
import run_mlm_dynsparse as mlm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    TrainerCallback,
    set_seed,
)
from transformers.hf_argparser import HfArg, string_to_bool
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_dynsparse import DynSparseTrainer, EarlyBirdCallback, Ticket, slim, sparsify_
from hf_dynsparse.blocks.sizes import as_block_shape, parse_block_size
from hf_dynsparse.checkpoints.saved_run import last_checkpoint
from hf_dynsparse.compress.slimming import TICKET_SCORES, random_ticket
from hf_dynsparse.data import count_pieces
from hf_dynsparse.data.classification import (
    TRANSFER,
    SentenceArguments,
    find_columns,
    head_of,
    load_sentences,
    tokenize_sentences,
)
from hf_dynsparse.data.pretraining import TextArguments, load_text, make_sequences
from hf_dynsparse.data.tokenizer_checks import check_positions
from hf_dynsparse.data.transfer import with_transfer_set
from hf_dynsparse.files import write_atomically
from hf_dynsparse.models.bert.configuration_dynsparse_bert import layer_sizes
from hf_dynsparse.reports.pictures.ticket import plot_ticket
from hf_dynsparse.training import scripts
from hf_dynsparse.training.callbacks.log_file import LogFile
from hf_dynsparse.training.callbacks.slimming import TICKET_FILE
from hf_dynsparse.training.finetuning import prepare_finetuning_
from hf_dynsparse.training.recipes import LEARNING_RATES


logger = logging.getLogger("run_earlybert")

SEARCH_FOLDER = "search"


@dataclass
class TicketArguments:
    """The search, the draw, and the training of what was drawn."""

    mlm: bool = HfArg(default=False, help="Masked language modelling instead of a task.")
    stage: str = HfArg(
        default="all",
        help="search: until the ticket is written; train: from a ticket in --output_dir or that of --ticket; "
        "all: both.",
        metadata={"choices": ["all", "search", "train"]},
    )
    ticket: str = HfArg(
        default="search",
        help="search; random:SEED, as many units in each layer, drawn at random; a ticket.json; or none: the "
        "dense model, trained by --learning_rate and --num_train_epochs.",
    )
    head_ratio: float = HfArg(default=1 / 3, help="Share of the heads to leave out.")
    neuron_ratio: float = HfArg(default=0.4, help="Share of the intermediate neurons to leave out.")
    draw_heads: str = HfArg(
        default="layer",
        help="Heads compete within their layer or with all.",
        metadata={"choices": ["layer", "global"]},
    )
    draw_neurons: str = HfArg(
        default="global", help="The same for neurons.", metadata={"choices": ["layer", "global"]}
    )
    ticket_score: str = HfArg(
        default="magnitude",
        help="What a unit is worth by its gate: |c|, or c as in the authors' code.",
        metadata={"choices": TICKET_SCORES},
    )
    multiple_of: int = HfArg(
        default=1, help="Neurons of a layer come in multiples, such as the block size of --block_size."
    )
    l1_heads: float = HfArg(default=1e-4, help="Strength of the L1 penalty on the gates of heads.")
    l1_neurons: float = HfArg(default=1e-4, help="The same for neurons.")
    draw_every: float = HfArg(default=0.02, help="Steps between draws, below 1 a share of an epoch.")
    ticket_queue: int = HfArg(default=5, help="How many tickets must agree.")
    ticket_tolerance: float = HfArg(default=0.1, help="They agree if they differ in less than this.")
    search_fallback: float = HfArg(
        default=0.2, help="The search ends after these steps, below 1 a share of an epoch, at the latest."
    )
    train_learning_rate: float | None = HfArg(
        default=None, help="Peak rate of the slimmed model. Default: --learning_rate, for a task twice that."
    )
    train_epochs: float | None = HfArg(
        default=None, help="Its epochs. Default: --num_train_epochs, for a task two thirds. --max_steps goes before."
    )

    def __post_init__(self) -> None:
        args: Any = self
        has_steps = args.max_steps is not None and args.max_steps > 0
        following: Any = super()
        following.__post_init__()
        if self.train_epochs is not None and has_steps:
            logger.warning(
                "`max_steps` goes before `train_epochs`. Got %d and %g. Leave one of them out.",
                *(args.max_steps, self.train_epochs),
            )
        # Those of the training; the search has its own schedule.
        self.train_steps = args.max_steps if has_steps or self.train_epochs is None else -1

    def search(self) -> EarlyBirdCallback:
        """The search that the arguments ask for."""
        return EarlyBirdCallback(
            l1_heads=self.l1_heads,
            l1_neurons=self.l1_neurons,
            draw_every=self.draw_every,
            queue_length=self.ticket_queue,
            tolerance=self.ticket_tolerance,
            fallback=self.search_fallback,
            head_ratio=self.head_ratio,
            neuron_ratio=self.neuron_ratio,
            heads=self.draw_heads,
            neurons=self.draw_neurons,
            score=self.ticket_score,
            multiple_of=self.multiple_of,
        )


@dataclass
class TaskArguments(TicketArguments, glue.RunArguments):
    """How it is searched and trained. The search follows the schedule of a whole dense run, and stops early."""

    output_dir: str = HfArg(default="earlybert-glue", help="Where everything of the run is written.")
    learning_rate: float = HfArg(default=2e-5, help="Peak rate of the search, and of --ticket none.")
    num_train_epochs: float | None = HfArg(
        default=None, help="Epochs of the search's schedule, and of that. Default: 3."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0


@dataclass
class MlmArguments(TicketArguments, mlm.RunArguments):
    """The same for masked language modelling."""

    output_dir: str = HfArg(default="earlybert-mlm", help="Where everything of the run is written.")
    recipe: str = HfArg(default="paper", help="Tickets are searched by the paper's.", metadata={"choices": ["paper"]})


@dataclass
class MlmModelArguments(mlm.ModelArguments):
    """What is trained: slimmed first, and then perhaps sparse."""

    sparsity: float = HfArg(default=0.0, help="Share of inactive positions of the slimmed model.")


class Job(NamedTuple):
    """What the stages do with a task, whichever it is."""

    load: Callable[[], Any]  # the dense model with its early weights: the same at every call
    trainer: Callable[[Any, Any, list[TrainerCallback]], DynSparseTrainer]  # of a model, arguments and callbacks
    report: Callable[[DynSparseTrainer], None]  # evaluates, writes results, summary.json and training.png


@scripts.holds_output_dir
def main() -> None:
    """Parse, check, prepare, search, draw, train, report."""
    with scripts.one_line_errors():
        kinds = MLM_ARGUMENTS if asks_for_mlm(sys.argv[1:]) else TASK_ARGUMENTS
        model_args, data_args, args = scripts.parse_arguments(*kinds, description=__doc__)
        checkpoint = check(model_args, args)
        (check_mlm if args.mlm else check_task)(model_args, data_args, args)
        scripts.prepare_process(args, logger.name)
        job = (prepare_mlm if args.mlm else prepare_task)(model_args, data_args, args)
    with scripts.one_line_errors():
        ticket = find_ticket(job, args)
        if args.stage != "search":
            train(job, ticket, model_args, args, checkpoint)


def asks_for_mlm(given: list[str]) -> bool:
    """Whether the flags, or the one JSON file that holds them, are those of masked language modelling."""
    if len(given) == 1 and given[0].endswith(".json"):
        return json.loads(Path(given[0]).read_text()).get("mlm", False)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--mlm", type=string_to_bool, nargs="?", const=True, default=False)
    return parser.parse_known_args(given)[0].mlm


def check(model_args: Any, args: Any) -> str | None:
    """Refuse what cannot work; the checkpoint of the training to go on from, if there is one."""
    args.search()
    if args.stage == "search" and args.ticket != "search":
        raise ValueError(f"`--stage search` searches. Got --ticket {args.ticket}. Leave one of them out.")
    if args.resume_from_checkpoint not in (None, "last"):
        raise ValueError(f"`--resume_from_checkpoint` must be `last` here. Got {args.resume_from_checkpoint!r}.")
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint is None and args.stage != "train":
        for old in (folder / TICKET_FILE, folder / SEARCH_FOLDER):
            if old.exists():
                raise ValueError(
                    f"`--output_dir` must not hold another run. Got {folder} with {old.name}. Give a new folder, or "
                    "--resume_from_checkpoint last, or --stage train for another training of that ticket."
                )
    check_ticket(folder, args)
    check_blocks(model_args, args)
    return scripts.find_checkpoint(args, model_args.token)


def check_ticket(folder: Path, args: Any) -> None:
    """That `--ticket` can be had, and is the one of the output folder if that holds one."""
    kind, _, seed = args.ticket.partition(":")
    drawn = folder / TICKET_FILE
    if kind == "random" and not seed.isdigit():
        raise ValueError(f"`--ticket random:SEED` needs a number. Got {args.ticket!r}. Write random:0.")
    if kind == "search":
        if args.stage == "train" and not (drawn.exists() or (folder / SEARCH_FOLDER / TICKET_FILE).exists()):
            raise ValueError(f"`--stage train` needs a ticket. Got none in {folder}. Search first.")
        return
    if kind == "none" or (kind == "random" and not drawn.exists()):
        return
    given = None if kind == "random" else Ticket.load(args.ticket)
    if drawn.exists():
        same = given == Ticket.load(drawn) if given else args.ticket == source_of(json.loads(drawn.read_text()))
        if not same:
            raise ValueError(
                f"`--ticket` must be that of {folder} already. Got {args.ticket}. Leave it out, or give a new folder."
            )


def source_of(ticket: dict[str, Any]) -> str:
    """What `--ticket` was; of a file that somebody put there, its name."""
    return ticket.get("source", TICKET_FILE)


def check_blocks(model_args: Any, args: Any) -> None:
    """That the blocks of `--sparsity` fit whatever number of neurons stays."""
    block_size = parse_block_size(model_args.block_size or "16")
    if not model_args.sparsity or args.ticket == "none":
        return
    if isinstance(block_size, dict):
        raise ValueError(f"A slimmed model gets one block size. Got --block_size {model_args.block_size}.")
    sides = as_block_shape(block_size)
    if (args.ticket == "search" or args.ticket.startswith("random:")) and args.multiple_of % lcm(*sides):
        raise ValueError(
            f"`--multiple_of` must be a multiple of both sides of a block, {sides[0]} x {sides[1]}: else blocks would "
            f"not fit the neurons that stay. Got {args.multiple_of}. Give {lcm(*sides)}."
        )


def check_task(model_args: Any, data_args: Any, args: Any) -> None:
    """What goes on from a slimmed model without a search is left to the other script."""
    if not args.do_train or args.quantization_aware or args.finetune_mode == "gradual":
        raise ValueError(
            "This script searches, slims and trains. Got --do_train false, --quantization_aware or --finetune_mode "
            "gradual. Go on from its model with run_glue_dynsparse.py."
        )
    glue.check(model_args, data_args, args)


def check_mlm(model_args: Any, data_args: Any, args: Any) -> None:
    """The model that is searched is dense; topology updates are for the slimmed one, if that is to be sparse."""
    model_args.static = model_args.static or not model_args.sparsity
    mlm.check(model_args, data_args, args)
    model_args.dense_baseline = True


def find_ticket(job: Job, args: Any) -> Ticket | None:
    """The ticket of the output folder, made if need be; `None` for the dense model."""
    kind, _, seed = args.ticket.partition(":")
    path = Path(args.output_dir, TICKET_FILE)
    if kind == "none":
        return None
    if path.exists():
        return Ticket.load(path)
    about: dict[str, Any] = {}
    if kind == "random":
        heads, neurons = zip(*layer_sizes(job.load().config), strict=True)
        ratios = {"head_ratio": args.head_ratio, "neuron_ratio": args.neuron_ratio, "multiple_of": args.multiple_of}
        ticket = random_ticket(heads, neurons, seed=int(seed), **ratios)
    else:
        source = Path(args.output_dir, SEARCH_FOLDER, TICKET_FILE) if kind == "search" else Path(args.ticket)
        if not source.exists():
            search(job, args)
        ticket, about = Ticket.load(source), json.loads(source.read_text())
    if args.process_index == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        about["source"] = args.ticket if ":" in args.ticket else Path(args.ticket).name
        ticket.save(path, **{name: fact for name, fact in about.items() if name not in vars(ticket)})
    return ticket


def search(job: Job, args: Any) -> None:
    """Train a model with gates until its ticket is written; the weights are of no further use."""
    settings = copy.copy(args)
    settings.output_dir = os.path.join(args.output_dir, SEARCH_FOLDER)
    settings.eval_strategy, settings.load_best_model_at_end, settings.push_to_hub = IntervalStrategy.NO, False, False
    if settings.save_strategy == SaveStrategy.EPOCH:
        settings.save_strategy = SaveStrategy.NO  # a search is over before an epoch is
    trainer = job.trainer(job.load(), settings, [args.search()])
    trainer.add_callback(LogFile())
    trainer.train(resume_from_checkpoint=last_checkpoint(settings.output_dir))
    trainer.accelerator.wait_for_everyone()  # the first process writes the ticket


def train(job: Job, ticket: Ticket | None, model_args: Any, args: Any, checkpoint: str | None) -> None:
    """Train the slimmed model, or the dense one, from its early weights, and report."""
    model = job.load()
    if ticket is not None:
        sizes = list(zip(ticket.num_heads, ticket.num_neurons, strict=True))
        if sizes != layer_sizes(model.config):
            raise ValueError(
                f"A ticket must be for the model. Got one for (heads, neurons) {sizes}, and a model of "
                f"{layer_sizes(model.config)}. Draw another."
            )
        model = slim(model, ticket.heads, ticket.neurons)
    if model_args.sparsity:
        model = sparsify_(model, parse_block_size(model_args.block_size or "16"), model_args.sparsity)
    settings = copy.copy(args)
    settings.learning_rate, settings.num_train_epochs = recipe(args, ticket is not None)
    settings.max_steps = args.train_steps
    if not args.mlm:
        prepare_finetuning_(model, settings)
    trainer = job.trainer(model, settings, [])
    trainer.add_callback(LogFile())
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    job.report(trainer)
    if trainer.is_world_process_zero():
        tell_of_ticket(trainer, ticket is not None)
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    trainer.accelerator.end_training()


def recipe(args: Any, is_slim: bool) -> tuple[float, float]:
    """Peak rate and epochs of the training: on a task a slim model gets twice the rate, two thirds of the epochs."""
    faster, shorter = (2.0, 2 / 3) if is_slim and not args.mlm else (1.0, 1.0)
    rate = args.learning_rate * faster if args.train_learning_rate is None else args.train_learning_rate
    return rate, args.num_train_epochs * shorter if args.train_epochs is None else args.train_epochs


def tell_of_ticket(trainer: DynSparseTrainer, is_slim: bool) -> None:
    """Add to summary.json which ticket was trained and the seconds of both stages, and draw the ticket."""
    folder = Path(str(trainer.args.output_dir))
    summary = json.loads((folder / "summary.json").read_text())
    facts: dict[str, Any] = {"ticket": "none"}
    if is_slim:
        ticket = json.loads((folder / TICKET_FILE).read_text())
        facts["ticket"] = source_of(ticket)
        facts |= {name: ticket[name] for name in ("step", "reason") if name in ticket}
        facts |= {name: [len(layer) for layer in ticket[name]] for name in ("heads", "neurons")}
        facts |= {name: ticket[name] for name in ("num_heads", "num_neurons")}
        facts["search_seconds"] = ticket.get("seconds", 0.0)
        try:
            plot_ticket(ticket, folder / "ticket.png", title=folder.name)
        except ImportError as error:
            logger.warning("No picture: %s", error)
    facts["train_seconds"] = summary["seconds"]
    facts["total_seconds"] = facts["train_seconds"] + facts.get("search_seconds", 0.0)
    write_atomically(folder / "summary.json", json.dumps(summary | {"earlybert": facts}, indent=2) + "\n")


def prepare_task(model_args: Any, data_args: Any, args: Any) -> Job:
    """A GLUE task, or sentences of one's own."""
    raw = load_sentences(data_args, cache_dir=model_args.cache_dir, token=model_args.token)
    columns, labels = find_columns(raw, data_args, args.splits)
    tokenizer = glue.load_tokenizer(model_args)
    name, how = model_args.model_name_or_path, {"trust_remote_code": model_args.trust_remote_code, **model_args.hub}
    config = AutoConfig.from_pretrained(model_args.config_name or name, **head_of(labels), **how)
    glue.check_tokenizer_and_model(tokenizer, config, columns, data_args)
    teacher = glue.find_teacher(model_args, data_args, args, tokenizer, columns)
    with args.main_process_first(desc="tokenize"):
        examples = tokenize_sentences(raw, columns, labels, tokenizer, data_args)
    if TRANSFER in examples:
        examples["train"] = with_transfer_set(examples["train"], examples[TRANSFER])

    def load() -> Any:
        set_seed(args.seed)  # the same new head every time
        return AutoModelForSequenceClassification.from_pretrained(
            name,
            config=copy.deepcopy(config),
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            **how,
        )

    def trainer(model: Any, settings: Any, callbacks: list[TrainerCallback]) -> DynSparseTrainer:
        return DynSparseTrainer(
            model,
            settings,
            teacher=teacher,
            train_dataset=examples["train"],
            eval_dataset=examples["validation"] if args.do_eval else None,
            compute_metrics=glue.scorer(data_args, labels),
            data_collator=None if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def report(trainer: DynSparseTrainer) -> None:
        results = glue.evaluate(trainer, examples, data_args) if args.do_eval else {}
        if args.do_predict:
            glue.predict(trainer, examples, labels, data_args)
        if trainer.is_world_process_zero():
            scripts.write_finetuning(trainer, results, glue.about_run(model_args, data_args))

    return Job(load, trainer, report)


def prepare_mlm(model_args: Any, data_args: Any, args: Any) -> Job:
    """Masked language modelling, from scratch or from a dense checkpoint."""
    known = Path(args.output_dir, scripts.TOKENIZER_FOLDER)
    config = mlm.build_config(model_args, data_args, args, None)
    check_positions(config, data_args.max_seq_length)
    with args.main_process_first(desc="prepare the text"):
        raw = load_text(data_args, cache_dir=model_args.cache_dir, token=model_args.token)
        tokenizer = mlm.load_tokenizer(model_args, raw, args, str(known) if known.exists() else None)
        mlm.fit_vocabulary_(config, tokenizer, model_args, data_args)
        sequences = make_sequences(raw, tokenizer, data_args, args.seed)
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[model_args.preset]
    counts = count_pieces(sequences["train"], tokenizer, config.vocab_size)
    teacher = mlm.find_teacher(model_args, data_args, args)

    def load() -> Any:
        set_seed(args.seed)  # the same initial weights every time
        return mlm.load_model(model_args, data_args, copy.deepcopy(config), calibration=None)

    def trainer(model: Any, settings: Any, callbacks: list[TrainerCallback]) -> DynSparseTrainer:
        return DynSparseTrainer(
            model,
            settings,
            teacher=teacher,
            piece_counts=counts,
            data_collator=data_args.collator(tokenizer, args.seed),
            train_dataset=sequences["train"],
            eval_dataset=sequences["validation"],
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def report(trainer: DynSparseTrainer) -> None:
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            about = mlm.about_run(model_args, data_args, str(raw["validation"].split))
            about["pattern"] = "the blocks of largest L1 norm"
            mlm.report(trainer, metrics, about, data_args.max_seq_length)

    return Job(load, trainer, report)


TASK_ARGUMENTS = (glue.ModelArguments, SentenceArguments, TaskArguments)
MLM_ARGUMENTS = (MlmModelArguments, TextArguments, MlmArguments)


if __name__ == "__main__":
    main()
