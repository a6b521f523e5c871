"""python -m bench NAME: one benchmark. Exit code 0, 1 where a number is out of its bound, 2 for a wrong call."""

import argparse
import importlib
import sys

BENCHES = {
    "parity": "every part against diffusers on the same weights, random ones or (--model) those of a model of yours",
    "layout": "what the bundled model draws: objects, colours and shapes right, measured without a network",
    "kernels": "convolutions and attention, shape by shape: what is taken beside what could be",
    "throughput": "one step with classifier-free guidance, against diffusers and OpenVINO",
    "guided": "one guided pass, and a whole guided image, against the published way on diffusers",
    "memory": "of steps, guided passes, batches, large images and their decoding, against diffusers",
    "scaling": "cost against batch, resolution, number of steps and of boxes",
    "load": "seconds and peak memory of loading a full-size model, against diffusers; imports and start-up",
    "all": "these six, one after the other",
    "model": "no benchmark: writes a model folder with random weights, for trials without a download",
}
"""Name -> what it shows. Each is a module here with `add_arguments(parser)` and `run(args) -> exit code`."""


def main(argv: list[str] | None = None) -> int:
    """Read the arguments and run. A bench is imported only when it is named: most need diffusers, all need torch."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    benches = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    asked = next((word for word in (sys.argv[1:] if argv is None else argv) if word in BENCHES), None)
    for name, text in BENCHES.items():
        sub = benches.add_parser(name, help=text, description=text)
        if name != "model":
            sub.add_argument(
                "--json", metavar="FILE", help="write the machine, the versions and the rows to FILE as well"
            )
        if name == asked:
            importlib.import_module(f"bench.{name}").add_arguments(sub)
    args = parser.parse_args(argv)
    try:
        code: int = importlib.import_module(f"bench.{args.bench}").run(args)
    except ValueError as error:
        print(f"bench {args.bench}: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
