"""Reading traces, by format: files of generated requests that the operating system has in memory. The memory of
`peakmem_load` is that of the process, which has made and written the trace before."""

import os
import tempfile
from pathlib import Path

import kvsim

FILES = {
    "azure": "trace.csv",
    "azure.gz": "trace.csv.gz",
    "mooncake": "trace.jsonl",
    "parquet": "trace.parquet",
}


ROWS = [10_000] if os.environ.get("KVSIM_BENCH_QUICK") else [10_000, 100_000, 1_000_000]


class Load:
    params = (ROWS, list(FILES))
    param_names = ("rows", "format")
    number = 1
    timeout = 300

    def setup(self, rows, format):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / FILES[format]
        kvsim.write_trace(kvsim.make_trace(rate=20.0, requests=rows, seed=1), self.path)
        assert len(kvsim.load_trace(self.path)) == rows  # and imports what reading needs

    def teardown(self, rows, format):
        self.folder.cleanup()

    def time_load(self, rows, format):
        kvsim.load_trace(self.path)

    def peakmem_load(self, rows, format):
        kvsim.load_trace(self.path)
