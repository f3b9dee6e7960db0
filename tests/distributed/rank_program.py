"""Run the training program several times in one set of processes: its argument is a JSON list of command lines.

Each command line ends in a line of JSON of rank 0: the exit message, or null. No run is drawn.
"""

import json
import sys

import torch

from moekit.parallel import start_processes
from moekit.recipes import report
from moekit.recipes.train import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    report.plot_run = lambda path, **options: path
    with start_processes() as world:
        for words in json.loads(sys.argv[1]):
            message = None
            try:
                main(words)
            except SystemExit as error:
                message = str(error)
            if world.rank == 0:
                print("ended " + json.dumps(message), flush=True)
