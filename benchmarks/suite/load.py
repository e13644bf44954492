"""Reading traces, by format: files of generated requests that the operating system has in memory."""

import tempfile
from pathlib import Path

import kvsim

FILES = {
    "azure": "trace.csv",
    "azure.gz": "trace.csv.gz",
    "mooncake": "trace.jsonl",
    "parquet": "trace.parquet",
}


class Load:
    params = ([10_000, 100_000], list(FILES))
    param_names = ("rows", "format")
    number = 1
    timeout = 120

    def setup(self, rows, format):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / FILES[format]
        kvsim.write_trace(kvsim.make_trace(rate=20.0, requests=rows, seed=1), self.path)
        assert len(kvsim.load_trace(self.path)) == rows  # and imports what reading needs

    def teardown(self, rows, format):
        self.folder.cleanup()

    def time_load(self, rows, format):
        kvsim.load_trace(self.path)
