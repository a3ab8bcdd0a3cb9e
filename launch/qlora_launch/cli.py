"""``qlora``: parse, call, print, exit. Each verb is a function; all else is imported by it."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist import __version__

if TYPE_CHECKING:
    from qlora_dist.ends import RankEnd
    from qlora_dist.layout import RunDir
    from qlora_dist.plan import CorpusFacts, Plan
    from qlora_dist.spec import RunSpec

_INTRO = """\
One YAML file to a trained QLoRA adapter.

  qlora plan configs/guanaco-7b.yaml            what the run takes, and whether it fits
  qlora data configs/guanaco-7b.yaml --show 3   what it will learn, token by token
  qlora run  configs/guanaco-7b.yaml            train; Ctrl-C saves and stops
  qlora resume runs/guanaco-7b                  go on from the last committed step

Any key of the file can be given on the command line: qlora run x.yaml optimizer.lr=1e-4
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = make_parser()
    args = _parse(parser, argv)
    if args.call is None:
        parser.print_help()
        return 0
    # Libraries' remarks are not about the user's input; ours are.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from qlora_dist.errors import QLoRAError

    try:
        code: int = args.call(args)
    except QLoRAError as error:
        sys.stderr.write(f"qlora: {error}\n")
        return error.exit_code
    except BrokenPipeError:
        # The reader (head, less) has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        sys.stderr.write(f"qlora: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("qlora: interrupted\n")
        return 130
    return code


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, with options anywhere among the words of a list.

    argparse itself takes a list's words only up to the first option, and then refuses the rest.
    """
    args, rest = parser.parse_known_args(argv)
    if rest:
        if args.rest is None or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        setattr(args, args.rest, [*getattr(args, args.rest), *rest])
    return args


def make_parser() -> argparse.ArgumentParser:
    """The whole command line; docs/cli.md is made from it."""
    parser = argparse.ArgumentParser(
        prog="qlora", description=_INTRO, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"qlora-dist {__version__}")
    parser.set_defaults(call=None, rest=None)
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")

    def verb(
        name: str, call: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(call=call)
        return sub

    plan = verb("plan", _plan, "say what a run takes: processes, steps, memory, and why")
    _config_arguments(plan)
    plan.add_argument("--json", action="store_true", help="for programs")

    run = verb("run", _run, "start a run, or go on with it if its directory is there")
    _config_arguments(run)
    run.add_argument(
        "--dry-run", action="store_true", help="print every file, argv and variable, and stop"
    )
    run.add_argument(
        "--prepare",
        action="store_true",
        help="write the run directory and stop; start it with qlora resume or accelerate launch",
    )

    submit = verb("submit", _submit, "the same as a Slurm job: run with resources.backend=slurm")
    _config_arguments(submit)
    submit.add_argument("--dry-run", action="store_true", help="print the batch script and stop")
    submit.set_defaults(prepare=False)

    resume = verb("resume", _resume, "go on with a run from its last committed step")
    _run_argument(resume)
    _overrides_argument(resume)
    resume.add_argument("--dry-run", action="store_true", help="print what would be started")

    status = verb("status", _status, "say where a run stands, and what its attempts were")
    _run_argument(status)
    status.add_argument("--json", action="store_true", help="for programs")

    runs = verb("list", _list, "say where every run of a folder stands")
    runs.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER")

    logs = verb("logs", _logs, "print what a run's newest attempt has said")
    _run_argument(logs)
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the attempt ends")
    logs.add_argument("--rank", type=_count, metavar="N", help="what one process printed instead")

    cancel = verb("cancel", _cancel, "have a run save and end, and not start again by itself")
    _run_argument(cancel)

    data = verb("data", _data, "read and tokenise a run's data, and show it")
    _config_arguments(data)
    data.add_argument(
        "--show", type=_count, default=0, metavar="N", help="print N samples, learned tokens marked"
    )
    data.add_argument("--json", action="store_true", help="for programs")

    consolidate = verb("consolidate", _consolidate, "write a checkpoint as RUN/adapter, for PEFT")
    _run_argument(consolidate)
    consolidate.add_argument(
        "--checkpoint", default="last", metavar="WHICH", help="last, best, or a step"
    )

    export = verb("export", _export, "merge the adapter into the base, as RUN/merged in 16 bits")
    _run_argument(export)
    export.add_argument("--output", type=Path, help="another folder to write")
    export.add_argument(
        "--base",
        choices=["16bit", "dequantized", "auto"],
        default="auto",
        help="the base as it was published, as training quantised it, or whichever measures nearer "
        "to the trained model (default)",
    )
    export.add_argument(
        "--no-check",
        action="store_true",
        help="neither load nor measure what was written; not with --base auto",
    )

    generate = verb(
        "generate", _generate, "answer prompts with a run, an adapter or a merged model"
    )
    generate.add_argument("model", metavar="MODEL", help="run directory, adapter or model folder")
    generate.add_argument(
        "prompt", nargs="*", help="one prompt each; read from standard input, a line each, if none"
    )
    generate.add_argument("--base", action="store_true", help="the run's base without its adapter")
    generate.add_argument(
        "--raw", action="store_true", help="give the prompt as it is, without a template"
    )
    generate.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N")
    generate.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="0 picks the likeliest token",
    )
    generate.add_argument("--top-p", type=_probability, default=0.9, metavar="P")
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(rest="prompt")
    return parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    _overrides_argument(parser)


def _overrides_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="such as optimizer.lr=1e-4"
    )
    parser.set_defaults(rest="overrides")


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not over 0 and at most 1")
    return value


def _say(line: str) -> None:
    """Print a line of a long command; one that nobody can read any more must not end it."""
    try:
        print(line, flush=True)
    except OSError:
        # Later lines go nowhere, and the interpreter's last flush does not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _warn(line: str) -> None:
    sys.stderr.write(line + "\n")


def _load(args: argparse.Namespace) -> "RunSpec":
    from qlora_dist.spec_file import load_spec

    return load_spec(args.config, args.overrides)


def _plan(args: argparse.Namespace) -> int:
    from qlora_dist.plan import make_plan

    spec = _load(args)
    make_plan(spec)
    plan = make_plan(spec, _corpus_facts(spec))
    if args.json:
        import json

        print(json.dumps(plan.to_json(), indent=2))
    else:
        from qlora_launch.show import plan_text

        print(plan_text(plan))
    return 0


def _corpus_facts(spec: "RunSpec") -> "CorpusFacts | None":
    """What is known of the data, if it has been tokenised before."""
    from qlora_dist.data import notes
    from qlora_dist.layout import corpora_dir, run_dir_of

    path = notes.read(spec, corpora_dir(spec, run_dir_of(spec)))
    if path is None:
        return None
    from qlora_dist.data.corpus import Corpus
    from qlora_dist.data.schedule import corpus_facts
    from qlora_dist.data.store import DamagedStoreError, open_store

    try:
        return corpus_facts(spec, Corpus(open_store(path, verify=False)))
    except (FileNotFoundError, DamagedStoreError):
        return None


def _run(args: argparse.Namespace) -> int:
    from qlora_dist.errors import PlanError
    from qlora_dist.plan import make_plan
    from qlora_launch.render import render
    from qlora_launch.rundir import absolute_paths, check_local_paths, write_run_dir
    from qlora_launch.show import bundle_text

    spec = absolute_paths(_load(args))
    plan = make_plan(spec)
    bundle = render(plan)
    if args.dry_run:
        print(bundle_text(bundle))
        return 0
    if plan.not_runnable:
        raise PlanError("\n".join(plan.not_runnable))
    check_local_paths(spec)
    run = write_run_dir(bundle, spec)
    if args.prepare:
        _say(f"{run.root} is written; start it with: qlora resume {run.root}")
        return 0
    return _start(run, plan)


def _submit(args: argparse.Namespace) -> int:
    args.overrides = [*args.overrides, "resources.backend=slurm"]
    return _run(args)


def _resume(args: argparse.Namespace) -> int:
    from qlora_dist.checkpoints import newest_step
    from qlora_dist.errors import PlanError
    from qlora_dist.layout import open_run
    from qlora_dist.plan import make_plan
    from qlora_dist.resume import check_change
    from qlora_dist.spec_file import spec_from_tree
    from qlora_launch.render import render
    from qlora_launch.rundir import absolute_paths, change_run_dir
    from qlora_launch.show import bundle_text

    run, before = open_run(args.run)
    spec = before
    if args.overrides:
        tree = before.model_dump(mode="json")
        spec = absolute_paths(spec_from_tree(tree, args.overrides, source=str(run.run_json)))
        check_change(before, spec)
    plan = make_plan(spec.model_copy(update={"run_dir": str(run.root)}))
    bundle = render(plan)
    if args.dry_run:
        print(bundle_text(bundle))
        return 0
    if plan.not_runnable:
        raise PlanError("\n".join(plan.not_runnable))
    done, steps = newest_step(run.checkpoints), spec.schedule.steps
    if steps is not None and steps < done:
        raise PlanError(
            f"schedule.steps: {steps} steps, and the run has {done} behind it; use at least {done}"
        )
    if args.overrides:
        change_run_dir(run, bundle)
    return _start(run, plan)


def _start(run: "RunDir", plan: "Plan") -> int:
    from qlora_dist.ends import DONE, PREEMPTED
    from qlora_launch.backends import get_backend

    _say(f"run directory: {run.root}")
    end = get_backend(plan.spec.resources.backend).submit(run, plan, say=_say)
    if end is None:
        return DONE
    if end.code == DONE:
        _say(f"done: {end.cause}")
    elif end.code == PREEMPTED:
        _say(f"{end.cause}; go on with: qlora resume {run.root}")
    else:
        sys.stderr.write(_failure_text(run, end))
    return end.code


def _failure_text(run: "RunDir", end: "RankEnd") -> str:
    from qlora_dist.ends import SILENT, USER_ERROR
    from qlora_dist.layout import newest_attempt

    attempt = newest_attempt(run)
    if end.code == USER_ERROR or attempt is None:
        return f"qlora: {end.cause}\n"
    if end.cause == SILENT:
        logs = f"{run.rank_log(attempt, end.rank)} and {run.launcher_log(attempt)}"
        return f"qlora: rank {end.rank} {end.cause}\nwhat it left: {logs}\n"
    log = run.rank_log(attempt, end.rank)
    return f"qlora: {end.cause}\nrank {end.rank} failed after step {end.step}; its log: {log}\n"


def _status(args: argparse.Namespace) -> int:
    from qlora_dist.layout import open_run
    from qlora_dist.ledger import standing
    from qlora_launch.show_runs import status_json, status_text

    run, spec = open_run(args.run)
    now = standing(run, spec)
    if args.json:
        import json

        print(json.dumps(status_json(now), indent=2))
    else:
        print(status_text(run, spec, now))
    return 0


def _list(args: argparse.Namespace) -> int:
    from qlora_launch.show_runs import list_text

    print(list_text(args.folder.expanduser().absolute()))
    return 0


def _logs(args: argparse.Namespace) -> int:
    from qlora_dist.layout import open_run
    from qlora_launch.follow import follow

    run, spec = open_run(args.run)
    follow(run, spec, say=_say, rank=args.rank, to_the_end=args.follow)
    return 0


def _cancel(args: argparse.Namespace) -> int:
    from qlora_dist.layout import open_run
    from qlora_launch.cancel import cancel

    run, spec = open_run(args.run)
    _say(cancel(run, spec))
    return 0


def _data(args: argparse.Namespace) -> int:
    from qlora_dist.data.build import ensure_store
    from qlora_dist.data.corpus import Corpus
    from qlora_dist.data.tokenizer import load_tokenizer
    from qlora_dist.layout import corpora_dir, run_dir_of
    from qlora_dist.plan import make_plan
    from qlora_launch.show_data import report, samples_text

    spec = _load(args)
    make_plan(spec)
    tokenizer = load_tokenizer(spec)
    with _RowBar() as bar:
        store = ensure_store(
            spec, tokenizer, corpora_dir(spec, run_dir_of(spec)), on_rows=bar.update, say=_warn
        )
    corpus = Corpus(store, spec.evaluation.max_rows)
    if args.json:
        import json

        print(json.dumps(report(spec, corpus), indent=2, ensure_ascii=False))
        return 0
    for key, value in report(spec, corpus).items():
        print(f"{key + ':':<24}{value}")
    print(samples_text(corpus, tokenizer, count=args.show, color=sys.stdout.isatty()), end="")
    return 0


class _RowBar:
    """A progress bar over rows, drawn only where tokenising has to be done, on a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> "_RowBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, total: int) -> None:
        """Show how far it is."""
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="row", desc="tokenising", dynamic_ncols=True)
        self._bar.update(done - self._bar.n)


