import os
import subprocess
import sys

PROGRAM = """
import multiprocessing

import mine

if __name__ == "__main__":
    from moekit.lm.processes import process_pool
    from moekit.lm.row_workers import WorkerRows
    from moekit.recipes.tuning.compiling import compiling

    with process_pool(1, preload="moekit.lm.processes") as pool:
        print("task:", pool.submit(mine.told, 1).result())
    try:
        with compiling(1) as compile_jobs:
            compile_jobs([mine.Job()])
    except RuntimeError as error:
        print("compiler:", error)
    multiprocessing.set_start_method("spawn", force=True)
    rows = WorkerRows(mine.Reading(), {}, workers=1)
    try:
        print("data worker:", rows._next_item())
    finally:
        rows.close()
"""
MINE = """
from typing import NamedTuple

def told(number):
    return f"{number} of the script"

class Job(NamedTuple):
    product: str = "up"
    device: str = "2 of the script"

class Reading:
    def order(self):
        raise ValueError("3 of the script")
"""


def test_processes_import_nothing_from_the_current_folder_and_all_from_the_scripts(tmp_path):
    current, scripts = tmp_path / "current", tmp_path / "scripts"
    current.mkdir()
    scripts.mkdir()
    for name in ("types", "random", "queue", "selectors", "torch", "numpy"):
        (current / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the current folder')\n")
    (scripts / "mine.py").write_text(MINE)
    (scripts / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(scripts / "program.py")]
    done = subprocess.run(words, cwd=current, env=environment, capture_output=True, text=True, timeout=240)
    told = done.stdout + done.stderr
    assert [f"{number} of the script" in told for number in (1, 2, 3)] == [True] * 3, told
    assert "of the current folder" not in told
