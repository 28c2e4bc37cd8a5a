"""Trains the arms of a study, judges them under one protocol and says what came out.

  python -m vapi_jax.study --study=configs/studies/demo.py --workdir=studies/demo
  python -m vapi_jax.study --study=configs/studies/demo.py:tiny --workdir=/tmp/tiny
  python -m vapi_jax.study --study=configs/studies/table2_xxl.py --workdir=studies/xxl --check
  python -m vapi_jax.study --study=configs/studies/acceptance.py --workdir=studies/acceptance

Arms are ordinary runs under WORKDIR/arms; judgements are JSON files under WORKDIR/results. What is finished
is not done again: the same command goes on after an interruption. Started several times, on one machine
or on several that share WORKDIR, it shares the arms out. study.md with its pictures is the page to read; it
is written whenever a process ends, from the results that there are. --results=DIR writes it from results
alone, without training.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import logging
import shlex
import sys
from typing import TYPE_CHECKING, Any

from vapi_jax.common.errors import exit_status
from vapi_jax.common.paths import local_path

if TYPE_CHECKING:
    from vapi_jax.study.spec import Study


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vapi_jax.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--study",
        required=True,
        metavar="FILE.py[:VARIANT]",
        help="whose get_study makes it, or the name of one that ships",
    )
    add("--workdir", type=local_path, required=True, metavar="DIR", help="made if absent")
    add("--check", action="store_true", help="print what it would cost, and what is in its way")
    add(
        "--results",
        type=local_path,
        metavar="DIR",
        help="make the page from these, and train nothing",
    )
    add(
        "--set",
        type=_change,
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="an option of every recipe, such as data.path=DIR; may be given several times",
    )
    return parser.parse_args(argv)


def _change(text: str) -> tuple[str, Any]:
    option, equals, value = text.partition("=")
    if not (option and equals):
        raise argparse.ArgumentTypeError(f"{text!r}: wants OPTION=VALUE")
    try:
        return option, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return option, value


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    logging.getLogger("vapi_jax").setLevel(logging.INFO)
    return exit_status(lambda: _run(parse(sys.argv[1:] if argv is None else argv)))


def _run(args: argparse.Namespace) -> int | None:
    # After the command line, so that --help needs no JAX.
    from vapi_jax.parallel import compiler
    from vapi_jax.study import estimate
    from vapi_jax.study.acceptance import Acceptance
    from vapi_jax.study.spec import StudyError, read_file, study_of, with_changes
    from vapi_jax.study.work import require_all

    found, changes = read_file(args.study), dict(args.set)
    if not args.check and args.results is None:
        compiler.reserve_memory()
        compiler.enable_compilation_cache(args.workdir / "compilation_cache")
    if isinstance(found, Acceptance):
        found = dataclasses.replace(found, changes=changes)
        if args.check:
            print(found.told())
            if missing := found.missing():
                raise StudyError(missing)
            return None
        return 0 if found.run(args.workdir) else 1
    study = study_of(args.study, found)
    study = with_changes(study, changes)
    if args.check:
        print(estimate.render(study, estimate.costs(study)))
        require_all(study)
        return None
    _study(study, args)
    return None


def _study(study: Study, args: argparse.Namespace) -> None:
    from vapi_jax.common import locks
    from vapi_jax.common.files import make_folder
    from vapi_jax.common.progress import announce
    from vapi_jax.parallel.preemption import StopRequest
    from vapi_jax.study import files, page, work

    folder, left = args.results or args.workdir / work.RESULTS, []
    if args.results is not None:
        work.check_protocol(study, folder.parent)
    else:
        work.require_all(study)
        stop = StopRequest()
        with stop.listening():
            left = work.work(study, args.workdir, stop)
    results = work.read_results(study, folder)
    make_folder(args.workdir)
    with locks.hold(args.workdir, patience=work.PATIENCE):
        path, sentences = page.write(study, results, args.workdir, _command(args))
    print("\n".join(sentences))
    if left:
        announce("\n- ".join(["the page is of what is finished; left are:", *left]))
    if study.files and study.files.prompts and (waiting := files.undetected(folder.parent)):
        announce(
            f"{len(waiting)} sets of images for prompts wait for your detector, the first in {waiting[0]}: "
            f"write what it finds into {files.DETECTIONS} there, and give the command again (docs/text.md)"
        )
    announce(f"Open {path}")


def _command(args: argparse.Namespace) -> str:
    given = [f"--set={option}={value}" for option, value in args.set]
    if args.results is not None:
        given.append(f"--results={args.results}")
    words = [f"--study={args.study}", f"--workdir={args.workdir}", *given]
    return shlex.join(["python", "-m", "vapi_jax.study", *words])


if __name__ == "__main__":
    sys.exit(main())