def _consolidate(args: argparse.Namespace) -> int:
    from qlora_dist.layout import open_run
    from qlora_dist.train.consolidate import consolidate

    run, spec = open_run(args.run)
    checkpoint = consolidate(run, spec, args.checkpoint)
    _say(f"{run.adapter}: the adapter after step {checkpoint.step}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from qlora_dist.layout import open_run
    from qlora_dist.train.export import export
    from qlora_dist.train.ticker import Ticker

    _silence_bars_without_terminal()
    run, spec = open_run(args.run)
    output = (args.output or run.merged).expanduser().absolute()
    ticker = Ticker(_say, bar=sys.stderr.isatty())
    done = export(run, spec, output, ticker, base=args.base, check=not args.no_check)
    _say(
        f"{output}: the {done.kind} base with the adapter merged into {done.num_matrices} matrices"
    )
    return 0


def _silence_bars_without_terminal() -> None:
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def _generate(args: argparse.Namespace) -> int:
    from qlora_dist.train.generate import Sampling, open_generator

    _silence_bars_without_terminal()
    prompts = args.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    generator = open_generator(Path(args.model), base_only=args.base, raw=args.raw)
    for prompt in prompts:
        if len(prompts) > 1:
            print(f"> {prompt}")
        generator.answer(prompt, sampling, on_text=partial(print, end="", flush=True))
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
