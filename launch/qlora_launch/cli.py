"""``qlora``: parse, call, print errors, exit. The words are in parser, what they do in commands."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from qlora_launch.parser import make_parser


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
    # As in training processes (qlora_dist.train.worker): two seconds of imports.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
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


if __name__ == "__main__":
    sys.exit(main())
