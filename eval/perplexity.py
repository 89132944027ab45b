"""Perplexity of a model on a text by the GPTQ paper's protocol; with --base also KL and top-1 agreement.

    python eval/perplexity.py MODEL DATA [--base MODEL] [--seq-len N] [--max-windows N] [--device auto] [--json]

The same as `lowbit eval MODEL --data DATA ...`, which has the options and the definition (`lowbit eval --help`).
"""

import sys

from lowbit.cli import main

if __name__ == "__main__":
    if len(sys.argv) < 3 or any(argument in ("-h", "--help") for argument in sys.argv):
        sys.exit(__doc__)
    model, data, *options = sys.argv[1:]
    sys.exit(main(["eval", model, "--data", data, *options]))
