"""Run the training program several times in one set of processes: its argument is a JSON list of command lines.

Each command line ends in a line of JSON of rank 0: the exit message, or null. No run is drawn.
"""

import json
import sys

import pytest
import torch
from small_runs import look_at_models_once, without_a_picture

from moekit.parallel import start_processes
from moekit.recipes.train import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    without_a_picture(patch)
    look_at_models_once(patch)
    with start_processes() as world:
        for words in json.loads(sys.argv[1]):
            message = None
            try:
                main(words)
            except SystemExit as error:
                message = str(error)
            if world.rank == 0:
                print("ended " + json.dumps(message), flush=True)
