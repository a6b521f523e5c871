"""python -m bench NAME: run one benchmark. Exit code: 0, 1 if a bound is violated, 2 for wrong arguments."""

import argparse
import importlib
import sys

BENCHES = {
    "parity": "every part against diffusers with the same weights, random or (--model) those of your own model",
    "layout": "accuracy of the bundled model: objects, colours and shapes, measured without a network",
    "kernels": "convolutions and attention by shape: the kernel in use against the alternatives",
    "throughput": "one step with classifier-free guidance, against diffusers and OpenVINO",
    "guided": "one guided pass, and a whole guided image, against the published method on diffusers",
    "memory": "memory of steps, guided passes, batches, large images and their decoding, against diffusers",
    "scaling": "cost as a function of batch size, resolution, number of steps and number of boxes",
    "placed": "the chance that an object comes out in its box: fitted to the league, tested on other prompts",
    "league": "every way of following boxes at equal numbers of guided passes, on twelve splits, resumable",
    "look": "minidiff.look on rendered scenes: masks, pointing, and words of what is not there",
    "load": "seconds and peak memory of loading a full-size model, against diffusers; imports and start-up",
    "batch": "planning a million lines of requests, and pictures a second against a loop over generate",
    "device": "everything that must hold on a CUDA card, in under four minutes; without a card, a dry run",
    "swaps": "another colour for one of two objects: prompt-to-prompt, MasaCtrl and inversions",
    "edited": "pictures of the bundled model made from a picture, as README shows them",
    "all": "all six of speed and memory, in sequence",
    "model": "not a benchmark: writes a model folder with random weights, for tests without a download",
}
"""Name -> description. Each is a module here with `add_arguments(parser)` and `run(args) -> exit code`."""


def main(argv: list[str] | None = None) -> int:
    """Read the arguments and run. Only the named bench is imported: most need diffusers, all need torch."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    benches = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    asked = next((word for word in (sys.argv[1:] if argv is None else argv) if word in BENCHES), None)
    for name, text in BENCHES.items():
        sub = benches.add_parser(name, help=text, description=text)
        if name != "model":
            sub.add_argument("--json", metavar="FILE", help="also write the machine, the versions and the rows to FILE")
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
