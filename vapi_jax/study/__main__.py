"""Trains the arms of a study, judges them under one protocol and says what came out.

  python -m vapi_jax.study --study=configs/studies/demo.py --workdir=studies/demo
  python -m vapi_jax.study --study=configs/studies/demo.py:tiny --workdir=/tmp/tiny

Arms are ordinary runs under WORKDIR/arms; judgements are JSON files under WORKDIR/results. What is finished
is not done again: the same command goes on after an interruption. Started several times, on one machine
or on several that share WORKDIR, it shares the arms out. study.md, differences.png are the page to read; they
are written whenever a process ends, from the results that there are. --results=DIR writes them from results
alone, without training.
"""

import argparse
import logging
import sys

from vapi_jax.common.errors import exit_status
from vapi_jax.common.paths import local_path


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vapi_jax.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--study", required=True, metavar="FILE.py[:VARIANT]", help="whose get_study makes it")
    add("--workdir", type=local_path, required=True, metavar="DIR", help="made if absent")
    add("--check", action="store_true", help="print what it would train, and stop")
    add(
        "--results",
        type=local_path,
        metavar="DIR",
        help="make the page from these, and train nothing",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parse(sys.argv[1:] if argv is None else argv)
    logging.getLogger("vapi_jax").setLevel(logging.INFO)
    return exit_status(lambda: _study(args))


def _study(args: argparse.Namespace) -> None:
    # After the command line, so that --help needs no JAX.
    from vapi_jax.common.files import make_folder
    from vapi_jax.common.progress import announce
    from vapi_jax.parallel import compiler
    from vapi_jax.parallel.preemption import StopRequest
    from vapi_jax.study import page, table, work
    from vapi_jax.study.spec import read_study, recipe_of
    from vapi_jax.training.preflight import require

    study = read_study(args.study)
    if args.check:
        for arm in study.trained:
            config = require(recipe_of(study, arm, 0))
            print(f"{arm.name}: {study.seeds} x {config.steps} steps of {config.batch_size} images")
        return
    folder = args.results or args.workdir / work.RESULTS
    complete = True
    if args.results is None:
        compiler.reserve_memory()
        compiler.enable_compilation_cache(args.workdir / "compilation_cache")
        stop = StopRequest()
        with stop.listening():
            complete = work.work(study, args.workdir, stop)
    base, arms = work.read_results(study, folder)
    rows, found = table.rows_of(study, base, arms), table.comparisons(study, base, arms)
    make_folder(args.workdir)
    command = f"python -m vapi_jax.study --study={args.study} --workdir={args.workdir}"
    path = page.write(study, base, rows, found, args.workdir, command)
    print("\n".join(table.verdicts(found, table.headline(base, study))))
    if not complete:
        announce(
            "other processes are at the arms that are left; the page is of those that are finished"
        )
    announce(f"Open {path}")


if __name__ == "__main__":
    sys.exit(main())
