"""A folder for `--random-weights` on a machine that lacks the default model's package, which has the tokenizer.

`python -m benchmarks.speed.shape SHAPE FOLDER` puts a shape's configuration and that tokenizer there, and no weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.models import SHAPES, random_config


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.shape", description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(arguments)
    config, tokenizer = random_config(args.shape)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)


if __name__ == "__main__":
    main()
