"""What each verb of the command line does; all that is heavy is imported by the verb itself."""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_dist.plan import CorpusFacts
    from qlora_dist.spec import RunSpec


def say(line: str) -> None:
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


def plan_command(args: argparse.Namespace) -> int:
    """Say what a run takes."""
    from qlora_dist.plan import make_plan
    from qlora_launch.room import shortages

    spec = _load(args)
    # What is impossible is refused before the data is looked at.
    make_plan(spec)
    plan = make_plan(spec, _corpus_facts(spec))
    if args.json:
        import json

        print(json.dumps(plan.to_json(), indent=2))
    else:
        from qlora_launch.show import plan_text

        print(plan_text(plan))
    for line in shortages(plan):
        _warn(f"warning: {line}")
    return 0


def _corpus_facts(spec: "RunSpec") -> "CorpusFacts | None":
    """What is known of the data, if it has been tokenised before."""
    from qlora_dist.data import notes
    from qlora_dist.layout import corpora_dir, run_dir_of
    from qlora_launch.pins import pin

    spec = pin(spec, ask_hub=False)
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


def run_command(args: argparse.Namespace) -> int:
    """Write a run directory, and start it."""
    from qlora_launch.backends import get_backend
    from qlora_launch.starting import plan_of, print_bundle, start, write

    plan = plan_of(_load(args), ask_hub=not args.dry_run)
    if args.dry_run:
        return print_bundle(plan)
    backend = None if args.prepare else get_backend(plan.spec.resources.backend)
    run = write(plan, backend, args.config, args.overrides, say=say)
    if backend is None:
        say(f"{run.root} is written; start it with: qlora resume {run.root}")
        return 0
    return start(run, plan, backend, say=say)


def submit_command(args: argparse.Namespace) -> int:
    """The same with Slurm as the backend, or several of them as an array."""
    from qlora_dist.spec_file import load_spec
    from qlora_launch.backends import get_queue
    from qlora_launch.starting import plan_of, print_bundle, run_of, write
    from qlora_launch.sweep import sweep_specs

    overrides = [*args.overrides, "resources.backend=slurm"]
    if args.sweep:
        specs = sweep_specs(args.config, overrides, args.sweep)
    else:
        specs = [load_spec(args.config, overrides)]
    # All are sound before the first is written.
    plans = [plan_of(spec, ask_hub=not args.dry_run) for spec in specs]
    queue, parallel = get_queue(args.after), args.parallel or len(plans)
    if args.dry_run:
        queue.warn(plans[0], say=_warn)
    if args.dry_run and args.sweep:
        print(queue.sweep_script([run_of(plan) for plan in plans], plans[0], parallel))
        return 0
    if args.dry_run:
        return print_bundle(plans[0])
    runs = [write(plan, queue, args.config, args.overrides, say=say) for plan in plans]
    if args.sweep:
        queue.submit_sweep(runs, plans[0], parallel, say=say)
    else:
        queue.submit(runs[0], plans[0], say=say)
    return 0


def resume_command(args: argparse.Namespace) -> int:
    """Go on with a run, perhaps with changes."""
    from qlora_dist.layout import open_run
    from qlora_launch.backends import get_backend
    from qlora_launch.starting import print_bundle, resumed_plan, rewrite, start

    run, before = open_run(args.run)
    plan = resumed_plan(run, before, args.overrides, ask_hub=not args.dry_run)
    if args.dry_run:
        return print_bundle(plan)
    backend = get_backend(plan.spec.resources.backend)
    rewrite(run, plan, backend, args.overrides, say=say)
    return start(run, plan, backend, say=say)


def drill_command(args: argparse.Namespace) -> int:
    """Do a fault to a short run, and see whether it comes back."""
    from qlora_launch.drill import drill, drill_spec, report_text

    report = drill(drill_spec(_load(args), args.steps), args.fault, args.config, say=say)
    say(report_text(report, args.fault))
    return 0 if report.passed else 1


def status_command(args: argparse.Namespace) -> int:
    """Say where a run stands."""
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


def list_command(args: argparse.Namespace) -> int:
    """Say where every run of a folder stands."""
    from qlora_launch.show_runs import list_text

    print(list_text(args.folder.expanduser().absolute()))
    return 0


def logs_command(args: argparse.Namespace) -> int:
    """Print what a run's newest attempt has said."""
    from qlora_dist.layout import open_run
    from qlora_launch.follow import follow

    run, spec = open_run(args.run)
    return follow(run, spec, say=say, rank=args.rank, to_the_end=args.follow)


