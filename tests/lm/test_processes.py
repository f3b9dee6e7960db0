import os
import subprocess
import sys

import pytest

STARTERS = {
    "tasks": """
        from moekit.lm.processes import process_pool
        with process_pool(1, preload="moekit.lm.processes") as pool:
            print(pool.submit(mine.told, 1).result())
    """,
    "compiler": """
        from moekit.recipes.tuning.compiling import compiling
        with compiling(1) as compile_jobs:
            print(compile_jobs([mine.Job()]))
    """,
    "data workers": """
        import multiprocessing
        from moekit.lm.row_workers import WorkerRows
        multiprocessing.set_start_method("spawn")
        rows = WorkerRows(mine.Reading(), {}, workers=1)
        print(rows._next_item())
        rows.close()
    """,
}
MINE = """
from typing import NamedTuple

def told(number):
    return f"{number} of the script"

class Job(NamedTuple):
    product: str = "up"
    device: str = "1 of the script"

class Reading:
    def order(self):
        raise ValueError("1 of the script")
"""


@pytest.mark.parametrize("starter", STARTERS)
def test_processes_import_nothing_from_the_current_folder_and_all_from_the_scripts(tmp_path, starter):
    current, scripts = tmp_path / "current", tmp_path / "scripts"
    current.mkdir()
    scripts.mkdir()
    for name in ("types", "random", "queue", "selectors", "torch", "numpy"):
        (current / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the current folder')\n")
    (scripts / "mine.py").write_text(MINE)
    body = f"import mine\nif __name__ == '__main__':{STARTERS[starter]}"
    (scripts / "program.py").write_text(body)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(scripts / "program.py")]
    done = subprocess.run(words, cwd=current, env=environment, capture_output=True, text=True, timeout=120)
    assert "1 of the script" in done.stdout + done.stderr, done.stderr
    assert "of the current folder" not in done.stderr