def cancel_command(args: argparse.Namespace) -> int:
    """Have a run save and end for good."""
    from qlora_dist.layout import open_run
    from qlora_launch.cancel import cancel, cancel_sweep

    done = cancel_sweep(Path(args.run)) or [cancel(*open_run(args.run))]
    for line in done:
        say(line)
    return 0


def prefetch_command(args: argparse.Namespace) -> int:
    """Fetch what a run needs of the hub."""
    from qlora_dist.layout import open_run
    from qlora_dist.spec_file import spec_from_tree
    from qlora_launch.pins import pin_changed
    from qlora_launch.prefetch import prefetch, table
    from qlora_launch.rundir import absolute_paths, check_local_paths

    if Path(args.config).expanduser().is_dir():
        run, before = open_run(args.config)
        tree = before.model_dump(mode="json")
        spec = absolute_paths(spec_from_tree(tree, args.overrides, source=str(run.run_json)))
        spec = pin_changed(before, spec, ask_hub=False)
    else:
        spec = absolute_paths(_load(args))
    check_local_paths(spec)
    if fetched := prefetch(spec, say=say):
        say(table(fetched))
    return 0


def doctor_command(args: argparse.Namespace) -> int:
    """Say what a cluster will do to a run."""
    from qlora_launch.doctor import examine
    from qlora_launch.show_doctor import doctor_json, doctor_text

    name, found = examine(args.config, args.overrides, args.cluster)
    if args.json:
        import json

        print(json.dumps(doctor_json(found), indent=2))
    else:
        print(doctor_text(name, found))
    return 0


def data_command(args: argparse.Namespace) -> int:
    """Tokenise and show the data."""
    from qlora_dist.data.build import ensure_store
    from qlora_dist.data.corpus import Corpus
    from qlora_dist.data.tokenizer import load_tokenizer
    from qlora_dist.layout import corpora_dir, run_dir_of
    from qlora_dist.plan import make_plan
    from qlora_launch.pins import pin
    from qlora_launch.show_data import report, samples_text

    spec = _load(args)
    make_plan(spec)
    spec = pin(spec, ask_hub=True)
    tokenizer = load_tokenizer(spec)
    with _Bar("row", "tokenising") as bar:
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


class _Bar:
    """A progress bar, drawn only where there is something to be done, on a terminal."""

    def __init__(self, unit: str, what: str) -> None:
        self._unit, self._what = unit, what
        self._bar: Any = None

    def __enter__(self) -> "_Bar":
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

            self._bar = tqdm(
                total=total,
                unit=self._unit,
                unit_scale=self._unit == "B",
                desc=self._what,
                dynamic_ncols=True,
            )
        self._bar.update(done - self._bar.n)


def quantize_command(args: argparse.Namespace) -> int:
    """Write the base in NF4."""
    from qlora_dist.errors import PlanError
    from qlora_dist.plan import make_plan
    from qlora_dist.spec import Nf4Quantization
    from qlora_launch.pins import pin
    from qlora_launch.rundir import absolute_paths

    spec = absolute_paths(_load(args))
    nf4 = spec.quantization
    if not isinstance(nf4, Nf4Quantization) or nf4.cache_dir is None:
        raise PlanError("quantization.cache_dir: name the folder that quantised bases are kept in")
    make_plan(spec)
    # torch is imported only for what can be done.
    import torch

    from qlora_dist.train.nf4_cache import ensure_cache

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _Bar("B", "quantising") as bar:
        path = ensure_cache(pin(spec, ask_hub=True), device, on_bytes=bar.update, say=_warn)
    say(f"{path}: the base in NF4")
    return 0


def consolidate_command(args: argparse.Namespace) -> int:
    """Write a checkpoint as an adapter or a model."""
    from qlora_dist.layout import open_run
    from qlora_dist.train.consolidate import consolidate, result_dir, result_name

    run, spec = open_run(args.run)
    checkpoint = consolidate(run, spec, args.checkpoint)
    say(f"{result_dir(run, spec)}: the {result_name(spec)} after step {checkpoint.step}")
    return 0


def export_command(args: argparse.Namespace) -> int:
    """Merge the adapter into the base."""
    from qlora_dist.layout import open_run
    from qlora_dist.train.export import export
    from qlora_dist.train.ticker import Ticker

    _silence_bars_without_terminal()
    run, spec = open_run(args.run)
    output = (args.output or run.merged).expanduser().absolute()
    ticker = Ticker(say, bar=sys.stderr.isatty())
    done = export(run, spec, output, ticker, base=args.base, check=not args.no_check)
    say(f"{output}: the {done.kind} base with the adapter merged into {done.num_matrices} matrices")
    return 0


def _silence_bars_without_terminal() -> None:
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def generate_command(args: argparse.Namespace) -> int:
    """Answer prompts."""
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
